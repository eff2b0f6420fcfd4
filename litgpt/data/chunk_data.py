"""What all data modules on chunks of tokens have in common."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from torch.utils.data import DataLoader

from litgpt.checkpoint.atomic import atomic_file
from litgpt.checkpoint.names import COMPANION_FILES
from litgpt.cli.plural import counted
from litgpt.cli.resources import cache_directory
from litgpt.data.base import DataModule, stream_loader
from litgpt.data.chunk_cache import ChunkCache
from litgpt.data.chunk_order import WINDOW
from litgpt.data.chunk_store import ChunkStore
from litgpt.data.dataset_record import RECORD_FILE, TOKENIZER_DIR, DatasetRecord
from litgpt.data.document_marks import DocumentMarks
from litgpt.data.object_store import fetch, is_remote, join_address, read_small
from litgpt.data.streaming import ChunkBlocks, PositionSampler
from litgpt.data.token_chunks import INDEX_FILE

if TYPE_CHECKING:
    from litgpt.tokenizer.tokenizer import Tokenizer

TRAIN, VAL = "train", "val"
Place = TypeVar("Place", str, "str | list[str]")
PREPARE = "litgpt prepare_dataset --source_path TEXT --checkpoint_dir TOKENIZER --destination_path"


@dataclass(frozen=True)
class DataSource:
    """A prepared data set among those that are trained on.

    Attributes:
        path: Folder or address, with what is recorded of the data set.
        train: Folder or address of its training chunks.
        val: The same of its validation chunks; None where it has none.
        weight: Its share of the training samples; None for as much as it has tokens.
    """

    path: str
    train: str
    val: str | None
    weight: float | None = None


@dataclass(repr=False)
class ChunkData(DataModule, Generic[Place]):
    """Data sets of token chunks, as `litgpt prepare_dataset` and litdata write them."""

    data_path: Place
    """Folder or address (s3://, gs://, azure://, hf://) of the prepared data"""
    seed: int = 42
    """Decides the order of the training blocks"""
    num_workers: int = 8
    """Processes that load batches, at most one per CPU core; 0 loads them in the training process"""
    isolate_documents: bool = False
    """Keep attention inside documents; otherwise a token also sees the documents before its own in the block"""
    cache_dir: Path | None = None
    """Where chunks of an object store, and compressed ones, are kept; null takes LITGPT_CACHE_DIR, or litgpt in the
    user's cache directory"""
    max_cache_gb: float = 50.0
    """Gigabytes that this cache may take on each machine; the chunks used least recently make room"""

    def __post_init__(self) -> None:
        self._tokenizer: Tokenizer | None = None
        self._batch_size, self._block_size = 1, 0
        self._fetched: set[str] = set()

    def sources(self) -> list[DataSource]:
        """What is trained and validated on; called after `prepare_data`."""
        raise TypeError(f"{type(self).__name__} has no sources(): it must say what is trained on.")

    def tokenizer_dir(self) -> Path | None:
        """The tokenizer that the data was prepared with, where that is recorded."""
        for path in self.roots():
            if self._record(path) is not None:
                return self._near(path) / TOKENIZER_DIR
        return None

    def roots(self) -> list[str]:
        """Folders or addresses of the data sets, prepared or not."""
        raise TypeError(f"{type(self).__name__} has no roots(): it must say where its data sets are.")

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        self._tokenizer, self._batch_size, self._block_size = tokenizer, batch_size, max_seq_length or 0

    def setup(self, stage: str = "") -> None:
        sources = self.sources()
        self._check_tokenizer(sources)
        marks = self._marks(sources) if self.isolate_documents else None
        cache = self._cache()
        self._stores = [ChunkStore(source.train, cache) for source in sources]
        self._train = ChunkBlocks(
            [[store] for store in self._stores],
            [source.weight for source in sources],
            self._block_size,
            self.seed,
            marks,
            prefetches=True,
        )
        for store, order in zip(self._stores, self._train.orders, strict=True):
            if not order.total:
                raise ValueError(self._too_short(store))
        self._check_cache()
        val_stores = [ChunkStore(source.val, cache) for source in sources if source.val is not None]
        self._val: ChunkBlocks | None = None
        if val_stores:
            longest = max((chunk.num_tokens for store in val_stores for chunk in store.index.chunks), default=0)
            if longest < 2:
                raise ValueError(
                    f"The validation data in {val_stores[0].path} is empty. Prepare the data again with a larger part "
                    f"for validation, or delete that folder to train without validation."
                )
            block_size = min(self._block_size, longest - 1)
            self._val = ChunkBlocks([val_stores], [None], block_size, self.seed, marks)

    def train_dataloader(self) -> DataLoader:
        sampler = PositionSampler(self._train, self._batch_size)
        return stream_loader(
            self._train, self._batch_size, seed=self.seed, num_workers=self.num_workers, sampler=sampler
        )

    def val_dataloader(self) -> DataLoader | list:
        return [] if self._val is None else DataLoader(self._val, batch_size=self._batch_size)

    def content(self) -> dict[str, str]:
        splits = {"train": self._train} | ({} if self._val is None else {"val": self._val})
        return {name: f"{len(blocks):,} blocks ({', '.join(blocks.digests)})" for name, blocks in splits.items()}

    def describe(self) -> str:
        """What is trained and validated on, a line each."""
        lines = []
        total = sum(self._train.weights)
        for store, order, weight in zip(self._stores, self._train.orders, self._train.weights, strict=True):
            index = store.index
            share = f" ({weight / total:.1%} of the samples)" if len(self._stores) > 1 else ""
            lines.append(
                f"Training data: {counted(index.num_tokens, 'token')} in {counted(len(index.chunks), 'chunk')} of "
                f"{store.path}{share}, "
                f"{counted(order.total, 'block')} of {self._block_size:,}."
            )
        if self._val is None:
            lines.append("There is no validation data.")
        else:
            lines.append(
                f"Validation data: {counted(len(self._val), 'block')} of {counted(self._val.block_size, 'token')}."
            )
        if self.isolate_documents:
            lines.append("Documents do not see each other.")
        return "\n".join(lines)

    # -- inside

    def _cache(self) -> ChunkCache:
        directory = Path(self.cache_dir or cache_directory()).expanduser() / "chunks"
        return ChunkCache(directory, int(self.max_cache_gb * 1e9))

    def _check_cache(self) -> None:
        """Two windows of each source are in use at the same time, where one ends and the next begins."""
        needed = 0
        for store in self._stores:
            if store.cached:
                sizes = sorted((chunk.num_bytes for chunk in store.index.chunks), reverse=True)
                needed += sum(sizes[: 2 * WINDOW])
        if needed > self.max_cache_gb * 1e9:
            raise ValueError(
                f"max_cache_gb={self.max_cache_gb:g} is too small: the chunks in use at a time take "
                f"{needed / 1e9:.3g} GB. Set at least max_cache_gb={needed / 1e9 * 1.1:.3g}."
            )

    def _near(self, path: str) -> Path:
        """The folder of a data set; for one in a store, a local copy of its small files."""
        if not is_remote(path):
            return Path(path)
        folder = self._cache().of(path).folder
        if path in self._fetched:
            return folder
        self._fetched.add(path)
        for name in COMPANION_FILES:
            file = folder / TOKENIZER_DIR / name
            _fetch_if_there(join_address(path, TOKENIZER_DIR, name), file)
        _fetch_if_there(join_address(path, RECORD_FILE), folder / RECORD_FILE)
        return folder

    def _record(self, path: str) -> DatasetRecord | None:
        return DatasetRecord.read(self._near(path))

    def _check_tokenizer(self, sources: list[DataSource]) -> None:
        tokenizer = self._tokenizer
        for source in sources:
            record = self._record(source.path)
            if tokenizer is None or record is None or record.tokenizer == tokenizer.fingerprint():
                continue
            raise ValueError(
                f"The data in {source.path} was prepared with another tokenizer than the one in {tokenizer.dir}: its "
                "ids mean other texts. Leave `tokenizer_dir` out to train with "
                f"{join_address(source.path, TOKENIZER_DIR)}, or prepare the text again with `checkpoint_dir` "
                f"{tokenizer.dir}."
            )

    def _marks(self, sources: list[DataSource]) -> DocumentMarks:
        records = [self._record(source.path) for source in sources]
        ends = {record.eos_id for record in records if record is not None}
        if None in records and self._tokenizer is not None and self._tokenizer.eos_id is not None:
            ends.add(self._tokenizer.eos_id)
        if len(ends) != 1:
            raise ValueError(
                "isolate_documents=true: it is not known which token ends a document, since the data has no "
                "record and there is no tokenizer with an EOS token. Give `tokenizer_dir`, or leave it out."
            )
        return DocumentMarks(end=ends.pop())

    def _too_short(self, store: ChunkStore) -> str:
        longest = max((chunk.num_tokens for chunk in store.index.chunks), default=0)
        if longest < 2:
            return f"The training data in {store.path} is empty. Prepare it again."
        return (
            f"train.max_seq_length={self._block_size}: the chunks in {store.path} are too short, the longest has "
            f"{longest:,} tokens, and a block needs {self._block_size + 1:,}. Set `train.max_seq_length` "
            f"{longest - 1} or less, or prepare the data again with larger chunks."
        )


@dataclass(repr=False)
class FolderData(ChunkData[str]):
    """Token chunks in one folder, or below it."""

    data_path: str = "data"
    """Folder or address (s3://, gs://, azure://, hf://) of the prepared data"""

    def __post_init__(self) -> None:
        self.data_path = os.fspath(self.data_path)  # from Python, a path will do
        super().__post_init__()

    def sources(self) -> list[DataSource]:
        return [splits_of(self.data_path)]

    def roots(self) -> list[str]:
        return [self.data_path]


def splits_of(path: str, split_names: tuple[str, str] | None = None, weight: float | None = None) -> DataSource:
    """The training and validation chunks of a data set: in the folders `split_names`, by default train and val; else
    all is for training.

    Raises:
        FileNotFoundError: There are no chunks.
    """
    if split_names is not None:
        return DataSource(path, join_address(path, split_names[0]), join_address(path, split_names[1]), weight)
    if has_chunks(join_address(path, TRAIN)):
        val = join_address(path, VAL)
        return DataSource(path, join_address(path, TRAIN), val if has_chunks(val) else None, weight)
    if has_chunks(path):
        return DataSource(path, path, None, weight)
    if is_remote(path):
        raise FileNotFoundError(
            f"data_path={path}: there is neither {TRAIN}/{INDEX_FILE} nor {INDEX_FILE}, so no prepared data. "
            "Check the address, and for another layout `split_names`."
        )
    what = f"it has no {INDEX_FILE}" if Path(path).is_dir() else "there is no such folder"
    raise FileNotFoundError(f"data_path={path} holds no prepared data ({what}). Prepare it with: {PREPARE} {path}")


def has_chunks(path: str) -> bool:
    """Whether there is an index of chunks."""
    try:
        read_small(join_address(path, INDEX_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _fetch_if_there(address: str, path: Path) -> None:
    try:
        with atomic_file(path) as temporary:
            fetch(address, temporary)
    except FileNotFoundError:
        pass
