"""The engine against the plain model: whole forward passes, one token at a time."""

import math
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch

from litgpt import kv_cache
from litgpt.config import Config
from litgpt.generation import compiled, kv_cache_manager, model_runner
from litgpt.generation import engine as engine_module
from litgpt.generation.engine import Engine, Request, share_memory
from litgpt.generation.sampling import Sampling
from litgpt.generation.worker import Worker
from litgpt.model import GPT
from tests import shapes

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
            **shapes.LLAMA,
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
def roomy() -> GPT:
    return tiny_model(block_size=1024)


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
    requests = [Request(prompt, 30, replace(sampling, seed=index)) for index, prompt in enumerate(PROMPTS)]
    engine = Engine(model)
    together = engine.complete(requests)
    assert [engine.complete([one])[0] for one in requests] == together
    assert engine.complete(requests[::-1]) == together[::-1]
    again = [engine.complete([Request(PROMPTS[0], 30, replace(sampling, seed=seed))])[0] for seed in (0, 1)]
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
    greedy, sampled = Request(PROMPTS[0], 20, GREEDY), Request(PROMPTS[0], 20, Sampling(2.0, seed=1))
    results = Engine(model).complete([greedy, sampled])
    assert results[0] == plain(model, PROMPTS[0], 20) != results[1]


@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_a_conversation_reuses_what_is_in_the_cache(request, kind):
    model = request.getfixturevalue(kind)
    engine, prompt, reads = Engine(model), list(range(20)), []
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
    engine = Engine(model)
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
        ([3], 0, "max_new_tokens 0 is not valid"),
        ([3], 1.5, "max_new_tokens 1.5 is not valid: give an integer"),
        ([3], "5", "max_new_tokens '5' is not valid: give an integer"),
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


# --- requests that come and go ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_requests_enter_and_leave_at_any_step_and_none_notices(request, kind):
    """Of 40 requests with beginnings in common on 5 slots some are cancelled; the others are as if alone."""
    model = request.getfixturevalue(kind)
    draws = random.Random(0)
    conversation = [draws.randrange(97) for _ in range(60)]
    prompts = [[*conversation[: draws.randrange(61)], draws.randrange(97), *[draws.randrange(97)] * draws.randrange(9)]
               for _ in range(40)]  # fmt: skip
    counts = [draws.randrange(1, 25) for _ in prompts]
    engine = Engine(model, max_slots=5, prefill_chunk=32)
    answers: dict[int, list[int]] = {}
    index_of, cancelled, coming = {}, set(), list(range(40))
    while coming or engine.busy:
        for _ in range(draws.randrange(3)):
            if coming:
                index = coming.pop(0)
                index_of[engine.submit(Request(prompts[index], counts[index], GREEDY))] = index
        for output in engine.step():
            assert index_of[output.request] not in cancelled
            answers.setdefault(index_of[output.request], []).extend(output.token_ids)
        assert engine.running <= 5
        if draws.random() < 0.2 and index_of:
            number = draws.choice(list(index_of))
            engine.cancel(number)
            cancelled.add(index_of[number])
    whole = set(range(40)) - cancelled
    assert len(whole) > 20
    assert {index: answers[index] for index in whole} == {
        index: plain(model, prompts[index], counts[index]) for index in whole
    }
    assert engine.running == engine.waiting == 0


def test_what_another_slot_holds_is_not_read_again(model):
    engine, reads = Engine(model, max_slots=4), []
    system = list(range(40))
    one = engine.submit(Request([*system, 50], 30, GREEDY))
    answers = {one: engine.step()[0].token_ids}
    handle = model.transformer["wte"].register_forward_hook(lambda _, args, __: reads.append(tuple(args[0].shape)))
    try:
        two = engine.submit(Request([*system, 51, 52], 30, GREEDY))
        outputs = engine.step()
    finally:
        handle.remove()
    assert reads == [(1, 1), (1, 2)]  # a token of the first, what is new of the second
    assert [output.cached_tokens for output in outputs] == [0, 40]
    while outputs or engine.busy:
        for output in outputs:
            answers.setdefault(output.request, []).extend(output.token_ids)
        outputs = engine.step() if engine.busy else []
    assert answers[one] == plain(model, [*system, 50], 30)
    assert answers[two] == plain(model, [*system, 51, 52], 30)


