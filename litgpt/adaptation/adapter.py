"""LLaMA-Adapter and Adapter v2 for a GPT, from outside: the model does not know them.

LLaMA-Adapter (https://arxiv.org/abs/2303.16199) gives the later layers a learned prompt each, to which every token
attends besides the text. What it finds there is added with a factor per head that starts at zero, so that the model
begins as it was. Adapter v2 (https://arxiv.org/abs/2304.15010) also learns a bias and a scale for every linear layer,
and the norms.

Names and shapes of the parameters, and what is computed from them, are those of LitGPT 0.5.13.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Generic, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from litgpt.adaptation.modules import KeepsFloat32, LinearLayer, is_linear, replace_module
from litgpt.checkpoint import HYPERPARAMETERS, plain_names, read_state_dict
from litgpt.checkpoint.names import ADAPTER_FILES, ADAPTER_V2_WEIGHTS, ADAPTER_WEIGHTS
from litgpt.cli.untrusted import read_yaml_mapping, shown
from litgpt.config import Config
from litgpt.kv_cache import AttentionPlan
from litgpt.model import GPT, CausalSelfAttention, RMSNorm, Router, attend

GATE = "gating_factor"
PROMPT = re.compile(rf"transformer\.h\.(\d+)\.attn\.({GATE}|adapter_wte\.weight)")
NORM = re.compile(r"transformer\.(h\.\d+\.norm_[12]|ln_f)\.(weight|bias)")
LINEAR = re.compile(r"(.+)\.adapter_(bias|scale)")


class Prompt(KeepsFloat32, nn.Embedding):
    """The places of a learned prompt, (L, C)."""


class PromptedAttention(KeepsFloat32, CausalSelfAttention):
    """Attention whose queries also look at a learned prompt, with a softmax of its own.

    `adapter_wte` is (L, C) for a prompt of L places, `gating_factor` (1, 1, H, 1). Keys and values of the prompt come
    from the layer's own projection, without rotation (they have no position) and without norms. Which of its rows: the
    last two of every group, as if each group's queries, key and value stood together. That is not how `qkv` holds them;
    the prompts of LitGPT 0.5.13 were trained so, and are nothing without it.
    """

    adapter_wte: Prompt
    gating_factor: nn.Parameter

    def attended(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        """As in the base class; the prompt is seen by every query, whatever the plan says of the text."""
        found = super().attended(q, k, v, plan)
        k, v = (part.expand(q.size(0), -1, -1, -1) for part in self.prompt(q.dtype))  # (B, L, G, D)
        everything = q.new_zeros(1, 1, q.size(1), k.size(1))
        return found + self.gating_factor.to(q.dtype) * attend(q, k, v, everything, self.scale, self.softcap)

    def prompt(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the prompt, (1, L, G, D)."""
        qkv = self.qkv(self.adapter_wte.weight.to(dtype)[None])
        qkv = qkv if self.clip is None else qkv.clamp(-self.clip, self.clip)
        rows = qkv.unflatten(-1, (self.sizes[1], -1, self.head_size))  # (1, L, G, H / G + 2, D)
        return rows[..., -2, :], rows[..., -1, :]


Linear = TypeVar("Linear", bound=LinearLayer)


class AdapterV2Linear(KeepsFloat32, Generic[Linear]):
    """A frozen linear layer, `linear`, and what its output is shifted and scaled by, each (out,)."""

    linear: Linear

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear
        size, device = linear.out_features, next(linear.parameters()).device
        self.adapter_bias = nn.Parameter(torch.empty(size, device=device, dtype=torch.float32))
        self.adapter_scale = nn.Parameter(torch.empty(size, device=device, dtype=torch.float32))

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.linear(x)
        return (y + self.adapter_bias.to(y.dtype)) * self.adapter_scale.to(y.dtype)


class AdapterV2Router(AdapterV2Linear[Router]):
    """The same for the router of a mixture, with what routing asks it for."""

    @property
    def config(self) -> Config:
        return self.linear.config

    @property
    def e_score_correction_bias(self) -> Tensor | None:
        return self.linear.e_score_correction_bias


class TrainedRMSNorm(KeepsFloat32, RMSNorm):
    """A norm that learns in float32; what it computes is the same."""


