"""Speculative decoding stops where it does not pay: on a clock that goes on by what a step's rows cost."""

from collections.abc import Callable
from functools import partial

import pytest

from litgpt.generation import speculative
from litgpt.generation.draft_pace import FIRST_PAUSE, LEARNED, TRIAL, DraftPace, plain_times
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.generation.speculative import PromptLookup, RewindableModel, SpeculativeEngine
from tests.unit.test_engine import tiny_model

GREEDY, PROMPT, TOKENS = Sampling(temperature=0), [5, 6, 7, 8], 50


class Clock:
    """Goes on with each call of the model, by what `cost` says of its tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Callable[[int], float]) -> None:
        self.now = 0.0
        call = RewindableModel.__call__

        def counting(model: RewindableModel, tokens, last):
            self.now += cost(tokens.numel())
            return call(model, tokens, last)

        monkeypatch.setattr(RewindableModel, "__call__", counting)
        monkeypatch.setattr(speculative, "perf_counter", lambda: self.now)


def answer(engine: SpeculativeEngine, tokens: int = TOKENS) -> list[int]:
    return engine.complete([Request(PROMPT, tokens, GREEDY)])[0]


@pytest.fixture
def model():
    return tiny_model(block_size=512)


def drafting(monkeypatch, expected: list[int], is_right: Callable[[int], bool]) -> None:
    """Drafts are what follows, or something else where they are not to be right."""

    def propose(lookup: PromptLookup, count: int) -> list[int]:
        start = len(lookup.tokens) - len(PROMPT)
        right = expected[start : start + count]
        return right if is_right(start) else [(token + 1) % 90 for token in right]

    monkeypatch.setattr(PromptLookup, "propose", propose)


def test_where_no_draft_is_right_an_answer_takes_hardly_longer(model, monkeypatch):
    expected = Engine(model).complete([Request(PROMPT, 400, GREEDY)])[0]
    drafting(monkeypatch, expected, lambda place: False)
    clock = Clock(monkeypatch, lambda rows: float(rows))  # every drafted token costs a whole step
    engine = SpeculativeEngine(model, count=3)
    assert answer(engine, 400) == expected
    assert clock.now < len(PROMPT) + 1.2 * 400  # 4 * 400 if it went on
    assert engine.proposed == 3 * TRIAL * 5  # pauses of 16, 32, 64, 128, 256
    assert engine.paused > 300


def test_where_drafts_are_right_it_goes_on(model, monkeypatch):
    expected = Engine(model).complete([Request(PROMPT, 100, GREEDY)])[0]
    drafting(monkeypatch, expected, lambda place: True)
    Clock(monkeypatch, lambda rows: 1 + 0.1 * rows)
    engine = SpeculativeEngine(model, count=3)
    assert answer(engine, 100) == expected
    assert engine.paused == 0
    assert engine.calls < LEARNED + 100 / 4 + 3


def test_right_drafts_that_take_too_long_are_not_worth_it(model, monkeypatch):
    expected = Engine(model).complete([Request(PROMPT, 100, GREEDY)])[0]
    drafting(monkeypatch, expected, lambda place: True)
    Clock(monkeypatch, lambda rows: float(rows) ** 2)  # four tokens for the time of sixteen
    engine = SpeculativeEngine(model, count=3)
    assert answer(engine, 100) == expected
    assert engine.paused > 45
    assert engine.proposed == 3 * TRIAL * 3


def test_a_text_that_repeats_itself_later_is_found_out(model, monkeypatch):
    expected = Engine(model).complete([Request(PROMPT, 300, GREEDY)])[0]
    drafting(monkeypatch, expected, lambda place: place >= 100)
    Clock(monkeypatch, lambda rows: 1 + 0.2 * rows)
    engine = SpeculativeEngine(model, count=3)
    assert answer(engine, 300) == expected
    assert engine.accepted > 0.5 * (300 - 100) * 3 / 4
    assert 0 < engine.paused < 150


def test_what_plain_steps_take_is_known_to_the_next_answer(model, monkeypatch):
    expected = Engine(model).complete([Request(PROMPT, 30, GREEDY)])[0]
    drafting(monkeypatch, expected, lambda place: True)
    Clock(monkeypatch, lambda rows: 1.0)
    engine = SpeculativeEngine(model, count=3)
    answer(engine, 30)
    first = engine.calls
    answer(engine, 30)
    assert engine.calls - first < first  # nothing is learned anew


def test_one_step_that_was_held_up_is_no_reason():
    pace = DraftPace(plain_times())
    for _ in range(LEARNED):
        assert not pace.drafts()
        pace.note(1.0, 0, 1)
    for seconds in [1.2, 1.2, 50.0, 1.2] * 5:
        assert pace.drafts()
        pace.note(seconds, 3, 3)
    for _ in range(TRIAL):  # now they do not pay
        pace.note(4.0, 3, 1)
    assert pace.is_paused
    assert not pace.drafts()
    for _ in range(FIRST_PAUSE):
        assert not pace.drafts()
        pace.note(1.0, 0, 1)
    assert pace.drafts()


@pytest.mark.parametrize("cost", [lambda rows: 1.0, lambda rows: float(rows) ** 2], ids=["pays", "does not"])
def test_what_a_seed_gives_does_not_depend_on_what_steps_take(model, monkeypatch, cost):
    request = Request(PROMPT * 6, 60, Sampling(0.9, 5, seed=3))
    plain = SpeculativeEngine(model)
    monkeypatch.setattr(DraftPace, "drafts", lambda pace: False)
    expected = plain.complete([request])
    assert plain.proposed == 0
    monkeypatch.undo()
    monkeypatch.setattr(speculative, "PromptLookup", partial(PromptLookup, shortest=1))  # a random model repeats little
    Clock(monkeypatch, cost)
    engine = SpeculativeEngine(model)
    assert engine.complete([request]) == expected
    assert engine.proposed > 0
