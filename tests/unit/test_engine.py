"""The engine against the plain model: whole forward passes, one token at a time."""

from functools import partial

import pytest
import torch

from litgpt.config import Config
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.model import GPT

GREEDY = Sampling(temperature=0)
PROMPTS = [[1, 2, 3], list(range(40)), [5] * 17, [7]]


def tiny_model(**changes) -> GPT:
    config = Config(
        name="tiny",
        **{
            "block_size": 128,
            "n_layer": 3,
            "n_embd": 32,
            "n_head": 4,
            "n_query_groups": 2,
            "vocab_size": 97,
            "padded_vocab_size": 97,
            "rotary_percentage": 1.0,
            "parallel_residual": False,
            "bias": False,
            "norm_class_name": "RMSNorm",
            "mlp_class_name": "LLaMAMLP",
            "intermediate_size": 64,
            **changes,
        },
    )
    torch.manual_seed(0)
    model = GPT(config).eval()
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the next token depends on what was read
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


@pytest.fixture(scope="module")
def windowed() -> GPT:
    return tiny_model(sliding_window_size=12, sliding_window_indices=[1, 0, 1])


@torch.inference_mode()
def plain(model: GPT, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("chunk", [1, 7, 16, 1024])
@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_a_batch_of_unequal_prompts_continues_each_as_it_would_alone(request, kind, chunk):
    model = request.getfixturevalue(kind)
    expected = [plain(model, prompt, 30) for prompt in PROMPTS]
    engine = Engine(model, prefill_chunk=chunk)
    requests = [Request(prompt, 30, GREEDY) for prompt in PROMPTS]
    assert engine.complete(requests) == expected
    assert [engine.complete([one])[0] for one in requests] == expected
    assert [list(engine.stream(one)) for one in requests] == expected
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)


