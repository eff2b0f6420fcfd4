"""The safetensors format (https://github.com/huggingface/safetensors#format): mapped reading, streamed writing.

    8 bytes   N, little-endian
    N bytes   JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    the rest  the tensors' bytes, without gaps, at those offsets

What is written here also carries sums, in the metadata, which other programs pass over: `litgpt_crc32` holds 8
hexadecimal digits for the header (with zeros in the place of these digits) and 8 for each tensor, in their order.

The `safetensors` package writes only what is whole in memory; and pages it has read from a file stay with the process
until the file is closed. Both would make a conversion's memory grow with the checkpoint, hence this module.
"""

import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from litgpt.checkpoint import MappedTensors, Release, raw_parts, unreadable
from litgpt.checkpoint.sums import CheckedPart, DamagedFile, check_parts
from litgpt.cli.untrusted import MAX_INTEGER, is_count, parse_json_object, shown

_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_DIMENSIONS = 16
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
_SUMS = "litgpt_crc32"
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def read_safetensors(path: Path, check: bool = True) -> MappedTensors:
    """Opens a safetensors file; its tensors are views of the file.

    Args:
        path: The file.
        check: As for `read_state_dict`.

    Raises:
        ValueError: The file is truncated or damaged, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f"its header would have {length:,} bytes")
            header = _header(file.read(length))
            entries = {name: _entry(name, value) for name, value in header.items() if name != "__metadata__"}
            end = _check_places(entries)
        except ValueError as error:
            raise ValueError(unreadable(path, f"it is truncated, or no safetensors file ({error})")) from None
        needed = 8 + length + end
        if needed != size:
            reason = "it is truncated" if needed > size else "something follows its last tensor"
            raise ValueError(unreadable(path, f"{reason}, {needed:,} bytes are expected"))
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = MappedTensors()
    for name, (dtype, shape, begin, _) in entries.items():
        tensors[name] = _view(content, dtype, shape, 8 + length + begin)
    if isinstance(sums := (header.get("__metadata__") or {}).get(_SUMS), str):
        places = [(name, begin, end) for name, (_, _, begin, end) in entries.items()]
        tensors.compare = partial(_compare, path, length, places, sums)
        if check:
            tensors.check()
    return tensors


def described(beginning: Callable[[int], bytes]) -> dict[str, torch.Tensor]:
    """The tensors of a file on the meta device, by its header alone.

    Args:
        beginning: Gives that many of the file's first bytes.

    Raises:
        ValueError: It is damaged, or no safetensors file.
    """
    length = int.from_bytes(beginning(8), "little")
    if not 0 < length <= _MAX_HEADER:
        raise ValueError(f"its header would have {length:,} bytes")
    header = _header(beginning(8 + length)[8:])
    entries = {name: _entry(name, value) for name, value in header.items() if name != "__metadata__"}
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape, *_) in entries.items()}


def _compare(path: Path, length: int, places: list[tuple[str, int, int]], sums: str) -> None:
    """Compare header and tensors, each from `begin` to `end` behind the header, with the sums in the metadata."""
    try:
        if not re.fullmatch(f"[0-9a-f]{{{8 * (len(places) + 1)}}}", sums):
            raise DamagedFile("it is damaged, its sums are not those of its tensors")
        values = [int(sums[i : i + 8], 16) for i in range(0, len(sums), 8)]
        with path.open("rb") as file:
            file.seek(8)
            text = file.read(length).replace(sums.encode(), b"0" * len(sums), 1)
        if zlib.crc32(text) != values[0]:
            raise DamagedFile("it is damaged, its header is not as it was written")
        start, named = 8 + length, zip(places, values[1:], strict=True)
        check_parts(path, [CheckedPart(name, start + begin, end - begin, value) for (name, begin, end), value in named])
    except DamagedFile as error:
        raise ValueError(unreadable(path, str(error))) from error


def _header(text: bytes) -> dict[str, Any]:
    header = parse_json_object(text, "header", "", unique_keys=True)
    if not isinstance(header.get("__metadata__", {}), dict):
        raise ValueError("its metadata is not an object")
    return header


def _entry(name: str, value: Any) -> tuple[torch.dtype, list[int], int, int]:
    """Type, shape, begin and end of a tensor, each of which is what it should be."""
    value = value if isinstance(value, dict) else {}
    dtype, shape, place = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"the type of {shown(name)} is {shown(dtype)}, which is not supported")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(map(is_count, shape)):
        raise ValueError(f"the shape of {shown(name)} is {shown(shape)}")
    itemsize = _DTYPES[dtype].itemsize
    if math.prod(max(size, 1) for size in shape) > MAX_INTEGER // itemsize:  # a 0 would hide the others
        raise ValueError(f"the shape of {shown(name)} is {shown(shape)}")
    if not isinstance(place, list) or len(place) != 2 or not all(map(is_count, place)):
        raise ValueError(f"the offsets of {shown(name)} are {shown(place)}")
    begin, end = place
    if end - begin != math.prod(shape) * itemsize:
        raise ValueError(f"the offsets of {shown(name)} are {shown(place)}, and its shape is {shown(shape)}")
    return _DTYPES[dtype], shape, begin, end


def _check_places(entries: dict[str, tuple[torch.dtype, list[int], int, int]]) -> int:
    """The end of the last tensor, with the others before it one after the other, without gaps, as the format has it."""
    last = 0
    for name, (*_, begin, end) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if begin != last:
            what = "overlaps the tensor before it" if begin < last else "leaves a gap before it"
            raise ValueError(f"{shown(name)} {what}, at byte {begin:,} of {last:,}")
        last = end
    return last


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
    sums = "0" * 8 * (len(names) + 1)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _SUMS: sums}}
    end = 0
    for name, like in names.items():
        begin, end = end, end + like.numel() * like.dtype.itemsize
        header[name] = {"dtype": _NAMES[like.dtype], "shape": list(like.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    found = [zlib.crc32(text)]
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), expected in zip(tensors, names, strict=True):
            assert name == expected, f"{name} comes where {expected} was announced"
            assert (tensor.dtype, tensor.shape) == (names[name].dtype, names[name].shape), name
            found.append(0)
            for part in raw_parts(tensor):
                file.write(memoryview(part.numpy()))
                found[-1] = zlib.crc32(memoryview(part.numpy()), found[-1])
                release(part)
        file.seek(8 + text.index(sums.encode()))
        file.write("".join(f"{value:08x}" for value in found).encode())
        file.flush()
        os.fsync(file.fileno())
