"""Keys and values in 8 bits: near to those in full, in a fraction of the memory, with all that a cache can do."""

import json
import math
from dataclasses import replace

import pytest
import torch

from litgpt import LLM
from litgpt.__main__ import main
from litgpt.config import Config
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.generation.speculative import SpeculativeEngine
from litgpt.kv_cache import Int8LayerCache, KVCache, LayerCache, layer_cache_of, to_int8
from litgpt.model import GPT
from litgpt.runs.memory_estimate import Usage, estimate_memory
from litgpt.sources.meta import meta_model
from tests import checkpoint_files

PLAIN = Config(
    block_size=256, n_layer=2, n_embd=64, n_head=4, n_query_groups=2, padded_vocab_size=96, rotary_percentage=1.0,
    intermediate_size=96, mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", bias=False,
)  # fmt: skip
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
CONFIGS = {
    "plain": PLAIN,
    "windows": replace(PLAIN, sliding_window_size=12, sliding_window_indices=[1, 0]),
    "written out": replace(PLAIN, attention_logit_softcapping=20.0),
    "latent": replace(
        PLAIN, latent_attention=LATENT, head_size=24, n_query_groups=4, rotary_percentage=1 / 3, norm_qk=False
    ),
}


def make(config: Config = PLAIN, kind: str | None = "int8") -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval()
    model.init_weights()
    for parameter in model.parameters():
        parameter.data.mul_(2)  # answers that depend on what was said before
    model.layer_cache = layer_cache_of(kind)
    return model


def prompt(length: int, seed: int = 1) -> list[int]:
    return torch.randint(1, 96, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def scores(engine: Engine, ids: list[int], answer: int = 12) -> list[float]:
    """Log-probabilities of a prompt's tokens and of an answer's."""
    found = []
    for output in engine.generate([Request(ids, answer, Sampling(0), logprobs=1, score_from=1)]):
        found += [one.logprob for one in (*output.prompt_logprobs, *output.logprobs)]
    return found


# --- the arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_is_off_by_half_a_step_at_most(dtype):
    torch.manual_seed(0)
    values = torch.randn(3, 5, 2, 64) * torch.logspace(-1, 2, 5)[:, None, None]
    codes, scales = to_int8(values, dtype)
    assert (codes.dtype, codes.shape, scales.dtype, scales.shape) == (torch.int8, values.shape, dtype, (3, 5, 2))
    step = values.abs().amax(-1, keepdim=True) / 127
    # The largest value of all may be clamped where its scale was rounded down.
    off = {torch.float32: 0.501, torch.float16: 0.57, torch.bfloat16: 0.76}[dtype]
    assert ((codes * scales.float()[..., None] - values).abs() <= off * step).all()
    assert codes.abs().amax(-1).min() > 120  # all of the range is used


def test_nothing_is_kept_as_nothing():
    codes, scales = to_int8(torch.zeros(2, 3, 1, 8), torch.bfloat16)
    assert not codes.any()
    assert (codes * scales[..., None]).isfinite().all()


# --- in the model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_in_chunks_and_an_answer_are_near_to_those_in_full(name):
    """The prompt is longer than a chunk, and than the window, which wraps round several times."""
    ids = prompt(70)
    full = scores(Engine(make(CONFIGS[name], None), prefill_chunk=16), ids)
    model = make(CONFIGS[name])
    found = scores(Engine(model, prefill_chunk=16), ids)
    assert len(found) == len(full) == 69 + 12
    difference = (torch.tensor(found) - torch.tensor(full))[: 69 + 1].abs()  # later answers may part
    assert 0 < difference.max() < 0.15
    assert difference.mean() < 0.02
    cache = model.new_cache(1, 64)
    assert {tensor.dtype for layer in cache.layers for tensor in layer.tensors} == {torch.int8, torch.float32}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_chunks_of_a_prompt_make_no_difference(name):
    model, ids = make(CONFIGS[name]), torch.tensor([prompt(40)])
    whole, parts = model.new_cache(1, 64), model.new_cache(1, 64)
    with torch.inference_mode():
        expected = model(ids, cache=whole)
        found = [model(ids[:, :23], cache=parts), model(ids[:, 23:], torch.arange(23, 40)[None], cache=parts)]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-3, rtol=2e-3)


