import copy
import math

import pytest
import torch
import torch.nn.functional as F

from litgpt import model as model_module
from litgpt.config import Config
from litgpt.kv_cache import Ring
from litgpt.model import (
    GPT,
    MASKED,
    LLaMAMoE,
    RMSNorm,
    RotaryEmbedding,
    Router,
    attend,
    latent_attention_scale,
    rope_frequencies,
    rotate,
    route,
    starts_of_documents,
    window_of,
)
from tests import shapes

LLAMA = {
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "n_query_groups": 2,
    "vocab_size": 64,
    "padded_vocab_size": 64,
    "block_size": 64,
    "intermediate_size": 48,
    **shapes.LLAMA,
}
MOE = {**LLAMA, "mlp_class_name": "LLaMAMoE", "n_expert": 8, "n_expert_per_token": 2, "moe_intermediate_size": 20}
GROUPED = {
    **MOE,
    "n_expert_groups": 4,
    "n_topk_groups": 2,
    "n_topk_scores_per_group": 2,
    "n_shared_expert": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}
LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
VARIANTS = {
    "llama": LLAMA,
    "neox": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 64, "padded_vocab_size": 64, "block_size": 64},
    "window": {**LLAMA, "sliding_window_size": 5},
    "gemma": {
        **LLAMA,
        "mlp_class_name": "GemmaMLP",
        "norm_unit_offset": True,
        "scale_embeddings": True,
        "sliding_window_size": 5,
        "sliding_window_indices": [1, 0],
        "attention_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.0,
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "norm_qk": True,
        "rope_local_base_freq": 100,
        "rope_indices": [1, 0],
        "rope_adjustments": {"factor": 8.0},
    },
    "olmo2": {
        **LLAMA,
        "norm_qk": True,
        "norm_qk_type": "olmo2",
        "norm_1": False,
        "norm_2": False,
        "post_mlp_norm": True,
    },
    "moe": MOE,
    "grouped moe": GROUPED,
    "latent": {**LLAMA, "latent_attention": {**LATENT, "q_lora_rank": 16}, "rope_interleave": True},
    "latent without query rank": {**LLAMA, "latent_attention": LATENT},
}


def make(values: dict, **more) -> GPT:
    """A model with random weights, biases and norms."""
    torch.manual_seed(0)
    model = GPT(Config(**{**values, **more})).eval()
    model.init_weights()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    for module in model.modules():
        if isinstance(module, Router) and module.e_score_correction_bias is not None:
            module.e_score_correction_bias.normal_(0, 0.3)
    return model


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(1))


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=VARIANTS)
def model(request):
    with torch.inference_mode():
        yield make(VARIANTS[request.param])


# --- the whole model -------------------------------------------------------------------------------------------------


def test_later_tokens_do_not_change_earlier_logits(model):
    idx = tokens(2, 20)
    changed = idx.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 64
    before, after = model(idx), model(changed)
    close(before[:, :12], after[:, :12])
    assert (before[:, 12:] - after[:, 12:]).abs().amax() > 1e-3


def test_forward_is_hidden_states_then_logits(model):
    idx = tokens(2, 9)
    hidden = model.hidden_states(idx)
    assert hidden.shape == (2, 9, 32)
    close(model.logits(hidden), model(idx))
    close(model.logits(hidden[0, 3]), model(idx)[0, 3])


def test_chunked_prefill_then_decode_equals_the_whole(model):
    """The chunks, 9 and 7 tokens, are longer than the windows of 5; the cache of those is shorter than the prompt."""
    idx, positions = tokens(2, 24), torch.arange(24).expand(2, 24)
    cache = model.new_cache(2, 24)
    steps = [model(idx[:, :9], cache=cache), model(idx[:, 9:16], positions[:, 9:16], cache=cache)]
    steps += [model(idx[:, [t]], positions[:, [t]], cache=cache) for t in range(16, 24)]
    close(torch.cat(steps, dim=1), model(idx))


def test_rows_at_different_positions(model):
    """Prompts of 13, 4 and 7 tokens, padded on the right, then decoded side by side."""
    lengths = torch.tensor([13, 4, 7])
    idx = tokens(3, 24)
    whole = model(idx)
    positions = torch.arange(13).expand(3, 13)
    positions = positions.masked_fill(positions >= lengths[:, None], -1)
    cache = model.new_cache(3, 24)
    first = model(idx[:, :13], positions, cache=cache)
    for row, length in enumerate(lengths):
        close(first[row, :length], whole[row, :length])
    for step in range(8):
        at = lengths + step
        logits = model(idx.gather(1, at[:, None]), at[:, None], cache=cache)
        close(logits[:, 0], whole[torch.arange(3), at])


