"""Low-rank adaptation of a GPT, from outside: the model does not know it.

LoRA (https://arxiv.org/abs/2106.09685) adds `scaling * B A` to a frozen weight, A of shape (r, in) and B of (out, r).
Here also its variants DoRA (https://arxiv.org/abs/2402.09353), which learns the length of each row alongside its
direction, and rank-stabilised scaling (https://arxiv.org/abs/2312.03732), alpha / sqrt(r) instead of alpha / r.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt.adaptation.modules import KeepsFloat32, LinearLayer, is_linear, replace_module
from litgpt.checkpoint import HYPERPARAMETERS, plain_names, read_state_dict
from litgpt.checkpoint.names import LORA_WEIGHTS
from litgpt.cli.untrusted import read_yaml_mapping, shown
from litgpt.config import Config
from litgpt.model import GPT, Router

TARGETS = ("query", "key", "value", "projection", "mlp", "head")
MAX_RANK = 2**20


@dataclass(frozen=True)
class LoRASettings:
    """What is adapted, and how."""

    r: int = 8
    """Rank of the update."""
    alpha: int | float = 16
    """The update is scaled by alpha / r."""
    dropout: float = 0.05
    """Share of the adapted layers' inputs that is zeroed in training."""
    query: bool = True
    """Adapt the attention's queries."""
    key: bool = False
    """Adapt its keys."""
    value: bool = True
    """Adapt its values."""
    projection: bool = False
    """Adapt its output projection."""
    mlp: bool = False
    """Adapt every linear layer of the MLPs, those of experts included; routers stay as they are."""
    head: bool = False
    """Adapt the output head."""
    dora: bool = False
    """Learn the length of each weight row alongside its direction (DoRA)."""
    rs: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilised)."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r={self.r}: the rank must be at least 1.")
        if self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha}: must be positive; with 0 nothing would be learned.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1.")
        if not self.targets:
            switches = ", ".join(f"`{target}`" for target in TARGETS)
            raise ValueError(f"Nothing is adapted: set at least one of {switches} to true.")

    @property
    def targets(self) -> tuple[str, ...]:
        """The parts of the model that are adapted."""
        return tuple(target for target in TARGETS if getattr(self, target))

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / (math.sqrt(self.r) if self.rs else self.r)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Dropout(nn.Dropout):
    """Dropout of the input of LoRA's first matrix; it says what to drop, `LowRank` does it."""

    def keeps(self, x: Tensor) -> Tensor:
        """1 where a value of x is kept and 0 elsewhere, in x's shape, uint8.

        On a CPU it draws 16 random bits for each value, as threads cannot share the drawing; the share that is zeroed
        is then `p` to within 1 / 2^17.
        """
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty_like(x, dtype=torch.uint8).bernoulli_(1 - self.p)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None).view(torch.int16)
        bits = bits[: x.numel()].view(x.shape)
        return bits.ge_(round(self.p * (1 << 16)) - (1 << 15)).to(torch.uint8)  # a comparison into bytes takes longer


def kept_values(x: Tensor, kept: Tensor | None) -> Tensor:
    """x where `kept`, of x's shape in uint8, is 1, and 0 where it is 0; all of x where it is None."""
    if kept is None:
        return x
    if x.device.type != "cpu":
        return x * kept
    # A CPU multiplies floats by bytes at a tenth of the speed at which it masks their bits.
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return kept.to(bits).neg_().bitwise_and_(x.view(bits)).view(x.dtype)