def test_a_long_prompt_holds_others_up_for_one_chunk_at_a_time(model):
    engine = Engine(model, prefill_chunk=16)
    first = engine.submit(Request([1], 60, GREEDY))
    engine.step()
    second = engine.submit(Request(list(range(80)), 5, GREEDY))
    for _ in range(4):
        assert [output.request for output in engine.step()] == [first]
    assert [output.request for output in engine.step()] == [first, second]


def test_prompts_of_like_length_are_read_together(model, monkeypatch):
    """And the first of those who wait is always among them."""
    monkeypatch.setattr(engine_module, "FREE_PADDING", 0)
    lengths = [10, 80, 12, 9, 70, 11, 78]
    requests = [Request([place % 90] * length, 3, GREEDY) for place, length in enumerate(lengths)]
    shapes, hidden_states = [], model.hidden_states

    def noted(idx: torch.Tensor, *rest, **named) -> torch.Tensor:
        shapes.append(tuple(idx.shape))
        return hidden_states(idx, *rest, **named)

    monkeypatch.setattr(model, "hidden_states", noted)
    answers = Engine(model, prefill_chunk=250).complete(requests)
    assert [shape for shape in shapes if shape[1] > 1] == [(4, 12), (3, 80)]
    monkeypatch.undo()
    assert answers == [plain(model, request.prompt, 3) for request in requests]


def test_short_and_long_sequences_are_rotated_each_in_its_way():
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 6.0, 9.0], "attention_factor": 1.2}
    model = tiny_model(rope_adjustments={**factors, "original_max_seq_len": 32})
    requests = [Request(list(range(12)), count, GREEDY) for count in (8, 60, 8)]
    engine = Engine(model)
    expected = []
    for request in requests:
        cache = model.new_cache(1, 12 + request.max_new_tokens)
        ids, logits = [], model(torch.tensor([request.prompt]), cache=cache)
        for place in range(12, 12 + request.max_new_tokens):
            ids.append(int(logits[0, -1].argmax()))
            logits = model(torch.tensor([ids[-1:]]), torch.tensor([[place]]), cache=cache)
        expected.append(ids)
    assert engine.complete(requests) == expected
    assert engine.complete(requests[::-1]) == expected[::-1]
    assert expected[0] == expected[2] != expected[1][:8]


