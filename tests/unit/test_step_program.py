"""The step that the kernels do in one call: the model's logits, hidden states and cache, for each architecture."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.config import Config
from litgpt.generation.step_program import MAX_TOKENS, StepProgram, why_not
from litgpt.kernels import build, levels, native
from litgpt.model import GPT
from litgpt.quantization.layers import replace_linears
from tests import shapes

pytestmark = pytest.mark.skipif(
    build.find_compiler() is None or not levels.supported(),
    reason="there is no C++ compiler, or no kernels for this CPU",
)
SIZES = {
    "block_size": 512,
    "n_layer": 3,
    "n_embd": 96,
    "n_head": 6,
    "n_query_groups": 2,
    "padded_vocab_size": 200,
    "intermediate_size": 160,
}
WINDOWS = {"sliding_window_size": 24, "sliding_window_indices": [1, 0, 1]}
ARCHITECTURES = {
    "Llama": shapes.LLAMA,
    "Llama tied, with biases": {**shapes.LLAMA, "tie_embeddings": True, "attn_bias": True, "mlp_bias": True},
    "Qwen 3": {**shapes.LLAMA, "norm_qk": True, "head_size": 24},
    "OLMo 2": {
        **shapes.LLAMA,
        "norm_qk": True,
        "norm_qk_type": "olmo2",
        "norm_1": False,
        "norm_2": False,
        "post_attention_norm": True,
        "post_mlp_norm": True,
    },
    "Gemma 2": {
        **shapes.LLAMA,
        **WINDOWS,
        "norm_unit_offset": True,
        "post_attention_norm": True,
        "post_mlp_norm": True,
        "scale_embeddings": True,
        "mlp_class_name": "GemmaMLP",
        "gelu_approximate": "tanh",
        "attention_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "Gemma 3": {
        **shapes.LLAMA,
        **WINDOWS,
        "norm_qk": True,
        "rope_local_base_freq": 50,
        "rope_indices": [1, 0, 1],
        "rope_adjustments": {"factor": 4.0},
    },
    "gpt-oss without experts": {**shapes.LLAMA, **WINDOWS, "attention_sinks": True, "swiglu_limit": 0.5},
    "GPT-NeoX": {
        "norm_class_name": "LayerNorm",
        "mlp_class_name": "GptNeoxMLP",
        "bias": True,
        "parallel_residual": True,
        "shared_attention_norm": False,
        "rotary_percentage": 0.25,
        "n_query_groups": 6,
    },
    "Phi": {
        "norm_class_name": "LayerNorm",
        "mlp_class_name": "GptNeoxMLP",
        "bias": True,
        "lm_head_bias": True,
        "parallel_residual": True,
        "shared_attention_norm": True,
        "rotary_percentage": 0.5,
        "gelu_approximate": "tanh",
    },
    "odd sizes": {
        **shapes.LLAMA,
        "n_embd": 70,
        "n_head": 7,
        "head_size": 10,
        "n_query_groups": 1,
        "intermediate_size": 33,
    },
    "interleaved, scaled": {
        **shapes.LLAMA,
        "rope_interleave": True,
        "residual_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "logits_scaling": 4.0,
        "clip_qkv": 0.5,
    },
    "no rotation in a layer": {**shapes.LLAMA, "nope_indices": [0, 1, 0]},
}


def make(name: str = "Llama", seed: int = 0, **more: object) -> GPT:
    torch.manual_seed(seed)
    model = GPT(Config(**{**SIZES, **ARCHITECTURES[name], **more})).eval()
    model.init_weights()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms and biases that do something
            nn.init.normal_(parameter, 0.5, 0.3)
    return model.requires_grad_(False)


def program_of(model: GPT) -> StepProgram:
    assert why_not(model) is None
    assert native.library() is not None
    return StepProgram(model)


@torch.inference_mode()
def largest_difference(model: GPT, program: StepProgram, steps: int = 12, tokens: int = 1) -> float:
    """Of the logits, relative to the largest, and of the caches: rows at different positions in the middle of a cache,
    windows that wrap, an idle row, another read length."""
    worst = [0.0]
    for max_length, length in ((60, None), (300, 128)):
        whole = [model.new_cache(5, max_length, spare=tokens - 1) for _ in range(2)]
        ids = torch.randint(0, 200, (5, 30))
        places = torch.arange(30).repeat(5, 1)
        places[1, 7:] = places[3, 20:] = -1
        for cache in whole:
            model(ids, places, cache=cache)
        plain, fast = (cache.select(slice(1, 5)) for cache in whole)
        plain.read_only(length)
        fast.read_only(length)
        positions = torch.tensor([[7], [30], [20], [-1]]) + torch.arange(tokens)
        positions[3] = -1
        for _ in range(steps):
            new = torch.randint(0, 200, (4, tokens))
            expected = model(new, positions, cache=plain).float()
            found = program(new, positions, cache=fast)
            assert found.dtype == torch.float32
            assert not found[3].any()
            worst.append(((found - expected)[:3].abs().max() / expected.abs().max()).item())
            positions = torch.where(positions < 0, -1, positions + tokens)
        # What the model writes for an idle row lies in the last slot, which is never seen.
        for one, other in zip(*(cache.tensors() for cache in whole), strict=True):
            assert one.dtype == other.dtype
            last = plain.rings[None].length if None in plain.rings else -1
            keep = min(last, one.size(1) - 1)
            worst.append((one[:, :keep].float() - other[:, :keep].float()).abs().max().item() / 10)
    return max(worst)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_step_is_the_models_step(name):
    model = make(name)
    assert largest_difference(model, program_of(model)) < 1e-4
    model.to(torch.bfloat16)
    assert largest_difference(model, program_of(model)) < 0.05


@pytest.mark.parametrize("level", [pytest.param(level, id=level.name) for level in levels.supported()])
def test_at_every_level(level, monkeypatch):
    monkeypatch.setattr(native, "_library", native.load(level))
    for name in ("Gemma 2", "odd sizes"):
        for kind in (None, "int8", "int4"):
            model = make(name)
            if kind is not None:
                replace_linears(model, kind, torch.float32)
            assert largest_difference(model, program_of(model), steps=3) < 1e-3


def test_many_keys_are_shared_out_and_merged():
    model = make("Gemma 2", block_size=2048)
    program = program_of(model)
    with torch.inference_mode():
        caches = [model.new_cache(2, 1500) for _ in range(2)]
        ids = torch.randint(0, 200, (2, 1000))
        for cache in caches:
            model.hidden_states(ids, cache=cache)
        caches[0].rewind(0, 300)
        caches[1].rewind(0, 300)
        positions = torch.tensor([[300], [1000]])
        expected = model(ids[:, :1], positions, cache=caches[0])
        found = program(ids[:, :1], positions, cache=caches[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_several_tokens_of_each_row_at_a_time(name):
    model = make(name)
    assert largest_difference(model, program_of(model), steps=3, tokens=4) < 1e-4


@torch.inference_mode()
def test_a_short_prompt_is_prefilled_in_an_empty_row():
    model = make("Gemma 3")
    program = program_of(model)
    caches = [model.new_cache(3, 100) for _ in range(2)]
    for cache in caches:
        model(torch.arange(3 * 20).view(3, 20), cache=cache)  # what requests before have left
    ids = torch.randint(0, 200, (2, 10))
    places = torch.arange(10).repeat(2, 1)
    places[0, 6:] = -1
    rows = torch.tensor([2, 0])
    expected = model.hidden_states(ids, places, cache=caches[0].select(rows, True))
    found = program.hidden_states(ids, places, cache=caches[1].select(rows, True))
    torch.testing.assert_close(found[places >= 0], expected[places >= 0], rtol=1e-4, atol=1e-4)
    assert program._operations is not None  # it was not the model's own


@pytest.mark.parametrize("token", [-1, 2**40])
def test_a_token_that_there_is_not_is_refused(token):
    """As torch's embedding does: the kernels would read what lies beside it."""
    model = make()
    program, cache = program_of(model), model.new_cache(2, 20)
    with pytest.raises(IndexError, match="is not in the vocabulary"):
        program.hidden_states(torch.tensor([[3, 4, token]]), None, cache=cache.select(slice(0, 1), True))
    ids, places = torch.tensor([[3, token]]), torch.tensor([[0, -1]])  # where there is no token, anything may stand
    found = program.hidden_states(ids, places, cache=cache.select(slice(1, 2), True))
    assert found[0, 0].isfinite().all()