def test_padding_on_the_left_is_ignored(model):
    idx = tokens(2, 10)
    padded = torch.cat((torch.full((2, 3), 7), idx), dim=1)
    positions = torch.cat((torch.full((2, 3), -1), torch.arange(10).expand(2, 10)), dim=1)
    close(model(padded, positions)[:, 3:], model(idx))
    cache = model.new_cache(2, 16)
    close(model(padded, positions, cache=cache)[:, 3:], model(idx))
    follow = tokens(2, 11)[:, 10:]
    whole = model(torch.cat((idx, follow), dim=1))
    close(model(follow, torch.full((2, 1), 10), cache=cache)[:, 0], whole[:, -1])


def test_a_row_may_pause_and_be_forgotten(model):
    """A row whose token is padding keeps its state; a row that was reset starts anew beside one that goes on."""
    idx = tokens(2, 20)
    whole = model(idx)
    cache = model.new_cache(2, 20)
    model(idx[:, :8], cache=cache)
    model(idx[:, [8]], torch.tensor([[8], [-1]]), cache=cache)
    both = model(torch.stack((idx[0, [9]], idx[1, [8]])), torch.tensor([[9], [8]]), cache=cache)
    close(both[0, 0], whole[0, 9])
    close(both[1, 0], whole[1, 8])
    cache.reset([1])
    fresh = tokens(1, 30)[:, 20:]
    mixed = torch.cat((torch.cat((idx[:1, 10:11], idx[:1, :9]), dim=1), fresh))
    positions = torch.stack((torch.tensor([10] + [-1] * 9), torch.arange(10)))
    logits = model(mixed, positions, cache=cache)
    close(logits[0, 0], whole[0, 10])
    close(logits[1], model(fresh)[0])


def test_a_reset_cache_is_as_good_as_new(model):
    idx = tokens(2, 12)
    cache = model.new_cache(2, 16)
    model(tokens(2, 16), cache=cache)
    cache.reset()
    assert cache.is_empty, "the prompt need not read the cache"
    close(model(idx, cache=cache), model(idx))
    close(model(idx[:, :1], torch.full((2, 1), 12), cache=cache)[:, 0], model(torch.cat((idx, idx[:, :1]), 1))[:, -1])


def test_reading_only_the_used_part_of_the_cache(model):
    idx, positions = tokens(2, 12), torch.arange(12).expand(2, 12)
    cache = model.new_cache(2, 64)
    model(idx[:, :8], cache=cache)
    cache.read_only(16)
    close(model(idx[:, 8:], positions[:, 8:], cache=cache), model(idx)[:, 8:])
    if None in cache.rings:
        assert cache.rings[None].positions.size(1) > 16, "otherwise nothing was saved"


def test_packed_documents_do_not_see_each_other(model):
    first, second, third = tokens(1, 9), tokens(1, 15)[:, 9:], tokens(1, 22)[:, 15:]
    packed = torch.cat((first, second, third), dim=1)
    ids = torch.tensor([[0] * 9 + [1] * 6 + [2] * 7])
    within = torch.cat([torch.arange(n) for n in (9, 6, 7)])[None]
    separate = torch.cat([model(document) for document in (first, second, third)], dim=1)
    close(model(packed, within, ids), separate)
    # Rotary positions are relative: counting through the row is the same.
    close(model(packed, document_ids=ids), separate, 1e-4)
    assert (model(packed) - separate).abs().amax() > 1e-3


