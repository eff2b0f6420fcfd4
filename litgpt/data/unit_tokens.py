"""One unit of a corpus becomes chunk files: what a worker does, on whatever machine."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from litgpt.checkpoint.atomic import atomic_file
from litgpt.cli.untrusted import LARGE_BYTES, read_json_object
from litgpt.data.corpus import Corpus, Unit
from litgpt.data.documents import Fragment, read_documents
from litgpt.data.source_files import Report
from litgpt.data.text_reading import encode_texts
from litgpt.data.token_chunks import ChunkInfo, write_chunk_bytes
from litgpt.data.word_cache import WordCache

WORK_DIR = ".preparing"  # in the destination, until all is there
PART_BYTES = 64 << 20  # ids that are kept in memory, and the most of one file
BATCH_CHARACTERS, BATCH_FRAGMENTS = 1 << 18, 1024  # what is tokenised at a time


@dataclass(frozen=True)
class UnitJob:
    """Everything that a worker has to know.

    Attributes:
        corpus: What is read.
        destination: Where the prepared data goes.
        tokenizer_dir: Where the tokenizer's files are.
        plan: Digest of all that decides the result; what was done for another plan does not count.
        dtype: Type of the ids.
        eos_id: Put at the end of every document.
        spelled: Tokens that count where they are spelled out in a plain text file.
        bos_id: Put at the start of every document; None for nothing.
        val_fraction: Part of the documents without a split of their own to hold out for validation.
        seed: Decides which those are.
    """

    corpus: Corpus
    destination: Path
    tokenizer_dir: Path
    plan: str
    dtype: np.dtype
    eos_id: int
    spelled: dict[str, int]
    bos_id: int | None
    val_fraction: float
    seed: int

    @property
    def work_dir(self) -> Path:
        return self.destination / WORK_DIR


@dataclass
class UnitResult:
    """What came of a unit.

    Attributes:
        parts: The files written for each split, in order.
        documents: Documents that end in the unit, of each split.
        records: Documents and records read, those without text included.
        without_text: Records without text.
    """

    parts: dict[str, list[ChunkInfo]] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    records: int = 0
    without_text: int = 0


def read_result(job: UnitJob, unit: Unit) -> UnitResult | None:
    """What came of a unit; None where it has not been worked on yet, or was for another plan."""
    try:
        content = read_json_object(_result_file(job, unit), limit=LARGE_BYTES)
        if content.pop("plan") != job.plan:
            return None
        parts = {split: [ChunkInfo(**part) for part in found] for split, found in content.pop("parts").items()}
        sizes = [((job.work_dir / p.filename).stat().st_size, p.num_bytes) for found in parts.values() for p in found]
        return UnitResult(parts=parts, **content) if all(size == said for size, said in sizes) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def prepare_unit(job: UnitJob, unit: Unit, words: WordCache, report: Report) -> None:
    """Tokenise a unit's documents and write them; whoever finds its result finds all of it.

    Raises:
        ValueError: A damaged file, a record whose text is no text.
        SaveError: The disk is full.
    """
    done = 0

    def count(size: int) -> None:
        nonlocal done
        size = min(size, unit.size - done)
        done += size
        report(size)

    result = UnitResult()
    # In a plain text file, BOS spelled out is that token, as EOS is; the text of a record is nothing but text.
    is_text = job.corpus.files[unit.extents[0].file].form == "text"
    spelled = job.spelled if is_text else {}
    writers = {split: _PartWriter(job, unit, split) for split in ("train", "val")}
    for batch in _batches(job, unit, result, count):
        for split, fragment, ids in _encoded(job, batch, words, spelled):
            writers[split].add(fragment, ids)
    for split, writer in writers.items():
        writer.flush()
        result.parts[split], result.documents[split] = writer.parts, writer.documents
    with atomic_file(_result_file(job, unit)) as temporary:
        temporary.write_text(json.dumps({"plan": job.plan, **asdict(result)}), encoding="utf-8")
    report(unit.size - done)


def _result_file(job: UnitJob, unit: Unit) -> Path:
    return job.work_dir / f"unit-{unit.number:07d}.json"


_Batch = list[tuple[str, Fragment]]


def _batches(job: UnitJob, unit: Unit, result: UnitResult, report: Report) -> Iterator[_Batch]:
    batch, size = [], 0
    split = "train"
    for fragment in read_documents(job.corpus, unit, report):
        result.records += fragment is None or fragment.ends
        if fragment is None:
            result.without_text += 1
            continue
        if not fragment.continues or unit.split is not None:
            split = unit.split or _draw(job, fragment.text)
        batch.append((split, fragment))
        size += len(fragment.text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_FRAGMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _draw(job: UnitJob, text: str) -> str:
    """Whether a document is held out. Its own text decides, so that it goes to the same side from any kind of file, and
    one that is there twice is not both trained and validated on."""
    key = job.seed.to_bytes(16, "little", signed=True)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
    return "val" if int.from_bytes(digest, "little") < job.val_fraction * 2**64 else "train"


def _encoded(
    job: UnitJob, batch: _Batch, words: WordCache, spelled: dict[str, int]
) -> Iterator[tuple[str, Fragment, list[np.ndarray]]]:
    texts, continues = [fragment.text for _, fragment in batch], [fragment.continues for _, fragment in batch]
    encoded = encode_texts(texts, words, continues=continues, spelled=spelled)
    for (split, fragment), ids in zip(batch, encoded, strict=True):
        before = [job.bos_id] if job.bos_id is not None and not fragment.continues else []
        after = [job.eos_id] if fragment.ends else []
        yield split, fragment, [np.array(before, job.dtype), _fitting(ids, job.dtype), np.array(after, job.dtype)]


def _fitting(ids: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if ids.size and int(ids.max()) > np.iinfo(dtype).max:
        raise ValueError(f"The tokenizer gives the id {int(ids.max())}, which is beyond its own vocabulary.")
    return ids.astype(dtype)


class _PartWriter:
    """Collects a split's ids, and writes them to a file when they become many."""

    def __init__(self, job: UnitJob, unit: Unit, split: str) -> None:
        self._job, self._name = job, f"{split}-{unit.number:07d}"
        self._body, self._lengths, self._open = bytearray(), array("q"), False
        self.parts: list[ChunkInfo] = []
        self.documents = 0

    def add(self, fragment: Fragment, ids: list[np.ndarray]) -> None:
        data = b"".join(part.tobytes() for part in ids)
        if self._open:  # a document, or the rest of it, is one item of a chunk
            self._lengths[-1] += len(data)
        else:
            self._lengths.append(len(data))
        self._body += data
        self._open = not fragment.ends
        self.documents += fragment.ends
        if len(self._body) >= PART_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._body:
            path = self._job.work_dir / f"{self._name}-{len(self.parts):04d}.bin"
            lengths = np.frombuffer(self._lengths, np.int64)
            self.parts.append(write_chunk_bytes(path, lengths, [self._body], self._job.dtype))
        self._body, self._lengths, self._open = bytearray(), array("q"), False
