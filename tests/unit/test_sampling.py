"""Sampling: what the filters leave, and that what is drawn follows it."""

import re

import pytest
import torch

from litgpt.generation.sampling import (
    BLOCK,
    Filters,
    Penalties,
    Sampler,
    Sampling,
    draw,
    filtered,
    keep_min_p,
    keep_top_p,
)

PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
LOGITS = PROBABILITIES.log()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def next_tokens(logits: torch.Tensor, samplings: list[Sampling], generators: list[torch.Generator]) -> torch.Tensor:
    return Sampler(samplings, generators, logits.device)(logits)


def frequencies(sampling: Sampling, logits: torch.Tensor = LOGITS, draws: int = 20_000) -> torch.Tensor:
    rows = logits.expand(draws, -1)
    shared = generator()
    tokens = next_tokens(rows, [sampling] * draws, [shared] * draws)
    return torch.bincount(tokens, minlength=logits.numel()) / draws


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(top_k=0), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(top_k=2), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
        (Sampling(top_k=99), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (Sampling(top_p=0.6), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # 0.25 crosses the threshold and stays
        (Sampling(top_p=0.3), [0, 1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.7), [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),  # of what top-k left: 0.47, 0.29, 0.24
        (Sampling(min_p=0.4), [0, 0.4 / 0.85, 0, 0.25 / 0.85, 0.2 / 0.85]),
        (Sampling(temperature=0.5), [0.05**2, 0.4**2, 0.1**2, 0.25**2, 0.2**2]),
    ],
)
def test_tokens_are_drawn_as_often_as_they_should_be(sampling, expected):
    expected = torch.tensor(expected) / sum(expected)
    measured = frequencies(sampling)
    assert (measured - expected).abs().max() < 0.015  # 4 standard deviations
    assert ((measured > 0) == (expected > 0)).all()


@pytest.mark.parametrize(
    "sampling", [Sampling(0), Sampling(top_k=1), Sampling(top_p=0), Sampling(0, 50, 0.5), Sampling(0, None, 1.0)]
)
def test_greedy_takes_the_most_likely(sampling):
    assert sampling.is_greedy
    assert next_tokens(LOGITS[None], [sampling], [generator()]).tolist() == [1]


def test_a_row_does_not_depend_on_its_batch_mates():
    filters = [
        (0.7, 20),
        (0,),
        (1.2, None, 0.9),
        (0.7, 5, 0.8),
        (2.0, None, 0.5, 0.1),
        (1.0,),
        (1.5, None, 1.0, 0.3),
        (3, 60),
    ]
    samplings = [Sampling(*one) for one in filters]
    for seed in range(20):
        logits = torch.randn(8, 100, generator=generator(seed))
        together = next_tokens(logits, samplings, [generator(row) for row in range(8)])
        alone = [next_tokens(logits[[row]], [samplings[row]], [generator(row)]).item() for row in range(8)]
        assert together.tolist() == alone
        assert together[1] == logits[1].argmax()


def test_the_generator_decides():
    sampling, logits = Sampling(), torch.zeros(1, 1000)
    tokens = [next_tokens(logits, [sampling], [generator(seed)]).item() for seed in (1, 1, 2, 3)]
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 3
    continued = generator(1)
    assert [next_tokens(logits, [sampling], [continued]).item() for _ in range(2)][1] != tokens[0]


def test_what_is_impossible_is_never_drawn():
    scores = torch.full((500, 4), float("-inf"))
    scores[:, 2] = 0.0
    assert draw(scores, [generator()] * 500).tolist() == [2] * 500


@pytest.mark.parametrize(("number", "expected"), [(0.0, 2), (0.49, 2), (0.5, 6), (1 - 2**-24, 6), (1.0, 2)])
def test_rounding_does_not_lead_to_what_is_impossible(number, expected, monkeypatch):
    """Neither a place between two tokens nor one beyond the last: then the most likely is taken."""
    scores = torch.full((1, 9), float("-inf"))
    scores[0, [2, 6]] = 0.0
    monkeypatch.setattr(torch, "rand", lambda *size, **named: torch.full(size, number))
    assert draw(scores, [generator()]).item() == expected


@pytest.mark.parametrize("size", [BLOCK + 1, 1000, 3 * BLOCK])
def test_a_number_finds_its_place_in_a_large_vocabulary(size, monkeypatch):
    """As in the running sum of all probabilities; blocks that are impossible are passed over."""
    scores = torch.randn(size, generator=generator(1)) * 4
    scores[BLOCK - 20 : BLOCK + 1] = float("-inf")
    ends = scores.double().softmax(dim=-1).cumsum(dim=-1)
    numbers = torch.linspace(0, 1 - 1e-4, 500)
    drawn = []
    for number in numbers.tolist():
        monkeypatch.setattr(torch, "rand", lambda *shape, number=number, **named: torch.full(shape, number))
        drawn.append(draw(scores[None], [generator()]).item())
    expected = torch.searchsorted(ends, numbers.double() * ends[-1], right=True)
    # Where a number is as good as a boundary, float32 may come to the other side of it.
    clear = (numbers.double()[:, None] * ends[-1] - ends).abs().amin(dim=-1) > 1e-6
    assert clear.sum() > 400
    assert torch.tensor(drawn)[clear].tolist() == expected[clear].tolist()
    assert scores[drawn].isfinite().all()


def test_half_precision_logits_are_compared_in_float32():
    assert next_tokens(LOGITS[None].half(), [Sampling(0)], [generator()]).dtype == torch.int64
    assert (frequencies(Sampling(top_p=0.9), LOGITS.bfloat16(), 2000) > 0).tolist() == [False, True, True, True, True]


def test_filters_leave_at_least_one():
    ordered = LOGITS.sort(descending=True).values[None]
    assert keep_top_p(ordered, 0.0).isfinite().sum() == 1
    assert keep_min_p(LOGITS[None], 1.0).isfinite().sum() == 1
    scores, candidates = filtered(LOGITS[None], Filters.of([Sampling(top_k=2)], "cpu"))
    assert scores.shape == candidates.shape == (1, 2)
    assert candidates.tolist() == [[1, 3]]


def test_penalties():
    """By the formulas of the papers, worked out by hand: token 0 was in the prompt, 1 twice in the answer, 2 once."""
    logits = torch.tensor([2.0, 3.0, -1.0, 4.0])
    penalties = {}
    for name, value in {"repetition": 2.0, "presence": 0.5, "frequency": 0.25}.items():
        penalties[name] = Penalties(Sampling(**{f"{name}_penalty": value}), [0, 0], 4, "cpu")
        for token in (1, 2, 1):
            penalties[name].count(torch.tensor(token))
    assert penalties["repetition"](logits).tolist() == [1.0, 1.5, -2.0, 4.0]
    assert penalties["presence"](logits).tolist() == [2.0, 2.5, -1.5, 4.0]
    assert penalties["frequency"](logits).tolist() == [2.0, 2.5, -1.25, 4.0]
    biased = Penalties(Sampling(logit_bias={3: -100.0, 0: 1.5}), [0], 4, "cpu")
    assert biased(logits).tolist() == [3.5, 3.0, -1.0, -96.0]
    assert Sampling(logit_bias={3: 1.0}).has_penalties
    assert not Sampling(0.5, 3, 0.5, 0.5).has_penalties


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-200),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", float("inf")),
        ("frequency_penalty", 1e300),
        ("temperature", None),
        ("top_k", 1.5),
        ("top_p", ()),
        ("min_p", [0.1]),
        ("seed", 0.5),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=re.escape(f"{name} {value} is not valid")):
        Sampling(**{name: value})


def test_answers_have_seeds_of_their_own_up_to_the_largest():
    """They are drawn with torch's generators, which keep a seed in 64 bits."""
    seeds = [Sampling(seed=2**63 - 2).following(index).seed for index in range(3)]
    assert seeds == [2**63 - 2, 2**63 - 1, -(2**63)]
    for seed in seeds:
        torch.Generator().manual_seed(seed)
