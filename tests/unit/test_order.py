"""The keyed permutation that training data is shuffled with."""

import tracemalloc
from collections import Counter
from itertools import chain, islice, permutations

import numpy as np
import pytest

from litgpt.data import StreamSampler
from litgpt.data.order import KeyedPermutation


@pytest.mark.parametrize("size", [*range(1, 40), 99, 100, 101, 1000, 1023, 1024, 1025, 4097, 20_011])
def test_it_is_one_to_one(size):
    for epoch in range(3):
        permutation = KeyedPermutation(size, 7, epoch)
        assert sorted(permutation[i] for i in range(size)) == list(range(size))
    for wrong in (-1, size):
        with pytest.raises(IndexError):
            permutation[wrong]


def chi_square(counts: np.ndarray, degrees: int) -> float:
    """How far counts are from even ones, in standard deviations of what chance makes of it."""
    expected = counts.mean()
    return (((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_all_permutations_of_few_are_alike(size):
    seen = Counter(tuple(KeyedPermutation(size, 7, epoch)) for epoch in range(6000))
    counts = np.array([seen[order] for order in permutations(range(size))])
    assert abs(chi_square(counts, len(counts) - 1)) < 4


@pytest.mark.parametrize("size", [10, 37])
def test_every_sample_comes_everywhere_equally_often(size):
    counts = np.zeros((size, size))
    for seed in range(2000):
        counts[range(size), list(KeyedPermutation(size, seed, 0))] += 1
    assert abs(chi_square(counts, (size - 1) ** 2)) < 4


@pytest.mark.parametrize("size", [10**6, 10**12])
def test_any_stretch_of_many_is_spread_evenly(size):
    permutation = KeyedPermutation(size, 42, 0)
    for start in (0, size // 2, size - 10_000):
        values = np.array([permutation[i] for i in range(start, start + 10_000)])
        assert len(set(values.tolist())) == 10_000
        steps = np.diff(values) % size
        for what in (values, steps):
            assert abs(chi_square(np.histogram(what, bins=30, range=(0, size))[0], 29)) < 4
        assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.03


def test_epochs_and_seeds_differ():
    orders = [list(KeyedPermutation(1000, seed, epoch)) for seed in range(5) for epoch in range(5)]
    for number, order in enumerate(orders):
        for other in orders[:number]:
            assert sum(a == b for a, b in zip(order, other, strict=True)) < 12  # 1 by chance


def test_the_order_of_a_seed_stays():
    """Recorded: runs in progress go on in this order. Another order needs a new ORDER_VERSION."""
    assert list(KeyedPermutation(10, 42, 0)) == [6, 7, 3, 0, 1, 9, 8, 5, 4, 2]
    assert KeyedPermutation(10**12, 42, 3)[123_456_789] == 873_408_203_319


def test_a_sampler_of_a_trillion_samples_takes_no_memory():
    tracemalloc.start()
    sampler = StreamSampler(10**12, 8)
    sampler.set_position(3 * 10**12 - 20)  # the end of an epoch, and the start of the next
    samples = list(chain.from_iterable(islice(sampler, 1000)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(samples)) == len(samples) == 8000 - 4  # the last batch of the epoch holds what is left of it
    assert 0 <= min(samples) < max(samples) < 10**12
    assert peak < 2**20
