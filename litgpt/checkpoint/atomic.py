"""Saving a file or directory whole or not at all.

What stands under its final name is complete: writers fill a hidden sibling, flush it to the disk and rename it.
"""

import errno
import os
import platform
import re
import shutil
import socket
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from litgpt.checkpoint.names import WEIGHTS


class SaveError(ValueError):
    """A save could not be completed, for lack of disk space above all. What was there before is untouched."""


@contextmanager
def atomic_directory(final: str | Path, overwrite: bool = False) -> Generator[Path]:
    """Yields an empty hidden sibling of `final`; when the block ends well it is flushed to disk and becomes `final`.

    If the block raises, the sibling is removed and `final` is what it was before. Siblings that killed processes left
    behind are removed on entry.

    Args:
        final: The directory to create.
        overwrite: Replace a `final` that exists. Without it, only an empty directory may be there.

    Raises:
        ValueError: `final` exists and `overwrite` is false.
        SaveError: The disk is full (or a quota or file-size limit is reached), or nothing can be written there.
    """
    final = Path(final)
    with _saving(final), _making_room(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale_siblings(final)
    if final.exists() and not overwrite and not (final.is_dir() and not any(final.iterdir())):
        raise ValueError(f"'{final}' exists already. Remove it, or choose another directory.")
    temporary = _sibling(final, "tmp")
    with _saving(final), _making_room(final):
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
def atomic_file(path: str | Path) -> Generator[Path]:
    """Yields a hidden sibling path to write to; when the block ends well it is flushed and replaces `path`.

    Raises:
        SaveError: The disk is full, or nothing can be written there. A file that stood at `path` is untouched.
    """
    path = Path(path)
    with _saving(path), _making_room(path):
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
def atomic_additions(directory: str | Path) -> Generator[Path]:
    """Yields an empty hidden directory inside `directory`; when the block ends well, its files move into `directory`.

    Each replaces a file of the same name whole or not at all; the weights come last, so that whoever finds them finds
    the rest too.

    Raises:
        SaveError: The disk is full, or nothing can be written there. Nothing in `directory` has changed.
    """
    directory = Path(directory)
    with _saving(directory), _making_room(directory):
        directory.mkdir(parents=True, exist_ok=True)
        _remove_stale_siblings(directory / "new")
        temporary = _sibling(directory / "new", "tmp")
        temporary.mkdir()
    try:
        with _saving(directory):
            yield temporary
            files = [path for path in temporary.rglob("*") if path.is_file()]
            for path in files:
                _fsync(path)
            for path in sorted(files, key=lambda path: path.name == WEIGHTS):
                final = directory / path.relative_to(temporary)
                final.parent.mkdir(exist_ok=True)
                os.replace(path, final)
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
def _saving(final: Path) -> Generator[None]:
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


@contextmanager
def _making_room(final: Path) -> Generator[None]:
    """Says of a place that nothing can be written to that it is one."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise SaveError(
            f"'{final}' cannot be written ({_reason(error)}). Choose another place, or change who may write there."
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
