"""Plain text files as pretraining data, tokenised once."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from litgpt.cli.plural import counted
from litgpt.cli.resources import cache_directory, find_file_or_folder
from litgpt.data.base import DataModule, stream_loader
from litgpt.data.cache_sums import is_whole
from litgpt.data.document_marks import DocumentMarks
from litgpt.data.text_reading import FilePiece, encode_texts, hold_out_text, read_chunks, spelled_tokens, whole_file
from litgpt.data.token_stream import TokenBlocks, TokenFile
from litgpt.data.word_cache import WordCache

if TYPE_CHECKING:
    from litgpt.tokenizer.tokenizer import Tokenizer

CACHE_FORMAT = 2  # raise it when the same text and tokenizer would give other tokens


@dataclass(repr=False)
class TextFiles(DataModule):
    """A folder of plain text files, or one file, in blocks of the model's context length.

    The text is tokenised once, on all cores, and cached; a BOS token (EOS where the tokenizer has none) stands at the
    start of each file. Where a file holds several documents, BOS or EOS spelled out between them counts as that token.
    """

    train_data_path: Path | None = None
    """Folder with the training text (every .txt file in it, at any depth), or one text file"""
    val_data_path: Path | None = None
    """The same for the validation text; null holds out val_split_fraction of the training text"""
    seed: int = 42
    """Decides the order of the training blocks"""
    num_workers: int = 4
    """Processes that load batches, at most one per CPU core; 0 loads them in the training process"""
    val_split_fraction: float = 0.05
    """Part of the training text held out for validation where there is no val_data_path; 0 holds out nothing"""
    data_dir: Path | None = None
    """Another spelling of train_data_path; a folder with the folders train and val in it gives both"""
    cache_dir: Path | None = None
    """Where the tokens are cached; null takes LITGPT_CACHE_DIR, or litgpt in the user's cache directory"""
    isolate_documents: bool = False
    """Keep attention inside documents: inside files, and where BOS or EOS is spelled out, between these"""

    def __post_init__(self) -> None:
        self._tokenizer: Tokenizer | None = None
        self._batch_size, self._block_size = 1, 0
        if self.data_dir is not None:
            if self.train_data_path is not None:
                raise ValueError("`data_dir` and `train_data_path` say the same: give only one of them.")
            train, val = Path(self.data_dir) / "train", Path(self.data_dir) / "val"
            self.train_data_path = train if train.is_dir() else Path(self.data_dir)
            self.val_data_path = self.val_data_path or (val if train.is_dir() and val.is_dir() else None)
            self.data_dir = None
        if not 0 <= self.val_split_fraction < 1:
            raise ValueError(f"val_split_fraction={self.val_split_fraction} is not in [0, 1).")

    def connect(
        self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None
    ) -> None:
        self._tokenizer, self._batch_size, self._block_size = tokenizer, batch_size, max_seq_length or 0

    def prepare_data(self) -> None:
        train, val = self._pieces()
        self._tokens("train", train, make=True)
        self._tokens("val", val, make=True)

    def setup(self, stage: str = "") -> None:
        train, val = self._pieces()
        self._train, self._val = self._tokens("train", train), self._tokens("val", val)
        if len(self._train) <= self._block_size:
            raise ValueError(
                f"The training text in {self.train_data_path} is too short: "
                f"{counted(len(self._train), 'token')}, and one block needs {self._block_size + 1:,}. Add text, or "
                f"shorten the blocks with train.max_seq_length={max(1, len(self._train) - 1)}."
            )
        if val and len(self._val) < 2:
            raise ValueError(
                f"The validation text holds only {len(self._val)} token(s). Point `val_data_path` at a longer "
                "one, or set a larger `val_split_fraction`."
            )

    def train_dataloader(self) -> DataLoader:
        blocks = TokenBlocks(self._train, self._block_size, self._marks())
        return stream_loader(blocks, self._batch_size, seed=self.seed, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader | list:
        if not self._val:
            return []
        blocks = TokenBlocks(self._val, min(self._block_size, len(self._val) - 1), self._marks())
        return DataLoader(blocks, batch_size=self._batch_size)

    def _marks(self) -> DocumentMarks | None:
        """What tells documents apart, where they are not to see each other."""
        if not self.isolate_documents:
            return None
        bos, eos = (self._tokenizer.bos_id, self._tokenizer.eos_id) if self._tokenizer else (None, None)
        if bos is None and eos is None:
            raise ValueError(
                "isolate_documents=true has no effect here: the tokenizer has neither BOS nor EOS, so nothing "
                "marks where a document begins. Leave it out."
            )
        return DocumentMarks(end=eos if bos not in (None, eos) else None, start=eos if bos is None else bos)

    def training_texts(self) -> Iterator[str]:
        for piece in self._pieces()[0]:
            yield from read_chunks(piece)

    def content(self) -> dict[str, str]:
        splits = {"train": self._train, "val": self._val}  # text and tokenizer are in the directories' names
        return {name: f"{len(file):,} tokens ({file.directory.name[:12]})" for name, file in splits.items()}

    def describe(self) -> str:
        """One line on what is trained and validated on."""
        train, val = self._pieces()
        line = (
            f"Training text: {counted(len(self._train), 'token')} of {counted(len({p.path for p in train}), 'file')}."
        )
        if not val:
            return f"{line} There is no validation text."
        if self.val_data_path is not None:
            return f"{line} Validation text: {counted(len(self._val), 'token')} of {counted(len(val), 'file')}."
        what = "the end of each file" if val[0].start else counted(len(val), "file")
        return (
            f"{line} Held out for validation: {self.val_split_fraction:.1%} ({what}, "
            f"{counted(len(self._val), 'token')}); --data.val_data_path chooses another text."
        )

    def _pieces(self) -> tuple[list[FilePiece], list[FilePiece]]:
        """What to train on, and what to validate on."""
        if self.train_data_path is None:
            raise ValueError("TextFiles needs to know where the text is: train_data_path=FOLDER_OR_FILE is missing.")
        train = text_files(self.train_data_path, "train_data_path")
        if self.val_data_path is None:
            return hold_out_text(train, self.val_split_fraction)
        val = text_files(self.val_data_path, "val_data_path")
        train = [path for path in train if path not in val]
        if not train:
            raise ValueError(
                f"val_data_path={self.val_data_path} holds every file of `train_data_path` "
                f"{self.train_data_path}: nothing is left to train on."
            )
        return [whole_file(path) for path in train], [whole_file(path) for path in val]

    def _tokens(self, name: str, pieces: list[FilePiece], make: bool = False) -> TokenFile:
        """The tokens of `pieces` from the cache; `make` puts them there where they are not."""
        if self._tokenizer is None:
            raise ValueError(
                "TextFiles needs a tokenizer: give `tokenizer_dir` (a directory, or the name of a checkpoint whose "
                "tokenizer was downloaded), or `tokenizer_vocab_size` to train one on the text."
            )
        digest = hashlib.sha256(f"{CACHE_FORMAT} {self._tokenizer.fingerprint()}".encode())
        for piece in pieces:
            digest.update(f"{piece.start} {piece_hash(piece)}".encode())
        directory = Path(self.cache_dir or cache_directory()).expanduser() / "tokens" / digest.hexdigest()[:32]
        if make and not is_whole(directory, "index.json", "token cache"):
            start = time.perf_counter()
            tokens = TokenFile.write(directory, tokenize(pieces, self._tokenizer), self._tokenizer.vocab_size)
            size, seconds = sum(piece.size for piece in pieces) / 1e6, time.perf_counter() - start
            print(
                f"Tokenised the {name} text: {size:.2f} MB, {counted(len(tokens), 'token')}, {seconds:.1f} s. "
                f"Cached in {directory}"
            )
        return TokenFile(directory)


def text_files(path: Path, option: str) -> list[Path]:
    """The text files that `path` stands for, sorted; an error names the option and the remedy."""
    try:
        path = find_file_or_folder(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{option}={path}: no such file or folder. Give a folder of .txt files or one text file."
        ) from error
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.txt") if p.is_file())
    if not files:
        others = sorted(p.name for p in path.iterdir())[:3]
        there = f"it holds {', '.join(others)}, ..." if others else "it is empty"
        raise FileNotFoundError(
            f"{option}={path} holds no .txt file ({there}). Put plain text files there, or give one file."
        )
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{option}={path}: all {len(files)} text file(s) are empty.")
    return [file for file in files if file.stat().st_size]


def piece_hash(piece: FilePiece) -> str:
    return _content_hash(piece, piece.path.stat().st_mtime_ns)


@lru_cache(maxsize=100_000)
def _content_hash(piece: FilePiece, changed: int) -> str:
    digest, left = hashlib.blake2b(digest_size=16), piece.size
    with open(piece.path, "rb") as file:
        file.seek(piece.start)
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def tokenize(pieces: list[FilePiece], tokenizer: Tokenizer) -> Iterator[Sequence[int] | np.ndarray]:
    """The ids of every piece in order, with BOS (or EOS) before the start of each file."""
    first, spelled = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id, spelled_tokens(tokenizer)
    total, words = sum(piece.size for piece in pieces), WordCache(tokenizer)
    with tqdm(total=total, desc="Tokenising", unit="B", unit_scale=True, disable=None) as bar:
        for piece in pieces:
            if piece.start == 0 and first is not None:
                yield [first]
            chunks, goes_on = read_chunks(piece, list(spelled)), piece.start > 0
            while batch := [chunk for _, chunk in zip(range(4 * (os.cpu_count() or 1)), chunks, strict=False)]:
                continues = [goes_on, *[True] * (len(batch) - 1)]
                yield from encode_texts(batch, words, continues=continues, spelled=spelled)
                goes_on = True
                bar.update(sum(len(chunk.encode()) for chunk in batch))
