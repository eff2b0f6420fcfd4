"""The chunks of one folder, local or in an object store: what its index says, opening them, having them fetched."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from litgpt.data.chunk_cache import ChunkCache, Prefetcher
from litgpt.data.object_store import StoreError, fetch, is_remote, join_address, read_small
from litgpt.data.token_chunks import INDEX_FILE, ChunkInfo, TokenChunks, open_chunk

OPEN_CHUNKS = 20  # that a process keeps mapped: two windows and some more


class ChunkStore:
    """The chunks of one folder, local or remote.

    Args:
        path: The folder or address with index.json.
        cache: Where chunks lie that are not in a folder as they are; needed for those only.

    Attributes:
        index: What index.json says.
        digest: Of index.json, which has the sums of the chunks.
    """

    def __init__(self, path: str, cache: ChunkCache) -> None:
        self.path = path
        if is_remote(path):
            text = read_small(join_address(path, INDEX_FILE)).decode("utf-8", "replace")
            self.index = TokenChunks.parse(text, join_address(path, INDEX_FILE))
        else:
            self.index = TokenChunks.read(Path(path))
            text = (Path(path) / INDEX_FILE).read_text(encoding="utf-8")
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self.cached = is_remote(path) or self.index.compression is not None
        if self.index.compression is not None:
            _decompressor(self.index.compression, path)  # that there is one is seen before training
        self._cache = cache.of(f"{path} {self.digest}") if self.cached else None
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._held: dict[int, int] = {}
        self._checked: set[int] = set()
        self._prefetcher: Prefetcher | None = None

    def __getstate__(self) -> dict:
        """For a worker process: it maps the files itself."""
        fresh = {"_open": OrderedDict(), "_held": {}, "_checked": set(), "_prefetcher": None}
        return {**vars(self), **fresh}

    def open(self, number: int) -> np.ndarray:
        """The ids of a chunk, (num_tokens,), mapped from its file.

        Raises:
            FileNotFoundError: The chunk is missing.
            ValueError: It is damaged.
            StoreError: The store does not give it.
        """
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        info = self.index.chunks[number]
        if self._cache is None:
            path = Path(self.path) / info.filename
            ids = open_chunk(path, info, self.index.dtype)
            if number not in self._checked:
                check_sum(path, info, str(path))
                self._checked.add(number)
        else:
            ids, self._held[number] = self._cached_chunk(self._cache, info, number in self._checked)
            self._checked.add(number)
        self._open[number] = ids
        while len(self._open) > OPEN_CHUNKS:
            last, _ = self._open.popitem(last=False)
            if (held := self._held.pop(last, None)) is not None:
                os.close(held)
        return ids

    def _cached_chunk(self, cache: ChunkCache, info: ChunkInfo, was_checked: bool) -> tuple[np.ndarray, int]:
        """A chunk in the cache and the descriptor that keeps it there; one that lies there damaged is fetched again."""
        for attempt in (1, 2):
            path, held = cache.hold(info.filename, info.num_bytes, lambda path: self._fetch(info, path, True))
            try:
                ids = open_chunk(path, info, self.index.dtype)
                if not was_checked:
                    check_sum(path, info, str(path))
            except ValueError:
                cache.discard(info.filename, held)
                if attempt == 2:
                    raise
            else:
                return ids, held
        raise AssertionError("unreachable")

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Have chunks fetched in the background that are not in the cache yet, in this order."""
        if self._cache is None:
            return
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._fetch_ahead)
        self._prefetcher.want(numbers)

    def _fetch_ahead(self, number: int) -> None:
        info = self.index.chunks[number]
        if self._cache is not None:
            self._cache.obtain(info.filename, info.num_bytes, lambda path: self._fetch(info, path, False), wait=False)

    def _fetch(self, info: ChunkInfo, path: Path, shows: bool) -> None:
        """Get a chunk into a file as it is not compressed, and check it."""
        where = join_address(self.path, info.filename)
        for attempt in (1, 2):
            try:
                self._get(info, where, path, shows)
                size = path.stat().st_size
                if size != info.num_bytes:
                    raise _damaged(where, f"it has {size:,} bytes, and the index says {info.num_bytes:,}")
                check_sum(path, info, where)
                return
            except ValueError as error:
                if isinstance(error, StoreError) or attempt == 2 or not is_remote(self.path):
                    raise

    def _get(self, info: ChunkInfo, where: str, path: Path, shows: bool) -> None:
        compression = self.index.compression
        if not is_remote(self.path):
            if not Path(where).is_file():
                raise FileNotFoundError(f"The chunk {where} is missing, though {INDEX_FILE} names it. Copy it there.")
            assert compression is not None  # other chunks of a folder are read where they are
            return _decompress(compression, Path(where), path, info.num_bytes)
        bar = tqdm(
            total=info.num_bytes, desc=info.filename, unit="B", unit_scale=True, delay=2, leave=False, disable=not shows
        )
        with bar:
            if compression is None:
                return fetch(where, path, bar.update)
            packed = path.with_name(f"{path.name}.packed")
            try:
                fetch(where, packed, bar.update)
                _decompress(compression, packed, path, info.num_bytes)
            finally:
                packed.unlink(missing_ok=True)
        return None


def check_sum(path: Path, info: ChunkInfo, where: str) -> None:
    """Compare a chunk's file with the sum in the index, where there is one."""
    if info.sha256 is None:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != info.sha256:
        raise _damaged(where, "its SHA-256 is not the one in the index")


def _damaged(where: str, reason: str) -> ValueError:
    return ValueError(f"The chunk {where} is damaged: {reason}. Copy it again, or prepare the data again.")


def _decompressor(compression: str, where: str) -> Callable[[IO[bytes]], IO[bytes]]:
    """Opens a file that is compressed as a whole."""
    if compression.partition(":")[0] != "zstd":
        raise ValueError(f"The chunks of {where} are compressed with {compression!r}; only zstd is supported.")
    if sys.version_info >= (3, 14):
        with suppress(ImportError):  # Python was built without it
            from compression.zstd import ZstdFile

            return ZstdFile
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"The chunks of {where} are compressed: pip install zstandard") from None
    return lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


def _decompress(compression: str, source: Path, path: Path, size: int) -> None:
    """Write what a compressed file holds, but not more than `size` bytes and one."""
    left = size + 1
    with open(source, "rb") as file, open(path, "wb") as out:
        try:
            with _decompressor(compression, str(source.parent))(file) as reader:
                while left and (block := reader.read(min(left, 1 << 20))):
                    out.write(block)
                    left -= len(block)
        except OSError:
            raise
        except Exception as error:  # the library's own kinds
            raise _damaged(str(source), f"it cannot be decompressed ({error})") from error
