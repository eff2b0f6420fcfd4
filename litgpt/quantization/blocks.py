"""The blocks in which GGUF files hold quantised weights (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

A row of a matrix is cut into blocks of 32 or 256 values. In a block, the values of a group share a step and, in some
formats, an offset:

    value = scale * scales[group] * code - minimum * minimums[group]

`scale` and `minimum` are in 16 bits, one of each in a block. The blocks of 32 values are one group, and have no
`scales`; those of 256, the "K-quants", have them for each of their groups, in 4 to 8 bits.

               values in    bits of a    a group has
      format   a group      code         an offset      bits a value
      q4_0     32           4                            4.5
      q4_1     32           4            yes             5
      q5_0     32           5                            5.5
      q5_1     32           5            yes             6
      q8_0     32           8                            8.5
      q2_k     16           2            yes             2.625
      q3_k     16           3                            3.4375
      q4_k     32           4            yes             4.5
      q5_k     32           5            yes             5.5
      q6_k     16           6                            6.5625

This is the plain description of each, which kernels must equal. How codes and scales are chosen is in
`litgpt.quantization.block_search`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_NIBBLES, _PAIRS, _BITS = (0, 4), (0, 2, 4, 6), (0, 1, 2, 3, 4, 5, 6, 7)


class Levels(NamedTuple):
    """What N blocks hold, taken apart."""

    codes: Tensor
    """(N, groups, values of a group) whole numbers"""
    scale: Tensor
    """(N,) in float32, of numbers in 16 bits"""
    scales: Tensor | None = None
    """(N, groups) whole numbers; None where there is one group"""
    minimum: Tensor | None = None
    """(N,), as `scale`; None in formats without offsets"""
    minimums: Tensor | None = None
    """(N, groups) whole numbers; None where there is one group"""

    def values(self) -> Tensor:
        """(N, values) what the blocks stand for, in float32, rounded as ggml rounds."""
        step = _times(self.scale, self.scales)
        values = self.codes.float() * step[..., None]  # (N, groups, values of a group)
        if self.minimum is not None:
            values -= _times(self.minimum, self.minimums)[..., None]
        return values.flatten(1)


def _times(scale: Tensor, scales: Tensor | None) -> Tensor:
    """(N, groups) the factors of the groups."""
    return scale[:, None] if scales is None else scale[:, None] * scales.float()


@dataclass(frozen=True)
class BlockFormat:
    """How a block lies in memory.

    Attributes:
        name: Such as q4_k.
        values: How many values a block stands for.
        bytes: How many bytes it has.
        group: How many values share a step.
        unpack: (N, bytes) -> levels.
        pack: The way back; None for formats that are only read.
    """

    name: str
    values: int
    bytes: int
    group: int
    unpack: Callable[[Tensor], Levels]
    pack: Callable[[Levels], Tensor] | None = None

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of this many values."""
        return columns // self.values * self.bytes

    def dequantised(self, raw: Tensor) -> Tensor:
        """(rows, row_bytes) uint8 -> (rows, columns) in float32."""
        blocks = raw.reshape(-1, self.bytes)
        return self.unpack(blocks).values().view(len(raw), raw.size(1) // self.bytes * self.values)


# --- bits and bytes --------------------------------------------------------------------------------------------------


def _taken_apart(data: Tensor, shifts: tuple[int, ...], pieces: int = 1) -> Tensor:
    """(N, bytes) -> (N, values): of every piece of the bytes first the lowest bits of each, then the next ones."""
    mask = (1 << (8 // len(shifts))) - 1
    shift = torch.tensor(shifts, dtype=torch.uint8, device=data.device)[:, None]
    pieced = data.reshape(len(data), pieces, 1, data.size(1) // pieces)
    return (pieced >> shift & mask).flatten(1)


def _put_together(values: Tensor, shifts: tuple[int, ...], pieces: int = 1) -> Tensor:
    """The way back; the values must not have more bits than there is room for."""
    shift = torch.tensor(shifts, dtype=torch.uint8, device=values.device)[:, None]
    size = values.size(1) // pieces // len(shifts)
    pieced = values.to(torch.uint8).view(len(values), pieces, len(shifts), size)
    return (pieced << shift).sum(dim=2, dtype=torch.uint8).flatten(1)


def _halves(data: Tensor) -> list[Tensor]:
    """(N, 2 n) bytes -> n numbers (N,) in float32."""
    return list(data.contiguous().view(torch.float16).float().unbind(1))


def _half(number: Tensor) -> Tensor:
    """(N,) -> (N, 2) bytes."""
    return number.to(torch.float16)[:, None].view(torch.uint8)


def _grouped(codes: Tensor, group: int) -> Tensor:
    return codes.unflatten(1, (-1, group))


# --- blocks of 32 values ---------------------------------------------------------------------------------------------


def _small(name: str, bits: int, offset: bool) -> BlockFormat:
    """A format with `bits` for a code: 4 of them in one place, the fifth in another."""
    numbers = 2 * (1 + offset)
    fifth = 4 if bits == 5 else 0
    # Without offsets the codes are around zero.
    middle = 0 if offset else 1 << (bits - 1)

    def unpack(blocks: Tensor) -> Levels:
        scale, *minimum = _halves(blocks[:, :numbers])
        codes = _taken_apart(blocks[:, numbers + fifth :], _NIBBLES)
        if fifth:
            codes |= _taken_apart(blocks[:, numbers : numbers + fifth], _BITS, pieces=4) << 4
        codes = _grouped(codes.to(torch.int8) - middle, 32)
        return Levels(codes, scale, minimum=-minimum[0] if minimum else None)

    def pack(levels: Levels) -> Tensor:
        codes = (levels.codes + middle).flatten(1).to(torch.uint8)
        parts = [_half(levels.scale)]
        if levels.minimum is not None:
            parts.append(_half(-levels.minimum))
        if fifth:
            parts.append(_put_together(codes >> 4, _BITS, pieces=4))
        return torch.cat([*parts, _put_together(codes & 15, _NIBBLES)], dim=1)

    return BlockFormat(name, 32, numbers + fifth + 16, 32, unpack, pack)


def _unpack_q8_0(blocks: Tensor) -> Levels:
    return Levels(_grouped(blocks[:, 2:].view(torch.int8), 32), _halves(blocks[:, :2])[0])


def _pack_q8_0(levels: Levels) -> Tensor:
    return torch.cat((_half(levels.scale), levels.codes.flatten(1).to(torch.int8).view(torch.uint8)), dim=1)


# --- blocks of 256 values --------------------------------------------------------------------------------------------


def _unpack_q2_k(blocks: Tensor) -> Levels:
    both, data = blocks[:, :16], blocks[:, 16:80]
    scale, minimum = _halves(blocks[:, 80:])
    return Levels(_grouped(_taken_apart(data, _PAIRS, pieces=2), 16), scale, both & 15, minimum, both >> 4)


def _unpack_q3_k(blocks: Tensor) -> Levels:
    high, data, scales = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    codes = _taken_apart(data, _PAIRS, pieces=2) | _taken_apart(high, _BITS) << 2
    scales = _taken_apart(scales[:, :8], _NIBBLES) | _taken_apart(scales[:, 8:], _PAIRS) << 4  # (N, 16)
    (scale,) = _halves(blocks[:, 108:])
    return Levels(_grouped(codes.to(torch.int8) - 4, 16), scale, scales.to(torch.int8) - 32)


def _unpack_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 12) -> eight scales and eight minimums (N, 8) of 6 bits.

    The first four of each have bytes of their own, whose upper bits are those of the other four.
    """
    first, second, third = data.split(4, dim=1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=1)
    minimums = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return scales, minimums


def _pack_scales(scales: Tensor, minimums: Tensor) -> Tensor:
    low, high = scales.to(torch.uint8).split(4, dim=1)
    low_minimums, high_minimums = minimums.to(torch.uint8).split(4, dim=1)
    third = high & 15 | (high_minimums & 15) << 4
    return torch.cat((low | high >> 4 << 6, low_minimums | high_minimums >> 4 << 6, third), dim=1)


def _pack_factors(levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """The bytes of the two numbers of each block, and of the scales and minimums of its groups."""
    scales, minimum, minimums = levels.scales, levels.minimum, levels.minimums
    assert scales is not None
    assert minimum is not None
    assert minimums is not None
    return _half(levels.scale), _half(minimum), _pack_scales(scales, minimums)


def _unpack_q4_k(blocks: Tensor) -> Levels:
    scale, minimum = _halves(blocks[:, :4])
    scales, minimums = _unpack_scales(blocks[:, 4:16])
    return Levels(_grouped(_taken_apart(blocks[:, 16:], _NIBBLES, pieces=4), 32), scale, scales, minimum, minimums)


def _pack_q4_k(levels: Levels) -> Tensor:
    codes = _put_together(levels.codes.flatten(1), _NIBBLES, pieces=4)
    return torch.cat((*_pack_factors(levels), codes), dim=1)


def _unpack_q5_k(blocks: Tensor) -> Levels:
    scale, minimum = _halves(blocks[:, :4])
    scales, minimums = _unpack_scales(blocks[:, 4:16])
    codes = _taken_apart(blocks[:, 48:], _NIBBLES, pieces=4) | _taken_apart(blocks[:, 16:48], _BITS) << 4
    return Levels(_grouped(codes, 32), scale, scales, minimum, minimums)


def _pack_q5_k(levels: Levels) -> Tensor:
    codes = levels.codes.flatten(1).to(torch.uint8)
    data = _put_together(codes >> 4, _BITS), _put_together(codes & 15, _NIBBLES, pieces=4)
    return torch.cat((*_pack_factors(levels), *data), dim=1)


def _unpack_q6_k(blocks: Tensor) -> Levels:
    codes = _taken_apart(blocks[:, :128], _NIBBLES, pieces=2) | _taken_apart(blocks[:, 128:192], _PAIRS, pieces=2) << 4
    (scale,) = _halves(blocks[:, 208:])
    return Levels(_grouped(codes.to(torch.int8) - 32, 16), scale, blocks[:, 192:208].view(torch.int8))


def _pack_q6_k(levels: Levels) -> Tensor:
    assert levels.scales is not None
    codes = (levels.codes + 32).flatten(1).to(torch.uint8)
    data = _put_together(codes & 15, _NIBBLES, pieces=2), _put_together(codes >> 4, _PAIRS, pieces=2)
    return torch.cat((*data, levels.scales.to(torch.int8).view(torch.uint8), _half(levels.scale)), dim=1)


FORMATS = {
    form.name: form
    for form in (
        _small("q4_0", 4, offset=False),
        _small("q4_1", 4, offset=True),
        _small("q5_0", 5, offset=False),
        _small("q5_1", 5, offset=True),
        BlockFormat("q8_0", 32, 34, 32, _unpack_q8_0, _pack_q8_0),
        BlockFormat("q2_k", 256, 84, 16, _unpack_q2_k),
        BlockFormat("q3_k", 256, 110, 16, _unpack_q3_k),
        BlockFormat("q4_k", 256, 144, 32, _unpack_q4_k, _pack_q4_k),
        BlockFormat("q5_k", 256, 176, 32, _unpack_q5_k, _pack_q5_k),
        BlockFormat("q6_k", 256, 210, 16, _unpack_q6_k, _pack_q6_k),
    )
}