def varlen(q, k, v, starts_q, starts_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What torch's GPU kernel for packed rows computes, by its documentation: (tokens, heads, D) each."""
    assert starts_q is starts_k
    assert starts_q.dtype == torch.int32
    assert enable_gqa == (q.size(1) != k.size(1))
    assert max_q == max_k >= starts_q.diff().max()
    found = []
    for first, last in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True):
        places = torch.arange(last - first)
        back, ahead = places[:, None] - places, places - places[:, None]
        seen = ahead <= window_size[1]
        if window_size[0] >= 0:
            seen &= back <= window_size[0]
        a, b, c = (part[first:last].transpose(0, 1)[None] for part in (q, k, v))
        y = F.scaled_dot_product_attention(a, b, c, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
        found.append(y[0].transpose(0, 1))
    return torch.cat(found)


def by_kernel(q, k, v, starts, window, scale):
    """`attend_by_document` as on a GPU, on tensors of the CPU."""
    y = model_module.attend_at_once(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts, window, scale)
    return y.unflatten(0, q.shape[:2])


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("device", ["cpu", "a GPU"])
def test_documents_on_their_own_equal_the_mask(monkeypatch, window, device):
    """Rows with several documents, padding at either end, and one document in two pieces, which only the mask can say."""
    changes = {} if window is None else {"sliding_window_size": window, "sliding_window_indices": [1, 0]}
    model = make(LLAMA | changes)
    ids = torch.tensor([[0] * 5 + [1] * 1 + [2] * 3 + [-1] * 3, [-1] * 2 + [0] * 10])
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 0, 1, 2, -1, -1, -1], [-1, -1, *range(10)]])
    starts = starts_of_documents(positions, ids)
    assert starts.tolist() == [0, 5, 6, 9, 12, 14, 24]
    assert starts_of_documents(None, torch.tensor([[0, 1, 0]])) is None
    idx, counted, calls = tokens(2, 12), (positions >= 0)[..., None], []

    def outcome() -> list[torch.Tensor]:
        model.zero_grad()
        y = model(idx, positions, ids, document_starts=starts) * counted
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in model.parameters())]

    if device != "cpu":
        monkeypatch.setattr(model_module, "attends_by_document", lambda *_: True)
        monkeypatch.setattr(
            model_module, "varlen_kernel", lambda: lambda *args, **kw: calls.append(1) or varlen(*args, **kw)
        )
        monkeypatch.setattr(model_module, "attend_by_document", by_kernel)
    separate = outcome()
    assert len(calls) == (0 if device == "cpu" else model.config.n_layer)
    monkeypatch.setattr(model_module, "attends_by_document", lambda *_: False)
    for a, b in zip(separate, outcome(), strict=True):
        close(a, b, 1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_weight(name):
    model = make(VARIANTS[name]).train()
    F.cross_entropy(model(tokens(4, 20)).flatten(0, 1), tokens(4, 20).flatten()).backward()
    for parameter_name, p in model.named_parameters():
        assert p.grad is not None, parameter_name
        assert p.grad.isfinite().all(), parameter_name
        # An expert without tokens has a gradient, of zeros: data-parallel ranks wait for all of them.
        assert p.grad.abs().max() > 0 or ".experts." in parameter_name, parameter_name


def test_packed_gradients_equal_separate_ones():
    model = make(VARIANTS["gemma"])
    a, b = tokens(1, 9), tokens(1, 15)[:, 9:]
    ids = torch.tensor([[0] * 9 + [1] * 6])
    model(torch.cat((a, b), 1), document_ids=ids).square().sum().backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model(a).square().sum() + model(b).square().sum()).backward()
    for one, p in zip(packed, model.parameters(), strict=True):
        close(one, p.grad, 1e-3)


def test_bfloat16_keeps_rotary_tables_and_routing_bias_in_float32():
    for name in ("gemma", "grouped moe", "latent"):
        model = make(VARIANTS[name])
        exact, before = model(tokens(2, 16)), model.rope.frequencies.clone()
        bias = {n: b.clone() for n, b in model.named_buffers() if "correction" in n}
        model = model.to(torch.bfloat16)
        assert model.rope.frequencies.dtype == torch.float32
        assert torch.equal(model.rope.frequencies, before)
        for n, b in model.named_buffers():
            if "correction" in n:
                assert torch.equal(b, bias[n])
        logits = model(tokens(2, 16))
        assert logits.dtype == torch.bfloat16
        if name != "grouped moe":  # where rounding may choose another expert
            close(logits.float(), exact, 0.15)


def test_a_model_built_without_memory_computes_as_one_built_with_it():
    model = make(VARIANTS["gemma"])
    with torch.device("meta"):
        empty = GPT(model.config)
    weights = model.state_dict()
    assigned = copy.deepcopy(empty)
    assigned.load_state_dict(weights, assign=True)
    close(assigned(tokens(2, 9)), model(tokens(2, 9)))
    emptied = copy.deepcopy(model).to("meta")
    emptied.load_state_dict(weights, assign=True)
    close(emptied(tokens(2, 9)), model(tokens(2, 9)))
    copied = empty.to_empty(device="cpu")
    copied.load_state_dict(weights)
    close(copied(tokens(2, 9)), model(tokens(2, 9)))
    assert "rope.frequencies" not in weights


