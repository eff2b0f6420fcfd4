"""The checkpoint directory: finding it, reading and writing its weights, and saving it whole or not at all.

A checkpoint directory holds `lit_model.pth` (weights), `model_config.yaml` (shape), the tokenizer's files and the model
card's JSON files. A directory or file that stands under its final name is complete: writers fill a hidden sibling,
flush it to the disk and rename it.

`lit_model.pth` is torch's own zip format. `write_state_dict` writes it one tensor at a time with the standard library's
`zipfile`, so that converting a checkpoint never needs the whole model in memory:

    archive/data/0 ... archive/data/N   raw little-endian storages, each at a multiple of 64 bytes (for mmap)
    archive/data.pkl                    the pickled dict of tensors, which refers to the storages by number
    archive/version, archive/byteorder, archive/.format_version, archive/.storage_alignment
"""

import ctypes
import errno
import os
import pickle
import platform
import re
import shutil
import socket
import struct
import sys
import zipfile
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.model import GPT

Release = Callable[[torch.Tensor], None]

WEIGHTS = "lit_model.pth"
CONFIG = "model_config.yaml"

# What belongs to a checkpoint beside weights and model_config.yaml, and follows it when it is finetuned or exported.
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "tokenizer.model.v3",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "prompt_style.yaml",
)


class SaveError(ValueError):
    """A save could not be completed, for lack of disk space above all. What was there before is untouched."""


# ------------------------------------------------------------------------------------------------- atomic saves


