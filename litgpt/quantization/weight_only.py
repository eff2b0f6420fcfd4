"""Weights in 4 or 8 bits for inference on CPUs: inputs and products stay in the model's type.

    int4    4 bits a value, and a scale and a middle for every 32 values of a row: 5 bits a value
    int8    8 bits a value, and a scale for every row; the head of an int4 model, too

Perplexity of SmolLM2-135M-Instruct on 2,048 tokens of Shakespeare: bfloat16 39.7, int8 40.1, int4 39.7, with the head
in 4 bits 41.3. The checkpoint had been in 4 bits in groups of 32 before, which flatters int4: in groups of 64 it is
51.8, with bnb.nf4 52.2.

Decoding reads every weight once for each token, so fewer bytes are more tokens. torch's own kernels multiply a few rows
by the packed weight; for many rows (prompts, large batches) the arithmetic counts, and the weight is de-quantised for a
plain product. The layers that hold these weights are `litgpt.quantization.layers`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("int4", "int8")
GROUP = 32  # values that share a scale in 4 bits
ROWS = 64  # rows of a weight that are packed together; the kernel's blocks are parts of it
# Up to this many rows of inputs the product with the packed weight is the quicker one (measured, see the benchmarks).
FEW = {"int4": 96, "int8": 16}


class WeightOnly(nn.Module):
    """An (out, in) matrix with fewer bits. Its tensors are not initialised; `fill` does it.

    Args:
        shape: (out, in) of the matrix.
    """

    rows_together = ROWS

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = torch.Size(shape)

    def _apply(self, fn: Callable, recurse: bool = True) -> WeightOnly:
        return super()._apply(keeping_types(fn), recurse)


class Int4Weight(WeightOnly):
    """4 bits: value = (code - 8) * scale + middle, the scale and the middle those of its group.

    `codes` (blocks, in, half) hold what two rows of a block have in a column, in the lower and the upper half of a
    byte, as torch's kernel for this CPU wants them (`block_layout`): rows i and i + half of 64 with AVX-512 and of 32
    with AVX2, rows 2 i and 2 i + 1 elsewhere. `scales` (groups, out, 2) are scales and middles in `dtype`. Both are
    padded to whole blocks and groups.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(shape)
        rows, columns = _padded(shape[0], ROWS), _padded(shape[1], GROUP)
        block, self.neighbours = block_layout()
        self.codes = frozen((rows // block, columns, block // 2), torch.uint8, device)
        self.scales = frozen((columns // GROUP, rows, 2), dtype, device)

    @torch.no_grad()
    def fill(self, parts: Iterator[Tensor]) -> None:
        """Takes the matrix, in parts of some rows each, of which all but the last are multiples of 64."""
        row = 0
        for part in parts:
            values = F.pad(part.float(), (0, -part.size(1) % GROUP, 0, -len(part) % ROWS)).unflatten(1, (-1, GROUP))
            smallest, largest = values.aminmax(dim=2)  # (rows, groups)
            scales = torch.stack(((largest - smallest) / 15, smallest + (largest - smallest) * (8 / 15)), dim=2)
            scales = scales.to(self.scales.dtype)
            scale, middle = scales.float()[..., None].unbind(2)  # (rows, groups, 1)
            codes = torch.where(scale > 0, (values - middle) / scale, 0).round_().add_(8).clamp_(0, 15)
            self._put(row, codes.to(torch.uint8).flatten(1), scales)
            row += len(values)

    def _put(self, row: int, codes: Tensor, scales: Tensor) -> None:
        """Takes codes (rows, in) and scales (rows, groups, 2) from one row on; whole blocks of rows."""
        block = 2 * self.codes.size(2)
        self.codes[row // block : (row + len(codes)) // block] = _in_pairs(codes, BlockLayout(block, self.neighbours))
        self.scales[:, row : row + len(codes)] = scales.transpose(0, 1)

    def plain(self) -> dict[str, Tensor]:
        """The tensors in an order that no CPU decides, for a file.

        `codes` (out, in / 2) hold two neighbours of a row in a byte, the first one in the lower half; `scales` are
        (out, groups, 2). `in` is padded to whole groups.
        """
        codes = self._single_codes().transpose(1, 2)  # (blocks, block, in)
        codes = codes.flatten(0, 1)[: self.shape[0]]
        return {
            "codes": codes[:, ::2] | codes[:, 1::2] << 4,
            "scales": self.scales.transpose(0, 1)[: self.shape[0]].contiguous(),
        }

    def plain_shapes(self) -> dict[str, torch.Size]:
        """The shapes of what `plain` gives."""
        groups, rows = self.scales.size(0), self.shape[0]
        return {"codes": torch.Size((rows, groups * GROUP // 2)), "scales": torch.Size((rows, groups, 2))}

    @torch.no_grad()
    def take_plain(self, codes: Tensor, scales: Tensor) -> None:
        """Takes the tensors back from that order, a few megabytes at a time."""
        rows = max(1, 2**20 // codes.size(1) // ROWS) * ROWS
        for row, part, factors in zip(range(0, len(codes), rows), codes.split(rows), scales.split(rows), strict=True):
            values = torch.stack((part & 15, part >> 4), dim=2).flatten(1)  # (rows, in)
            missing = -len(part) % ROWS
            factors = F.pad(factors, (0, 0, 0, 0, 0, missing)).to(self.scales)
            self._put(row, F.pad(values, (0, 0, 0, missing), value=8), factors)  # 8 is zero, as `fill` pads

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the values that the codes stand for."""
        return self._blocks(dtype).transpose(1, 2).flatten(0, 1)[: self.shape[0], : self.shape[1]]

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of x."""
        rows = x.shape[:-1].numel()
        flat = F.pad(x.reshape(rows, self.shape[1]), (0, -self.shape[1] % GROUP))
        if rows > FEW["int4"]:
            y = flat @ self._blocks(x.dtype).transpose(0, 1).flatten(1)
        else:
            packed = self.codes.view(self.scales.size(1), -1)
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, GROUP, self.scales.to(x.dtype))
        return y[:, : self.shape[0]].view(*x.shape[:-1], self.shape[0])

    def _blocks(self, dtype: torch.dtype) -> Tensor:
        """(blocks, in, block) the values in the order of the codes."""
        codes = self._single_codes().view(torch.int8).sub_(8)
        blocks, _, block = codes.shape
        # (blocks, groups, 1, block)
        scale, middle = self.scales.to(dtype).view(-1, blocks, 1, block, 2).permute(4, 1, 0, 2, 3).contiguous()
        return torch.addcmul(middle, codes.view(blocks, -1, GROUP, block).to(dtype), scale).view(codes.shape)

    def _single_codes(self) -> Tensor:
        """(blocks, in, block) the codes, one to a byte."""
        halves = (self.codes & 15, self.codes >> 4)
        return torch.stack(halves, dim=3).flatten(2) if self.neighbours else torch.cat(halves, dim=2)


class Int8Weight(WeightOnly):
    """8 bits: value = code * scale of its row. `codes` are (out, in), `scales` (out,) in `dtype`."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(shape)
        self.codes = frozen(shape, torch.int8, device)
        self.scales = frozen(shape[0], dtype, device)

    @torch.no_grad()
    def fill(self, parts: Iterator[Tensor]) -> None:
        """Takes the matrix, in parts of some rows each."""
        row = 0
        for part in parts:
            values = part.float()
            scales = (values.abs().amax(dim=1) / 127).to(self.scales.dtype)
            scale = scales.float()[:, None]
            self.codes[row : row + len(part)] = torch.where(scale > 0, values / scale, 0).round_().clamp_(-127, 127)
            self.scales[row : row + len(part)] = scales
            row += len(part)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the values that the codes stand for."""
        return self.codes.to(dtype) * self.scales.to(dtype)[:, None]

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of x."""
        rows = x.shape[:-1].numel()
        if rows > FEW["int8"] or self.shape[1] % 16:  # the kernel reads 16 values at a time, over the end if need be
            return F.linear(x, self.codes.to(x.dtype)) * self.scales.to(x.dtype)  # the codes are exact in 16 bits
        flat = x.reshape(rows, self.shape[1])
        y = torch.ops.aten._weight_int8pack_mm(flat, self.codes, self.scales.to(x.dtype))
        return y.view(*x.shape[:-1], self.shape[0])


class BlockLayout(NamedTuple):
    """How torch's 4-bit kernel packs the rows of a weight."""

    rows: int
    """How many it packs together"""
    neighbours: bool
    """Whether neighbours share a byte, not rows that are half a block apart"""


LAYOUTS = [BlockLayout(rows, neighbours) for rows in (64, 32, 16) for neighbours in (False, True)]


@cache
def block_layout() -> BlockLayout:
    """How it does so on this CPU: one of LAYOUTS.

    Raises:
        ValueError: None of these; the kernel is another one than we know.
    """
    row, column = torch.arange(ROWS, device="cpu")[:, None], torch.arange(GROUP, device="cpu")
    codes = ((row // 16 + 5 * row + 3 * column) % 16).int()  # no two rows within 16 are alike, nor a block and the next
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for layout in LAYOUTS:
        if torch.equal(_in_pairs(codes.to(torch.uint8), layout).reshape(packed.shape), packed):
            return layout
    raise ValueError("quantize=int4 does not know the kernel of this version of torch for this CPU. Use int8.")


def _in_pairs(codes: Tensor, layout: BlockLayout) -> Tensor:
    """(blocks, in, block / 2) bytes of codes (rows, in), two to a byte."""
    half = layout.rows // 2
    if layout.neighbours:
        lower, upper = codes.unflatten(0, (-1, half, 2)).unbind(2)  # (blocks, half, in) each
    else:
        lower, upper = codes.unflatten(0, (-1, 2, half)).unbind(1)
    return (lower | upper << 4).transpose(1, 2)


def keeping_types(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves and converts a module's tensors, without the converting."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def frozen(shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Memory for a part of a weight that is not trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