def test_mixed_precision_and_a_cache_of_another_dtype():
    model = make(VARIANTS["gemma"])
    idx = tokens(2, 9)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        whole = model(idx)
        cache = model.new_cache(2, 16, dtype=torch.bfloat16)
        positions = torch.arange(8).expand(2, 8).clone()
        positions[1, 5:] = -1
        model(idx[:, :8], positions, cache=cache)
        step = model(idx[:, 8:], torch.tensor([[8], [-1]]), cache=cache)
    assert step.isfinite().all(), "a row without anything to see stays finite"
    close(step[0, 0].float(), whole[0, 8].float(), 0.1)


def test_calls_that_do_not_fit_are_refused():
    model = make(LLAMA, block_size=8)
    with pytest.raises(ValueError, match="9 tokens does not fit the model's context of 8"):
        model(tokens(1, 9))
    cache = model.new_cache(1, 4)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of max_length=4"):
        model(tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match="document_ids"):
        model(tokens(1, 4), document_ids=torch.zeros(1, 4, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="max_length=0"):
        model.new_cache(1, 0)


def test_window_layers_keep_a_window_and_latent_ones_their_latents():
    cache = make(VARIANTS["gemma"]).new_cache(2, 60)
    assert [layer.tensors[0].size(1) for layer in cache.layers] == [8, 64, 8]
    (stored,) = make(VARIANTS["latent"]).new_cache(2, 60).layers[0].tensors
    assert stored.shape == (2, 64, 1, 8 + 4)
    assert sum(1 for _ in cache.tensors()) == 2 + 3 * 2


def test_tied_embeddings_are_one_parameter():
    model = make(LLAMA, tie_embeddings=True)
    assert model.lm_head.weight is model.transformer["wte"].weight
    untied = make(LLAMA)
    assert untied.num_parameters() - model.num_parameters() == 64 * 32
    model.transformer["wte"].requires_grad_(False)
    assert model.num_parameters() - model.num_parameters(trainable_only=True) == 64 * 32


def test_initial_weights():
    torch.manual_seed(3)
    model = GPT(Config(**{**VARIANTS["gemma"], "n_embd": 256, "head_size": 16, "bias": True}))
    model.init_weights()
    first = copy.deepcopy(model.state_dict())
    std, layers = math.sqrt(2 / (5 * 256)), 3
    assert first["transformer.h.0.attn.qkv.weight"].std() == pytest.approx(std, rel=0.05)
    assert first["transformer.h.0.mlp.proj.weight"].std() == pytest.approx(std / math.sqrt(2 * layers), rel=0.05)
    assert first["transformer.h.1.attn.proj.bias"].abs().max() == 0
    assert first["transformer.ln_f.weight"].abs().max() == 0, "with the unit offset, 0 is the identity"
    torch.manual_seed(3)
    model.init_weights()
    again = model.state_dict()
    assert not torch.equal(first["lm_head.weight"], again["lm_head.weight"]), "the constructor drew numbers before"
    torch.manual_seed(3)
    other = GPT(model.config)
    other.init_weights()
    assert all(torch.equal(first[name], weight) for name, weight in other.state_dict().items())


@pytest.mark.parametrize("name", ["window", "gemma", "latent"])
def test_decoding_compiles_to_one_graph(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make(VARIANTS[name])
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    idx, positions = tokens(2, 14), torch.arange(14).expand(2, 14)
    with torch.inference_mode():
        whole = model(idx)
        cache = model.new_cache(2, 16)
        model(idx[:, :8], cache=cache)
        for t in range(8, 14):
            logits = compiled(idx[:, [t]], positions[:, [t]], cache=cache)
            close(logits[:, 0], whole[:, t])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- attention -------------------------------------------------------------------------------------------------------


def test_plain_causal_training_needs_no_mask():
    """SDPA's own causal kernel, which never holds a T x T tensor, serves whenever it says the same."""
    model = make(LLAMA, sliding_window_size=5, sliding_window_indices=[1, 0])
    plans = model._plan_attention(tokens(1, 5), None, None, None, torch.float32)
    assert plans[5].mask is None
    assert plans[None].mask is None
    plans = model._plan_attention(tokens(1, 6), None, None, None, torch.float32)
    assert plans[None].mask is None
    expected = torch.tensor([[[[0, 1, 1, 1, 1, 1]] * 6]])
    assert plans[5].mask.shape == expected.shape
    assert [(plans[5].mask[0, 0, t] == 0).nonzero().flatten().tolist() for t in (0, 4, 5)] == [
        [0],
        [0, 1, 2, 3, 4],
        [1, 2, 3, 4, 5],
    ]
    assert [window_of(model.config, layer) for layer in range(3)] == [5, None, 5]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (1, 6)])