@contextmanager
def atomic_directory(final: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty hidden sibling of `final`; when the block ends well it is flushed to disk and becomes `final`.

    If the block raises, the sibling is removed and `final` is what it was before. Siblings that killed processes left
    behind are removed on entry.

    Args:
        final: The directory to create.
        overwrite: Replace a `final` that exists. Without it, only an empty directory may be there.

    Raises:
        ValueError: `final` exists and `overwrite` is false.
        SaveError: The disk is full (or a quota or file-size limit is reached).
    """
    final = Path(final)
    with _saving(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_siblings(final)
    if final.exists() and not overwrite and not (final.is_dir() and not any(final.iterdir())):
        raise ValueError(f"'{final}' exists already. Remove it, or choose another directory.")
    temporary = _sibling(final, "tmp")
    with _saving(final):
        temporary.mkdir()
    try:
        with _saving(final):
            yield temporary
            for root, _, names in os.walk(temporary, topdown=False):
                for name in names:
                    _fsync(Path(root, name))
                _fsync(Path(root))
            _replace_directory(temporary, final)
            _fsync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a hidden sibling path to write to; when the block ends well it is flushed and replaces `path`.

    Raises:
        SaveError: The disk is full. A file that stood at `path` is untouched.
    """
    path = Path(path)
    with _saving(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_siblings(path)
    temporary = _sibling(path, "tmp")
    try:
        with _saving(path):
            yield temporary
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_additions(directory: str | Path) -> Iterator[Path]:
    """Yields an empty hidden directory inside `directory`; when the block ends well, its files move into `directory`.

    Each replaces a file of the same name whole or not at all; the weights come last, so that whoever finds them finds
    the rest too.

    Raises:
        SaveError: The disk is full. Nothing in `directory` has changed.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with _saving(directory):
        _remove_stale_siblings(directory / "new")
        temporary = _sibling(directory / "new", "tmp")
        temporary.mkdir()
    try:
        with _saving(directory):
            yield temporary
            files = sorted(temporary.iterdir(), key=lambda path: path.name == WEIGHTS)
            for path in files:
                _fsync(path)
            for path in files:
                os.replace(path, directory / path.name)
            _fsync(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sibling(final: Path, kind: str) -> Path:
    # The host is part of the name: on a shared file system a process number alone would not tell whose it is.
    return final.with_name(f".{final.name}.{kind}-{socket.gethostname()}-{os.getpid()}")


def _remove_stale_siblings(final: Path) -> None:
    """Removes what a killed save of `final` left on this host; puts back an old version caught between two names."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(tmp|old)-{re.escape(socket.gethostname())}-(\d+)")
    for path in list(final.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or (int(match[2]) != os.getpid() and _is_running(int(match[2]))):
            continue
        if match[1] == "old" and not final.exists():
            os.rename(path, final)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if platform.system() == "Windows":  # os.kill(pid, 0) would end the process there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _replace_directory(temporary: Path, final: Path) -> None:
    if not final.exists():
        os.rename(temporary, final)
        return
    old = _sibling(final, "old")
    os.rename(final, old)
    try:
        os.rename(temporary, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink()


def _fsync(path: Path) -> None:
    if path.is_symlink() or (path.is_dir() and platform.system() == "Windows"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not flush directories (EINVAL); a file must be flushed, or the save has failed.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _saving(final: Path) -> Iterator[None]:
    """Turns the many faces of a full disk into one clear message."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_disk_full(error, final):
            raise
        free = shutil.disk_usage(_existing_parent(final)).free
        raise SaveError(
            f"Could not save '{final}': no space left to write ({_reason(error)}; {free / 1e6:,.1f} MB free there). "
            "What was saved before is untouched. Free some space, or choose another output directory."
        ) from error


def _is_disk_full(error: BaseException, final: Path) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    # torch.save reports any failed write as a RuntimeError of its own, without the system's error number.
    if "PytorchStreamWriter failed" not in str(error) and "unexpected pos" not in str(error):
        return False
    return shutil.disk_usage(_existing_parent(final)).free < 64 * 2**20


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())


def _reason(error: BaseException) -> str:
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "the disk is full"


# ---------------------------------------------------------------------------------------- finding a checkpoint


def resolve_checkpoint_dir(name_or_path: str | Path, *, download: Callable[[str], Path] | None = None) -> Path:
    """Finds the checkpoint that a user means.

    Args:
        name_or_path: An existing directory or `.gguf` file, a weight file inside such a directory, the same below
            `checkpoints/`, a known model name (`org/name` or the short name), or a Hub id.
        download: Called with the repository id if nothing is found on this machine.

    Returns:
        A checkpoint directory (ours or Hugging Face's) or a `.gguf` file.

    Raises:
        FileNotFoundError: Nothing is found, or a directory is found that lacks something; says what, and what to do.
    """
    from litgpt.config import did_you_mean, find_known, known_checkpoints

    name = str(name_or_path)
    known = find_known(name)
    repo_id = known.repo_id if known else name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
    candidates = [Path(name).expanduser(), Path("checkpoints") / name]
    if known:
        candidates.append(Path("checkpoints") / repo_id)
    for path in candidates:
        if path.is_file():
            return path if path.suffix == ".gguf" else _complete(path.parent)
        if path.is_dir():
            return _complete(path)
    if download and repo_id and not name.startswith((".", "~", "/")):
        return _complete(Path(download(repo_id)))
    if repo_id and not name.startswith("."):
        remedy = f"To download it, run `litgpt download {repo_id}`."
    else:
        remedy = "Give the path of a checkpoint directory or .gguf file, or a name from `litgpt download list`."
    names = [repo_id if "/" in name else entry.name for repo_id, entry in known_checkpoints().items()]
    hint = "" if known else did_you_mean(name, [*names, *_local_checkpoints()])
    looked = ", ".join(f"'{path}'" for path in dict.fromkeys(candidates))
    raise FileNotFoundError(f"No checkpoint '{name}' (looked for {looked}).{hint} {remedy}")


def _local_checkpoints() -> list[str]:
    return [str(path.parent) for path in sorted(Path("checkpoints").glob(f"*/*/{WEIGHTS}"))]


def _complete(path: Path) -> Path:
    missing = missing_files(path)
    if missing:
        raise FileNotFoundError(
            f"The checkpoint directory '{path}' is incomplete; it lacks {' and '.join(missing)}. "
            "Download or convert the checkpoint again, or give another directory."
        )
    return path


def missing_files(path: Path, weights: bool = False) -> list[str]:
    """What a directory lacks to be a checkpoint directory, in words; empty if nothing.

    A directory with just a tokenizer lacks nothing (it serves as `--tokenizer_dir`), unless `weights` are asked for.
    """
    if (path / WEIGHTS).is_file():
        return [] if (path / CONFIG).is_file() else [f"{CONFIG} (the shape of the model in {WEIGHTS})"]
    files = hf_weight_files(path)
    if files:
        lost = [f"the weight file {file.name}" for file in files if not file.is_file()]
        return lost + ([] if (path / "config.json").is_file() else ["config.json (the shape of the model)"])
    if not weights and any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
    ):
        return []
    weights_names = f"weights ({WEIGHTS}, *.safetensors or pytorch_model*.bin)"
    if any((path / name).is_file() for name in (CONFIG, "config.json")):
        return [weights_names]
    return [weights_names, f"{CONFIG} or config.json"]


def hf_weight_files(path: Path) -> list[Path]:
    """The weight files of a Hugging Face directory, as its index lists them (so a listed file may be absent).

    Safetensors win over `.bin` files of the same weights.
    """
    import json

    for single in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if index.is_file():
            try:
                names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"'{index}' is no valid weight index ({error!r}). Download it again.") from error
            return [path / name for name in sorted(set(names))]
        if (path / single).is_file():
            return [path / single]
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        # Without an index: adapters and original/consolidated weights are other things than this model's weights.
        found = sorted(file for file in path.glob(pattern) if not file.name.startswith(("adapter", "consolidated")))
        if found:
            return found
    return []


def copy_companion_files(source: str | Path, destination: str | Path) -> None:
    """Copies the tokenizer's files, the JSON files and the prompt style from one checkpoint directory to another."""
    source, destination = Path(source), Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    for name in COMPANION_FILES:
        # A Hub cache holds links; what is copied is the file behind them.
        if (source / name).is_file() and not (destination / name).exists():
            shutil.copy(source / name, destination / name)


def save_model(
    directory: str | Path,
    model: "GPT | dict[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]",
    config: "Config",
    release: Release | None = None,
) -> None:
    """Writes `lit_model.pth` and `model_config.yaml` into a directory (that `atomic_directory` gave the caller).

    Args:
        directory: An existing directory.
        model: A model, its state dict, or a stream of names and tensors.
        config: Its shape.
        release: As for `write_state_dict`.
    """
    if isinstance(model, torch.nn.Module):
        model = model.state_dict()
    config.save(directory)
    write_state_dict(Path(directory) / WEIGHTS, model.items() if isinstance(model, dict) else model, release)


# -------------------------------------------------------------------------------------------- reading weights


class MappedTensors(dict[str, torch.Tensor]):
    """Tensors by name, views of one file on disk (private: writing to one does not change the file).

    Pages that were read from the file count as the process's memory until they are released.
    """

    mapped: bool = True
    """False where the file's format did not allow that; then the tensors are plain memory."""

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


def read_state_dict(path: str | Path) -> MappedTensors:
    """Opens the weights in a `.pth` or `.bin` file without executing anything in it and without reading them yet.

    Weights below a key "model" or "state_dict" (as training scripts save them) are found there.

    Returns:
        Tensors by name, mapped from the file where its format allows (files older than torch 1.6 are read whole).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated, of another kind, or holds something else than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No weight file '{path}'.")
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(unreadable(path, "it holds other Python objects than tensors, or is damaged")) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(unreadable(path, "it is truncated or damaged")) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"'{path}' holds no weights: expected a dictionary of tensors by name.")
    tensors = MappedTensors(content)
    tensors.mapped = mapped
    return tensors


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
    return (
        f"Cannot read weights from '{path}' ({path.stat().st_size:,} bytes): {reason}. "
        "Download or convert the checkpoint again."
    )


# -------------------------------------------------------------------------------------------- writing weights

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

    def __init__(self, file: Any) -> None:
        self.file = file
        self.thread = ThreadPoolExecutor(1)
        self.pending: deque[Future] = deque()

    def write(self, data: Any) -> int:
        self.then(self._write_all, memoryview(data).cast("B"))
        return len(data)

    def then(self, function: Callable, *arguments: Any) -> None:
        """Has the thread call a function when everything before is written."""
        while len(self.pending) >= 4:
            self.pending.popleft().result()
        self.pending.append(self.thread.submit(function, *arguments))

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

    def __enter__(self) -> "_WriteBehind":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if error == (None, None, None):
                self.flush()
        finally:
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
        # An address alone proves nothing: after the storage is freed, the next tensor may get the same.
        storage, entry = self.written.get(key, (None, None))
        if storage is None or storage.expired() or tensor.numel() == 0:
            entry = _StoredTensor(str(len(self.entries)), tensor.dtype, tuple(tensor.shape))
            self._write_storage(f"archive/data/{entry.key}", tensor)
            self.written[key] = (StorageWeakRef(tensor.untyped_storage()), entry)
        self.entries[name] = entry

    def _write_storage(self, record: str, tensor: torch.Tensor) -> None:
        with self._open(record, tensor.numel() * tensor.dtype.itemsize) as out:
            for part in raw_parts(tensor):
                out.write(memoryview(part.numpy()))
                if self.release:
                    self.file.then(self.release, part)

    def _open(self, record: str, size: int) -> Any:
        """Opens a record whose content begins at a multiple of 64 bytes, filled up by an extra field of the header."""
        info = zipfile.ZipInfo(record)
        zip64 = size >= zipfile.ZIP64_LIMIT
        header = self.archive.fp.tell() + _ZIP_HEADER + len(record) + (_ZIP64_FIELD if zip64 else 0)
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
