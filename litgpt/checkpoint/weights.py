"""Reading weight files: mapped into memory, nothing in them executed."""

import ctypes
import os
import pickle
import sys
import warnings
import zipfile
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import _weights_only_unpickler

from litgpt.checkpoint.names import LORA_WEIGHTS, TRAINING_STATE, WEIGHTS
from litgpt.checkpoint.sums import DamagedFile, check_archive
from litgpt.cli.untrusted import shown

Release = Callable[[torch.Tensor], None]
_MAX_PICKLE = 1 << 26  # torch reads a few megabytes of it a second; 100,000 tensors have ten


class MappedTensors(dict[str, torch.Tensor]):
    """Tensors by name, views of one file on disk (private: writing to one does not change the file).

    Pages that were read from the file count as the process's memory until they are released.
    """

    mapped: bool = True
    """False where the file's format did not allow that; then the tensors are plain memory."""

    compare: Callable[[], None] | None = None
    """Compares the file with the sums that it carries; None where it carries none"""

    def check(self) -> None:
        """To be called before the values are used: compares the file with the sums that it carries, if any.

        Raises:
            ValueError: It has changed since it was written; says what to do.
        """
        if self.compare is not None:
            self.compare()

    def renamed(self, names: dict[str, str]) -> "MappedTensors":
        """The same under other names, of which `names` has one for each."""
        other = MappedTensors({name: self[key] for key, name in names.items()})
        vars(other).update({name: value for name, value in vars(self).items() if name != "_range"})
        return other

    def release(self, tensor: torch.Tensor) -> None:
        """Gives back the memory of a view of this file; reading it again fetches it from the file anew.

        Changes made to it in place are lost by that. Does nothing to tensors that are not from this file.
        """
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.dtype.itemsize
        first, last = self._range
        if first <= start < end <= last and tensor.is_contiguous() and sys.platform.startswith("linux"):
            page, dont_need = os.sysconf("SC_PAGESIZE"), 4
            start = start // page * page
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), dont_need)

    @cached_property
    def _range(self) -> tuple[int, int]:
        """First and last address of the file's mapping that a tensor uses."""
        storages = [tensor.untyped_storage() for tensor in self.values() if self.mapped and tensor.numel()]
        starts = [storage.data_ptr() for storage in storages]
        ends = [storage.data_ptr() + storage.nbytes() for storage in storages]
        return min(starts, default=0), max(ends, default=0)


def read_state_dict(path: str | Path, check: bool = True) -> MappedTensors:
    """Opens the weights in a `.pth` or `.bin` file without executing anything in it.

    Weights below a key "model" or "state_dict" (as training scripts save them) are found there.

    Args:
        path: The file.
        check: Compare it with the sums that it carries, which reads it once. Without, nothing is read yet, and whoever
            uses the values calls the tensors' own `check` before.

    Returns:
        Tensors by name, mapped from the file where its format allows (files older than torch 1.6 are read whole).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated or damaged, of another kind, or holds something else than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No weight file '{path}'.")
    mapped = zipfile.is_zipfile(path)
    if mapped:
        _check_records(path)
    _bound_messages()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is damaged the error says enough
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(unreadable(path, "it holds other Python objects than tensors, or is damaged")) from error
    except Exception as error:  # a pickle that makes no sense raises anything: IndexError, AssertionError, ...
        raise ValueError(unreadable(path, "it is truncated or damaged")) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"'{path}' holds no weights: expected a dictionary of tensors by name.")
    _check_tensors(path, content)
    tensors = MappedTensors(content)
    tensors.mapped = mapped
    tensors.compare = partial(check_weights, path)
    if check:
        tensors.check()
    return tensors


def check_weights(path: Path) -> None:
    """Compares a `.pth` or `.bin` file with its sums; ValueError, with what to do, where it has changed."""
    try:
        check_archive(path)
    except DamagedFile as error:
        raise ValueError(unreadable(path, str(error))) from error


@cache
def _bound_messages() -> None:
    """Cuts off what torch's unpickler says of a file: torch searches it for words in a time that grows with the square
    of its length, and a file may have it repeat megabytes."""
    unpickler = _weights_only_unpickler.Unpickler
    load = unpickler.load

    def bounded(self: Any) -> Any:
        try:
            return load(self)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(str(error)[:1000]) from None

    unpickler.load = bounded


def _check_records(path: Path) -> None:
    """That an archive holds what torch maps: records that are not compressed, and no larger than the file.

    Raises:
        ValueError: It does not, or its directory cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except Exception as error:  # of a directory that makes no sense: BadZipFile, struct.error, NotImplementedError, ...
        raise ValueError(unreadable(path, f"the directory of its records cannot be read ({error})")) from error
    pickles = sum(record.file_size for record in records if record.filename.endswith(".pkl"))
    if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
        raise ValueError(unreadable(path, "its records are compressed or encrypted, as torch writes none"))
    if sum(record.file_size for record in records) > path.stat().st_size or pickles > _MAX_PICKLE:
        raise ValueError(unreadable(path, "its records would be larger than the file"))


def _check_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """That there are bytes in the file for what tensors claim: a stride of 0, or a sparse form, makes them any size.

    Raises:
        ValueError: There are not; names one.
    """
    total, size = 0, path.stat().st_size
    for name, tensor in tensors.items():
        is_plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
        if not isinstance(name, str) or not is_plain or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(unreadable(path, f"{shown(name)} is not a plain tensor whose values are all in the file"))
        total += tensor.nbytes
    if total > 2 * size:  # tied weights are one
        raise ValueError(unreadable(path, f"its tensors would have {total:,} bytes"))


def unreadable(path: Path, reason: str) -> str:
    """What to say about a weight file that cannot be read; looks for the usual causes."""
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        reason = "it is empty"
    elif start.startswith(b"version https://git-lfs"):
        return f"'{path}' is a Git LFS pointer, not the weights themselves. Fetch them with `git lfs pull`."
    elif start.lstrip()[:1] == b"<":
        reason = "it is a web page"
    return f"Cannot read weights from '{path}' ({path.stat().st_size:,} bytes): {reason}. {remedy(path)}"


def remedy(path: Path) -> str:
    """What to do about a damaged file of a checkpoint."""
    directory = path.parent
    if path.name == WEIGHTS and (directory / LORA_WEIGHTS).is_file():
        return f"LoRA's matrices are next to it: write it again with `litgpt merge_lora {directory}`."
    if (directory / TRAINING_STATE).is_file():
        others = sorted(other.parent for other in directory.parent.glob(f"*/{TRAINING_STATE}"))
        others = [str(other) for other in others if other != directory]
        return f"Take another checkpoint of the run{': ' + ', '.join(others[-3:]) if others else ''}."
    return "Download or convert the checkpoint again."
