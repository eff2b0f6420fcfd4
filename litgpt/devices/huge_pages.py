"""Memory for weights in pages of 2 MB, where the system has them.

Decoding reads all weights for every token. In pages of 4 KB a CPU is slowed down by looking up where they are: two
cores read SmolLM2's matrices at 18 to 24 GB/s, in large pages at 30 to 35. Weights are smaller than a page: they lie
together.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from math import prod

import torch
from torch import Tensor

PAGE = 2**21
LINE = 64  # bytes of a cache line; tensors begin at one


class Pages:
    """Room for tensors. The system gives it as it is filled, and gets it back when the last of them is gone.

    Args:
        sizes: Bytes of each tensor that is to be in it.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self._next = self._end = 0
        size = sum(map(_rounded, sizes))
        if size < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        try:
            self._memory = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a system without them
            return
        self._next = -torch.frombuffer(self._memory, dtype=torch.uint8, count=1).data_ptr() % PAGE
        self._end = self._next + size

    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A tensor with a storage of its own, as `torch.empty`: on a CPU from here, while there is room."""
        count, offset = prod(shape), self._next
        size = _rounded(count * dtype.itemsize)
        if torch.device(device).type != "cpu" or not 0 < size <= self._end - offset:
            return torch.empty(shape, dtype=dtype, device=device)
        self._next += size
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset).view(shape)


def _rounded(size: int) -> int:
    return -(-size // LINE) * LINE