class TrainedLayerNorm(KeepsFloat32, nn.LayerNorm):
    """A norm that learns in float32; what it computes is the same."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).to(input.dtype)


TRAINED_NORMS: dict[type[nn.Module], type[nn.Module]] = {RMSNorm: TrainedRMSNorm, nn.LayerNorm: TrainedLayerNorm}


def apply_adapter(gpt: GPT, prompt_length: int = 10, start_layer: int = 2) -> None:
    """Freeze a model and give its layers from `start_layer` on a prompt of `prompt_length` places each.

    Raises:
        ValueError: The model's attention cannot take a prompt, or no layer would get one.
    """
    if start_layer >= gpt.config.n_layer:
        raise ValueError(
            f"adapter_start_layer={start_layer}: the model has only {gpt.config.n_layer} layers: nothing would "
            "be learned. Give an earlier layer, or use finetune_lora."
        )
    gpt.requires_grad_(False)
    _add_prompts(gpt, prompt_length, start_layer)
    reset_adapter(gpt)


def apply_adapter_v2(gpt: GPT, prompt_length: int = 10, start_layer: int = 2) -> None:
    """As `apply_adapter`; and every linear layer gets a bias and a scale, and the norms are trained.

    Raises:
        ValueError: The model's attention cannot take a prompt.
    """
    gpt.requires_grad_(False)
    _add_prompts(gpt, prompt_length, start_layer)
    for name, module in list(gpt.named_modules()):
        if isinstance(module, Router):
            replace_module(gpt, name, AdapterV2Router(module))
        elif is_linear(module):
            replace_module(gpt, name, AdapterV2Linear(module))
        elif type(module) in TRAINED_NORMS and NORM.fullmatch(f"{name}.weight"):
            _train_norm(module)
    reset_adapter(gpt)


def _add_prompts(gpt: GPT, prompt_length: int, start_layer: int) -> None:
    if gpt.config.latent_attention is not None:
        raise ValueError(
            "LLaMA-Adapter does not work with multi-head latent attention (DeepSeek V2 and V3), where a learned prompt "
            "has no keys and values. Use finetune_lora."
        )
    if start_layer < 0:
        raise ValueError(f"adapter_start_layer={start_layer}: layers are counted from 0.")
    if prompt_length < 1:
        raise ValueError(f"adapter_prompt_length={prompt_length}: a prompt has at least one place.")
    for block in gpt.transformer.h[start_layer:]:
        attention = block.attn
        assert isinstance(attention, CausalSelfAttention)
        device = next(attention.parameters()).device
        attention.__class__ = PromptedAttention  # in place, as FSDP2 does it: names and hooks stay
        # Made by hand: as a plain embedding, the meta device's would import torch's compiler to initialise nothing.
        attention.adapter_wte = Prompt.from_pretrained(
            torch.empty(prompt_length, gpt.config.n_embd, device=device, dtype=torch.float32), freeze=False
        )
        gate = torch.empty(1, 1, gpt.config.n_head, 1, device=device, dtype=torch.float32)
        attention.gating_factor = nn.Parameter(gate)


def _train_norm(norm: nn.Module) -> None:
    norm.__class__ = TRAINED_NORMS[type(norm)]
    for p in norm.parameters():
        p.data = p.data.float()
        p.requires_grad_(True)


@torch.no_grad()
def reset_adapter(gpt: GPT) -> None:
    """Start from a model that does what the original did: prompts are random, and their factors zero."""
    for module in gpt.modules():
        if isinstance(module, PromptedAttention) and not module.gating_factor.is_meta:
            nn.init.normal_(module.adapter_wte.weight)
            nn.init.zeros_(module.gating_factor)
        elif isinstance(module, AdapterV2Linear) and not module.adapter_bias.is_meta:
            nn.init.zeros_(module.adapter_bias)
            nn.init.ones_(module.adapter_scale)


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to LLaMA-Adapter."""
    return PROMPT.fullmatch(name) is not None


def is_adapter_v2(name: str) -> bool:
    """Whether a parameter of that name belongs to Adapter v2, to which the norms belong, too."""
    return is_adapter(name) or any(kind.fullmatch(name) for kind in (LINEAR, NORM))


def is_v2(weights: dict[str, Tensor]) -> bool:
    """Whether the parameters of an adapter are those of Adapter v2."""
    return any(LINEAR.fullmatch(name) for name in weights)


def save_adapter(directory: Path, weights: dict[str, Tensor], base: str) -> None:
    """Writes the parameters of either kind under its file name, with the checkpoint they belong to."""
    file = directory / (ADAPTER_V2_WEIGHTS if is_v2(weights) else ADAPTER_WEIGHTS)
    torch.save({"model": weights, "base": base}, file)


def read_adapter(place: Path) -> tuple[dict[str, Tensor], str | None]:
    """The parameters in a file or directory, of either kind, and the checkpoint they belong to.

    A file of LitGPT 0.5.13 holds the parameters alone; hyperparameters.yaml next to it names the checkpoint.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds something else.
    """
    files = [place] if place.is_file() else [place / name for name in ADAPTER_FILES]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        names = " or ".join(ADAPTER_FILES)
        raise FileNotFoundError(f"{place} holds no {names}. Give the directory of an adapter checkpoint.")
    stored = read_state_dict(file)
    weights = {name: stored[key] for key, name in plain_names(stored).items()}
    wanted = is_adapter if file.name == ADAPTER_WEIGHTS else is_adapter_v2
    strangers = [name for name in weights if not wanted(name)]
    if strangers or not weights:
        raise ValueError(f"{file} holds no adapter: {', '.join(strangers[:3]) or 'it is empty'}.")
    base = torch.load(file, map_location="meta", weights_only=True).get("base")
    settings = file.parent / HYPERPARAMETERS
    if base is None and settings.is_file():
        base = read_yaml_mapping(settings).get("checkpoint_dir")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"'{file}' names {shown(base)} as the model that it belongs to. Take another copy of it.")
    return weights, base


@torch.no_grad()
def load_adapter(gpt: GPT, weights: dict[str, Tensor]) -> None:
    """Adapt a model as in a file: names and shapes tell the kind, the layers and the length of the prompt.

    Raises:
        ValueError: They belong to another model.
    """
    prompts = {int(match[1]): name for name in weights if (match := PROMPT.fullmatch(name)) and match[2] != GATE}
    length = weights[prompts[min(prompts)]].shape[:1].numel() if prompts else 1
    start = min(prompts, default=gpt.config.n_layer)
    (apply_adapter_v2 if is_v2(weights) else apply_adapter)(gpt, length, start)
    own = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
    wrong = sorted(own.keys() ^ weights.keys())
    wrong += [name for name in own.keys() & weights.keys() if own[name].shape != weights[name].shape]
    if wrong:
        raise ValueError(f"The adapter belongs to another model: {', '.join(wrong[:4])} ({len(wrong)} in all) differ.")
    for name, p in own.items():
        p.copy_(weights[name])
