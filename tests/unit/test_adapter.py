"""LLaMA-Adapter and Adapter v2: what they compute, learn, keep and refuse."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from litgpt.adaptation.adapter import (
    ADAPTER_V2_WEIGHTS,
    ADAPTER_WEIGHTS,
    apply_adapter,
    apply_adapter_v2,
    is_adapter,
    is_adapter_v2,
    load_adapter,
    read_adapter,
    save_adapter,
)
from litgpt.checkpoint import CONFIG, WEIGHTS, save_model
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.sources.load import load_model
from litgpt.training.loss import NextTokenLoss
from tests.shapes import LLAMA

SIZES = {
    "n_layer": 4,
    "n_embd": 32,
    "n_head": 4,
    "intermediate_size": 40,
    "vocab_size": 64,
    "block_size": 64,
    "padding_multiple": 64,
}
KINDS = {
    "multi-head, parallel": {"bias": True},
    "one norm for both": {"shared_attention_norm": True, "lm_head_bias": True},
    "grouped": LLAMA | {"n_query_groups": 2},
    "multi-query, wide heads": LLAMA | {"n_query_groups": 1, "head_size": 12},
    "normed keys": LLAMA | {"n_query_groups": 2, "norm_qk": True},
    "clipped": LLAMA | {"n_query_groups": 2, "clip_qkv": 0.3},
    "soft cap, window": LLAMA
    | {"attention_logit_softcapping": 2.0, "sliding_window_size": 4, "sliding_window_indices": [1, 0]},
    "sinks": LLAMA | {"n_query_groups": 2, "attention_sinks": True},
    "experts": LLAMA | {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
}
APPLY = {"adapter": apply_adapter, "adapter_v2": apply_adapter_v2}
BELONGS = {"adapter": is_adapter, "adapter_v2": is_adapter_v2}


def build(kind: str = "grouped", **changed) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(Config(**{**SIZES, **KINDS[kind], **changed}))
    gpt.init_weights()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return gpt.eval()


def adapted(version: str, kind: str = "grouped", **changed) -> GPT:
    """A model whose adapter has learned something."""
    gpt = build(kind, **changed)
    APPLY[version](gpt)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if BELONGS[version](name) and "adapter_wte" not in name:
                p.add_(torch.randn_like(p) * 0.3)
    return gpt


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", APPLY)
@torch.no_grad()
def test_it_begins_as_the_model_it_adapts(version, kind):
    gpt = build(kind)
    before = gpt(tokens())
    APPLY[version](gpt)
    assert torch.equal(gpt(tokens()), before)


@pytest.mark.parametrize("kind", ["multi-head, parallel", "grouped", "multi-query, wide heads"])
@torch.no_grad()
def test_the_prompt_is_a_second_attention_added_by_a_gate(kind):
    """The last layer's attention, computed anew by its formula from the layer's input, its queries and its weights."""
    gpt = adapted("adapter", kind)
    attention, config, seen = gpt.transformer.h[3].attn, gpt.config, {}
    attention.proj.register_forward_hook(lambda module, inputs, y: seen.update(found=inputs[0]))
    original = attention.attended
    attention.attended = lambda q, k, v, plan: seen.update(q=q) or original(q, k, v, plan)
    gpt(tokens())
    both, gate = seen["found"], attention.gating_factor.clone()
    attention.gating_factor.zero_()
    gpt(tokens())
    from_prompt = both - seen["found"]
    groups, size, per_group = config.n_query_groups, config.head_size, config.n_head // config.n_query_groups
    rows = F.linear(attention.adapter_wte.weight, attention.qkv.weight, attention.qkv.bias)  # (10, rows)
    rows = rows.view(10, groups, per_group + 2, size)
    expected = torch.zeros_like(both).view(2, 20, config.n_head, size)
    for head in range(config.n_head):
        k, v = rows[:, head // per_group, per_group], rows[:, head // per_group, per_group + 1]  # (10, D)
        weights = (seen["q"][:, :, head] @ k.T / math.sqrt(size)).softmax(dim=-1)
        expected[:, :, head] = gate[0, 0, head] * (weights @ v)
    assert from_prompt.abs().max() > 0.05
    assert torch.allclose(from_prompt, expected.flatten(-2), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", APPLY)
@torch.no_grad()
def test_with_a_cache_as_without(version, kind):
    gpt, idx = adapted(version, kind), tokens()
    expected = gpt(idx)
    cache = gpt.new_cache(2, 20)
    parts = [gpt(idx[:, :7], cache=cache)]
    for at in range(7, 20):
        parts.append(gpt(idx[:, at : at + 1], torch.full((2, 1), at), cache=cache))
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=1e-5)


@pytest.mark.parametrize("version", APPLY)
@torch.no_grad()
def test_packed_documents_are_what_they_are_alone(version):
    gpt, idx = adapted(version), tokens(1, 15)
    ends = [0, 4, 10, 15]
    documents = torch.cat([torch.full((1, b - a), number) for number, (a, b) in enumerate(pairwise(ends))], dim=1)
    positions = torch.cat([torch.arange(b - a)[None] for a, b in pairwise(ends)], dim=1)
    alone = torch.cat([gpt(idx[:, a:b]) for a, b in pairwise(ends)], dim=1)
    assert torch.allclose(gpt(idx, positions=positions, document_ids=documents), alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("version", APPLY)
def test_the_adapter_alone_learns(version, kind):
    gpt = adapted(version, kind).train()
    idx = tokens()
    NextTokenLoss(gpt)(idx[:, :-1], idx[:, 1:]).backward()
    learns = {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert learns == {name for name in gpt.state_dict() if BELONGS[version](name)}
    for name, p in gpt.named_parameters():
        assert (p.grad is not None) == (name in learns), name
        if name in learns and "experts" not in name:
            assert p.grad.abs().max() > 0, name
    assert not any("h.1.attn.gating_factor" in name for name in learns)
    assert {"transformer.h.2.attn.gating_factor", "transformer.h.3.attn.adapter_wte.weight"} <= learns
    assert ("lm_head.adapter_scale" in learns) == (version == "adapter_v2")


def test_v2_trains_the_norms_and_the_router():
    gpt = adapted("adapter_v2", "experts")
    learns = {name for name, p in gpt.named_parameters() if p.requires_grad}
    assert {
        "transformer.h.0.norm_1.weight",
        "transformer.ln_f.weight",
        "transformer.h.0.mlp.gate.adapter_bias",
    } <= learns
    assert "transformer.h.0.mlp.gate.linear.weight" not in learns


@pytest.mark.parametrize("version", APPLY)
@pytest.mark.parametrize("scheme", ["bnb.nf4", "bnb.int8-training"])
def test_quantised_layers_are_adapted_alike(version, scheme, tmp_path):
    pytest.importorskip("bitsandbytes")
    plain = build()
    save_model(tmp_path, plain, plain.config)
    gpt = load_model(tmp_path, quantize=scheme)
    before = gpt(tokens())
    APPLY[version](gpt)
    assert torch.equal(gpt(tokens()), before)
    NextTokenLoss(gpt)(tokens()[:, :-1], tokens()[:, 1:]).backward()
    learns = {name for name, p in gpt.named_parameters() if p.grad is not None}
    assert learns == {name for name in gpt.state_dict() if BELONGS[version](name)}


@pytest.mark.parametrize("version", APPLY)
def test_it_stays_in_float32_when_the_model_is_converted(version):
    gpt = adapted(version, "multi-head, parallel")
    exact = {name: p.clone() for name, p in gpt.named_parameters() if BELONGS[version](name)}
    expected = gpt(tokens())
    gpt.to(torch.bfloat16)
    for name, p in gpt.named_parameters():
        assert p.dtype == (torch.float32 if name in exact else torch.bfloat16), name
        assert name not in exact or torch.equal(p, exact[name]), name
    logits = gpt(tokens())
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(("version", "name"), [("adapter", ADAPTER_WEIGHTS), ("adapter_v2", ADAPTER_V2_WEIGHTS)])
@torch.no_grad()
def test_a_file_says_all_that_is_needed(version, name, tmp_path):
    """The number of layers and the length of the prompt are other than usual."""
    gpt = build()
    APPLY[version](gpt, prompt_length=3, start_layer=1)
    for p in gpt.parameters():
        if p.requires_grad:
            p.add_(torch.randn_like(p) * 0.3)
    save_adapter(tmp_path, {n: p for n, p in gpt.state_dict().items() if BELONGS[version](n)}, "org/model")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    weights, base = read_adapter(tmp_path)
    again = build()
    load_adapter(again, weights)
    assert base == "org/model"
    assert torch.equal(again(tokens()), gpt(tokens()))
    with pytest.raises(ValueError, match="belongs to another model"):
        load_adapter(build("grouped", n_layer=5), weights)


def test_a_file_of_litgpt_is_explained_by_what_is_beside_it(tmp_path):
    gpt = adapted("adapter")
    torch.save({"model": {n: p for n, p in gpt.state_dict().items() if is_adapter(n)}}, tmp_path / ADAPTER_WEIGHTS)
    assert read_adapter(tmp_path)[1] is None
    (tmp_path / "hyperparameters.yaml").write_text("checkpoint_dir: checkpoints/org/model\n")
    assert read_adapter(tmp_path)[1] == "checkpoints/org/model"


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no lit_model\.pth\.adapter or lit_model\.pth\.adapter_v2"):
        read_adapter(tmp_path)
    torch.save({"model": build().state_dict()}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(ValueError, match=r"holds no adapter: lm_head\.weight"):
        read_adapter(tmp_path)
    assert {WEIGHTS, CONFIG}.isdisjoint(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("apply", APPLY.values())
def test_models_that_cannot_be_adapted_are_refused(apply):
    latent = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": None}
    with pytest.raises(ValueError, match="multi-head latent attention"):
        apply(build("grouped", n_query_groups=4, latent_attention=latent))
    with pytest.raises(ValueError, match="adapter_prompt_length=0"):
        apply(build(), prompt_length=0)
    with pytest.raises(ValueError, match="adapter_start_layer=-1"):
        apply(build(), start_layer=-1)


def test_a_model_without_later_layers_is_refused():
    with pytest.raises(ValueError, match="adapter_start_layer=2: the model has only 2 layers"):
        apply_adapter(build(n_layer=2))


@pytest.mark.parametrize("version", APPLY)
def test_shapes_need_no_memory(version):
    with torch.device("meta"):
        gpt = GPT(Config(**{**SIZES, **KINDS["experts"]}))
    APPLY[version](gpt)
    expected = adapted(version, "experts").state_dict()
    assert {name: p.shape for name, p in gpt.state_dict().items()} == {name: p.shape for name, p in expected.items()}
    assert all(p.is_meta for p in gpt.parameters())