def test_memory_is_half_and_every_count_knows():
    config = replace(PLAIN, n_embd=256, head_size=64)
    sizes = {}
    for kind in (None, "int8"):
        model = make(config, kind).to(torch.bfloat16)
        tensors = sum(t.nbytes for layer in model.new_cache(2, 255).layers for t in layer.tensors)
        engine = Engine(model)
        meta = meta_model(config, dtype=torch.bfloat16).to(torch.bfloat16)
        meta.layer_cache = layer_cache_of(kind)
        plan = estimate_memory(meta, Usage(False, None, 2, 255))["kv_cache"]
        engine.complete([Request(prompt(20), 4, Sampling(0))])
        sizes[kind] = torch.tensor([tensors, engine.bytes_needed(256), engine.cache_size, plan])
    share = sizes["int8"] / sizes[None]
    assert share.min() == pytest.approx((64 + 2) / 128)  # a scale of two bytes for 64 codes
    assert share.max() < 0.53  # which slot is whose counts, too


def test_twice_the_requests_fit_into_the_same_memory():
    """What the server admits by: the requests that run at a time in a given memory."""
    running = {}
    for kind in (None, "int8"):
        config = replace(PLAIN, n_embd=256, head_size=64)
        engine = Engine(make(config, kind).to(torch.bfloat16), cache_bytes=1)
        plain = Engine(make(config, None).to(torch.bfloat16), cache_bytes=1).bytes_needed(128)
        engine.cache_bytes = 4 * plain
        for seed in range(12):
            engine.submit(Request(prompt(20, seed), 90, Sampling(0)))
        for _ in range(3):
            engine.step()
        running[kind] = engine.running
    assert running == {None: 4, "int8": 7}


# --- in the engine


@pytest.mark.parametrize("name", ["plain", "windows"])
def test_a_known_prefix_gives_the_answer_that_it_gave(name):
    model = make(CONFIGS[name])
    engine, ids = Engine(model), prompt(60)
    first = engine.complete([Request(ids, 8, Sampling(0))])[0]
    outputs = list(engine.generate([Request([*ids, *first], 8, Sampling(0))]))
    again = [token for output in outputs for token in output.token_ids]
    assert outputs[0].cached_tokens >= 60
    # The same without the prefix cache, chunk by chunk.
    assert again == Engine(model, prefill_chunk=1).complete([Request([*ids, *first], 8, Sampling(0))])[0]


def test_a_prefix_is_copied_with_its_scales():
    model = make()
    engine, shared = Engine(model), prompt(40)
    tails = [prompt(5, seed) for seed in (2, 3, 4)]
    engine.complete([Request([*shared, *tails[0]], 4, Sampling(0))])
    requests = [Request([*shared, *tail], 6, Sampling(0)) for tail in tails]
    outputs = list(engine.generate(requests))
    known = {output.request: output.cached_tokens for output in outputs if output.cached_tokens}
    assert set(known) == {0, 1, 2}
    answers = [[t for o in outputs if o.request == index for t in o.token_ids] for index in range(3)]
    for request, answer in zip(requests, answers, strict=True):
        alone = scores(Engine(model), [*request.prompt, *answer], 1)
        full = scores(Engine(make(kind=None)), [*request.prompt, *answer], 1)
        assert max(abs(a - b) for a, b in zip(alone, full, strict=True)) < 0.15


def test_a_cancelled_slot_is_used_again_without_a_trace():
    model = make(CONFIGS["windows"])
    engine = Engine(model, max_slots=2)
    cancelled = engine.submit(Request(prompt(50, 7), 60, Sampling(0)))
    kept = engine.submit(Request(prompt(20, 8), 30, Sampling(0)))
    answers = {kept: []}
    for step in range(40):
        if step == 5:
            engine.cancel(cancelled)
            answers[engine.submit(Request(prompt(30, 9), 20, Sampling(0)))] = []
        for output in engine.step():
            if output.request in answers:
                answers[output.request] += output.token_ids
    alone = [
        Engine(model).complete([Request(prompt(n, s), c, Sampling(0))])[0] for n, s, c in ((20, 8, 30), (30, 9, 20))
    ]
    assert list(answers.values()) == alone


