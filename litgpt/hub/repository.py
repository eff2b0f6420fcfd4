"""A repository of the hub at one commit, and getting files of it into a checkpoint directory."""

import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from litgpt.cli.secret import Secret, reveal
from litgpt.hub import cache
from litgpt.hub.hub_error import HubError, clear_errors, http_error_class
from litgpt.hub.transfer import Patience, RemoteFile, Transfer

Answer = TypeVar("Answer")
TEMPLATES = "additional_chat_templates"
# What may become a file on our disk: nothing that leaves the checkpoint's directory.
NAME = re.compile(rf"(?:{TEMPLATES}/)?[^/\\]+")


class Repository:
    """A repository at one commit.

    Attributes:
        repo_id: `org/name`.
        commit: Its full hash.
        files: The files at its top level, and the chat templates in `TEMPLATES`, by name.
        access_token: What the user gave, if anything.
    """

    def __init__(
        self, repo_id: str, commit: str, files: Iterable[RemoteFile], access_token: Secret | str | None
    ) -> None:
        self.repo_id, self.commit, self.access_token = repo_id, commit, access_token
        self.files = {file.name: file for file in files}
        self.cached = cache.snapshot(repo_id, commit)
        self.contents: dict[str, bytes] = {}

    def read(self, name: str) -> bytes:
        """The content of a small file."""
        if name not in self.contents:
            import tempfile

            with tempfile.TemporaryDirectory() as folder, clear_errors(self.repo_id, self.access_token):
                self._obtain(self._transfer(tqdm(disable=True)), Path(folder), self.files[name])
                self.contents[name] = Path(folder, name).read_bytes()
        return self.contents[name]

    def beginning(self, name: str, count: int) -> bytes:
        """The first `count` bytes of a file, of which no more is fetched than these."""
        if (self.cached / name).is_file():
            with open(self.cached / name, "rb") as file:
                return file.read(count)
        with clear_errors(self.repo_id, self.access_token):
            transfer = self._transfer(tqdm(disable=True))
            return _patiently(lambda: transfer.beginning(self.files[name], count))

    def fetch(self, names: Iterable[str], directory: Path, further_bytes: int = 0) -> Path:
        """Gets files into a checkpoint directory.

        A new directory appears under its name only once it is complete; until then the files gather in a hidden
        sibling, where a second attempt finds the finished ones and goes on with the others. In a directory that exists,
        files that are right already stay, and new ones appear when all have arrived.

        Args:
            names: The files.
            directory: The checkpoint's own directory.
            further_bytes: What else will be written there: the disk must have room for it too.

        Returns:
            `directory`.

        Raises:
            HubError: no room, no access, no connection, or a damaged file; what has arrived is kept for the next time.
        """
        files = [self.files[name] for name in dict.fromkeys(names)]
        gathering = directory.with_name(f".{directory.name}.partial")
        with clear_errors(self.repo_id, self.access_token), _alone(directory):
            gathering.mkdir(exist_ok=True)
            _discard_others(gathering, files)
            with _progress(self.repo_id, sum(file.size for file in files)) as bar:
                transfer = self._transfer(bar)
                right = transfer.each(lambda file: _held(transfer, file, directory, gathering), files)
                missing = [file for file, is_right in zip(files, right, strict=True) if not is_right]
                self._check_space(missing, gathering, directory, further_bytes)
                transfer.each(lambda file: self._obtain(transfer, gathering, file), missing)
            _move_in(gathering, directory)
        return directory

    def _transfer(self, bar: tqdm) -> Transfer:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        def address(file: RemoteFile) -> str:
            return hf_hub_url(self.repo_id, file.name, revision=self.commit)

        return Transfer(address, build_hf_headers(token=reveal(self.access_token), library_name="litgpt"), bar)

    def _obtain(self, transfer: Transfer, folder: Path, file: RemoteFile) -> None:
        """Puts a file into a folder: what was read before, else from the client's cache, else from the hub."""
        (folder / file.name).parent.mkdir(exist_ok=True)
        if file.name in self.contents:
            (folder / file.name).write_bytes(self.contents[file.name])
            transfer.advance(file.size)
            return
        cached = self.cached / file.name
        if cached.is_file():
            cache.take(cached, folder / file.name)
            if transfer.holds(folder, file):
                return
            (folder / file.name).unlink()
        transfer.fetch(folder, file)

    def _check_space(self, missing: list[RemoteFile], gathering: Path, directory: Path, further_bytes: int) -> None:
        to_come = sum(self._bytes_to_come(file, gathering) for file in missing)
        free = shutil.disk_usage(gathering).free
        if to_come + further_bytes <= free:
            return
        conversion = f" and {_gigabytes(further_bytes)} for the converted weights" if further_bytes else ""
        remedy = ", or convert_checkpoint=false (every command loads the downloaded files too)" if further_bytes else ""
        raise HubError(
            f"No room for {self.repo_id}: {_gigabytes(to_come)} to download{conversion} are needed, and "
            f"{_gigabytes(free)} are free at '{directory.parent}'. Free some space, or choose another disk with "
            f"`checkpoint_dir`{remedy}."
        )

    def _bytes_to_come(self, file: RemoteFile, gathering: Path) -> int:
        cached, partial = self.cached / file.name, gathering / file.partial_name
        if cached.is_file() and cache.can_link(cached, gathering):
            return 0
        return file.size - (min(partial.stat().st_size, file.size) if partial.exists() else 0)


