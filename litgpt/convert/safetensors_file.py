"""The safetensors format (https://github.com/huggingface/safetensors#format): mapped reading, streamed writing.

    8 bytes   N, little-endian
    N bytes   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    the rest  the tensors' bytes, without gaps, at those offsets

The `safetensors` package writes only what is whole in memory; and pages it has read from a file stay with the process
until the file is closed. Both would make a conversion's memory grow with the checkpoint, hence this module.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint import MappedTensors, Release, raw_parts, unreadable

_MAX_HEADER = 100_000_000  # the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_safetensors(path: Path) -> MappedTensors:
    """Opens a safetensors file; its tensors are views of the file.

    Raises:
        ValueError: The file is truncated, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if 0 < length <= min(_MAX_HEADER, size - 8) else None
            entries = {name: _entry(value) for name, value in header.items() if name != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(unreadable(path, "it is truncated, or no safetensors file")) from error
        needed = 8 + length + max((end for *_, end in entries.values()), default=0)
        if needed > size:
            raise ValueError(unreadable(path, f"it is truncated, {needed:,} bytes are expected"))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = MappedTensors()
    for name, (dtype, shape, begin, _) in entries.items():
        tensors[name] = _view(content, dtype, shape, 8 + length + begin)
    return tensors


def _entry(value: dict[str, Any]) -> tuple[torch.dtype, list[int], int, int]:
    dtype, shape, (begin, end) = _DTYPES[value["dtype"]], value["shape"], value["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(value)
    return dtype, shape, begin, end


def _view(content: mmap.mmap, dtype: torch.dtype, shape: list[int], offset: int) -> torch.Tensor:
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=offset).view(shape)


def write_safetensors(
    path: Path,
    names: dict[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    release: Release = lambda tensor: None,
) -> None:
    """Writes a safetensors file one tensor at a time.

    Args:
        path: The file, overwritten.
        names: For every tensor, in the order they come, one of its type and shape (on the meta device, say).
        tensors: Names and tensors.
        release: Called with each part of a tensor that has been written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, like in names.items():
        begin, end = end, end + like.numel() * like.dtype.itemsize
        header[name] = {"dtype": _NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), expected in zip(tensors, names, strict=True):
            assert name == expected, f"{name} comes where {expected} was announced"
            assert (tensor.dtype, tensor.shape) == (names[name].dtype, names[name].shape), name
            for part in raw_parts(tensor):
                file.write(memoryview(part.numpy()))
                release(part)
        file.flush()
        os.fsync(file.fileno())
