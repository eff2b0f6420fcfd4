"""Writing `lit_model.pth`, torch's own zip format, one tensor at a time.

Converting a checkpoint so never needs the whole model in memory. The file is written with the standard library's
`zipfile`:

    archive/data/0 ... archive/data/N   raw little-endian storages, each at a multiple of 64 bytes (for mmap)
    archive/data.pkl                    the pickled dict of tensors, which refers to the storages by number
    archive/version, archive/byteorder, archive/.format_version, archive/.storage_alignment
"""

import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO, FileIO
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from litgpt.checkpoint.weights import Release

_Part = TypeVar("_Part")
_ALIGNMENT = 64  # torch's own, so that a mapped tensor of any type is aligned
_CHUNK = 4 * 2**20
_ZIP_HEADER = 30
_ZIP64_FIELD = 20
# Types that have a storage class, as files read by every torch version name them; other types are written untyped.
_STORAGE_CLASSES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


def write_state_dict(
    path: str | Path, tensors: Iterable[tuple[str, torch.Tensor]], release: Release | None = None
) -> None:
    """Writes tensors by name to a file that `torch.load` reads (`weights_only=True`, with or without `mmap`).

    One tensor is in memory at a time if `tensors` is a generator. A tensor that comes under several names while it is
    alive (tied embeddings) is stored once, and is one again when loaded. The file is flushed to disk.

    Args:
        path: The file, overwritten; wrap in `atomic_file` or `atomic_directory` to have it whole or not at all.
        tensors: Pairs of name and tensor, on any device.
        release: Called with each part of a tensor that has been written, such as `MappedTensors.release`.
    """
    with open(path, "wb", buffering=0) as plain:
        with _WriteBehind(plain) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            writer = _StateDictWriter(archive, file, release)
            for name, tensor in tensors:
                writer.add(name, tensor)
            writer.finish()
        os.fsync(plain.fileno())


class _WriteBehind:
    """A file that is written by a thread, so that the next part's checksum is computed meanwhile.

    What fails is raised by a later call, at the latest when the file is left.
    """

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.thread = ThreadPoolExecutor(1)
        self.pending: deque[Future] = deque()

    def write(self, data: bytes | memoryview) -> int:
        self.then(self._write_all, memoryview(data).cast("B"))
        return len(data)

    def then(self, function: Callable[[_Part], None], part: _Part) -> None:
        """Has the thread call a function when everything before is written."""
        while len(self.pending) >= 4:
            self.pending.popleft().result()
        self.pending.append(self.thread.submit(function, part))

    def _write_all(self, data: memoryview) -> None:
        while data:
            data = data[self.file.write(data) :]

    def flush(self) -> None:
        while self.pending:
            self.pending.popleft().result()

    def tell(self) -> int:
        self.flush()
        return self.file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        self.flush()
        return self.file.seek(offset, whence)

    def close(self) -> None:
        """Has everything written, and ends the thread."""
        try:
            self.flush()
        finally:
            self.thread.shutdown()

    def __enter__(self) -> "_WriteBehind":
        return self

    def __exit__(self, *error: object) -> None:
        if error == (None, None, None):
            self.close()
        else:
            self.thread.shutdown()


def raw_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The bytes of a tensor in order, in the machine's (little-endian) form, as uint8 tensors of a few megabytes."""
    if tensor.numel():
        yield from tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).split(_CHUNK)


class _StateDictWriter:
    def __init__(self, archive: zipfile.ZipFile, file: _WriteBehind, release: Release | None) -> None:
        self.archive = archive
        self.file = file
        self.release = release
        self.entries: dict[str, _StoredTensor] = {}
        self.written: dict[tuple, tuple[StorageWeakRef, _StoredTensor]] = {}  # by address, shape and type

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.entries:
            raise ValueError(f"The tensor '{name}' comes twice.")
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        written = self.written.get(key)
        # An address alone proves nothing: after the storage is freed, the next tensor may get the same.
        if written is None or written[0].expired() or tensor.numel() == 0:
            entry = _StoredTensor(str(len(self.entries)), tensor.dtype, tuple(tensor.shape))
            self._write_storage(f"archive/data/{entry.key}", tensor)
            written = self.written[key] = (StorageWeakRef(tensor.untyped_storage()), entry)
        self.entries[name] = written[1]

    def _write_storage(self, record: str, tensor: torch.Tensor) -> None:
        with self._open(record, tensor.numel() * tensor.dtype.itemsize) as out:
            for part in raw_parts(tensor):
                out.write(part.numpy().data)
                if self.release:
                    self.file.then(self.release, part)

    def _open(self, record: str, size: int) -> IO[bytes]:
        """Opens a record whose content begins at a multiple of 64 bytes, filled up by an extra field of the header."""
        info = zipfile.ZipInfo(record)
        zip64 = size >= zipfile.ZIP64_LIMIT
        header = self.file.tell() + _ZIP_HEADER + len(record) + (_ZIP64_FIELD if zip64 else 0)
        padding = -(header + 4) % _ALIGNMENT
        info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding  # "FB", the field's id in torch's own files
        return self.archive.open(info, "w", force_zip64=zip64)

    def finish(self) -> None:
        buffer = BytesIO()
        _Pickler(buffer, protocol=2).dump(self.entries)
        records = {
            "data.pkl": buffer.getvalue(),
            ".format_version": b"1",
            ".storage_alignment": str(_ALIGNMENT).encode(),
            "byteorder": sys.byteorder.encode(),
            "version": b"3\n",
        }
        for name, content in records.items():
            with self._open(f"archive/{name}", len(content)) as out:
                out.write(content)


class _StoredTensor:
    """Stands for a written tensor in the pickle; unpickles as the tensor."""

    def __init__(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.key, self.dtype, self.shape = key, dtype, shape

    def __reduce__(self) -> tuple:
        stride = torch.empty(self.shape, device="meta").stride()
        arguments = (_StorageReference(self), 0, self.shape, stride, False, OrderedDict())
        if self.dtype in _STORAGE_CLASSES:
            return torch._utils._rebuild_tensor_v2, arguments
        return torch._utils._rebuild_tensor_v3, (*arguments[:-1], OrderedDict(), self.dtype)


class _StorageReference:
    def __init__(self, tensor: _StoredTensor) -> None:
        self.tensor = tensor

    def persistent_id(self) -> tuple:
        elements = 1
        for size in self.tensor.shape:
            elements *= size
        storage_class = _STORAGE_CLASSES.get(self.tensor.dtype)
        if storage_class is None:
            storage_class, elements = torch.UntypedStorage, elements * self.tensor.dtype.itemsize
        return ("storage", storage_class, self.tensor.key, "cpu", elements)


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple | None:
        return obj.persistent_id() if isinstance(obj, _StorageReference) else None
