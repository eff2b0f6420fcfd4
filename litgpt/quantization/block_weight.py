"""Weights in the blocks of a GGUF file, used as they lie there: no copy is de-quantised, and the memory is the file's.

A matrix here may be made of several of the file: queries, keys and values are one matrix here and three there, each in
a format of its own, with rows in another order. Blocks lie along rows, so that any choice of rows is one of whole
blocks; what is made of parts stays a list of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from litgpt.kernels import native
from litgpt.quantization.blocks import FORMATS
from litgpt.quantization.weight_only import keeping_types

KIND = "gguf"
# Up to so many rows the product with the blocks is quicker than widening them first (measured, see the benchmarks).
FEW = 16
_AT_ONCE = 2**18  # values that are de-quantised at a time: they stay in a CPU's cache until they are multiplied


class BlockRows(NamedTuple):
    """Some rows of a matrix as a file has them."""

    raw: Tensor
    """(rows, bytes) uint8 in a format, or (rows, in) of fractions"""
    form: str | None
    """The format, a key of `FORMATS`; None for fractions"""

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(rows, in)"""
        values = self.raw if self.form is None else FORMATS[self.form].dequantised(self.raw)
        return values.to(dtype)

    def take(self, rows: Tensor) -> BlockRows:
        """(N,) numbers of rows -> these, as a copy."""
        return BlockRows(self.raw[rows], self.form)


class BlockMatrix(NamedTuple):
    """A matrix made of parts."""

    parts: list[BlockRows]
    """One below the other"""
    order: Tensor | None = None
    """(out,) which row of the parts each row of the matrix is; None where they are in order"""

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the values that the blocks stand for."""
        values = torch.cat([part.dequantised(dtype) for part in self.parts])
        return values if self.order is None else values[self.order]


class BlockWeight(nn.Module):
    """An (out, in) matrix in the blocks of a GGUF file. It is empty until `take`.

    `part0`, `part1` and so on are the parts one below the other; `order` (out,) says which row of them each row of the
    matrix is, where that is another.

    Args:
        shape: (out, in) of the matrix.
        dtype: The type of fractions that are put in, by `fill`.
    """

    rows_together = 1

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = torch.Size(shape), dtype
        self.forms: list[str | None] = []
        self.register_buffer("order", None)

    def take(self, matrix: BlockMatrix) -> None:
        """Takes the parts as they are, without a copy."""
        for number in range(len(self.forms)):
            delattr(self, f"part{number}")
        self.forms = [part.form for part in matrix.parts]
        for number, part in enumerate(matrix.parts):
            setattr(self, f"part{number}", nn.Parameter(part.raw, requires_grad=False))
        self.order = matrix.order

    @torch.no_grad()
    def fill(self, parts: Iterator[Tensor]) -> None:
        """Takes a matrix that has no blocks, in parts of some rows each."""
        self.take(BlockMatrix([BlockRows(torch.cat([part.to(self.dtype) for part in parts]), None)]))

    @property
    def parts(self) -> list[BlockRows]:
        return [BlockRows(getattr(self, f"part{number}"), form) for number, form in enumerate(self.forms)]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the values that the blocks stand for."""
        return BlockMatrix(self.parts, self.order).dequantised(dtype)

    def rows(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,) numbers of rows -> (N, in) their values; no other row is de-quantised."""
        if self.order is not None:
            numbers = self.order[numbers]
        parts = self.parts
        if len(parts) == 1:
            return parts[0].take(numbers).dequantised(dtype)
        values = torch.empty(len(numbers), self.shape[1], dtype=dtype, device=numbers.device)
        first = 0
        for part in parts:
            here = (numbers >= first) & (numbers < first + len(part.raw))
            values[here] = part.take(numbers[here] - first).dequantised(dtype)
            first += len(part.raw)
        return values

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of x."""
        flat = x.reshape(-1, self.shape[1])
        if x.device.type == "cpu" and x.dtype in native.TYPES and native.library() is not None:
            y = torch.cat([_multiplied(part, flat) for part in self.parts], dim=1)
        else:
            y = self._multiplied_in_pieces(flat)
        if self.order is not None:
            y = y[:, self.order]
        return y.view(*x.shape[:-1], self.shape[0])

    def _multiplied_in_pieces(self, flat: Tensor) -> Tensor:
        pieces = (piece for part in self.parts for piece in _some_rows(part, self.shape[1]))
        return torch.cat([flat @ piece.dequantised(flat.dtype).T for piece in pieces], dim=1)

    def _apply(self, fn: Callable, recurse: bool = True) -> BlockWeight:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(keeping_types(fn), recurse)


def _multiplied(part: BlockRows, x: Tensor) -> Tensor:
    """(rows, in) -> (rows, rows of the part), by the kernels for CPUs."""
    if part.form is None:
        return x @ part.raw.T.to(x.dtype)
    shape = len(part.raw), x.size(1)
    matrix = native.Matrix(native.BLOCKS[part.form], 0, *shape, part.raw.data_ptr())
    return native.linear(matrix, x) if len(x) <= FEW else native.widened_product(matrix, x)


def _some_rows(part: BlockRows, columns: int) -> Iterator[BlockRows]:
    """A part in parts that are small once they are de-quantised."""
    for raw in part.raw.split(max(1, _AT_ONCE // columns)):
        yield BlockRows(raw, part.form)


class BlockEmbedding(nn.Module):
    """An embedding whose table is a `BlockWeight`: only the rows that are asked for are de-quantised.

    Args:
        num_embeddings: How many rows there are.
        embedding_dim: Their width.
        dtype: The type of what comes out.
    """

    kind = KIND

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.quantized = BlockWeight((num_embeddings, embedding_dim), dtype)

    @property
    def weight(self) -> Tensor:
        """(0, C) a tensor of the type and in the place of what comes out. The table is in `quantized`."""
        place = next(self.quantized.parameters(), torch.empty(0)).device
        return torch.empty(0, self.quantized.shape[1], dtype=self.dtype, device=place)

    def forward(self, idx: Tensor) -> Tensor:
        """(...) -> (..., C)."""
        return self.quantized.rows(idx.flatten(), self.dtype).view(*idx.shape, self.quantized.shape[1])

    def weight_shape(self) -> Tensor:
        """A tensor like the table before it is quantised, without memory."""
        return torch.empty(self.quantized.shape, dtype=self.dtype, device="meta")

    def plain_weight(self) -> Tensor:
        """(rows, width) the table, de-quantised."""
        return self.quantized.dequantised(self.dtype)

    def load_weight(self, weight: Tensor, done: Callable[[Tensor], None] = lambda part: None) -> None:
        """Takes a table that has no blocks."""
        self.quantized.fill(iter([weight]))
        done(weight)

    def _apply(self, fn: Callable, recurse: bool = True) -> BlockEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)
