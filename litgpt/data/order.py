"""The order of samples as a pure function of seed and position: any place in it at once, with nothing to remember."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from math import isqrt

ORDER_VERSION = 2  # raise it when the same seed would give another order; 1 was torch's randperm
WORD = (1 << 64) - 1
ROUNDS = 8
SMALLEST_SIDE = 4  # on fewer values, so few rounds would not give all permutations alike


class KeyedPermutation:
    """A permutation of range(n) that a key decides, with random access: `permutation[i]` in O(1) time and memory.

    A Feistel network (Luby and Rackoff 1988) on pairs (left, right) with left < a, right < b and a * b just above n, in
    the generalised form of Black and Rogaway ("Ciphers with Arbitrary Finite Domains", 2002): each round adds a keyed
    hash of one half to the other, modulo that one's size, which can be undone, so that the whole is one-to-one. What
    falls on n or beyond is sent through again (cycle walking): of more than 16 values, fewer than a = O(sqrt(n)).

    It is made for mixing training data, not for secrets.

    Args:
        size: n.
        key: What decides the permutation, such as a seed and an epoch.
    """

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self._left = max(SMALLEST_SIDE, isqrt(max(size - 1, 0)) + 1)
        self._right = max(SMALLEST_SIDE, -(-size // self._left))
        text = ":".join(map(str, (ORDER_VERSION, size, *key)))
        digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        """Where `index` goes."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        value = self._once(index)
        while value >= self.size:
            value = self._once(value)
        return value

    def __iter__(self) -> Iterator[int]:
        return map(self.__getitem__, range(self.size))

    def _once(self, value: int) -> int:
        a, b = self._left, self._right
        right, left = divmod(value, a)
        keys = iter(self._keys)
        for key in keys:
            left = (left + ((_mix(right ^ key) * a) >> 64)) % a
            right = (right + ((_mix(left ^ next(keys)) * b) >> 64)) % b
        return right * a + left


def _mix(x: int) -> int:
    """64 bits in which each bit depends on all of those of `x` (the finaliser of SplitMix64)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)
