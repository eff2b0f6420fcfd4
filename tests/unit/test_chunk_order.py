"""The order of blocks in chunks, and of the sources of a mixture."""

import pickle
from itertools import chain, groupby

import numpy as np
import pytest

from litgpt.data.chunk_order import CYCLE, ChunkOrder, Mixture

BLOCKS = [int(n) for n in np.random.default_rng(0).integers(0, 40, 53)]  # some chunks have none


@pytest.mark.parametrize("window", [1, 4, 100])
def test_every_epoch_has_all_blocks_once_in_an_order_of_its_own(window):
    order = ChunkOrder(BLOCKS, seed=5, window=window)
    epochs = [[order.place(epoch * order.total + i) for i in range(order.total)] for epoch in range(3)]
    every = [(chunk, block) for chunk, blocks in enumerate(BLOCKS) for block in range(blocks)]
    assert [sorted(epoch) for epoch in epochs] == [every] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    other = ChunkOrder(BLOCKS, seed=6, window=window)
    assert epochs[0] != [other.place(i) for i in range(order.total)]


def test_a_window_of_chunks_is_used_up_before_the_next():
    order = ChunkOrder(BLOCKS, seed=5, window=4)
    windows = [order.window_at(i) for i in range(2 * order.total)]
    numbers = [number for number, _ in groupby(window.number for window in windows)]
    assert numbers == list(range(2 * order.windows_per_epoch))
    for position, window in enumerate(windows):
        assert order.place(position).chunk in window.chunks
        assert len(window.chunks) <= 4
    following = {window.number: window.chunks for window in windows}
    for window in windows[: order.total]:
        assert order.window_after(window).chunks == following[window.number + 1]
    first = [order.place(i).chunk for i in range(40)]
    assert len(set(first)) == 4  # mixed, not one after the other


def test_any_position_at_once_and_in_another_process():
    order = ChunkOrder(BLOCKS, seed=5)
    far = [order.place(10**15 + i) for i in range(20)]
    assert [pickle.loads(pickle.dumps(order)).place(10**15 + i) for i in range(20)] == far


def test_the_chunk_order_of_a_seed_stays():
    """Recorded: another order needs a new ORDER_VERSION."""
    order = ChunkOrder([3, 5, 2, 7, 1, 4], seed=42, window=2)
    assert list(chain.from_iterable(order.place(i) for i in range(22, 30))) == [
        1,
        3,
        1,
        0,
        1,
        1,
        1,
        2,
        5,
        0,
        5,
        3,
        1,
        4,
        5,
        2,
    ]
    mixture = Mixture([0.7, 0.3], seed=42)
    assert [mixture.draw(5000 + i) for i in range(4)] == [(0, 3457), (0, 2951), (0, 3406), (0, 3100)]


@pytest.mark.parametrize("weights", [[0.693584, 0.306416], [1, 2, 3], [5.0], [1, 0.0001]])
def test_a_mixture_keeps_to_its_weights_and_leaves_nothing_out(weights):
    mixture = Mixture(weights, seed=3)
    share = np.array(weights) / sum(weights)
    drawn = [mixture.draw(i) for i in range((20_000 // mixture.cycle + 1) * mixture.cycle)]
    for source, part in enumerate(share):
        places = [place for which, place in drawn if which == source]
        assert sorted(places) == list(range(len(places)))
        assert len(places) == pytest.approx(part * len(drawn), abs=1)
    for start in range(0, len(drawn) - CYCLE, 97):  # everywhere, not only in the end
        count = np.bincount([which for which, _ in drawn[start : start + CYCLE]], minlength=len(weights))
        assert (abs(count / CYCLE - share) < 0.06).all()
    assert pickle.loads(pickle.dumps(mixture)).draw(10**15) == mixture.draw(10**15)
