"""A text's tokens in one file, memory-mapped, and blocks of them to train on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from litgpt.checkpoint import atomic_directory
from litgpt.data.cache_sums import write_sums
from litgpt.data.document_marks import DocumentMarks

TOKENS_FILE = "tokens.bin"
INDEX_FILE = "index.json"


class TokenFile:
    """The tokens of a whole text: a directory with the bare ids (uint16 or uint32, little-endian) and an index."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        self.dtype, self.count = np.dtype(index["dtype"]), int(index["count"])
        size = (directory / TOKENS_FILE).stat().st_size
        if size != self.count * self.dtype.itemsize:
            raise ValueError(
                f"The token cache {directory} is damaged: {TOKENS_FILE} has {size} bytes, not "
                f"{self.count * self.dtype.itemsize}. Delete the directory; it will be made again."
            )

    @classmethod
    def write(cls, directory: Path, pieces: Iterable[Sequence[int] | np.ndarray], vocab_size: int) -> TokenFile:
        """Write the ids of all `pieces`, one after the other; `directory` appears once it is complete."""
        dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        count = 0
        directory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(directory, overwrite=True) as temporary:
            with open(temporary / TOKENS_FILE, "wb") as file:
                for piece in pieces:
                    file.write(np.asarray(piece, dtype=dtype).tobytes())
                    count += len(piece)
            index = {"dtype": dtype.str, "count": count, "vocab_size": vocab_size}
            (temporary / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")
            write_sums(temporary)
        return cls(directory)

    def __len__(self) -> int:
        return self.count

    @cached_property
    def tokens(self) -> np.ndarray:
        """All ids, mapped from the file; nothing is read before it is used."""
        if self.count == 0:
            return np.empty(0, self.dtype)
        return np.memmap(self.directory / TOKENS_FILE, self.dtype, mode="r", shape=(self.count,))

    def __getstate__(self) -> dict:
        # A loader's worker process maps the file itself; pickling the map would copy every token.
        return {k: v for k, v in vars(self).items() if k != "tokens"}


class TokenBlocks(Dataset):
    """Blocks of T + 1 tokens: block i holds tokens i*T to i*T + T, so that every token but the first is predicted once.

    Args:
        file: The tokens.
        block_size: T, the tokens that go into the model.
        marks: What tells documents apart, where these are not to see each other.
    """

    def __init__(self, file: TokenFile, block_size: int, marks: DocumentMarks | None = None) -> None:
        self.file = file
        self.block_size = block_size
        self.marks = marks

    def __len__(self) -> int:
        return max(0, (len(self.file) - 1) // self.block_size)

    def __getitem__(self, index: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Block `index`, int64, (T + 1,); where documents are isolated, see `DocumentMarks.isolate`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.block_size
        tokens = torch.from_numpy(self.file.tokens[start : start + self.block_size + 1].astype(np.int64))
        return tokens if self.marks is None else self.marks.isolate(tokens)
