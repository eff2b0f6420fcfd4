"""The end of a data set's preparation: from the results of all parts to the files that are trained on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from litgpt.checkpoint.atomic import atomic_file
from litgpt.data.dataset_record import TOKENIZER_DIR, DatasetRecord, SplitRecord
from litgpt.data.preparation_plan import SHARDS_FILE, SPLITS, record_of
from litgpt.data.token_chunks import (
    ChunkInfo,
    document_offsets,
    header_bytes,
    index_text,
    write_chunk_bytes,
    write_index,
)
from litgpt.data.unit_tokens import UnitJob, UnitResult, read_result
from litgpt.tokenizer.tokenizer import Tokenizer

CHUNK_BYTES = 16 << 20  # files of units become a chunk when they hold that much together


def finish(job: UnitJob, options: dict[str, Any], tokenizer: Tokenizer) -> DatasetRecord:
    """Put the units' files together, in their order; the indices come last."""
    from litgpt.checkpoint import copy_companion_files

    results = _all_results(job)
    _check_documents(job, results)
    copy_companion_files(tokenizer.dir, job.destination / TOKENIZER_DIR)
    chunks = {split: _make_chunks(job, split, results) for split in _made(job)}
    splits = {}
    for split, made in chunks.items():
        splits[split] = SplitRecord(
            tokens=sum(chunk.num_tokens for chunk in made),
            documents=sum(result.documents[split] for result in results),
            chunks=len(made),
            index_sha256=hashlib.sha256(index_text(made, job.dtype).encode()).hexdigest(),
        )
    record = record_of(job, options, tokenizer, results, splits)
    record.write(job.destination)
    for split in reversed(chunks):
        write_index(job.destination / split, chunks[split], job.dtype)
    shutil.rmtree(job.work_dir, ignore_errors=True)
    return record


def _made(job: UnitJob) -> list[str]:
    """The splits that come of the corpus."""
    return [split for split in SPLITS if split in job.corpus.splits or (split == "val" and job.val_fraction)]


def _all_results(job: UnitJob) -> list[UnitResult]:
    results = [read_result(job, unit) for unit in job.corpus.units]
    missing = [number for number, result in enumerate(results) if result is None]
    if not missing:
        return [result for result in results if result is not None]
    try:
        count = int(json.loads((job.work_dir / SHARDS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        count = 0
    shards = sorted({number % count + 1 for number in missing}) if count else []
    named = ", ".join(f"{shard}/{count}" for shard in shards[:20]) + (", ..." if len(shards) > 20 else "")
    which = f" They are those of shard={named}." if shards else ""
    raise ValueError(
        f"merge=true: {len(missing)} of {len(results)} units of {job.destination} are not done.{which} Run these, "
        "or the same command without `shard` and `merge`, which does what is missing."
    )


def _check_documents(job: UnitJob, results: Sequence[UnitResult]) -> None:
    records, without = (sum(getattr(result, name) for result in results) for name in ("records", "without_text"))
    if without and without == records:
        raise ValueError(
            f"The column {job.corpus.column!r} is empty in all {records:,} records. Name another with `text_column`."
        )
    for split in _made(job):
        if not sum(result.documents[split] for result in results):
            held = split == "val" and job.val_fraction
            remedy = (
                f"Give a larger `val_split_fraction` than {job.val_fraction:g}, or split=train."
                if held
                else "Look at its files."
            )
            raise ValueError(f"There is no document for {split} among {records:,}. {remedy}")


def _make_chunks(job: UnitJob, split: str, results: Sequence[UnitResult]) -> list[ChunkInfo]:
    """The chunks of a split: a large file of a unit as it is, small ones put together."""
    directory, chunks = job.destination / split, []
    directory.mkdir(parents=True, exist_ok=True)
    groups = list(_groups([part for result in results for part in result.parts[split]]))
    size = sum(part.num_bytes for group in groups for part in group)
    with tqdm(total=size, desc=f"Writing {split}", unit="B", unit_scale=True, delay=2, disable=None) as bar:
        for number, group in enumerate(groups):
            path = directory / f"chunk-{number:06d}.bin"
            if len(group) == 1:
                _link(job.work_dir / group[0].filename, path)
                chunks.append(replace(group[0], filename=path.name))
            else:
                chunks.append(_concatenate(job, group, path))
            bar.update(sum(part.num_bytes for part in group))
    return chunks


def _groups(parts: Sequence[ChunkInfo]) -> Iterator[list[ChunkInfo]]:
    group: list[ChunkInfo] = []
    for part in parts:
        group.append(part)
        if sum(part.num_bytes for part in group) >= CHUNK_BYTES:
            yield group
            group = []
    if group:
        yield group


def _link(part: Path, path: Path) -> None:
    """The file under another name too: until all is finished, it can be finished again."""
    path.unlink(missing_ok=True)  # renaming one name of a file to another name of it does nothing
    with atomic_file(path) as temporary:
        try:
            os.link(part, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(part, temporary)


def _concatenate(job: UnitJob, group: Sequence[ChunkInfo], path: Path) -> ChunkInfo:
    files = [(job.work_dir / part.filename, part) for part in group]
    lengths = np.concatenate([np.diff(document_offsets(file, part, job.dtype)) for file, part in files])
    return write_chunk_bytes(path, lengths * job.dtype.itemsize, _bodies(files), job.dtype)


def _bodies(files: Sequence[tuple[Path, ChunkInfo]]) -> Iterator[bytes]:
    for path, part in files:
        with open(path, "rb") as file:
            file.seek(header_bytes(part.num_documents))
            while block := file.read(1 << 22):
                yield block
