"""The hub client's own cache: `models--org--name/snapshots/COMMIT/FILE`, links to blobs named by their checksum."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from litgpt.hub.transfer import RemoteFile

# A small file may be edited in the checkpoint directory, which must not change the cache: it is copied.
LINKED_FROM = 2**26


def snapshot(repo_id: str, revision: str) -> Path:
    """Where the cache has, or would have, a repository at a revision (a branch, tag or commit)."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repo_id.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    return folder / "snapshots" / commit


def cached_files(folder: Path) -> Iterator[RemoteFile]:
    """The files of a snapshot."""
    for path in sorted((*folder.iterdir(), *folder.glob("*/*"))):
        if path.is_file():
            blob = path.resolve().name
            digest = blob if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob) else None
            yield RemoteFile(path.relative_to(folder).as_posix(), path.stat().st_size, digest)


def can_link(path: Path, folder: Path) -> bool:
    """Whether a cached file can stand in a folder of ours without taking up space again."""
    return path.stat().st_size >= LINKED_FROM and path.stat().st_dev == folder.stat().st_dev


def take(path: Path, target: Path) -> None:
    """Puts a cached file to another place."""
    target.unlink(missing_ok=True)
    if can_link(path, target.parent):
        try:
            os.link(path.resolve(), target)
            return
        except OSError:  # some file systems know no hard links
            pass
    shutil.copyfile(path, target)
