"""Reading GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3.

The `gguf` package's own reader takes four seconds for a vocabulary of 49,000 tokens, since it makes an array of every
string; this one takes a tenth of one, and leaves the tensors on the disk until they are asked for. What the package
knows about quantised types is used from there.
"""

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from litgpt.cli.untrusted import MAX_INTEGER, is_count, shown
from litgpt.quantization.block_weight import BlockRows
from litgpt.quantization.blocks import FORMATS

# GGUF's type numbers of fixed size -> struct format and numpy type.
_NUMBERS = {
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "?"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
_STRING, _ARRAY = 8, 9
# More than any file has; what is read by the number in the file is read one by one.
_MAX_PAIRS, _MAX_TENSORS, _MAX_ARRAY = 1 << 16, 1 << 20, 1 << 22
_MAX_DIMENSIONS = 4  # the format's own limit
_MAX_STRING = 1 << 24
_PLAIN = {
    gguf.GGMLQuantizationType.F32: torch.float32,
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
    gguf.GGMLQuantizationType.F64: torch.float64,
}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in a GGUF file.

    Attributes:
        shape: Slowest dimension first, as torch has it (the file says it the other way round).
        dtype: The type that `read` gives.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        return _PLAIN.get(self.kind, torch.float32)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * size

    @property
    def form(self) -> str | None:
        """The format of its blocks, a key of `FORMATS`; None where there is none for it."""
        name = self.kind.name.lower()
        return name if name in FORMATS else None

    def rows_in(self, content: Tensor) -> BlockRows:
        """Its rows, without a copy of their blocks; of a matrix.

        Args:
            content: All bytes of the file (`GGUFFile.mapped`).
        """
        raw = content[self.offset : self.offset + self.size]
        if self.form is not None:
            return BlockRows(raw.view(self.shape[0], -1), self.form)
        aligned = self.kind in _PLAIN and self.offset % self.dtype.itemsize == 0
        return BlockRows(raw.view(self.dtype).view(self.shape) if aligned else self.read(), None)

    def read(self) -> Tensor:
        """The values; quantised ones in float32. Raises `ValueError` for a type that cannot be de-quantised."""
        raw = np.fromfile(self.path, dtype=np.uint8, count=self.size, offset=self.offset)
        if self.kind in _PLAIN:
            return torch.from_numpy(raw).view(self.dtype).view(self.shape)
        rows = raw.reshape(-1, self.size // math.prod(self.shape[:-1]))
        try:
            return torch.from_numpy(gguf.dequantize(rows, self.kind)).view(self.shape)
        except NotImplementedError as error:
            message = f"'{self.path}': {self.name} is of type {self.kind.name}, which cannot be de-quantised."
            raise ValueError(message) from error


class GGUFFile:
    """The metadata and the list of tensors of a GGUF file.

    Attributes:
        metadata: Values by key; arrays as lists.
        tensors: Tensors by name, in the file's order.

    Raises:
        ValueError: The file is truncated, or no GGUF file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        try:
            # The header is small (the vocabulary); mapping lets it be parsed without knowing its length.
            self._content = np.memmap(path, dtype=np.uint8, mode="r").data if size else memoryview(b"")
            self._position = 0
            self._parse()
        except (struct.error, ValueError) as error:
            raise ValueError(self._unreadable(f"it is truncated, or no GGUF file ({error})")) from error
        finally:
            self._content = memoryview(b"")
        end = max((tensor.offset + tensor.size for tensor in self.tensors.values()), default=0)
        if end > size:
            raise ValueError(self._unreadable(f"it is truncated, {end:,} bytes are expected"))

    def mapped(self) -> Tensor:
        """All bytes of the file, which are read from the disk where they are used, and can be dropped again."""
        return torch.from_file(str(self.path), shared=False, size=self.path.stat().st_size, dtype=torch.uint8)

    def _unreadable(self, reason: str) -> str:
        return f"Cannot read '{self.path}' ({self.path.stat().st_size:,} bytes): {reason}. Download it again."

    def _parse(self) -> None:
        if bytes(self._content[:4]) != b"GGUF":
            raise ValueError("it does not begin with 'GGUF'")
        self._position = 4
        version = self._number(4)
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format")
        tensor_count = self._count(10, _MAX_TENSORS, "tensors")
        pair_count = self._count(10, _MAX_PAIRS, "metadata")
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string()
            if key in self.metadata:
                raise ValueError(f"{shown(key)} comes twice")
            self.metadata[key] = self._value(self._number(4))
        tensors = [self._tensor_header() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not is_count(alignment, 1 << 20) or alignment == 0 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {shown(alignment)}, which is not a power of two")
        start = -(-self._position // alignment) * alignment
        self.tensors = {tensor.name: replace(tensor, offset=start + tensor.offset) for tensor in tensors}
        if len(self.tensors) < len(tensors):
            raise ValueError("a tensor comes twice")
        self._check_places(start, alignment)

    def _check_places(self, start: int, alignment: int) -> None:
        """Tensors lie one behind the other: none overlaps another, each begins at a multiple of the alignment."""
        end = start
        for tensor in sorted(self.tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end or (tensor.offset - start) % alignment:
                raise ValueError(f"the offset of {shown(tensor.name)} is wrong")
            end = tensor.offset + tensor.size

    def _tensor_header(self) -> GGUFTensor:
        """A tensor with its offset from where the tensors begin."""
        name = self._string()
        dimensions = self._count(4, _MAX_DIMENSIONS, f"dimensions of {shown(name)}")
        shape = tuple(self._number(10) for _ in range(dimensions))[::-1]
        kind = gguf.GGMLQuantizationType(self._number(4))
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if not shape or 0 in shape or shape[-1] % block or math.prod(shape) > MAX_INTEGER // size:
            raise ValueError(f"the shape of {shown(name)} is {shown(shape)}")
        return GGUFTensor(self.path, name, shape, kind, self._number(10))

    def _count(self, kind: int, at_most: int, what: str) -> int:
        count = self._number(kind)
        if count > at_most:
            raise ValueError(f"it would have {count:,} {what}")
        return count

    def _number(self, kind: int) -> Any:
        if kind not in _NUMBERS:
            raise ValueError(f"a value in its metadata is of the unknown type {kind}")
        form = _NUMBERS[kind][0]
        (value,) = struct.unpack_from(form, self._content, self._position)
        self._position += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._count(10, _MAX_STRING, "bytes in a string")
        end = self._position + length
        if end > len(self._content):
            raise ValueError("it ends within a string")
        text = bytes(self._content[self._position : end]).decode("utf-8", errors="replace")
        self._position = end
        return text

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._number(kind)
        item, length = self._number(4), self._count(10, _MAX_ARRAY, "values in an array")
        if item == _STRING:
            return [self._string() for _ in range(length)]
        if item not in _NUMBERS:
            raise ValueError(f"an array in its metadata is of arrays, or of the unknown type {item}")
        numbers = np.frombuffer(self._content, _NUMBERS[item][1], length, self._position)
        self._position += numbers.nbytes
        return numbers.tolist()
