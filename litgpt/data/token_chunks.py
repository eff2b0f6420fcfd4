"""Token ids in chunk files with an index, in litdata's format, so that litdata's `TokensLoader` reads what is written
here and what litdata wrote is read here.

A chunk file is, little-endian: uint32 number of documents n, uint32 offsets [n + 1] (byte positions in the file at
which the documents begin, and the end of the last one), then the bare ids of all documents, one after the other.
`index.json` names the chunks in their order. The `sha256` of a chunk is an addition of ours that litdata passes over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from litgpt.checkpoint.atomic import atomic_file
from litgpt.cli.untrusted import LARGE_BYTES, parse_json, read_text

INDEX_FILE = "index.json"
MAX_CHUNK_BYTES = (1 << 32) - 1  # the offsets are uint32
# litdata names a type by its place in a list of torch's or of numpy's types.
TORCH_TYPES = {11: "u1", 12: "i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
NUMPY_TYPES = {0: "i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "u1", 5: "<u2", 6: "<u4", 7: "<u8"}
WRITTEN_TYPES = {np.dtype("<u2"): 20, np.dtype("<i4"): 16}
ONE_TENSOR = json.dumps([1, {"type": None, "context": None, "children_spec": []}])  # a sample is one tensor


@dataclass(frozen=True)
class ChunkInfo:
    """What the index says of one chunk.

    Attributes:
        filename: Name of the file, below the directory of the index.
        num_tokens: Ids in it.
        num_documents: Documents, or parts of one that is longer than a chunk.
        num_bytes: Size of the file, where it is compressed of what it decompresses to.
        sha256: Of the file as it is not compressed; None where the writer recorded none.
    """

    filename: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    sha256: str | None = None


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of the two types written here in which every id of the vocabulary fits: uint16, else int32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<i4")


def header_bytes(num_documents: int) -> int:
    """The size of a chunk file's header."""
    return 4 * (num_documents + 2)


def write_chunk(path: Path, documents: Iterable[np.ndarray], dtype: np.dtype) -> ChunkInfo:
    """Write the ids of `documents`, each a 1-D array, as the chunk file `path`, whole or not at all.

    Raises:
        ValueError: There are more tokens or documents than a chunk can hold (4 GiB).
        SaveError: The disk is full.
    """
    parts = [np.ascontiguousarray(document, dtype) for document in documents]
    lengths = np.array([part.nbytes for part in parts], np.int64)
    return write_chunk_bytes(path, lengths, parts, dtype)


def write_chunk_bytes(path: Path, lengths: np.ndarray, body: Iterable[Any], dtype: np.dtype) -> ChunkInfo:
    """The same from the documents' sizes in bytes, int64 (n,), and buffers that hold their ids one after the other."""
    ends = header_bytes(len(lengths)) + np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if ends[-1] > MAX_CHUNK_BYTES:
        raise ValueError(f"{path.name}: {int(ends[-1]):,} bytes do not fit into a chunk, which holds at most 4 GiB.")
    digest = hashlib.sha256()
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        for block in (np.array([len(lengths)], "<u4").tobytes(), ends.astype("<u4").tobytes(), *body):
            digest.update(block)
            file.write(block)
        if file.tell() != ends[-1]:
            raise AssertionError(f"{path.name}: {file.tell()} bytes written, {int(ends[-1])} announced")
    num_tokens = int(lengths.sum()) // dtype.itemsize
    return ChunkInfo(path.name, num_tokens, len(lengths), int(ends[-1]), digest.hexdigest())


def open_chunk(path: Path, info: ChunkInfo, dtype: np.dtype) -> np.ndarray:
    """The ids of a chunk file, (num_tokens,), mapped from it.

    Raises:
        FileNotFoundError: The file is not there.
        ValueError: It is not what the index says.
    """
    document_offsets(path, info, dtype)  # checks the header
    if info.num_tokens == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=header_bytes(info.num_documents), shape=(info.num_tokens,))


def document_offsets(path: Path, info: ChunkInfo, dtype: np.dtype) -> np.ndarray:
    """Where the documents of a chunk file begin, and the last one ends: int64 (num_documents + 1,), counted in tokens.

    Raises: see `open_chunk`.
    """
    start = header_bytes(info.num_documents)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            if size != info.num_bytes:
                raise _damaged_chunk(path, f"it has {size:,} bytes, and the index says {info.num_bytes:,}")
            file.seek(0)
            header = np.frombuffer(file.read(start), "<u4").astype(np.int64)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"The chunk {path} is missing, though {path.parent / INDEX_FILE} names it. Copy it there, or prepare the "
            "data again."
        ) from None
    offsets = header[1:] - start
    if header[0] != info.num_documents or offsets[0] != 0 or offsets[-1] != info.num_tokens * dtype.itemsize:
        raise _damaged_chunk(path, "its header and the index disagree")
    if (np.diff(offsets) < 0).any() or (offsets % dtype.itemsize).any():
        raise _damaged_chunk(path, "the offsets in its header are not those of documents")
    return offsets // dtype.itemsize


def write_index(directory: Path, chunks: Sequence[ChunkInfo], dtype: np.dtype) -> None:
    """Write `index.json` next to the chunk files."""
    with atomic_file(directory / INDEX_FILE) as temporary:
        temporary.write_text(index_text(chunks, dtype), encoding="utf-8")