def test_attention_by_its_formula(softcap, queries, keys):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, queries, 4, 8), torch.randn(2, keys, 2, 8), torch.randn(2, keys, 2, 5)
    visible = torch.ones(queries, keys, dtype=torch.bool).tril() if queries == keys else torch.rand(2, 1, 1, keys) > 0.3
    visible = visible.expand(2, 1, queries, keys)
    masks = [torch.zeros(visible.shape).masked_fill(~visible, MASKED)] + ([None] if queries == keys else [])
    for mask in masks:
        y = attend(q, k, v, mask, 0.3, softcap)
        for head in range(4):
            scores = 0.3 * q[:, :, head] @ k[:, :, head // 2].transpose(1, 2)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(~visible[:, 0], -math.inf).softmax(-1)
            close(y[:, :, head], weights @ v[:, :, head // 2])


def test_a_ring_keeps_the_newest_of_a_long_chunk():
    ring = Ring(2, 5, "cpu")
    assert ring.length == 7
    slots = ring.claim(torch.stack((torch.arange(10), torch.tensor([4, 5, 6, -1, -1, -1, -1, -1, -1, -1]))))
    assert slots.tolist() == [[7, 7, 7, 3, 4, 5, 6, 0, 1, 2], [4, 5, 6, 7, 7, 7, 7, 7, 7, 7]]
    assert ring.positions.tolist() == [[7, 8, 9, 3, 4, 5, 6, -1], [-1, -1, -1, -1, 4, 5, 6, -1]]


def test_yarn_sharpens_latent_attention():
    stretch = {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 16}
    config = Config(**VARIANTS["latent"], rope_adjustments=stretch)
    assert latent_attention_scale(config, 10) == pytest.approx(10**-0.5)
    config.rope_adjustments["mscale_all_dim"] = 0.7
    assert latent_attention_scale(config, 10) == pytest.approx(10**-0.5 * (0.07 * math.log(4) + 1) ** 2)


def test_latent_attention_through_a_replaced_projection():
    """LoRA and quantisation replace linear layers: decoding must use what the replacement computes."""

    class Doubled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    model = make(VARIANTS["latent"])
    for block in model.transformer["h"]:
        block.attn.kv_b_proj = Doubled(block.attn.kv_b_proj)
    idx = tokens(2, 8)
    cache = model.new_cache(2, 8)
    with torch.inference_mode():
        model(idx[:, :7], cache=cache)
        close(model(idx[:, 7:], torch.full((2, 1), 7), cache=cache)[:, 0], model(idx)[:, 7])


# --- every switch, against a plain reading of the architecture ---------------------------------------------------------


def plain_norm(config: Config, weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = weights.get(name + ".weight"), weights.get(name + ".bias")
    if config.norm_class_name == "LayerNorm":
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + config.norm_eps).sqrt()
        return x if weight is None else x * weight + bias
    return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * (weight + config.norm_unit_offset)


def plain_linear(weights: dict, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ weights[name + ".weight"].T
    return y + weights[name + ".bias"] if name + ".bias" in weights else y


def plain_attention(config: Config, weights: dict, layer: int, x: torch.Tensor) -> torch.Tensor:
    """One sequence x (T, C), head by head and token by token."""
    name, size, groups = f"transformer.h.{layer}.attn", config.head_size, config.n_query_groups
    q, k, v = plain_linear(weights, name + ".qkv", x).split([config.n_head * size, groups * size, groups * size], -1)
    if config.norm_qk and config.norm_qk_type == "olmo2":
        q, k = plain_norm(config, weights, name + ".norm_q", q), plain_norm(config, weights, name + ".norm_k", k)
    local = config.rope_indices is not None and config.rope_indices[layer]
    scaling = 1 if local else (config.rope_adjustments or {}).get("factor", 1) * config.rope_condense_ratio
    base, half = config.rope_local_base_freq if local else config.rope_base, config.rope_n_elem // 2

    def head(part, number, norm):
        h = part[:, number * size : (number + 1) * size]
        if config.norm_qk and config.norm_qk_type == "default":
            h = plain_norm(config, weights, f"{name}.norm_{norm}", h)
        turned = h.clone()
        for t in range(len(h)):
            for i in range(half):
                a, b = (2 * i, 2 * i + 1) if config.rope_interleave else (i, i + half)
                angle = t / scaling * base ** (-i / half)
                turned[t, a] = h[t, a] * math.cos(angle) - h[t, b] * math.sin(angle)
                turned[t, b] = h[t, b] * math.cos(angle) + h[t, a] * math.sin(angle)
        return turned

    outputs = []
    for number in range(config.n_head):
        group = number * groups // config.n_head
        scores = head(q, number, "q") @ head(k, group, "k").T / math.sqrt(config.attention_scores_scalar or size)
        if config.attention_logit_softcapping:
            scores = config.attention_logit_softcapping * torch.tanh(scores / config.attention_logit_softcapping)
        narrow = config.sliding_window_indices is not None and config.sliding_window_indices[layer]
        for t in range(len(x)):
            scores[t, t + 1 :] = -math.inf
            if narrow:
                scores[t, : max(0, t + 1 - config.sliding_window_size)] = -math.inf
        outputs.append(scores.softmax(-1) @ v[:, group * size : (group + 1) * size])
    return plain_linear(weights, name + ".proj", torch.cat(outputs, -1))


def plain_mlp(config: Config, weights: dict, layer: int, x: torch.Tensor) -> torch.Tensor:
    name = f"transformer.h.{layer}.mlp"

    def gelu(z):
        if config.gelu_approximate == "tanh":
            return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))

    if config.mlp_class_name == "GptNeoxMLP":
        return plain_linear(weights, name + ".proj", gelu(plain_linear(weights, name + ".fc", x)))
    gate = plain_linear(weights, name + ".fc_1", x)
    gate = gelu(gate) if config.mlp_class_name == "GemmaMLP" else gate * gate.sigmoid()
    return plain_linear(weights, name + ".proj", gate * plain_linear(weights, name + ".fc_2", x))


def plain_forward(config: Config, weights: dict, idx: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of one sequence (T,), written as the papers read."""
    x = weights["transformer.wte.weight"][idx]
    x = x * math.sqrt(config.n_embd) if config.scale_embeddings else x
    for layer in range(config.n_layer):
        name = f"transformer.h.{layer}"
        normed = plain_norm(config, weights, name + ".norm_1", x) if config.norm_1 else x
        attended = plain_attention(config, weights, layer, normed)
        if config.post_attention_norm:
            attended = plain_norm(config, weights, name + ".post_attention_norm", attended)
        base = x if config.parallel_residual else x + attended
        second = plain_norm(config, weights, name + ".norm_2", base) if config.norm_2 else base
        out = plain_mlp(config, weights, layer, normed if config.shared_attention_norm else second)
        if config.post_mlp_norm:
            out = plain_norm(config, weights, name + ".post_mlp_norm", out)
        x = x + attended + out
    z = plain_linear(weights, "lm_head", plain_norm(config, weights, "transformer.ln_f", x))
    cap = config.final_logit_softcapping
    return cap * torch.tanh(z / cap) if cap else z


SWITCHES = {
    "phi": {
        **VARIANTS["neox"],
        "shared_attention_norm": True,
        "lm_head_bias": True,
        "gelu_approximate": "tanh",
        "rotary_percentage": 0.5,
    },
    "neox sequential": {**VARIANTS["neox"], "parallel_residual": False},
    "falcon": {**VARIANTS["neox"], "n_query_groups": 1, "bias": False, "rotary_percentage": 1.0},
    "qwen2": {**LLAMA, "attn_bias": True},
    "qwen3": {**LLAMA, "norm_qk": True, "head_size": 16},
    "biases": {**LLAMA, "bias": True},
    "condensed": {**LLAMA, "rope_condense_ratio": 4},
    "interleaved": {**LLAMA, "rope_interleave": True, "rotary_percentage": 0.5},
    "olmo": {**LLAMA, "norm_class_name": "LayerNorm", "norm_affine": False},
    "scaled scores": {**VARIANTS["gemma"], "attention_scores_scalar": 3, "gelu_approximate": "tanh"},
    **{name: VARIANTS[name] for name in ("llama", "neox", "window", "gemma", "olmo2")},
}


@pytest.mark.parametrize("name", SWITCHES)
def test_against_the_plain_reading(name):
    model = make(SWITCHES[name], n_layer=2)
    idx = tokens(1, 9)
    with torch.no_grad():
        expected = plain_forward(model.config, model.state_dict(), idx[0])
        close(model(idx)[0], expected, 1e-4)


# --- embeddings, norms, logits ---------------------------------------------------------------------------------------


def test_embeddings_are_scaled_and_logits_capped():
    plain, scaled = make(LLAMA), make(LLAMA, scale_embeddings=True)
    plain.transformer["wte"].weight.data.mul_(math.sqrt(32))
    close(scaled(tokens(1, 5)), plain(tokens(1, 5)))
    capped = make(LLAMA, final_logit_softcapping=0.5)
    z = scaled.lm_head(capped.hidden_states(tokens(1, 5)))
    close(capped(tokens(1, 5)), 0.5 * torch.tanh(z / 0.5))


def test_rms_norm_by_its_formula_in_every_dtype():
    x = 5 * torch.randn(3, 16)
    norm = RMSNorm(16, eps=0.1)
    offset = RMSNorm(16, eps=0.1, unit_offset=True)
    close(norm(x), offset(x))  # both start as the identity
    with torch.no_grad():
        norm.weight.copy_(torch.randn(16))
        offset.weight.copy_(norm.weight - 1)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
    close(norm(x), expected)
    close(offset(x), expected)
    half = norm(x.bfloat16())  # weights stay in float32, as under autocast
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.02)
    # Large values whose squares float16 cannot hold.
    close(norm.half()(300 * x.half()).float(), norm.float()(300 * x.half().float()), 0.01)


def test_olmo_norms_have_no_weights():
    model = make({**LLAMA, "norm_class_name": "LayerNorm", "norm_affine": False})
    assert not [name for name in model.state_dict() if "norm" in name or "ln_f" in name]
    x = model.hidden_states(tokens(1, 7))
    close(x.mean(-1), torch.zeros(1, 7))


# --- rotary embedding ------------------------------------------------------------------------------------------------


def frequencies(**values) -> torch.Tensor:
    return rope_frequencies(Config(**{**LLAMA, "head_size": 16, **values}))[0]


def test_frequencies_of_every_variant():
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    close(frequencies()[0], plain)
    close(frequencies(rope_condense_ratio=4)[0], plain / 4)
    close(frequencies(rope_adjustments={"factor": 8.0})[0], plain / 8)
    both = frequencies(rope_local_base_freq=100, rope_adjustments={"factor": 8.0})
    close(both[0], plain / 8)
    close(both[1], 100.0 ** -(torch.arange(0, 16, 2) / 16))
    assert frequencies(rotary_percentage=0.25).shape == (1, 2)


def test_positions_stay_in_float32_under_a_default_type_of_16_bits():
    """With a whole number as the ratio, too, and far positions, which bfloat16 cannot tell apart."""
    config = Config(**{**LLAMA, "head_size": 16, "rope_condense_ratio": 4, "block_size": 8192})
    expected = RotaryEmbedding(config)(torch.tensor([[4000, 4001]]), 8192)[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = RotaryEmbedding(config)(torch.tensor([[4000, 4001]]), 8192)[0]
        logits = GPT(config)(torch.tensor([[1, 2, 3]]))
    finally:
        torch.set_default_dtype(torch.float32)
    assert logits.dtype == torch.bfloat16
    for part, of in zip(found[:2], expected[:2], strict=True):
        assert part.dtype == torch.float32
        assert torch.equal(part, of)


def test_llama3_stretches_slow_rotations_only():
    stretch = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 64}
    plain, stretched = frequencies()[0], frequencies(rope_adjustments=stretch)[0]
    turns = 64 * plain / (2 * math.pi)
    close(stretched[turns > 4], plain[turns > 4])
    close(stretched[turns < 1], plain[turns < 1] / 8)
    between = (turns >= 1) & (turns <= 4)
    assert between.any()
    assert ((stretched < plain) & (stretched > plain / 8))[between].all()


def test_yarn_keeps_fast_rotations_and_raises_the_magnitude():
    stretch = {"factor": 4.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 1024}
    plain, stretched = frequencies()[0], frequencies(rope_adjustments=stretch)[0]
    turns = 1024 * plain / (2 * math.pi)
    close(stretched[turns > 60], plain[turns > 60])
    close(stretched[turns < 0.5], plain[turns < 0.5] / 4)

    def magnitude(**more):
        return rope_frequencies(Config(**LLAMA, rope_adjustments={**stretch, **more}))[1]

    assert magnitude() == [pytest.approx(0.1 * math.log(4) + 1)]
    assert magnitude(attention_factor=1.5) == [1.5]
    assert magnitude(mscale=1.0, mscale_all_dim=1.0) == [1.0]


@pytest.mark.parametrize("interleave", [False, True])
def test_rotation_turns_pairs_by_position_times_frequency(interleave):
    model = make(LLAMA, rope_interleave=interleave, rotary_percentage=0.5)
    position, size = 11, 4  # 4 of the 8 values of a head
    rotation, _ = model.rope(torch.tensor([[position]]), 1)
    x = torch.randn(1, 1, 3, 8)
    y = rotate(x, rotation, interleave)
    pairs = [(0, 1), (2, 3)] if interleave else [(0, 2), (1, 3)]
    for (a, b), frequency in zip(pairs, model.rope.frequencies[0].tolist(), strict=True):
        before, after = torch.complex(x[..., a], x[..., b]), torch.complex(y[..., a], y[..., b])
        close(after, before * complex(math.cos(position * frequency), math.sin(position * frequency)))
    assert torch.equal(y[..., size:], x[..., size:])


def test_rotation_at_a_far_position_is_exact_in_bfloat16():
    """Angles are made of float32 positions: bfloat16 would not even tell 1001 from 1000."""
    model = make(LLAMA).to(torch.bfloat16)
    far, _ = model.rope(torch.tensor([[1000, 1001]]), 2)
    assert far.cos.dtype == torch.float32
    close(far.cos[0, :, 0, 0], torch.tensor([math.cos(1000), math.cos(1001)]), 1e-4)


# --- mixture of experts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [MOE, {**MOE, "softmax_after_topk": False}, GROUPED], ids=["softmax", "all", "grouped"]
)
def test_grouping_tokens_by_expert_equals_the_formula(values):
    torch.manual_seed(0)
    moe = LLaMAMoE(Config(**values))
    if moe.gate.e_score_correction_bias is not None:
        moe.gate.e_score_correction_bias.normal_(0, 0.3)
    x = torch.randn(2, 5, 32)
    expected = torch.zeros_like(x)
    with torch.no_grad():
        for b in range(2):
            for t in range(5):
                weights, chosen = route(moe.gate, x[b, t][None])
                for weight, expert in zip(weights[0], chosen[0], strict=True):
                    expected[b, t] += weight * moe.experts[expert](x[b, t])
                if moe.shared_experts is not None:
                    expected[b, t] += moe.shared_experts(x[b, t])
        close(moe(x), expected)
        close(moe(x[:1, :1]), expected[:1, :1])


def test_softmax_routing():
    router = Router(Config(**MOE))
    x = torch.randn(7, 32)
    scores = router(x)
    weights, chosen = route(router, x)
    assert torch.equal(chosen, scores.topk(2).indices)
    close(weights, scores.gather(1, chosen).softmax(-1))
    close(weights.sum(-1), torch.ones(7))
    over_all = Router(Config(**{**MOE, "softmax_after_topk": False}))
    over_all.load_state_dict(router.state_dict())
    close(route(over_all, x)[0], scores.softmax(-1).gather(1, chosen))


def test_grouped_routing_step_by_step():
    router = Router(Config(**GROUPED))
    router.e_score_correction_bias.normal_(0, 0.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, 32)
    weights, chosen = route(router, x)
    for token in range(9):
        scores = router(x[token]).sigmoid()
        biased = scores + router.e_score_correction_bias
        groups = [biased[2 * g : 2 * g + 2].sum() for g in range(4)]  # 8 experts in 4 groups, the best 2 of each
        best = sorted(range(4), key=lambda g: -groups[g])[:2]
        allowed = [e for g in best for e in (2 * g, 2 * g + 1)]
        expected = sorted(allowed, key=lambda e: -biased[e])[:2]
        assert chosen[token].tolist() == expected
        share = scores[expected] / scores[expected].sum()
        close(weights[token], 2.5 * share)


def test_first_layers_of_a_mixture_may_be_dense():
    kinds = [type(block.mlp).__name__ for block in make(GROUPED).transformer["h"]]
    assert kinds == ["LLaMAMLP", "LLaMAMoE", "LLaMAMoE"]
    names = make(GROUPED).state_dict()
    assert "transformer.h.1.mlp.gate.e_score_correction_bias" in names
    assert names["transformer.h.1.mlp.shared_experts.fc_1.weight"].shape == (40, 32)