def test_each_row_has_its_own_length(model):
    lengths = [3, 30, 1, 12]
    requests = [Request(prompt, length, GREEDY) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    expected = [plain(model, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    assert Engine(model).complete(requests) == expected


def test_tokens_come_one_by_one(model):
    stream = Engine(model).stream(Request(PROMPTS[0], 30, GREEDY))
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        for count in range(1, 6):
            next(stream)
            assert len(calls) == count
    finally:
        handle.remove()


def test_a_stop_sequence_ends_the_answer_and_is_no_part_of_it(model):
    expected = plain(model, PROMPTS[0], 30)
    stop = expected[5:8]
    outputs = list(Engine(model).generate([Request(PROMPTS[0], 30, GREEDY, stops=[[96, 96], stop])]))
    assert [token for output in outputs for token in output.token_ids] == expected[:5]
    assert outputs[-1].finish_reason == "stop"
    assert all(output.finish_reason is None for output in outputs[:-1])


def test_what_only_begins_like_a_stop_sequence_is_given_in_the_end(model):
    expected = plain(model, PROMPTS[0], 10)
    almost = [*expected[2:5], 96 if expected[5] != 96 else 95]
    outputs = list(Engine(model).generate([Request(PROMPTS[0], 10, GREEDY, stops=[almost, [*expected[-2:], 96]])]))
    assert [token for output in outputs for token in output.token_ids] == expected
    assert [] in [output.token_ids for output in outputs]
    assert outputs[-1].finish_reason == "length"


def test_a_finished_row_does_not_disturb_the_others(model):
    expected = [plain(model, prompt, 20) for prompt in PROMPTS]
    stops = [[[expected[0][2]]], [], [], []]
    requests = [Request(prompt, 20, GREEDY, stops=stop) for prompt, stop in zip(PROMPTS, stops, strict=True)]
    positions = []
    handle = model.register_forward_pre_hook(lambda _, args: positions.append(args[1][:, 0].tolist()))
    try:
        outputs = Engine(model).complete(requests)
    finally:
        handle.remove()
    length = expected[0].index(expected[0][2])
    assert outputs[0] == expected[0][:length]
    assert outputs[1:] == expected[1:]
    assert [step[0] for step in positions] == [*range(3, 3 + length), *[-1] * (19 - length)]
    assert [step[1] for step in positions] == [*range(40, 59)]


def test_a_sampled_row_depends_on_its_seed_alone(model):
    sampling = Sampling(0.9, 20, 0.95)
    requests = [Request(prompt, 30, sampling, seed=index) for index, prompt in enumerate(PROMPTS)]
    engine = Engine(model)
    together = engine.complete(requests)
    assert [engine.complete([one])[0] for one in requests] == together
    assert engine.complete(requests[::-1]) == together[::-1]
    again = [engine.complete([Request(PROMPTS[0], 30, sampling, seed=seed)])[0] for seed in (0, 1)]
    assert again[0] == together[0]
    assert again[1] != together[0]


def test_without_a_seed_torchs_own_decides(model):
    engine, one = Engine(model), Request(PROMPTS[0], 30, Sampling(1.0))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(engine.complete([one])[0])
    assert results[0] == results[1] != results[2]


def test_rows_may_be_sampled_differently(model):
    greedy, sampled = Request(PROMPTS[0], 20, GREEDY), Request(PROMPTS[0], 20, Sampling(2.0), seed=1)
    results = Engine(model).complete([greedy, sampled])
    assert results[0] == plain(model, PROMPTS[0], 20) != results[1]


@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_a_conversation_reuses_what_is_in_the_cache(request, kind):
    model = request.getfixturevalue(kind)
    engine, prompt, reads = Engine(model, keep_prefix=True), list(range(20)), []
    handle = model.transformer["wte"].register_forward_hook(lambda _, args, __: reads.append(args[0].size(1)))
    try:
        for turn in range(3):
            expected = plain(model, prompt, 8)
            reads.clear()
            assert list(engine.stream(Request(prompt, 8, GREEDY))) == expected
            assert reads[0] == (20 if turn == 0 else 5)  # the last token of the reply and four new ones
            prompt = prompt + expected + [50 + turn, 51, 52, 53]
        other = [*prompt[:6], 90, 91]  # the same beginning, then something else
        assert list(engine.stream(Request(other, 8, GREEDY))) == plain(model, other, 8)
        stream = engine.stream(Request(other, 30, GREEDY))
        begun = [next(stream) for _ in range(3)]
        stream.close()  # an interrupted reply
        prompt = [*other, *begun, 3, 3]
        assert list(engine.stream(Request(prompt, 8, GREEDY))) == plain(model, prompt, 8)
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["model", "windowed"])
@pytest.mark.parametrize("in_prefill", [True, False])
def test_an_interrupt_inside_the_model_spoils_nothing(request, kind, in_prefill):
    model = request.getfixturevalue(kind)
    engine = Engine(model, keep_prefix=True)
    prompt = [*PROMPTS[1], *engine.stream(Request(PROMPTS[1], 5, GREEDY))]
    stream = engine.stream(Request([*prompt, *range(60, 80)], 20, GREEDY))
    if not in_prefill:
        next(stream)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.transformer["h"][1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    handle.remove()
    prompt += [1, 2]
    assert list(engine.stream(Request(prompt, 10, GREEDY))) == plain(model, prompt, 10)


def test_the_context_is_filled_to_its_last_token(model):
    prompt = [3] * 125
    outputs = list(Engine(model).generate([Request(prompt, 50, GREEDY)]))
    assert [token for output in outputs for token in output.token_ids] == plain(model, prompt, 3)
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ([3] * 128, 5, "The prompt has 128 tokens, and the model's context of 128 tokens"),
        ([], 5, "The prompt is empty"),
        ([3], 0, "max_new_tokens 0 is not possible"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(model, prompt, count, message):
    with pytest.raises(ValueError, match=message):
        Engine(model).complete([Request(prompt, count, GREEDY)])


def test_mixed_precision_keeps_the_weights_and_computes_in_half(model):
    dtypes = []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    try:
        tokens = Engine(model, autocast=torch.bfloat16).complete([Request(PROMPTS[1], 5, GREEDY)])[0]
    finally:
        handle.remove()
    assert set(dtypes) == {torch.bfloat16}
    assert model.lm_head.weight.dtype == torch.float32
    assert tokens[0] == plain(model, PROMPTS[1], 1)[0]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_decode_step_is_compiled_once_and_gives_the_same_tokens(monkeypatch, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = tiny_model(n_layer=1, block_size=512)
    requests = [Request(prompt * 3, 40, GREEDY) for prompt in PROMPTS[1:3]]
    engine = Engine(model, compile=True)
    for _ in range(2):
        assert engine.complete(requests) == Engine(model).complete(requests)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
