"""Weights in 4 or 8 bits for inference on CPUs: inputs and products stay in the model's type.

    int4    4 bits a value, and a scale and a middle for every 32 values of a row: 5 bits a value
    int8    8 bits a value, and a scale for every row; the head of an int4 model, too

Perplexity of SmolLM2-135M-Instruct on 2,048 tokens of Shakespeare: bfloat16 39.7, int8 40.1, int4 39.7, with the head
in 4 bits 41.3. The checkpoint had been in 4 bits in groups of 32 before, which flatters int4: in groups of 64 it is
51.8, with bnb.nf4 52.2.

Decoding reads every weight once for each token, so fewer bytes are more tokens. The kernels (`litgpt.kernels`) multiply
a few rows by the packed weight; for many rows (prompts, large batches) the arithmetic counts, and the weight is
de-quantised a part at a time for torch's product. The layers that hold these weights are in
`litgpt.quantization.layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.kernels import native
from litgpt.kernels.native import INT4, INT8, TYPES, Matrix

KINDS = ("int4", "int8")
GROUP = 32  # values that share a scale in 4 bits
BLOCK = 16  # rows of a weight whose codes lie together
ROWS = 64  # rows that are packed at a time
# Up to this many rows of inputs the product with the packed weight is the quicker one (measured, see the benchmarks).
FEW = {"int4": 32, "int8": 16}


class WeightOnly(nn.Module):
    """An (out, in) matrix with fewer bits. Its tensors are not initialised; `fill` does it.

    Args:
        shape: (out, in) of the matrix.
    """

    rows_together = ROWS
    kind: str
    codes: nn.Parameter
    scales: nn.Parameter

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = torch.Size(shape)
        self._plain: Tensor | None = None  # where there are no kernels: the matrix as numbers

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the values that the codes stand for."""
        raise NotImplementedError

    def matrix(self) -> Matrix:
        """It, for the kernels. They read its memory."""
        kinds = {"int8": INT8, "int4": INT4}
        scales = self.scales
        return Matrix(kinds[self.kind], TYPES[scales.dtype], *self.shape, self.codes.data_ptr(), scales.data_ptr())

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the type of x."""
        has_kernels = x.device.type == "cpu" and x.dtype in TYPES and self.scales.dtype in TYPES
        if not has_kernels or native.library() is None:
            return F.linear(x, self._numbers(x.dtype))
        if x.shape[:-1].numel() <= FEW[self.kind]:
            return native.linear(self.matrix(), x)
        return native.widened_product(self.matrix(), x)

    def _numbers(self, dtype: torch.dtype) -> Tensor:
        """(out, in), kept: without kernels, this is quicker than to de-quantise for every token."""
        if self._plain is None or self._plain.dtype != dtype or self._plain.device != self.codes.device:
            self._plain = self.dequantised(dtype)
        return self._plain

    def _apply(self, fn: Callable, recurse: bool = True) -> WeightOnly:
        self._plain = None
        return super()._apply(keeping_types(fn), recurse)


class Int4Weight(WeightOnly):
    """4 bits: value = (code - 8) * scale + middle, the scale and the middle those of its group.

    The order is that of the kernels (kernels/int4.h), for every CPU: `codes` (blocks, groups, 4, 64) hold two codes in
    a byte, `scales` (blocks, groups, 2, 16) the scales and the middles of 16 rows, in `dtype`. Both are padded to whole
    blocks and groups.
    """

    kind = "int4"

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(shape)
        blocks, groups = -(-shape[0] // BLOCK), -(-shape[1] // GROUP)
        self.codes = frozen((blocks, groups, 4, 4 * BLOCK), torch.uint8, device)
        self.scales = frozen((blocks, groups, 2, BLOCK), dtype, device)

    @torch.no_grad()
    def fill(self, parts: Iterator[Tensor]) -> None:
        """Takes the matrix, in parts of some rows each, of which all but the last are multiples of 16."""
        row = 0
        for part in parts:
            values = F.pad(part.float(), (0, -part.size(1) % GROUP, 0, -len(part) % BLOCK)).unflatten(1, (-1, GROUP))
            smallest, largest = values.aminmax(dim=2)  # (rows, groups)
            scales = torch.stack(((largest - smallest) / 15, smallest + (largest - smallest) * (8 / 15)), dim=2)
            scales = scales.to(self.scales.dtype)
            scale, middle = scales.float()[..., None].unbind(2)  # (rows, groups, 1)
            codes = torch.where(scale > 0, (values - middle) / scale, 0).round_().add_(8).clamp_(0, 15)
            self._put(row, codes.to(torch.uint8).flatten(1), scales)
            row += len(values)

    def _put(self, row: int, codes: Tensor, scales: Tensor) -> None:
        """Takes codes (rows, in) and scales (rows, groups, 2) from one row on; whole blocks of rows."""
        blocks = slice(row // BLOCK, (row + len(codes)) // BLOCK)
        # (blocks, groups, 4, halves, 16 rows, 4 inputs)
        lower, upper = codes.view(-1, BLOCK, codes.size(1) // GROUP, 4, 2, 4).permute(4, 0, 2, 3, 1, 5)
        self.codes[blocks] = (lower | upper << 4).flatten(3)
        self.scales[blocks] = scales.unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 1)

    def plain(self) -> dict[str, Tensor]:
        """The tensors in the order of a file.

        `codes` (out, in / 2) hold two neighbours of a row in a byte, the first one in the lower half; `scales` are
        (out, groups, 2). `in` is padded to whole groups.
        """
        codes = self._single_codes()[: self.shape[0]]
        scales = self.scales.permute(0, 3, 1, 2).flatten(0, 1)[: self.shape[0]]
        return {"codes": codes[:, ::2] | codes[:, 1::2] << 4, "scales": scales.contiguous()}

    def plain_shapes(self) -> dict[str, torch.Size]:
        """The shapes of what `plain` gives."""
        groups, rows = self.scales.size(1), self.shape[0]
        return {"codes": torch.Size((rows, groups * GROUP // 2)), "scales": torch.Size((rows, groups, 2))}

    @torch.no_grad()
    def take_plain(self, codes: Tensor, scales: Tensor) -> None:
        """Takes the tensors back from that order, a few megabytes at a time."""
        rows = max(1, 2**20 // codes.size(1) // ROWS) * ROWS
        for row, part, factors in zip(range(0, len(codes), rows), codes.split(rows), scales.split(rows), strict=True):
            values = torch.stack((part & 15, part >> 4), dim=2).flatten(1)  # (rows, in)
            missing = -len(part) % BLOCK
            factors = F.pad(factors, (0, 0, 0, 0, 0, missing)).to(self.scales)
            self._put(row, F.pad(values, (0, 0, 0, missing), value=8), factors)  # 8 is zero, as `fill` pads

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(out, in) the values that the codes stand for."""
        codes = self._single_codes().view(torch.int8).sub_(8).unflatten(1, (-1, GROUP))
        scale, middle = self.scales.to(dtype).permute(2, 0, 3, 1).flatten(1, 2)[..., None]  # (rows, groups, 1)
        return torch.addcmul(middle, codes.to(dtype), scale).flatten(1)[: self.shape[0], : self.shape[1]]

    def _single_codes(self) -> Tensor:
        """(rows, in) the codes, one to a byte, padded to whole blocks and groups."""
        codes = self.codes.unflatten(3, (BLOCK, 4))
        codes = torch.stack((codes & 15, codes >> 4), dim=3)  # (blocks, groups, 4, halves, 16, 4)
        return codes.permute(0, 4, 1, 2, 3, 5).reshape(codes.size(0) * BLOCK, -1)


class Int8Weight(WeightOnly):
    """8 bits: value = code * scale of its row. `codes` are (out, in), `scales` (out,) in `dtype`."""

    kind = "int8"

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


def keeping_types(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What moves and converts a module's tensors, without the converting."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

    return move


def frozen(shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    """Memory for a part of a weight that is not trained."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
