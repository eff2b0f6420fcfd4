"""Every architecture against the reference: tiny random models of `transformers`, converted, run, trained and exported.

One row per architecture and variant in `ROWS`; a new architecture adds its row here and nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from litgpt.export.hf_writer import export_hf
from litgpt.formats.architectures import ARCHITECTURES
from litgpt.formats.hf_config import config_from_hf, differences
from litgpt.model import GPT
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model

VOCABULARY = 97
WINDOW = 8  # of every sliding window here; prompts are longer
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # large enough that every part matters to the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ALL_HEADS = {"num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0}
MLA_YARN = {**YARN, "beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.3, 1.4, 1.5, 1.7],
    "long_factor": [1.2, 1.9, 3.0, 4.0, 6.0, 7.5],
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
    "num_key_value_heads": 4,
}
EXPERTS = {"moe_intermediate_size": 40, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "n_routed_experts": 8}
GROUPS = {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.7, "norm_topk_prob": True}
MOE = {"num_experts": 6, "moe_intermediate_size": 40, "num_experts_per_tok": 2}
FALCON = {key: value for key, value in COMMON.items() if key not in ("intermediate_size", "num_key_value_heads")}

ROWS = {
    # name: (class of transformers, what differs from COMMON)
    "Llama": ("Llama", {}),
    "Llama multi-head, tied": ("Llama", ALL_HEADS | TIED),
    "Llama multi-query, wide heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "Llama all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama attention bias": ("Llama", {"attention_bias": True}),
    "Llama linear rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "Llama llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "Llama yarn rope": ("Llama", {"rope_parameters": YARN}),
    "Mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 24}),
    "Mistral without window": ("Mistral", {"sliding_window": None}),
    "Ministral3": (
        "Ministral3",
        {"head_dim": 16, "rope_parameters": {**MLA_YARN, "llama_4_scaling_beta": 0.3}},
    ),
    "Mixtral": ("Mixtral", {"sliding_window": WINDOW, "num_local_experts": 5}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "Qwen3": ("Qwen3", {"head_dim": 24} | TIED),
    "Qwen3 biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "Qwen3Moe": ("Qwen3Moe", {"head_dim": 24, "norm_topk_prob": True, **MOE, "num_experts_per_tok": 3}),
    "Qwen3Moe dense first layer": (
        "Qwen3Moe",
        {"mlp_only_layers": [0], **MOE},
    ),
    "Gemma": ("Gemma", {"head_dim": 24, "num_key_value_heads": 1}),
    "Gemma2": ("Gemma2", {"head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 40}),
    "Gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 4,
            "head_dim": 24,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 40,
            "sliding_window_pattern": 3,
            "rope_theta": 5000.0,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "Phi": ("Phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "Phi grouped": ("Phi", {"partial_rotary_factor": 0.25}),
    "Phi3": ("Phi3", {"sliding_window": WINDOW}),
    "Phi3 short of longrope": (
        "Phi3",
        {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "original_max_position_embeddings": 64} | TIED,
    ),
    "Phi3 beyond longrope": (
        "Phi3",
        {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "GPTNeoX": ("GPTNeoX", {"intermediate_size": 256}),
    "GPTNeoX in sequence, half rotated": ("GPTNeoX", {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "Falcon multi-query": ("Falcon", {}),
    "Falcon multi-head, in sequence, biases": ("Falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    "Falcon grouped": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon grouped, one norm": (
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 96},
    ),
    "StableLm": ("StableLm", {"use_qkv_bias": True}),
    "StableLm multi-head": ("StableLm", {"partial_rotary_factor": 0.5} | ALL_HEADS),
    "Olmo": ("Olmo", {}),
    "Olmo clipped": ("Olmo", {"clip_qkv": 0.5} | TIED),
    "Olmo2": ("Olmo2", {}),
    "Olmo3": (
        "Olmo3",
        {"num_hidden_layers": 4, "sliding_window": WINDOW, "rope_scaling": YARN | {"attention_factor": 1.2}},
    ),
    "SmolLM3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "SmolLM3 window": (
        "SmolLM3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": WINDOW, "attention_bias": True},
    ),
    "Granite": (
        "Granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.11,
            "logits_scaling": 0.7,
            "attention_bias": True,
        },
    ),
    "SeedOss": (
        "SeedOss",
        {"head_dim": 16, "attention_out_bias": True, "residual_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "Glm4": ("Glm4", {"head_dim": 16}),
    "Glm4Moe": ("Glm4Moe", EXPERTS | GROUPS | {"head_dim": 16, "attention_bias": True, "use_qk_norm": True}),
    "Glm4Moe one group": ("Glm4Moe", EXPERTS | GROUPS | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "GptOss": (
        "GptOss",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "swiglu_limit": 1.0,
            "rope_parameters": YARN | {"truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "DeepseekV2": (
        "DeepseekV2",
        EXPERTS | GROUPS | LATENT | {"rope_parameters": MLA_YARN, "topk_method": "group_limited_greedy"},
    ),
    "DeepseekV2 Lite": ("DeepseekV2", EXPERTS | LATENT | {"q_lora_rank": None, "n_shared_experts": 2}),
    "DeepseekV3": ("DeepseekV3", EXPERTS | GROUPS | LATENT | {"rope_parameters": MLA_YARN}),
    "DeepseekV3 as Kimi K2": (
        "DeepseekV3",
        EXPERTS | GROUPS | LATENT | {"n_group": 1, "topk_group": 1, "attention_bias": True, "rope_interleave": False},
    ),
}
# By how much the rounding error of ours in bfloat16 may exceed that of the reference.
BFLOAT16_BOUND = 1.1


@dataclass
class Pair:
    """The reference and our model, with the weights of one directory."""

    reference: torch.nn.Module
    ours: GPT
    path: Path


def build(row: str, path: Path) -> Pair:
    family, values = ROWS[row]
    torch.manual_seed(0)
    common = FALCON if family == "Falcon" else COMMON
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**common | values)
    reference = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, p in [*reference.named_parameters(), *reference.named_buffers()]:
        if p.dim() == 1 and "inv_freq" not in name:  # norms, biases, sinks, corrections: those start at 1 or 0
            p.data.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
    reference.save_pretrained(path)
    return Pair(reference, load_model(open_checkpoint(path), dtype=torch.float32), path)


@pytest.fixture(scope="module", params=ROWS)
def pair(request, tmp_path_factory):
    return build(request.param, tmp_path_factory.mktemp("reference"))


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def distance(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return (ours[..., :VOCABULARY].float() - reference.float()).abs().max().item()


def test_every_architecture_has_a_row():
    assert {f"{family}ForCausalLM" for family, _ in ROWS.values()} == set(ARCHITECTURES)


@torch.inference_mode()
def test_full_forward(pair):
    idx = tokens(2, 40)
    expected = pair.reference(idx).logits
    assert expected.abs().max() > 1, "otherwise 1e-4 says little"
    assert distance(pair.ours(idx), expected) < 1e-4


@torch.inference_mode()
def test_cached_decode(pair):
    """Rows at different positions, prompts longer than any window in two chunks, then 24 tokens one by one."""
    prompts, steps = torch.tensor([22, 13]), 24
    idx = tokens(2, 22 + steps)
    expected = [pair.reference(row[None, : length + steps]).logits[0] for row, length in zip(idx, prompts, strict=True)]
    cache = pair.ours.new_cache(2, 22 + steps)
    positions = torch.arange(22).expand(2, 22)
    positions = positions.masked_fill(positions >= prompts[:, None], -1)
    logits = [pair.ours(idx[:, :9], positions[:, :9], cache=cache)]
    logits.append(pair.ours(idx[:, 9:22], positions[:, 9:], cache=cache))
    prefill = torch.cat(logits, dim=1)
    assert all(distance(prefill[row, :n], expected[row][:n]) < 1e-4 for row, n in enumerate(prompts))
    for step in range(steps):
        at = (prompts + step)[:, None]
        stepped = pair.ours(idx.gather(1, at), at, cache=cache)
        assert all(distance(stepped[row, 0], expected[row][at[row, 0]]) < 1e-4 for row in range(2)), f"step {step}"


@torch.inference_mode()
def test_bfloat16_rounds_no_worse_than_the_reference(pair):
    """Mean error of a token's logits against float32, the median over many tokens: in a mixture, rounding sends a few
    tokens to other experts, and these, different ones in the two, have errors of their own."""
    idx = tokens(8, 60)
    exact = pair.reference(idx).logits

    def error(logits: torch.Tensor) -> torch.Tensor:
        return (logits[..., :VOCABULARY].float() - exact).abs().mean(-1).median()

    rounded = type(pair.reference).from_pretrained(pair.path, dtype=torch.bfloat16).eval()
    assert error(load_model(pair.path, dtype=torch.bfloat16)(idx)) <= BFLOAT16_BOUND * error(rounded(idx).logits)


@torch.inference_mode()
def test_export(pair, tmp_path):
    """Exported back, every tensor is the same to the bit, and the reference loads it and computes the same."""
    export_hf(pair.path, tmp_path)
    before, after = load_file(pair.path / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(pair.reference)
    idx = tokens(2, 40)
    assert distance(again(idx).logits, pair.reference(idx).logits) < 1e-6


@torch.inference_mode()
def test_config_written_anew(pair, tmp_path):
    """Without the original `config.json`, the one that is written says the same to us and to the reference."""
    (tmp_path / "ours").mkdir()
    from litgpt.checkpoint import save_model

    save_model(tmp_path / "ours", pair.ours, pair.ours.config)
    name = type(pair.reference).__name__
    (tmp_path / "ours" / "config.json").write_text(json.dumps({"architectures": [name]}))
    export_hf(tmp_path / "ours", tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written["architectures"] == [name]
    assert not differences(config_from_hf(written), pair.ours.config)
    idx = tokens(2, 40)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert distance(again(idx).logits, pair.reference(idx).logits) < 1e-4


def test_loss_and_gradients(pair, tmp_path):
    """The reference's gradients, saved as if they were weights, are read through the same rules and compared to ours."""
    reference, ours = pair.reference, load_model(pair.path, dtype=torch.float32)
    idx = tokens(2, 24)
    loss = reference(idx, labels=idx).loss
    loss.backward()
    logits = ours(idx)[:, :-1, :VOCABULARY].flatten(0, 1)
    our_loss = torch.nn.functional.cross_entropy(logits, idx[:, 1:].flatten())
    our_loss.backward()
    assert abs(our_loss.item() - loss.item()) < 1e-5
    weights = {name: p.data for name, p in reference.named_parameters()}
    try:
        for p in reference.parameters():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad.clone()
        reference.save_pretrained(tmp_path)
    finally:
        for name, p in reference.named_parameters():
            p.data, p.grad = weights[name], None
    expected = load_model(tmp_path, dtype=torch.float32)
    for (name, p), theirs in zip(ours.named_parameters(), expected.parameters(), strict=True):
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        scale = theirs.abs().max().clamp(min=1e-3)
        assert ((grad - theirs).abs().max() / scale).item() < 1e-3, name


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_absent_entries_mean_what_they_mean_to_the_reference(architecture):
    """Entries that a config.json may leave out: the reference's defaults, except those that every one of them has."""
    by_type = {**transformers.models.auto.configuration_auto.CONFIG_MAPPING}
    reference = by_type[architecture.model_type]()
    full = json.loads(reference.to_json_string(use_diff=False)) | {"architectures": [architecture.name]}
    always = [
        "architectures",
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
    ]
    if full.get("num_experts_per_tok", 1) is None:
        full["num_experts_per_tok"] = 2
        always.append("num_experts_per_tok")
    if full["hidden_size"] % full["num_attention_heads"]:
        full["head_dim"] = 128
        always.append("head_dim")
    least = {key: full[key] for key in always if key in full}
    assert not differences(config_from_hf(least), config_from_hf(full))
    if architecture.defaults:
        text = {**architecture.defaults, "architectures": [architecture.name]}
        assert not differences(config_from_hf(text), config_from_hf(full))
