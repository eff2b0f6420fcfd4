"""Files from the hub to the disk, several at once: an interrupted one goes on, and each is checked when it is whole."""

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tqdm import tqdm

from litgpt.hub.hub_error import HubError, http_error_class

CONNECTIONS = 4
CHUNK = 2**20
# Of a larger file, so much is asked for at a time: content networks refuse to send more than 50 GB in one answer.
REQUEST = 2**34
# Seconds between attempts; they begin anew whenever bytes arrive.
WAITS = (1, 2, 4, 8, 16)
LONGEST_WAIT = 300


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit."""

    name: str
    size: int
    """In bytes."""
    digest: str | None
    """SHA-256 of a large file (Git LFS), Git's own SHA-1 of a small one; None where only the size is known."""

    @property
    def partial_name(self) -> str:
        """What it is called on the disk until it is whole: never mixed with another version of itself."""
        return f".{self.name.replace('/', '--')}.{(self.digest or str(self.size))[:12]}.incomplete"

    def hasher(self) -> "Hasher":
        """A hash to feed with the content."""
        if self.digest is not None and len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    def matches(self, hasher: "Hasher") -> bool:
        return self.digest in (None, hasher.hexdigest())


class Hasher(Protocol):
    """A hash of `hashlib`, whose module does not name the type."""

    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


File = TypeVar("File", bound=RemoteFile)
Result = TypeVar("Result")


class Stopped(Exception):
    """Another file's failure, or Ctrl-C, has ended this transfer too."""


class Patience:
    """How often to try again, and how long to wait in between.

    Args:
        connected: Whether the hub was there before, so that a lost connection may come back.
        pause: Sleeps for this many seconds.
    """

    def __init__(self, connected: bool, pause: Callable[[float], object]) -> None:
        self.connected, self.pause = connected, pause
        self.renew()

    def renew(self) -> None:
        self.waits = iter(WAITS)

    def bear(self, error: Exception) -> None:
        """Waits before another attempt, or raises `error` if there is no point in one."""
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        passing = self.connected if status is None else status in (408, 429) or status >= 500
        seconds = next(self.waits, None) if passing else None
        if seconds is None:
            raise error
        asked = str(response.headers.get("Retry-After", "")) if response is not None else ""
        seconds = max(seconds, min(int(asked), LONGEST_WAIT) if asked.isdigit() else 0)
        if seconds >= 2:
            what = f"the hub answers {status}" if status else "the connection was lost"
            tqdm.write(f"Waiting {seconds} s before trying again: {what}.", file=sys.stderr)
        self.pause(seconds)


class Transfer(Generic[File]):
    """The transfers of one run.

    Args:
        address: Gives the URL of a file.
        headers: Headers of every request, with the token.
        bar: Advances by every byte that has been checked.
    """

    def __init__(self, address: Callable[[File], str], headers: dict[str, str], bar: tqdm) -> None:
        self.address, self.headers, self.bar = address, headers, bar
        self.stop = threading.Event()
        self.counting = threading.Lock()

    def each(self, work: Callable[[File], Result], files: Iterable[File]) -> list[Result]:
        """The results of `work` on every file, several at once; the first failure stops all."""
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            futures = [pool.submit(work, file) for file in files]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return [future.result() for future in futures]

    def holds(self, folder: Path, file: File) -> bool:
        """Whether that very file is in the folder."""
        path = folder / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        hasher = file.hasher()
        with open(path, "rb") as content:
            for chunk in iter(lambda: content.read(CHUNK), b""):
                hasher.update(chunk)
                self.advance(len(chunk))
        if not file.matches(hasher):
            self.advance(-file.size)
            return False
        return True

    def fetch(self, folder: Path, file: File) -> None:
        """Downloads a file into the folder, going on with what an earlier attempt left there.

        Raises:
            HubError: what arrives is not what the hub lists.
        """
        path = folder / file.partial_name
        resumed = path.exists()
        whole = self._attempt(path, file) or (resumed and self._attempt(path, file))
        if not whole:
            raise HubError(
                f"{file.name} arrives damaged: its checksum is not the one that the hub lists. Run the same command "
                "again; if that does not help, a proxy or mirror (HTTPS_PROXY, HF_ENDPOINT) changes the files."
            )
        (folder / file.name).parent.mkdir(exist_ok=True)
        os.replace(path, folder / file.name)

    def _attempt(self, path: Path, file: File) -> bool:
        """Fetches what is missing of a file and says whether it is right now; if not, nothing of it is kept."""
        with PartialFile(path, file, self.advance) as partial:
            patience = Patience(connected=True, pause=self.stop.wait)
            while partial.size < file.size:
                before = partial.size
                try:
                    self._request(file, partial)
                except http_error_class() as error:
                    if partial.size > before:
                        patience.renew()
                    patience.bear(error)
                    self.advance(0)
                else:
                    if partial.size <= before:
                        break
            if partial.size == file.size and file.matches(partial.hasher):
                os.fsync(partial.out.fileno())
                return True
            partial.restart()
        path.unlink()
        return False

    def _request(self, file: File, partial: "PartialFile") -> None:
        """One request for what is missing of a file."""
        last = min(partial.size + REQUEST, file.size) - 1
        with self._answer(file, partial.size, last) as response:
            if response.status_code != 206:  # not every proxy knows ranges: this is the file from its start
                partial.restart()
            for chunk in response.iter_bytes():  # as they arrive: what a lost connection has brought is kept
                partial.append(chunk)

    def beginning(self, file: File, count: int) -> bytes:
        """The first `count` bytes of a file, by one request."""
        content = bytearray()
        with self._answer(file, 0, count - 1) as response:
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) >= count:  # the answer may be the whole file
                    break
        return bytes(content[:count])

    @contextmanager
    def _answer(self, file: File, first: int, last: int) -> Generator[Any]:
        """The answer to a request for the bytes `first` to `last` of a file."""
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session, hf_raise_for_status

        headers = {**self.headers, "Accept-Encoding": "identity", "Range": f"bytes={first}-{last}"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", self.address(file), headers=headers, timeout=timeout) as response:
            hf_raise_for_status(response)
            yield response

    def advance(self, count: int) -> None:
        if self.stop.is_set():
            raise Stopped
        with self.counting:
            self.bar.update(count)


class PartialFile:
    """The beginning of a file on the disk, and its hash as far as it goes."""

    def __init__(self, path: Path, file: RemoteFile, advance: Callable[[int], None]) -> None:
        self.file, self.advance = file, advance
        self.out = open(path, "a+b")  # noqa: SIM115 - closed by __exit__
        self.size, self.hasher = 0, file.hasher()

    def __enter__(self) -> "PartialFile":
        self.out.seek(0)
        for chunk in iter(lambda: self.out.read(CHUNK), b""):
            self._count(chunk)
        if self.size > self.file.size:
            self.restart()
        return self

    def __exit__(self, *error: object) -> None:
        self.out.close()

    def append(self, chunk: bytes) -> None:
        self.out.write(chunk)
        self.out.flush()  # so that a killed process leaves what has arrived
        self._count(chunk)

    def restart(self) -> None:
        """Forgets what there is."""
        self.out.truncate(0)
        self.advance(-self.size)
        self.size, self.hasher = 0, self.file.hasher()

    def _count(self, chunk: bytes) -> None:
        self.hasher.update(chunk)
        self.size += len(chunk)
        self.advance(len(chunk))
