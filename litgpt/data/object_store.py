"""Files of an object store (S3, Google, Azure, the Hub), through litdata's clients."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

REMOTE = re.compile(r"(s3|gs|azure|r2|hf)://.+|local:.+")
ATTEMPTS = 3  # of fetching a file, each with as many of the S3 client's own as follow
CLIENT_ATTEMPTS = 4
MISSING = {"404", "NoSuchKey", "NoSuchBucket", "NotFound", "ResourceNotFoundError", "BlobNotFound", "ContainerNotFound"}
REFUSED = {
    *("401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
    *("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "Forbidden", "Unauthorized"),
    *("ClientAuthenticationError", "AccountProblem"),
}


class StoreError(ValueError):
    """An object store does not give what is asked for."""


def is_remote(path: str) -> bool:
    """Whether it is the address of an object store, or a folder that is to be read through the cache (`local:`)."""
    return REMOTE.fullmatch(path) is not None


def join_address(path: str, *names: str) -> str:
    """The address of something below a folder or an address."""
    return "/".join([path.rstrip("/"), *names]) if is_remote(path) else os.path.join(path, *names)


def read_small(path: str) -> bytes:
    """A small file of a folder or an object store.

    Raises:
        FileNotFoundError: It is not there.
        StoreError: The store cannot be reached, or refuses.
    """
    if not is_remote(path):
        return Path(path).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        fetch(path, file)
        return file.read_bytes()


def fetch(address: str, path: Path, progress: Callable[[int], Any] | None = None) -> None:
    """Get an object of a store into a file, trying again where the connection breaks.

    Raises: see `read_small`.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _download(address, path, progress)
            return
        except Exception as error:  # every store has its own kinds
            problem = _explained(address, error)
            if isinstance(problem, FileNotFoundError) or not _is_passing(error) or attempt == ATTEMPTS:
                raise problem from error
            time.sleep(attempt)


def _download(address: str, path: Path, progress: Callable[[int], Any] | None) -> None:
    folder, _, name = address.rpartition("/")
    downloader = _downloader(folder, os.getpid())
    if address.startswith(("hf://", "local:")):  # litdata gives these as files only
        path.unlink(missing_ok=True)
        downloader.download_file(f"{folder}/{name}", str(path))
        Path(f"{path}.lock").unlink(missing_ok=True)
        if not path.is_file():
            raise FileNotFoundError(address)
        return
    with open(path, "wb") as file:
        downloader.download_fileobj(address, _Counted(file, progress) if progress else file)


_downloaders: dict[tuple[str, int], Any] = {}


def _downloader(folder: str, process: int) -> Any:
    """litdata's client for a store. A process that was forked makes its own: connections must not be shared."""
    if (folder, process) not in _downloaders:
        try:
            from litdata.streaming.downloader import get_downloader
        except ImportError as error:
            raise StoreError(
                f"Data at {folder} is read through litdata, which is not installed: pip install 'litgpt[all]'"
            ) from error
        options = {}
        if folder.startswith("s3://"):
            from botocore.config import Config  # litdata's own would try again a thousand times

            options["config"] = Config(
                retries={"max_attempts": CLIENT_ATTEMPTS, "mode": "standard"}, connect_timeout=20, read_timeout=60
            )
        _downloaders[folder, process] = get_downloader(folder, "", [], options)
    return _downloaders[folder, process]


class _Counted:
    """A file that tells how much is written to it."""

    def __init__(self, file: IO[bytes], progress: Callable[[int], Any]) -> None:
        self._file, self._progress = file, progress

    def write(self, data: bytes) -> int:
        self._progress(len(data))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _names(error: BaseException) -> set[str]:
    """What an error is called, by its class and by the store."""
    response = getattr(error, "response", None)
    details = response.get("Error", {}) if isinstance(response, dict) else {}
    codes = (details.get("Code"), getattr(error, "code", None), getattr(error, "error_code", None))
    return {type(error).__name__, *(str(getattr(code, "value", code)) for code in codes if code)}


def _is_passing(error: BaseException) -> bool:
    """Whether another attempt may help."""
    return not isinstance(error, ImportError | StoreError) and not _names(error) & (MISSING | REFUSED)


def _explained(address: str, error: Exception) -> Exception:
    names = _names(error)
    if isinstance(error, StoreError):
        return error
    if isinstance(error, FileNotFoundError) or names & MISSING:
        return FileNotFoundError(f"There is no {address}: no such bucket, or nothing of that name in it.")
    if names & REFUSED:
        return StoreError(
            f"{address} may not be read ({error}). Check the credentials, for S3 in AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and that they may read this bucket."
        )
    if isinstance(error, ImportError):
        return StoreError(f"{address} cannot be read: {error}. Install what it names.")
    return StoreError(
        f"{address} cannot be read ({type(error).__name__}: {error}). Check the network and the address of the store "
        "(for S3, AWS_ENDPOINT_URL)."
    )
