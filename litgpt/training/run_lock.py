"""One run at a time in a directory: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import functools
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

LOCK_FILE = ".lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_FAR = 1 << 30  # Windows lets nobody read bytes that are locked; who holds the lock is to be read

_Given = ParamSpec("_Given")
_Returned = TypeVar("_Returned")
# By the file's identity. To open and close a file that this process has locked would let go of the lock.
_held: dict[tuple[int, int], RunLock] = {}


class RunLock:
    """The right to write to a run's directory.

    It is a POSIX record lock (on Windows, a locked byte): the system lets go of it when the process ends, also by
    SIGKILL; NFS and its server know it, so that it counts on all nodes; what is forked, as a loader's workers are, does
    not inherit it; and it names no process by its number, which another one may get. What is written into the file is
    for people alone.

    Raises:
        ValueError: Another process, or another call in this one, has it; says which, where, and since when. Or the
            directory cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / LOCK_FILE
        self.process, self.thread = os.getpid(), threading.get_ident()
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        self.holder = {"process": self.process, "host": socket.gethostname(), "since": now}
        self.note: str | None = None
        """What to say where the file system has no locks"""
        self._made = [parent for parent in (directory, *directory.parents) if not parent.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            while (descriptor := self._open()) is None:  # its holder has just let go, and removed it
                pass
        except OSError as error:
            raise ValueError(
                f"out_dir={directory} cannot be written to ({error.strerror}). Choose another directory."
            ) from error
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self._key = status.st_dev, status.st_ino
        _held[self._key] = self

    def release(self) -> None:
        """Lets go, and leaves no trace: neither the file nor directories that were made for it and hold nothing."""
        if _held.get(self._key) is not self or self.process != os.getpid():
            return
        del _held[self._key]
        try:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            for directory in self._made:
                directory.rmdir()
        except OSError:  # it holds something, as after every run that trained; on Windows, the file is still open
            pass

    def _open(self) -> int | None:
        """The locked file; None where the file that was locked is no longer the one in the directory."""
        if (other := self._of_this_process()) is not None:
            raise ValueError(self._refusal(other.holder))
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not self._lock(descriptor):
                raise ValueError(self._refusal(_read_holder(self.path)))
            if not _is_at(descriptor, self.path):
                os.close(descriptor)
                return None
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(self.holder).encode())
        except ValueError:
            os.close(descriptor)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):  # the lock is there, though it cannot say whose it is
                os.close(descriptor)
                raise
        return descriptor

    def _of_this_process(self) -> RunLock | None:
        """The lock, where this process has it already."""
        try:
            status = os.stat(self.path)
        except OSError:
            return None
        other = _held.get((status.st_dev, status.st_ino))
        return other if other is not None and other.process == os.getpid() else None  # fork does not inherit it

    def _lock(self, descriptor: int) -> bool:
        """Whether nobody else had it."""
        try:
            _lock_file(descriptor)
        except OSError as error:
            if error.errno in _HELD_BY_ANOTHER:
                return False
            self.note = (
                f"Note: the file system of {self.directory} has no locks ({error.strerror}): a second run there would "
                "not be noticed. Start only one."
            )
        return True

    def _refusal(self, holder: dict[str, Any] | None) -> str:
        who = "it has not yet said which"
        if holder is not None:
            who = f"process {holder['process']} on {holder['host']}, since {holder['since']}"
        return (
            f"out_dir={self.directory}: another run writes there ({who}). Wait until it ends or end it, or choose "
            "another `out_dir`."
        )


def _read_holder(path: Path) -> dict[str, Any] | None:
    try:
        holder = json.loads(path.read_bytes())
        return {key: holder[key] for key in ("process", "host", "since")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unlocks_at_end(function: Callable[_Given, _Returned]) -> Callable[_Given, _Returned]:
    """The same function; what it locks, it lets go of when it ends, however it ends."""

    @functools.wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
        before = set(_held)
        try:
            return function(*args, **kwargs)
        finally:
            for key in _held.keys() - before:
                if _held[key].thread == threading.get_ident():
                    _held[key].release()

    return call


def _lock_file(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _FAR, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return
    import fcntl

    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