def test_weights_may_change_in_place():
    model = make()
    program = program_of(model)
    assert largest_difference(model, program, steps=1) < 1e-4
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert largest_difference(model, program, steps=1) < 1e-4


def test_a_cache_that_has_moved_is_found_again():
    model = make()
    program = program_of(model)
    with torch.inference_mode():
        cache, like = model.new_cache(2, 40), model.new_cache(2, 40)
        ids = torch.arange(20).view(2, 10)
        for one in (cache, like):
            model(ids, cache=one)
        for position, length in ((10, 40), (11, 200), (12, 80)):
            cache.resize([0, 1], 2, length)
            like.resize([0, 1], 2, length)
            places = torch.full((2, 1), position)
            expected = model(ids[:, :1], places, cache=like)
            torch.testing.assert_close(program(ids[:, :1], places, cache=cache), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_cache_that_the_engine_has_let_go_of_is_freed():
    model = make()
    program, cache = program_of(model), model.new_cache(2, 64)
    model.hidden_states(torch.tensor([[1, 2], [3, 4]]), cache=cache)
    rows = cache.select(slice(0, 1))
    program(torch.tensor([[5]]), torch.tensor([[2]]), cache=rows)
    held = weakref.ref(cache.layers[0].tensors[0])
    assert held() is not None
    del cache, rows
    assert held() is None


def test_what_is_not_finite_stays_in_its_row():
    model = make()
    program = program_of(model)
    with torch.inference_mode():
        cache = model.new_cache(2, 64)
        model(torch.tensor([[1, 2], [3, 4]]), cache=cache)
        cache.layers[1].tensors[1][0, 0] = torch.nan
        logits = program(torch.tensor([[5], [6]]), torch.tensor([[2], [2]]), cache=cache)
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()


def test_what_the_kernels_do_not_know_runs_layer_by_layer():
    assert why_not(make()) is None
    tuned = make()
    apply_lora(tuned, LoRASettings())
    assert "Merge them" in (why_not(tuned) or "")
    assert "mixtures" in (
        why_not(GPT(replace(make().config, mlp_class_name="LLaMAMoE", n_expert=2, n_expert_per_token=1))) or ""
    )
    assert "float64" in (why_not(make().double()) or "")
    hooked = make()
    hooked.transformer.h[1].register_forward_hook(lambda *_: None)
    assert "several devices" in (why_not(hooked) or "")
    model = make(**WINDOWS)
    program = program_of(model)
    with torch.inference_mode():
        cache = model.new_cache(1, 100)
        cache.is_empty = False
        assert not program.suits(torch.zeros(1, 10, dtype=torch.int64), cache)  # the window has no room for ten
        assert program.suits(torch.zeros(1, 1, dtype=torch.int64), cache)
        assert not program.suits(torch.zeros(1, MAX_TOKENS + 1, dtype=torch.int64), cache)
        with torch.autocast("cpu", torch.bfloat16):
            assert not program.suits(torch.zeros(1, 1, dtype=torch.int64), cache)


def test_while_the_library_is_being_built_the_model_goes_on(monkeypatch):
    model = make()
    program = StepProgram(model)
    monkeypatch.setattr(native, "library", lambda wait=True: None)
    with torch.inference_mode():
        caches = [model.new_cache(1, 64) for _ in range(2)]
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(program.hidden_states(ids, None, cache=caches[0]), model.hidden_states(ids, cache=caches[1]))
        step = ids[:, :1], torch.tensor([[3]])
        assert torch.equal(program(*step, cache=caches[0]), model(*step, cache=caches[1]))