def test_requests_wait_where_the_cache_would_need_too_much_memory(model):
    sizes = [sum(t.numel() * t.itemsize for t in model.new_cache(rows, 128).tensors()) for rows in (1, 2, 4)]
    requests = [Request(prompt, 30, GREEDY) for prompt in PROMPTS * 2]
    expected = Engine(model).complete(requests)
    for most, size in ((1, sizes[0]), (2, sizes[1]), (4, sizes[2]), (1, sizes[0] // 2)):
        engine, ran = Engine(model, cache_bytes=size), []
        handle = model.transformer["wte"].register_forward_hook(lambda *_, e=engine, r=ran: r.append(e.running))
        try:
            assert engine.complete(requests) == expected
        finally:
            handle.remove()
        assert max(ran) == most


def test_engines_of_one_device_share_what_memory_it_has_left(model, monkeypatch):
    monkeypatch.setattr("litgpt.generation.engine.memory_free", lambda device: 1000)
    engines = [Engine(model) for _ in range(4)]
    assert [engine.cache_bytes for engine in engines] == [500] * 4
    share_memory(engines)
    assert [engine.cache_bytes for engine in engines] == [125] * 4
    share_memory(engines, 800)
    assert [engine.cache_bytes for engine in engines] == [200] * 4
    monkeypatch.setattr("litgpt.generation.engine.memory_free", lambda device: None)
    share_memory(engines)
    assert engines[0].cache_bytes == math.inf


@torch.inference_mode()
def test_logprobs_are_those_of_the_model(model):
    outputs = list(Engine(model).generate([Request(PROMPTS[1], 4, Sampling(0.5, 5, seed=1), logprobs=3)]))
    ids = [token for output in outputs for token in output.token_ids]
    expected = model(torch.tensor([PROMPTS[1] + ids]))[0, len(PROMPTS[1]) - 1 : -1].log_softmax(-1)
    logprobs = [logprob for output in outputs for logprob in output.logprobs]
    assert [logprob.token for logprob in logprobs] == ids
    for row, token, logprob in zip(expected, ids, logprobs, strict=True):
        assert logprob.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [token for token, _ in logprob.top_logprobs] == row.topk(3).indices.tolist()
        assert [value for _, value in logprob.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_penalties_and_biases_act_on_their_own_row(model):
    plainly = plain(model, PROMPTS[0], 20)
    forbidden = Sampling(0, logit_bias={plainly[3]: -100.0})
    never_again = Sampling(0, presence_penalty=100.0)
    requests = [Request(PROMPTS[0], 20, sampling) for sampling in (GREEDY, forbidden, never_again)]
    answers = Engine(model).complete(requests)
    assert answers[0] == plainly
    assert answers[1][:3] == plainly[:3]
    assert plainly[3] not in answers[1]
    assert len(set(answers[2])) == 20


class Alternating:
    """Even and odd tokens in turn."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def mask(self) -> torch.Tensor:
        return torch.arange(90) % 2 == len(self.tokens) % 2

    def accept(self, token: int) -> None:
        self.tokens.append(token)


def test_a_constraint_is_kept(model):
    constraint = Alternating()
    requests = [Request(PROMPTS[0], 20, Sampling(5.0, seed=1), constraint=constraint), Request(PROMPTS[0], 20, GREEDY)]
    constrained, free = Engine(model).complete(requests)
    assert [token % 2 for token in constrained] == [0, 1] * 10
    assert constraint.tokens == constrained
    assert max(constrained) < 90
    assert free == plain(model, PROMPTS[0], 20)


# --- many callers ----------------------------------------------------------------------------------------------------


def test_callers_from_many_threads_share_one_engine(model):
    worker = Worker(Engine(model, max_slots=4))
    prompts = [[index, *range(index)] for index in range(1, 17)]
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda prompt: list(worker.stream(Request(prompt, 12, GREEDY))), prompts))
    assert answers == [plain(model, prompt, 12) for prompt in prompts]
    with pytest.raises(ValueError, match="The prompt is empty"):
        next(worker.generate(Request([], 5)))
    worker.close()
    with pytest.raises(RuntimeError, match="shut down"):
        next(worker.generate(Request([1], 5)))


def test_a_caller_that_goes_away_frees_its_slot(model):
    worker = Worker(Engine(model, max_slots=1))
    stream = worker.stream(Request([1], 120, GREEDY))
    next(stream)
    stream.close()
    assert list(worker.stream(Request([2], 5, GREEDY))) == plain(model, [2], 5)
    worker.close()
    assert not worker.engine.busy


def test_a_request_that_the_engine_does_not_take_fails_alone(model, monkeypatch):
    worker = Worker(Engine(model))

    def fail(*_):
        raise OverflowError("too large")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "Sequence", fail)
        with pytest.raises(OverflowError, match="too large"):
            list(worker.stream(Request([1], 5, GREEDY)))
    assert list(worker.stream(Request([1], 5, GREEDY))) == plain(model, [1], 5)
    worker.close()


def test_what_goes_wrong_in_a_step_ends_its_requests_and_no_others(model):
    worker = Worker(Engine(model))

    def fail(*_):
        raise MemoryError("no more")

    handle = model.transformer["h"][1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(MemoryError, match="no more"):
            list(worker.stream(Request(PROMPTS[1], 5, GREEDY)))
    finally:
        handle.remove()
    assert list(worker.stream(Request(PROMPTS[1], 5, GREEDY))) == plain(model, PROMPTS[1], 5)
    stream = worker.stream(Request([1], 100, GREEDY))
    next(stream)
    closing = threading.Thread(target=worker.close, args=(True,))
    closing.start()
    assert len(list(stream)) == 99  # what has begun is finished
    closing.join()


def test_an_engine_that_only_fails_is_not_asked_again_and_again(model, monkeypatch):
    """As one whose other ranks are gone: it still has memory to give back, and cannot."""
    engine, steps, idle = Engine(model, kept_bytes=0), [], threading.Event()

    def fail():
        steps.append(None)
        raise MemoryError("no more")

    worker = Worker(engine)
    stream = worker.stream(Request([1], 100, GREEDY))
    next(stream)
    monkeypatch.setattr(engine, "step", fail)
    with pytest.raises(MemoryError):
        list(stream)
    for _ in range(3):
        with pytest.raises(MemoryError):
            list(worker.stream(Request([1], 5, GREEDY)))
    worker._commands.put(idle.set)
    assert idle.wait(60)
    assert engine.busy  # with what cannot be done
    assert len(steps) <= 2 * 5  # one for each request, and at most one more before the next command
    worker.close(finish=True)
    assert not worker._thread.is_alive()


def test_what_goes_wrong_between_the_model_and_its_tokens_frees_the_slots(model, monkeypatch):
    engine, one = Engine(model, max_slots=1), Request(PROMPTS[1], 5, GREEDY)

    def fail(*_):
        raise MemoryError("no more")

    for owner, name in ((model, "logits"), (engine.runner, "sample")):
        monkeypatch.setattr(owner, name, fail)
        with pytest.raises(MemoryError):
            engine.complete([one])
        monkeypatch.undo()
        assert (engine.running, engine.waiting) == (0, 0)
        assert engine.complete([one]) == [plain(model, one.prompt, 5)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_decode_step_is_compiled_once_and_gives_the_same_tokens(monkeypatch, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(model_runner, "has_kernels", lambda device: False)  # as on a GPU
    monkeypatch.setattr(compiled, "decoder", partial(torch.compile, backend=backend, dynamic=False))
    model = tiny_model(n_layer=1, block_size=512)
    requests = [Request(prompt * 3, 40, GREEDY) for prompt in PROMPTS[1:3]]
    engine = Engine(model, compile=True)
    for _ in range(2):
        assert engine.complete(requests) == Engine(model).complete(requests)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# -- scoring


@torch.inference_mode()
def plain_scores(model: GPT, prompt: list[int], start: int) -> list[tuple[float, int]]:
    """The log-probability of each token of a prompt from `start` on, and the likeliest one in its place."""
    logprobs = model(torch.tensor([prompt[:-1]]))[0].log_softmax(-1)
    return [(logprobs[at - 1, prompt[at]].item(), int(logprobs[at - 1].argmax())) for at in range(start, len(prompt))]


def scores(engine: Engine, requests: list[Request]) -> list[list]:
    of_prompts = [[] for _ in requests]
    for output in engine.generate(requests):
        of_prompts[output.request] += output.prompt_logprobs
    return of_prompts


CONTEXTS = [list(range(30, 70)), [9, *range(20)], [3]]
CHOICES = [[*context, *choice] for context in CONTEXTS for choice in ([1], [4, 4, 2], [1, 2, 3, 4, 5, 6, 7], [8, 1])]
STARTS = [len(context) for context in CONTEXTS for _ in range(4)]


@pytest.mark.parametrize("slots", [1, 3, 8, 32])
@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_tokens_of_a_prompt_are_scored_as_the_plain_model_does(request, kind, chunk, slots):
    model = request.getfixturevalue(kind)
    asked = [
        Request(prompt, 0, GREEDY, logprobs=1, score_from=start) for prompt, start in zip(CHOICES, STARTS, strict=True)
    ]
    found = scores(Engine(model, max_slots=slots, prefill_chunk=chunk), asked)
    for one, prompt, start in zip(found, CHOICES, STARTS, strict=True):
        expected = plain_scores(model, prompt, start)
        assert [score.token for score in one] == prompt[start:]
        assert [score.logprob for score in one] == pytest.approx([logprob for logprob, _ in expected], rel=1e-4)
        assert [score.top_logprobs[0][0] for score in one] == [likeliest for _, likeliest in expected]


def test_what_several_prompts_begin_with_is_read_once(model, monkeypatch):
    engine, read = Engine(model, max_slots=12), []
    hidden_states = engine.runner.hidden_states
    monkeypatch.setattr(
        engine.runner,
        "hidden_states",
        lambda idx, positions=None, cache=None: (
            read.append(idx.numel() if positions is None else int((positions >= 0).sum())),
            hidden_states(idx, positions, cache=cache),
        )[1],
    )
    contexts = [[seed, *range(30, 75)] for seed in range(6)]  # 46 tokens each, and then four choices of 3
    choices = [([*context, 5, choice, 6], len(context)) for context in contexts for choice in range(4)]
    scores(engine, [Request(prompt, 0, GREEDY, score_from=start) for prompt, start in choices])
    # The first choice reads the context and all but its own last token, the others the last of the context and theirs.
    assert sum(read) == 6 * (48 + 3 * 3)


def test_other_tokens_are_scored_in_the_last_ones_place(model):
    prompt, others = CHOICES[2], (1, 50, 96)
    (found,) = scores(Engine(model), [Request(prompt, 0, GREEDY, logprobs=1, score_from=41, alternatives=others)])
    expected = [plain_scores(model, [*prompt[:-1], token], len(prompt) - 1)[0] for token in others]
    assert [score.token for score in found] == [*prompt[41:], *others]
    assert [score.logprob for score in found[-3:]] == pytest.approx([logprob for logprob, _ in expected], rel=1e-4)
    assert {score.top_logprobs[0][0] for score in found[-3:]} == {expected[0][1]}


def test_a_scored_prompt_may_be_continued_and_may_fill_the_context(model):
    prompt = CHOICES[2]
    (output, *rest) = list(Engine(model).generate([Request(prompt, 3, GREEDY, score_from=5)]))
    assert len(output.prompt_logprobs) == len(prompt) - 5
    assert not any(one.prompt_logprobs for one in rest)
    assert [token for one in (output, *rest) for token in one.token_ids] == plain(model, prompt, 3)
    longest = [index % 90 for index in range(129)]  # the context has 128; the last token is only predicted
    (found,) = scores(Engine(model, prefill_chunk=50), [Request(longest, 0, GREEDY, score_from=1)])
    assert sum(score.logprob for score in found) == pytest.approx(
        sum(logprob for logprob, _ in plain_scores(model, longest, 1)), abs=1e-2
    )
    for wrong in (Request([*longest, 1], 0, score_from=1), Request([1], 0, score_from=1), Request([1, 2], 0)):
        with pytest.raises(ValueError, match=r"context|score_from|max_new_tokens"):
            Engine(model).check(wrong)


def sizes(model, *shapes: tuple[int, int]) -> list[int]:
    """Bytes of caches of this many rows and tokens."""
    return [sum(t.numel() * t.itemsize for t in model.new_cache(*shape).tensors()) for shape in shapes]


def shape_of_cache(engine: Engine) -> tuple[int, int]:
    """Rows and tokens."""
    cache = engine.cache_manager.cache
    return (0, 0) if cache is None else (cache.batch_size, cache.max_length)


def test_memory_is_given_back_once_no_request_needs_it(roomy):
    """What a long request has made of the cache does not stay, and what short ones go on from does."""
    [kept, most] = sizes(roomy, (2, 128), (1, 512))
    engine, seen = Engine(roomy, kept_bytes=kept), []
    handle = roomy.transformer["wte"].register_forward_hook(lambda *_: seen.append(engine.cache_size))
    try:
        short = [Request(prompt, 20, GREEDY) for prompt in PROMPTS * 2]
        expected = engine.complete(short)
        assert engine.cache_size <= kept < max(seen)
        long = Request(list(range(90)) * 3, 150, GREEDY)
        seen.clear()
        assert engine.complete([long]) == [plain(roomy, long.prompt, 150)]
        assert kept < max(seen) == most  # not as many rows as there were, each as long
        assert engine.cache_size <= kept
        outputs = list(engine.generate(short))
        assert [[t for o in outputs if o.request == i for t in o.token_ids] for i in range(len(short))] == expected
        assert engine.cache_size <= kept
    finally:
        handle.remove()


def test_what_runs_on_is_the_same_while_the_cache_shrinks_and_grows_around_it(roomy):
    """Rows move in the memory while they are written to; idle ones keep what they hold as far as there is room."""
    [kept] = sizes(roomy, (4, 128))
    engine = Engine(roomy, kept_bytes=kept)
    long = [Request([7 * i % 90 for i in range(200 + 40 * n)], 6, GREEDY) for n in range(3)]
    steady = Request(PROMPTS[0], 110, GREEDY)
    expected, shapes = plain(roomy, steady.prompt, 110), set()
    number, given = engine.submit(steady), []
    later = {10: long[:1], 30: long[1:], 60: [Request(prompt, 5, GREEDY) for prompt in PROMPTS]}
    wanted = {}
    step = 0
    while len(given) < 110 or engine.busy:
        for request in later.pop(step, ()):
            wanted[engine.submit(request)] = request, []
        for output in engine.step():
            (given if output.request == number else wanted[output.request][1]).extend(output.token_ids)
        shapes.add(shape_of_cache(engine))
        step += 1
    assert given == expected
    for request, tokens in wanted.values():
        assert tokens == plain(roomy, request.prompt, request.max_new_tokens)
    assert len(shapes) > 3
    assert engine.cache_size <= kept
    # A conversation goes on from what has stayed of it.
    [again] = [o for o in engine.generate([Request([*PROMPTS[1], 3], 1, GREEDY)]) if o.finish_reason]
    assert again.cached_tokens == len(PROMPTS[1])


@pytest.mark.parametrize("kind", ["model", "windowed"])
def test_the_cache_grows_with_answers(request, kind, monkeypatch):
    """What an answer may come to is not taken at once, and several that grow at different times are right."""
    model = request.getfixturevalue(kind)
    most = model.config.block_size
    monkeypatch.setattr(kv_cache_manager, "CACHE_STEP", most // 16)
    monkeypatch.setattr(kv_cache_manager, "HEADROOM", most // 8)
    engine = Engine(model, kept_bytes=0)
    counts = [most - len(prompt) for prompt in PROMPTS]  # to the end of the context
    counts[1] = 5
    asked = [Request(prompt, count, GREEDY) for prompt, count in zip(PROMPTS, counts, strict=True)]
    lengths, found = [], [[] for _ in asked]
    for output in engine.generate(asked):
        found[output.request] += output.token_ids
        lengths.append(shape_of_cache(engine)[1])
    for request_, tokens in zip(asked, found, strict=True):
        assert tokens == plain(model, request_.prompt, request_.max_new_tokens)
    assert lengths[0] <= most / 2
    assert sorted(set(lengths[:-1])) == [length for length in (most >> 2, most >> 1, most) if length >= lengths[0]]
    shapes, reasons = [], []
    for output in engine.generate([replace(asked[0], stops=[[found[0][5]]])]):
        shapes.append(shape_of_cache(engine)[1])
        reasons.append(output.finish_reason)
    assert reasons[-1] == "stop"
    assert 0 < max(shapes) <= most / 2  # what it might have come to was never there


def test_a_device_without_memory_for_more_ends_what_runs_and_no_more(roomy, monkeypatch):
    """Half of the layers have grown when it happens."""
    monkeypatch.setattr(kv_cache_manager, "HEADROOM", 64)
    engine = Engine(roomy, kept_bytes=math.inf)
    long, short = Request(PROMPTS[0], 400, GREEDY), Request(PROMPTS[1], 20, GREEDY)
    put_rows, calls = kv_cache.put_rows, []

    def fails_at_the_second_layer(*args):
        calls.append(args)
        if len(calls) == 4:
            raise MemoryError("no more")
        return put_rows(*args)

    monkeypatch.setattr(kv_cache, "put_rows", fails_at_the_second_layer)
    with pytest.raises(MemoryError):
        engine.complete([long])
    assert len(calls) == 4
    assert (engine.running, engine.waiting) == (0, 0)
    assert engine.complete([long, short]) == [plain(roomy, one.prompt, one.max_new_tokens) for one in (long, short)]


def test_what_is_let_in_can_grow_to_its_end(roomy, monkeypatch):
    """Short now, long later: one that could not be finished next to the others waits, though there is room for now."""
    monkeypatch.setattr(kv_cache_manager, "HEADROOM", 64)
    [two] = sizes(roomy, (2, 512))
    engine = Engine(roomy, kept_bytes=math.inf, cache_bytes=two)
    asked = [Request(prompt, 300 - len(prompt), GREEDY) for prompt in PROMPTS[:3]]
    running, found = [], [[] for _ in asked]
    for output in engine.generate(asked):
        found[output.request] += output.token_ids
        running.append(engine.running)
        assert engine.cache_size <= two
    assert max(running) == 2
    for request, tokens in zip(asked, found, strict=True):
        assert tokens == plain(roomy, request.prompt, request.max_new_tokens)


def test_what_idle_slots_hold_makes_way_for_one_that_needs_the_memory(roomy):
    [two] = sizes(roomy, (2, 512))
    engine = Engine(roomy, kept_bytes=math.inf, cache_bytes=two)
    engine.complete([Request([n] * 20, 4, GREEDY) for n in range(1, 5)])
    assert len(engine.cache_manager.slots) == 4
    for output in engine.generate([Request(list(range(90)) * 4, 40, GREEDY)]):
        assert engine.cache_size <= two, output


def test_a_cancelled_request_leaves_no_memory_behind(roomy):
    [kept] = sizes(roomy, (1, 128))
    engine = Engine(roomy, kept_bytes=kept)
    number = engine.submit(Request(list(range(90)) * 3, 200, GREEDY))
    engine.step()
    assert engine.cache_size > kept
    engine.cancel(number)
    assert engine.busy  # so that its thread makes one more step
    assert engine.step() == []
    assert not engine.busy
    assert engine.cache_size <= kept


def test_a_sliding_window_stays_right_in_a_smaller_cache():
    model = tiny_model(block_size=1024, sliding_window_size=16, sliding_window_indices=[1, 0])
    [kept] = sizes(model, (2, 128))
    engine = Engine(model, kept_bytes=kept)
    long = Request([7 * i % 90 for i in range(300)], 5, GREEDY)
    steady = Request(PROMPTS[0], 90, GREEDY)
    alone = [Engine(model).complete([request])[0] for request in (steady, long)]
    assert engine.complete([steady, long]) == alone
    assert engine.complete([steady])[0] == alone[0]