def open_repository(repo_id: str, revision: str | None = None, access_token: Secret | str | None = None) -> Repository:
    """Looks a repository up on the hub or, with `HF_HUB_OFFLINE`, in the client's cache.

    Args:
        repo_id: `org/name`.
        revision: A branch, tag or commit; the main branch by default.
        access_token: For gated and private repositories.

    Raises:
        HubError: no such repository or revision, no access, or no connection.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    revision = revision or "main"
    if constants.HF_HUB_OFFLINE:
        return _cached_repository(repo_id, revision, access_token)
    with clear_errors(repo_id, access_token, revision):
        api = HfApi(token=reveal(access_token))
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        commit = _patiently(lambda: api.model_info(repo_id, revision=revision, timeout=timeout)).sha or revision
        tree = _patiently(lambda: list(api.list_repo_tree(repo_id, revision=commit)))
        if any(entry.path == TEMPLATES for entry in tree):
            tree += _patiently(lambda: list(api.list_repo_tree(repo_id, TEMPLATES, revision=commit)))
    files = [
        RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in tree
        if isinstance(entry, RepoFile) and NAME.fullmatch(entry.path) and Path(entry.path).name not in ("", ".", "..")
    ]
    return Repository(repo_id, commit, files, access_token)


def _cached_repository(repo_id: str, revision: str, access_token: Secret | str | None) -> Repository:
    folder = cache.snapshot(repo_id, revision)
    if not folder.is_dir():
        raise HubError(
            f"HF_HUB_OFFLINE is set, and the Hub cache has no {repo_id} at revision {revision} (looked in '{folder}'). "
            f"Unset HF_HUB_OFFLINE, or run `hf download {repo_id}` where there is a network and copy the cache here "
            "(HF_HOME says where it is)."
        )
    return Repository(repo_id, folder.name, cache.cached_files(folder), access_token)


def _patiently(ask: Callable[[], Answer]) -> Answer:
    patience = Patience(connected=False, pause=threading.Event().wait)
    while True:
        try:
            return ask()
        except http_error_class() as error:
            patience.bear(error)


@contextmanager
def _alone(directory: Path) -> Generator[None]:
    """Keeps a second process from downloading into the same directory at the same time."""
    from huggingface_hub.utils import WeakFileLock

    directory.parent.mkdir(parents=True, exist_ok=True)
    lock = directory.with_name(f".{directory.name}.lock")
    # Some network file systems know no locks that end with their process.
    busy = f"Waiting for another process to download into '{directory}'. If there is none, remove '{lock}'."
    notice = threading.Timer(2, print, [busy], {"file": sys.stderr, "flush": True})
    notice.start()
    with WeakFileLock(lock):
        notice.cancel()
        try:
            yield
        finally:
            with suppress(OSError):
                lock.unlink()


def _discard_others(gathering: Path, files: list[RemoteFile]) -> None:
    """Removes what an attempt at something else has left: another revision, or more of this one."""
    wanted = {name for file in files for name in (file.name, file.partial_name)}
    for path in gathering.rglob("*"):
        if path.is_file() and path.relative_to(gathering).as_posix() not in wanted:
            path.unlink()


def _held(transfer: Transfer, file: RemoteFile, *folders: Path) -> bool:
    return any(transfer.holds(folder, file) for folder in folders)


@contextmanager
def _progress(repo_id: str, total: int) -> Generator[tqdm]:
    """A bar over all files, which shows after two seconds; without a terminal, nothing."""
    with tqdm(total=total, desc=repo_id, unit="B", unit_scale=True, delay=2, disable=None) as bar:
        try:
            yield bar
        except KeyboardInterrupt:
            bar.close()
            print("\nThe same command goes on where this one stopped.", file=sys.stderr)
            raise


def _move_in(gathering: Path, directory: Path) -> None:
    if not directory.exists():
        os.replace(gathering, directory)
        return
    for path in sorted(gathering.rglob("*")):  # a folder before what is in it
        if path.is_dir():
            (directory / path.relative_to(gathering)).mkdir(exist_ok=True)
        else:
            os.replace(path, directory / path.relative_to(gathering))
    shutil.rmtree(gathering)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 5e7 else f"{count / 1e6:,.1f} MB"
