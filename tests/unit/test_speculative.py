"""Speculative decoding: the tokens of plain decoding where greedy, and its distribution where sampled."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from litgpt.generation import speculative
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.generation.speculative import PromptLookup, SpeculativeEngine, accept, accept_equal, probabilities
from litgpt.generation.worker import Worker
from tests.unit.test_engine import PROMPTS, tiny_model

GREEDY = Sampling(temperature=0)
WINDOWS = {"sliding_window_size": 15, "sliding_window_indices": [1, 0, 1]}
LATENT = {
    "latent_attention": {
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    },
    "n_query_groups": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def steps_that_take_no_time(monkeypatch):
    """Drafting always pays: whether it does is for test_draft_pace.py."""
    monkeypatch.setattr(speculative, "perf_counter", lambda: 0.0)


def noisy(model, amount: float, **changes):
    """A model that often, not always, says the same."""
    draft = tiny_model(**changes)
    draft.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(torch.randn_like(parameter) * amount)
    return draft


@pytest.mark.parametrize("shape", [{}, WINDOWS, LATENT], ids=["plain", "windows", "latent"])
@pytest.mark.parametrize("count", [1, 4])
def test_greedy_tokens_are_those_of_plain_decoding(shape, count, monkeypatch):
    monkeypatch.setattr(speculative, "PromptLookup", partial(PromptLookup, shortest=1))  # a random model repeats little
    model = tiny_model(**shape)
    requests = [Request(prompt, 40, GREEDY) for prompt in PROMPTS[1:3]]
    expected = Engine(model).complete(requests)
    for draft in (None, noisy(model, 0.02, **shape), model):
        engine = SpeculativeEngine(model, draft, count=count)
        assert engine.complete(requests) == expected
        assert 0 < engine.accepted <= engine.proposed
        assert engine.accepted + engine.calls == 40 * len(requests)
        if draft is model:
            assert engine.accepted == engine.proposed
        elif draft is not None:
            assert engine.accepted < engine.proposed


def test_a_long_prompt_is_read_in_chunks(monkeypatch):
    monkeypatch.setattr(speculative, "PREFILL_CHUNK", 8)
    model = tiny_model(**WINDOWS)
    request = Request(PROMPTS[1], 30, GREEDY)
    assert SpeculativeEngine(model, model).complete([request]) == Engine(model).complete([request])


@pytest.mark.parametrize("context", [32, 52])
def test_a_draft_with_a_shorter_context_drafts_up_to_its_end(context):
    model = tiny_model()
    draft = tiny_model(block_size=context)
    request = Request(PROMPTS[1], 40, GREEDY)
    engine = SpeculativeEngine(model, draft, count=4)
    assert engine.complete([request]) == Engine(model).complete([request])
    assert engine.accepted == engine.proposed
    assert (engine.proposed > 0) == (context > len(PROMPTS[1]))
    assert engine.accepted < 20


def test_the_draft_may_pad_its_vocabulary_differently():
    model = tiny_model()
    for size in (96, 128):
        draft = tiny_model(padded_vocab_size=size)
        engine = SpeculativeEngine(model, draft)
        assert engine.complete([Request([1, 2, 3], 20, GREEDY)]) == Engine(model).complete(
            [Request([1, 2, 3], 20, GREEDY)]
        )
        assert all(token < 97 for token in engine.complete([Request([1], 20, Sampling(3.0, seed=1))])[0])


def test_stop_sequences_and_limits_hold_within_a_draft():
    model = tiny_model()
    expected = Engine(model).complete([Request(PROMPTS[0], 30, GREEDY)])[0]
    engine = SpeculativeEngine(model, model, count=7)
    outputs = list(engine.generate([Request(PROMPTS[0], 30, GREEDY, stops=[expected[5:8]])]))
    assert [token for output in outputs for token in output.token_ids] == expected[:5]
    assert outputs[-1].finish_reason == "stop"
    for count in (1, 2, 9):
        assert engine.complete([Request(PROMPTS[0], count, GREEDY)]) == [expected[:count]]
    room = model.config.block_size - 3
    assert len(engine.complete([Request([1, 2, 3], 1000, GREEDY)])[0]) == room


def test_the_same_seed_gives_the_same_tokens():
    model, sampling = tiny_model(), Sampling(0.9, 20)
    engine = SpeculativeEngine(model, noisy(model, 0.02))
    first, again, other = (
        engine.complete([Request(PROMPTS[0], 30, replace(sampling, seed=seed))])[0] for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize("kind", ["draft", "lookup"])
def test_accepted_and_replaced_tokens_have_the_targets_distribution(kind):
    """Both tokens that follow one drafted token: the total variation to what the target says is that of the noise."""
    torch.manual_seed(0)
    size, trials = 8, 4_000
    target = torch.randn(2, size).mul(1.5).softmax(dim=-1)
    draft = torch.randn(1, size).mul(1.5).softmax(dim=-1)
    if kind == "lookup":
        draft = torch.nn.functional.one_hot(target[:1].argmax(dim=-1), size).float()
    generator = torch.Generator().manual_seed(1)
    first, second = torch.zeros(size), torch.zeros(size)
    for _ in range(trials):
        proposed = draft.multinomial(1, generator=generator)[0]
        if kind == "lookup":
            count, token = accept_equal(target, proposed, generator)
        else:
            count, token = accept(target, draft, proposed, generator)
        first[proposed if count else token] += 1
        if count:
            second[token] += 1
    share = torch.minimum(target[0], draft[0]).sum()  # how many stay: section 3.2 of the paper
    assert second.sum() / trials == pytest.approx(share.item(), abs=0.03)
    for seen, wanted in zip((first, second), target, strict=True):
        chi_square = ((seen - wanted * seen.sum()) ** 2 / (wanted * seen.sum())).sum()
        assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.3, 4, 0.8)])
def test_whole_sequences_have_the_distribution_of_plain_sampling(sampling):
    """Every pair of tokens after a prompt, with its probability by the model."""
    model = tiny_model(vocab_size=5, padded_vocab_size=5, n_layer=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.div_(2)
        first = probabilities(model(torch.tensor([[1, 2]]))[:, -1], sampling)[0]
        second = probabilities(model(torch.tensor([[1, 2, token] for token in range(5)]))[:, -1], sampling)
    exact = first[:, None] * second  # (V, V)
    engine = SpeculativeEngine(model, noisy(model, 0.3, vocab_size=5, padded_vocab_size=5, n_layer=1), count=2)
    seen, trials = torch.zeros(5, 5), 400
    for seed in range(trials):
        a, b, _ = engine.complete([Request([1, 2], 3, replace(sampling, seed=seed))])[0]
        seen[a, b] += 1
    assert 0.2 < engine.accepted / engine.proposed < 0.99
    assert not seen[exact == 0].any()
    chi_square = ((seen - exact * trials) ** 2 / (exact * trials))[exact > 0].sum()
    assert chi_square < 51.2  # 24 degrees of freedom, p = 0.001


def test_prompt_lookup_prefers_the_longest_and_latest_match():
    lookup = PromptLookup(longest=3)
    lookup.extend([1, 2, 3, 9, 4, 2, 3, 8, 5])
    assert lookup.propose(3) == []
    lookup.extend([2, 3])
    assert lookup.propose(3) == [8, 5, 2]
    lookup.extend([7, 1, 2, 3])
    assert lookup.propose(2) == [9, 4]
    assert lookup.propose(1) == [9]


def test_requests_may_be_cancelled_and_served_by_a_worker():
    model = tiny_model()
    requests = [Request(prompt, 20, GREEDY) for prompt in PROMPTS]
    expected = Engine(model).complete(requests)
    engine = SpeculativeEngine(model)
    numbers = [engine.submit(request) for request in requests]
    engine.step()
    engine.cancel(numbers[0])
    engine.cancel(numbers[2])
    assert (engine.running, engine.waiting) == (1, 1)
    answers = {number: [] for number in numbers}
    while engine.busy:
        for output in engine.step():
            answers[output.request] += output.token_ids
    assert list(answers.values()) == [[], expected[1], [], expected[3]]
    worker = Worker(engine)
    assert [list(worker.stream(request)) for request in requests] == expected
    worker.close()


def test_what_it_cannot_do_is_refused():
    engine = SpeculativeEngine(tiny_model())
    for request in (Request([1], 5, Sampling(presence_penalty=1.0)), Request([1], 5, logprobs=2)):
        with pytest.raises(ValueError, match="has no penalties, biases, constraints or log-probabilities"):
            engine.complete([request])
    with pytest.raises(ValueError, match="compile=true is not supported"):
        SpeculativeEngine(tiny_model(), compile=True)
    with pytest.raises(ValueError, match="speculative_k=0 is not valid"):
        SpeculativeEngine(tiny_model(), count=0)