def index_text(chunks: Sequence[ChunkInfo], dtype: np.dtype) -> str:
    """The content of `index.json`. The same chunks give the same."""
    entries = [
        {
            "chunk_bytes": chunk.num_bytes,
            "chunk_size": chunk.num_documents,
            "dim": chunk.num_tokens,
            "filename": chunk.filename,
            **({"sha256": chunk.sha256} if chunk.sha256 else {}),
        }
        for chunk in chunks
    ]
    config = {
        "chunk_bytes": max((chunk.num_bytes for chunk in chunks), default=0),
        "chunk_size": None,
        "compression": None,
        "data_format": [f"no_header_tensor:{WRITTEN_TYPES[np.dtype(dtype)]}"],
        "data_spec": ONE_TENSOR,
        "encryption": None,
        "item_loader": "TokensLoader",
    }
    # litdata keeps its cache of a remote data set until this value changes, and writes the time here. What the chunks
    # are does as well, and the file depends on nothing else.
    updated_at = hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:32]
    return json.dumps({"chunks": entries, "config": config, "updated_at": updated_at}, indent=1) + "\n"


@dataclass(frozen=True)
class TokenChunks:
    """What an index says.

    Attributes:
        chunks: The chunks, in order.
        dtype: Type of the ids in all of them.
        compression: How the chunk files are compressed as a whole, such as `zstd`; None where they are not.
    """

    chunks: tuple[ChunkInfo, ...]
    dtype: np.dtype
    compression: str | None = None

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)

    @classmethod
    def read(cls, directory: Path) -> TokenChunks:
        """The index of a directory.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is damaged, or not one of chunks of tokens.
        """
        path = Path(directory) / INDEX_FILE
        try:
            text = read_text(path, LARGE_BYTES)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"'{directory}' has no {INDEX_FILE}: no token chunks are there, or `litgpt prepare_dataset` has not "
                "finished; the same command goes on where it stopped."
            ) from None

        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> TokenChunks:
        """The index with the content `text`; `where` is what errors call it.

        Raises:
            ValueError: It is damaged, or not one of chunks of tokens.
        """
        try:
            index = parse_json(text)
        except ValueError as error:
            raise _damaged_index(where, f"not valid JSON ({error})") from None
        if not isinstance(index, dict) or not isinstance(index.get("chunks"), list):
            raise _damaged_index(where, "no list of chunks")
        config = index.get("config")
        if not isinstance(config, dict):
            raise _damaged_index(where, "no config")
        dtype = _dtype(config, where)
        compression = config.get("compression")
        if compression is not None and not isinstance(compression, str):
            raise _damaged_index(where, f"compression is {compression!r}")
        if config.get("encryption") is not None:
            raise ValueError(f"The chunks of {where} are encrypted. Write them again without encryption.")
        chunks = tuple(_chunk(entry, dtype, where) for entry in index["chunks"])
        if len({chunk.filename for chunk in chunks}) != len(chunks):
            raise _damaged_index(where, "it names a chunk twice")
        return cls(chunks, dtype, compression)


def _dtype(config: dict[str, Any], where: str) -> np.dtype:
    loader, data_format = config.get("item_loader"), config.get("data_format")
    if loader not in (None, "TokensLoader") or not isinstance(data_format, list) or len(data_format) != 1:
        raise ValueError(
            f"{where} lists chunks of another kind (item_loader {loader!r}, data_format {data_format!r}), not of "
            "tokens. Write them with `litgpt prepare_dataset`, or with litdata's optimize(item_loader=TokensLoader())."
        )
    kind, _, number = str(data_format[0]).partition(":")
    types = {"no_header_tensor": TORCH_TYPES, "no_header_numpy": NUMPY_TYPES}.get(kind, {})
    name = types.get(int(number)) if number.isdecimal() and len(number) < 4 else None
    if name is None:
        raise ValueError(f"{where}: data_format {data_format[0]!r} is not a type of token ids.")
    return np.dtype(name)


def _chunk(entry: Any, dtype: np.dtype, where: str) -> ChunkInfo:
    if not isinstance(entry, dict):
        raise _damaged_index(where, f"a chunk is {entry!r:.80}")
    name = entry.get("filename")
    if not isinstance(name, str) or not name or name.startswith(".") or any(c in '/\\:"\0' for c in name):
        raise _damaged_index(where, f"a chunk's filename is {name!r:.80}, which is not a plain name of a file")
    counts = [entry.get(key) for key in ("dim", "chunk_size", "chunk_bytes")]
    tokens, documents, size = counts
    if not (_is_size(tokens) and _is_size(documents) and _is_size(size)):
        raise _damaged_index(where, f"dim, chunk_size, chunk_bytes of {name} are {counts!r:.80}")
    if size != header_bytes(documents) + tokens * dtype.itemsize:
        raise _damaged_index(where, f"{name} has {tokens} tokens of {documents} documents in {size} bytes")
    digest = entry.get("sha256")
    if digest is not None and not (isinstance(digest, str) and len(digest) == 64):
        raise _damaged_index(where, f"the sha256 of {name} is {digest!r:.80}")
    return ChunkInfo(name, tokens, documents, size, digest)


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _damaged_index(where: str, reason: str) -> ValueError:
    return ValueError(f"{where} is damaged ({reason}). Copy it again from where it came, or prepare the data again.")


def _damaged_chunk(path: Path, reason: str) -> ValueError:
    return ValueError(f"The chunk {path} is damaged: {reason}. Copy it again, or prepare the data again.")
