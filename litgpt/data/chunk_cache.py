"""Chunks on this machine's disk, shared by all its processes and bounded in size."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import overload

from litgpt.checkpoint.atomic import atomic_file

try:
    import fcntl
except ImportError:  # Windows, which does not let a file be removed that is in use
    fcntl = None


class ChunkCache:
    """A directory of chunks.

    A chunk appears whole, fetched by one process while the others wait for it. Those used least recently make room for
    new ones, but none that a process has open: whoever reads a chunk holds a shared lock on its file.

    Args:
        directory: Below it, a folder for each set of chunks.
        max_bytes: Of all of them together.
    """

    def __init__(self, directory: Path, max_bytes: int, folder: Path | None = None) -> None:
        self.directory, self.max_bytes = Path(directory), max_bytes
        self.folder = folder or self.directory

    def of(self, key: str) -> ChunkCache:
        """The part for one set of chunks."""
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return ChunkCache(self.directory, self.max_bytes, self.directory / name)

    def hold(self, name: str, size: int, make: Callable[[Path], None]) -> tuple[Path, int]:
        """A chunk's file, made where it is not there, and a descriptor: until that is closed, the file stays."""
        while True:
            path = self.obtain(name, size, make)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # it has just made room for another
                continue
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
            with suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.utime(path)
                    return path, descriptor
            os.close(descriptor)

    @overload
    def obtain(self, name: str, size: int, make: Callable[[Path], None]) -> Path: ...

    @overload
    def obtain(self, name: str, size: int, make: Callable[[Path], None], wait: bool) -> Path | None: ...

    def obtain(self, name: str, size: int, make: Callable[[Path], None], wait: bool = True) -> Path | None:
        """A chunk's file, made where it is not there.

        Without `wait`, None where another process is making it, or where there is no room.
        """
        path = self.folder / name
        if path.is_file():
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / f"{name}.lock", wait) as locked:
            if not locked:
                return None
            if not path.is_file():
                if not self.make_room(size) and not wait:
                    return None
                with atomic_file(path) as temporary:
                    make(temporary)
        return path

    def discard(self, name: str, descriptor: int) -> None:
        """Take a damaged chunk away, and close its descriptor; who asks for it next makes it again."""
        path = self.folder / name
        with _locked(self.folder / f"{name}.lock", True):
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):  # and no process has done so already
                    path.unlink()
            os.close(descriptor)

    def make_room(self, size: int) -> bool:
        """Remove what was used least recently until there is room for `size` bytes; whether there is."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(self.directory / "room.lock", True):
            files = sorted(self._files(), key=lambda file: file[1].st_mtime)
            total = sum(stat.st_size for _, stat in files)
            for path, stat in files:
                if total + size <= self.max_bytes:
                    break
                if _remove_unused(path):
                    total -= stat.st_size
        return total + size <= self.max_bytes

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for folder in self.directory.iterdir():
            for path in folder.iterdir() if folder.is_dir() else ():
                with suppress(FileNotFoundError):
                    if not path.name.endswith(".lock") and not path.name.startswith("."):
                        yield path, path.stat()


def _remove_unused(path: Path) -> bool:
    """Remove a file that no process holds."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


@contextmanager
def _locked(path: Path, wait: bool) -> Generator[bool]:
    """Exclude other processes and threads; yields whether it could be done at once, where it may not wait."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class Prefetcher:
    """A thread that fetches what will be wanted, the newest wish replacing the one before.

    Errors are left to whoever needs the chunk and finds it missing.
    """

    def __init__(self, fetch: Callable[[int], None]) -> None:
        self._fetch = fetch
        self._wishes: SimpleQueue[list[int]] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="chunk prefetch").start()

    def want(self, numbers: Iterable[int]) -> None:
        self._wishes.put(list(numbers))

    def _work(self) -> None:
        while True:
            wish = self._wishes.get()
            for number in wish:
                if not self._wishes.empty():
                    break
                with suppress(Exception):
                    self._fetch(number)