class LowRank(torch.autograd.Function):
    """scale * up down (x kept): (..., in) -> (..., out), with `down` (r, in) and `up` (out, r) in float32 or x's type.

    One function instead of six for autograd: the matrices are small, so that calling takes as long as computing. For
    the backward pass it holds x, which others hold, too, and a byte for each of its values: not what dropout left of
    it, for every layer that reads it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, kept: Tensor | None, scale: float) -> Tensor:
        hidden = F.linear(kept_values(x, kept), down.to(x.dtype)).mul_(scale)  # (..., r)
        ctx.save_for_backward(x, down, up, kept, hidden)
        ctx.scale = scale
        return F.linear(hidden, up.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        x, down, up, kept, hidden = ctx.saved_tensors
        rows = grad_output.flatten(0, -2)  # (N, out)
        scaled = (rows @ up.to(x.dtype)).mul_(ctx.scale)  # (N, r) the gradient of what `down` gives
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = kept_values((scaled @ down.to(x.dtype)).view(x.shape), kept)
        grad_down = (scaled.T @ kept_values(x, kept).flatten(0, -2)).to(down.dtype)
        grad_up = (rows.T @ hidden.flatten(0, -2)).to(up.dtype)
        return grad_x, grad_down, grad_up, None, None


class LoRALinear(KeepsFloat32):
    """A linear layer with low-rank updates to some of its rows.

    The original layer, whatever its class, is `linear`. `lora_A` is (n * r, in) and `lora_B` (rows, r) for n updated
    parts, one below the other: the names and shapes of LitGPT 0.5.13. Both stay in float32 when the model is converted
    to 16 bits, where small updates would be rounded away.

    Args:
        linear: The layer to adapt; it is frozen.
        settings: Rank, scaling, dropout, DoRA.
        rows: The parts of the output, in order, as (number of rows, whether they are updated).
    """

    linear: LinearLayer

    def __init__(self, linear: LinearLayer, settings: LoRASettings, rows: list[tuple[int, bool]]) -> None:
        super().__init__()
        self.linear = linear
        for p in linear.parameters():
            p.requires_grad_(False)
        self.rows = rows
        self.rank, self.scaling = settings.r, settings.scaling
        self.enabled = True  # without it, the layer does what the original did
        updated = [size for size, updates in rows if updates]
        device = _device(linear)

        def trained(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))

        self.lora_A = trained(len(updated) * settings.r, linear.in_features)
        self.lora_B = trained(sum(updated), settings.r)
        self.lora_magnitude = trained(sum(updated)) if settings.dora else None
        self.dropout = Dropout(settings.dropout) if settings.dropout else nn.Identity()

    @property
    def in_features(self) -> int:
        return self.linear.in_features

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    def reset_lora(self) -> None:
        """A is random (each part as a linear layer of its own), B is zero: the layer does what it did."""
        for part in self.lora_A.split(self.rank):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_magnitude is not None:
            with torch.no_grad():
                self.lora_magnitude.copy_(self._updated(plain_weight(self.linear).float()).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.linear(x)
        if not self.enabled:
            return y
        # autocast would do it within `F.linear`, and not in the backward pass
        typed = x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x
        kept, scale = None, self.scaling
        if self.training and isinstance(self.dropout, Dropout):
            kept, scale = self.dropout.keeps(x), self.scaling / (1 - self.dropout.p)
        update = LowRank.apply(typed, self.lora_A, self._up(), kept, scale)
        if self.lora_magnitude is None:
            return y + update
        return self._with_magnitude(self.lora_magnitude, y, self._updated(update, dim=-1))

    def _up(self) -> Tensor:
        """(out, n * r) lora_B with each part's rows beside that part's ranks, and zeros elsewhere."""
        if len(self.rows) == 1:
            return self.lora_B
        parts = iter(self.lora_B.split(self._sizes()))
        blank = self.lora_B.new_empty
        return torch.block_diag(*(next(parts) if updates else blank(size, 0) for size, updates in self.rows))

    def _with_magnitude(self, magnitude: Tensor, y: Tensor, update: Tensor) -> Tensor:
        """DoRA: each updated row is brought to its learned length; the norm itself gets no gradient (section 4.3)."""
        with torch.no_grad():  # `detach` at the end would keep the sum, as large as the weight, until the backward pass
            weight = self._updated(plain_weight(self.linear).float())
            norm = (weight + self.update().float()).norm(dim=1)
        factor = (magnitude / norm).to(y.dtype)  # (updated rows,)
        bias = self.linear.bias
        direction = self._updated(y, dim=-1) - (0 if bias is None else self._updated(bias.to(y.dtype)))
        return y + self._spread((factor - 1) * direction + factor * update)

    def update(self) -> Tensor:
        """(updated rows, in) what is added to the weight, without DoRA's lengths."""
        parts = zip(self.lora_B.split(self._sizes()), self.lora_A.split(self.rank), strict=True)
        return torch.cat([b @ a for b, a in parts]) * self.scaling

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) the weight that does the same without this class, by default in the dtype of the original's."""
        original = plain_weight(self.linear)
        weight = original.float()
        rows = self._updated(weight) + self.update().float()
        if self.lora_magnitude is not None:
            rows = rows * (self.lora_magnitude / rows.norm(dim=1))[:, None]
        ordered, taken = [], 0
        for part, (size, updates) in zip(weight.split([size for size, _ in self.rows]), self.rows, strict=True):
            ordered.append(rows[taken : taken + size] if updates else part)
            taken += size * updates
        return torch.cat(ordered).to(dtype or original.dtype)

    def _sizes(self) -> list[int]:
        return [size for size, updates in self.rows if updates]

    def _updated(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The updated parts of what has the layer's rows along `dim`."""
        if all(updates for _, updates in self.rows):
            return tensor
        parts = tensor.split([size for size, _ in self.rows], dim=dim)
        return torch.cat([part for part, (_, updates) in zip(parts, self.rows, strict=True) if updates], dim=dim)

    def _spread(self, update: Tensor) -> Tensor:
        """(..., updated rows) -> (..., out), zeros elsewhere."""
        if all(updates for _, updates in self.rows):
            return update
        updated = iter(update.split(self._sizes(), dim=-1))
        blank = update.shape[:-1]
        parts = [next(updated) if updates else update.new_zeros(*blank, size) for size, updates in self.rows]
        return torch.cat(parts, dim=-1)


def plain_weight(linear: LinearLayer) -> Tensor:
    """(out, in) the weight of a linear layer, also of a quantised one."""
    if type(linear) is nn.Linear:
        return linear.weight
    dequantise = getattr(linear, "plain_weight", None)
    if dequantise is not None:
        return dequantise()
    identity = torch.eye(linear.in_features, device=_device(linear))
    with torch.no_grad():
        y = linear(identity)
    return (y if linear.bias is None else y - linear.bias).T


def _device(module: LinearLayer) -> torch.device:
    return next(module.parameters()).device


def apply_lora(gpt: GPT, settings: LoRASettings) -> None:
    """Freeze a model and put a `LoRALinear` in the place of each layer that is adapted."""
    gpt.requires_grad_(False)
    for name, layer in list(gpt.named_modules()):
        rows = adapted_rows(name, layer, gpt.config, settings)
        if rows is not None and is_linear(layer):
            replace_module(gpt, name, LoRALinear(layer, settings, rows))
    reset_lora(gpt)


def reset_lora(gpt: GPT) -> None:
    """Start from a model that does what the original did."""
    for layer in lora_layers(gpt):
        if not layer.lora_A.is_meta:
            layer.reset_lora()


def adapted_rows(name: str, layer: nn.Module, config: Config, settings: LoRASettings) -> list[tuple[int, bool]] | None:
    """The parts of a layer's rows, each with whether it is updated; None for a layer that stays as it is."""
    if not is_linear(layer) or isinstance(layer, (Router, LoRALinear)):
        return None
    block, _, last = name.rpartition(".")
    size = config.head_size
    if last == "qkv":
        keys = config.n_query_groups * size
        parts = [(config.n_head * size, settings.query), (keys, settings.key), (keys, settings.value)]
        return parts if any(updates for _, updates in parts) else None
    if name == "lm_head":
        updates = settings.head
    elif ".mlp" in block:
        updates = settings.mlp
    elif last == "proj":
        updates = settings.projection
    elif last.startswith("q_"):  # multi-head latent attention
        updates = settings.query
    else:
        updates = last.startswith("kv_") and (settings.key or settings.value)
    return [(layer.out_features, True)] if updates else None


def lora_layers(gpt: nn.Module) -> Iterator[LoRALinear]:
    return (module for module in gpt.modules() if isinstance(module, LoRALinear))


def is_lora(name: str) -> bool:
    """Whether a parameter of that name belongs to the adaptation."""
    return name.rpartition(".")[2].startswith("lora_")


@torch.no_grad()
def merge_lora(gpt: GPT) -> None:
    """Put the updates into the weights and plain linear layers in the place of the adapted ones."""
    for name, layer in list(gpt.named_modules()):
        if not isinstance(layer, LoRALinear):
            continue
        weight, bias = layer.merged_weight(), layer.linear.bias
        plain = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
        replace_module(gpt, name, plain)
        if name == "lm_head":
            gpt.config.tie_embeddings = False  # the embedding has not learned what the head has


def parameter_groups(gpt: GPT, learning_rate: float, ratio: float | None) -> list[Any]:
    """What the optimizer trains, by name; with `ratio` in two groups, B learning that many times as fast as A (LoRA+,
    https://arxiv.org/abs/2402.12354)."""
    trained = [(name, p) for name, p in gpt.named_parameters() if p.requires_grad]
    if ratio is None:
        return trained
    fast = [p for name, p in trained if name.endswith("lora_B")]
    slow = [p for name, p in trained if not name.endswith("lora_B")]
    return [{"params": slow}, {"params": fast, "lr": learning_rate * ratio}]


def save_lora(directory: Path, weights: dict[str, Tensor], settings: LoRASettings, base: str) -> None:
    """Writes `lit_model.pth.lora`: the matrices, what they are, and the checkpoint they belong to."""
    content = {"model": weights, "lora": settings.to_dict(), "base": base}
    torch.save(content, directory / LORA_WEIGHTS)


def read_lora(path: Path) -> tuple[dict[str, Tensor], LoRASettings, str | None]:
    """The matrices of a directory or file, their settings, and the checkpoint they belong to.

    A file of LitGPT 0.5.13 holds the matrices alone; hyperparameters.yaml next to it says the rest.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or nothing says what its matrices are.
    """
    file = path / LORA_WEIGHTS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {file.name}. Give the directory of a LoRA checkpoint.")
    stored = read_state_dict(file)
    weights = {name: stored[key] for key, name in plain_names(stored).items()}
    strangers = [name for name in weights if not is_lora(name)]
    if strangers or not weights:
        raise ValueError(f"{file} holds no LoRA weights: {', '.join(strangers[:3]) or 'it is empty'}.")
    content = torch.load(file, map_location="meta", weights_only=True)
    if "lora" in content:
        return weights, _settings_in(file, content["lora"]), _base_in(file, content.get("base"))
    try:
        recorded = read_yaml_mapping(file.parent / HYPERPARAMETERS)
    except OSError:
        raise ValueError(f"{file} does not say what it is, and there is no {HYPERPARAMETERS} next to it.") from None
    names = [field.name for field in fields(LoRASettings)]
    given = {name: recorded[f"lora_{name}"] for name in names if f"lora_{name}" in recorded}
    return weights, _settings_in(file, given), _base_in(file, recorded.get("checkpoint_dir"))


def _settings_in(file: Path, given: Any) -> LoRASettings:
    """The settings that a file says, from whomever it came."""
    defaults = {field.name: field.default for field in fields(LoRASettings)}
    numbers = ("alpha", "dropout")
    try:
        if not isinstance(given, dict) or not given.keys() <= defaults.keys():
            raise ValueError(f"its settings are {shown(given)}")
        for name, value in given.items():
            kinds = (int, float) if name in numbers else (type(defaults[name]),)
            if type(value) not in kinds or not -MAX_RANK <= value <= MAX_RANK:
                raise ValueError(f"{name} is {shown(value)}")
        return LoRASettings(**given)
    except ValueError as error:
        raise ValueError(f"'{file}' does not say what its matrices are ({error}). Take another copy of it.") from None


def _base_in(file: Path, base: Any) -> str | None:
    if base is None or isinstance(base, str):
        return base
    raise ValueError(f"'{file}' names {shown(base)} as the model that it belongs to. Take another copy of it.")


def check_update(gpt: GPT, update: dict[str, Tensor]) -> None:
    """Raises ValueError where LoRA weights are not those of an adapted model."""
    wanted = {name: p.shape for name, p in gpt.state_dict().items() if is_lora(name)}
    wrong = sorted(wanted.keys() ^ update.keys())
    wrong += [name for name in wanted.keys() & update.keys() if wanted[name] != update[name].shape]
    if wrong:
        raise ValueError(
            f"The LoRA weights do not belong to this model: {', '.join(wrong[:4])} ({len(wrong)} in all) differ."
        )


def adapted_copy(gpt: GPT, update: dict[str, Tensor], settings: LoRASettings) -> GPT:
    """Another model, with LoRA weights, that shares all other weights with this one: it takes no memory for them.

    Args:
        gpt: The base, which stays as it is.
        update: The LoRA matrices by name.
        settings: What they are.

    Raises:
        ValueError: The matrices belong to another model.
    """
    shared = {id(tensor): tensor for tensor in (*gpt.parameters(), *gpt.buffers())}
    adapted = copy.deepcopy(gpt, shared)
    apply_lora(adapted, settings)
    check_update(adapted, update)
    adapted.load_state_dict(update, strict=False)
    return adapted.eval()


@torch.no_grad()
def merged_weights(
    weights: Iterable[tuple[str, Tensor]],
    config: Config,
    update: dict[str, Tensor],
    settings: LoRASettings,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's weights with a LoRA update in them, one at a time: memory does not grow with the model.

    Args:
        weights: Names and tensors of the base.
        config: Its shape.
        update: The LoRA matrices by name.
        settings: What they are.
        dtype: The type of those that are changed, rounded to it once; by default their own.

    Raises:
        ValueError: The matrices belong to another model.
    """
    with torch.device("meta"):
        model = GPT(config)
        apply_lora(model, settings)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Router) and f"{name}.lora_A" in update:  # LitGPT 0.5.13 adapts these, too
                replace_module(model, name, LoRALinear(layer, settings, [(layer.out_features, True)]))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    check_update(model, update)
    for name, tensor in weights:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            yield name, tensor
            continue
        prefix = name.removesuffix("weight")
        for key, _ in layer.named_parameters(recurse=False):
            setattr(layer, key, nn.Parameter(update[prefix + key].float(), requires_grad=False))
        plain = layer.linear
        assert isinstance(plain, nn.Linear)
        empty, plain.weight = plain.weight, nn.Parameter(tensor, requires_grad=False)
        yield name, layer.merged_weight(dtype)
        plain.weight = empty  # the memory may be given back