def test_many_at_a_time_answer_as_each_alone():
    model = make(CONFIGS["windows"])
    requests = [Request(prompt(5 + 7 * seed, seed), 20, Sampling(0)) for seed in range(6)]
    assert Engine(model).complete(requests) == [Engine(model).complete([request])[0] for request in requests]


def test_a_cache_that_grows_and_moves_keeps_codes_and_scales():
    model, ids = make(CONFIGS["windows"]), torch.tensor([prompt(30), prompt(30, 2)])
    caches = [model.new_cache(2, 64), model.new_cache(2, 40)]
    with torch.inference_mode():
        for cache in caches:
            model(ids, cache=cache)
        caches[1].resize([1, 0], 4, 64)
        step = torch.tensor([[5], [6]])
        expected = model(step, torch.full((2, 1), 30), cache=caches[0])
        found = model(step.flip(0), torch.full((2, 1), 30), cache=caches[1].select(slice(0, 2)))
    torch.testing.assert_close(found.flip(0), expected)


def test_drafts_are_taken_back():
    model = make(CONFIGS["windows"])
    ids = prompt(10) * 3
    assert SpeculativeEngine(model, count=3).complete([Request(ids, 20, Sampling(0))]) == Engine(
        model, prefill_chunk=1
    ).complete([Request(ids, 20, Sampling(0))])


# --- as users ask for it


def test_the_python_api_keeps_it_where_the_model_moves(tmp_path):
    directory = checkpoint_files.chat_model(tmp_path / "tiny")
    llm = LLM.load(directory, precision="32-true", kv_cache="int8")
    assert llm.model.layer_cache is Int8LayerCache
    text = llm.generate("Hello", top_k=1, max_new_tokens=12)
    llm.distribute("cpu", precision="32-true")
    assert llm.model.layer_cache is Int8LayerCache
    assert llm.generate("Hello", top_k=1, max_new_tokens=12) == text
    with pytest.raises(ValueError, match=r"kv_cache='int4' is unknown. Give int8, or leave it out"):
        LLM.load(directory, kv_cache="int4")
    assert LLM.load(directory).model.layer_cache is LayerCache


def test_two_processes_share_heads_in_8_bits(tmp_path):
    directory = checkpoint_files.chat_model(tmp_path / "tiny")
    alone = LLM.load(directory, precision="32-true", kv_cache="int8")
    expected = alone.generate("Hello", top_k=1, max_new_tokens=12)
    alone.distribute("cpu", devices=2, generate_strategy="tensor_parallel", precision="32-true")
    assert isinstance(alone.model.new_cache(1, 8), KVCache)
    assert alone.generate("Hello", top_k=1, max_new_tokens=12) == expected
    alone.placement.close()


def test_commands_take_it(tmp_path, capsys, monkeypatch):
    directory = checkpoint_files.bare_model(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 20)
    made = []
    plain = Engine.make_runner
    monkeypatch.setattr(Engine, "make_runner", lambda self, slots: made.append(self.model) or plain(self, slots))

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([*map(str, words)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert run("generate", directory, "--max_new_tokens", 4, "--kv_cache", "int8")
    assert [model.layer_cache for model in made] == [Int8LayerCache]
    plans = [
        json.loads(run("validate", directory, "--json", *options))["memory"]["methods"]["inference"]["parts"][
            "kv_cache"
        ]
        for options in ((), ("--kv_cache", "int8"))
    ]
    assert plans[1] < 0.8 * plans[0]
    for options in ((), ("--kv_cache", "int8"), ("--kv_cache", "int8", "--devices", "2")):
        folder = tmp_path / "-".join(["results", *options])
        perplexity = ("--tasks", "perplexity", "--data", text, "--precision", "32-true", "--out_dir", folder)
        run("evaluate", directory, *perplexity, *options)
    found = [
        json.loads(next(tmp_path.glob(f"{name}/results*.json")).read_text())
        for name in ("results", "results---kv_cache-int8", "results---kv_cache-int8---devices-2")
    ]
    figures = [math.log(result["results"]["perplexity"]["perplexity,none"]) for result in found]
    assert figures[0] != figures[1] == pytest.approx(figures[0], rel=0.02)
    assert figures[2] == pytest.approx(figures[1], rel=1e-5)
    assert main(["generate", str(directory), "--kv_cache", "fp8"]) == 1
    assert "--kv_cache 'fp8' is unknown. Give int8" in capsys.readouterr().err
