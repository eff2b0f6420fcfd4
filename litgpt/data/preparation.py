"""Pretraining data out of a corpus: everything is tokenised once, into chunks that training streams.

The corpus is cut into units of work (`corpus`). Whoever works on one, a process, another machine or Ray, writes files
of its own for it (`unit_tokens`). When all units are done, their files, in the units' order, become the chunks, small
ones put together. So the result depends neither on who did what nor on how often the work was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from litgpt.checkpoint.atomic import atomic_file
from litgpt.data.corpus import EXPANSION, Unit, plan_corpus
from litgpt.data.dataset_record import FORMAT, RECORD_FILE, TOKENIZER_DIR, DatasetRecord, SplitRecord
from litgpt.data.source_files import Report
from litgpt.data.text_reading import spelled_tokens
from litgpt.data.token_chunks import (
    ChunkInfo,
    document_offsets,
    header_bytes,
    index_text,
    token_dtype,
    write_chunk_bytes,
    write_index,
)
from litgpt.data.unit_tokens import WORK_DIR, Job, UnitResult, read_result
from litgpt.plural import counted
from litgpt.tokenizer import Tokenizer

CHUNK_BYTES = 16 << 20  # files of units become a chunk when they hold that much together
PLAN_FILE = "plan.json"
SHARDS_FILE = "shards.json"
SPLITS = ("train", "val")
VAL_FRACTION, VAL_BYTES = 0.05, 100 << 20  # what is held out by default: the smaller of the two
Engine = Literal["processes", "ray"]


@dataclass(frozen=True)
class Shard:
    """Share `index` of `count`, counted from 1, of the units."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`I/N`, or `slurm` for this task's place in its array of jobs.

        Raises:
            ValueError: It is neither.
        """
        if text == "slurm":
            try:
                task, first, count = (int(os.environ[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "COUNT"))
                step = int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1"))
            except (KeyError, ValueError):
                raise ValueError(
                    "--shard slurm: this is no task of a SLURM array (SLURM_ARRAY_TASK_ID, _MIN and _COUNT are not "
                    "set). Submit it with `sbatch --array=1-8`, or give --shard I/N."
                ) from None
            index = (task - first) // step + 1
        else:
            parts = text.split("/")
            if len(parts) != 2 or not all(part.isdecimal() and len(part) < 8 for part in parts):
                raise ValueError(f"--shard {text}: I/N is expected, such as 1/8 for the first of 8, or slurm.")
            index, count = map(int, parts)
        if not 1 <= index <= count:
            raise ValueError(f"--shard {text}: shards are counted from 1, the first of 8 is 1/8, the last 8/8.")
        return cls(index, count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, unit: Unit) -> bool:
        return unit.number % self.count == self.index - 1


def prepare(
    sources: Mapping[str, Sequence[Path]],
    root: Path,
    tokenizer_dir: Path,
    destination: Path,
    *,
    splits: Sequence[str] = SPLITS,
    text_column: str | None = None,
    document_separator: str | None = None,
    val_split_fraction: float | None = None,
    eos_token: str | None = None,
    add_bos: bool = False,
    seed: int = 42,
    num_workers: int | None = None,
    shard: Shard | None = None,
    merge: bool = False,
    engine: Engine = "processes",
    overwrite: bool = False,
) -> DatasetRecord | None:
    """Tokenise a corpus into `destination`/train and /val; what an interrupted run has done is not done again.

    Args:
        sources: The files of `train`, and those of `val` where it has its own.
        root: The folder that their names begin below.
        tokenizer_dir: Where the tokenizer's files are.
        destination: Where the chunks, the tokenizer and the record of both go.
        splits: What to make; without `val` nothing is held out.
        text_column: Where the text of a record is; None finds it out.
        document_separator: What stands between the documents of a text file, beside EOS.
        val_split_fraction: Part of `train` to hold out where there are no files for `val`; None takes the smaller of
            5 % and about 100 MB.
        eos_token: The token at the end of a document, where the tokenizer names none.
        add_bos: Put BOS at the start of each document.
        seed: Decides which documents are held out.
        num_workers: Processes; None takes one per core.
        shard: Do only this share of the work, and leave the rest to others.
        merge: Do no work, but finish what the shards have done.
        engine: Where the workers run.
        overwrite: Replace what an earlier preparation left in `destination`.

    Returns:
        The record; None where only a shard was worked on.

    Raises:
        ValueError: Something is wrong with the options, the files or the tokenizer; what is in the destination is not
            from the same preparation; shards are missing.
        SaveError: The disk is full.
    """
    sources = {split: list(files) for split, files in sources.items() if split in splits}
    if "train" not in sources:
        raise ValueError(f"--split {','.join(splits)}: train has to be among them; val is optional.")
    if overwrite and (shard or merge):
        raise ValueError("--overwrite cannot act with --shard or --merge: it would delete what the others have done.")
    if shard and merge:
        raise ValueError("--merge true finishes what all shards have done: run it without --shard, when they are done.")
    begin = time.perf_counter()
    tokenizer = Tokenizer(tokenizer_dir)
    fraction = _val_fraction(sources, splits, val_split_fraction)
    job, options = _plan(
        sources, root, tokenizer, destination, fraction, text_column, document_separator, eos_token, add_bos, seed
    )
    _guard_sources(job)
    if overwrite:
        _remove(destination)
    record = _claim(job, options, tokenizer)
    if record is not None:
        print(f"{destination} is prepared already: {_summary(record)}.")
        return record
    if not merge:
        units = [unit for unit in job.corpus.units if shard is None or shard.holds(unit)]
        if shard is not None:
            _note_shards(job, shard)
        _work(job, units, num_workers, engine)
        if shard is not None:
            print(
                f"Shard {shard} is done: {len(units)} of {len(job.corpus.units)} units. When all are, the same command "
                "with --merge true instead of --shard finishes."
            )
            return None
    record, seconds = _finish(job, options, tokenizer), time.perf_counter() - begin
    size = sum(figures["bytes"] for figures in record.sources.values()) / 1e6
    left_out = ""
    if empty := record.rows_without_text:
        left_out = f" {counted(empty, 'record')} without text {'was' if empty == 1 else 'were'} left out."
    print(f"Prepared {destination}: {_summary(record)}.{left_out} {size:,.1f} MB, {seconds:,.1f} s.")
    return record


def _val_fraction(sources: Mapping[str, Sequence[Path]], splits: Sequence[str], fraction: float | None) -> float:
    """What to hold out of the training files."""
    if "val" not in splits or "val" in sources:
        if fraction is not None:
            why = "the validation text has files of its own" if "val" in sources else "--split leaves val out"
            raise ValueError(f"--val_split_fraction {fraction} cannot act: {why}.")
        return 0.0
    if fraction is not None:
        if not 0 < fraction < 1:
            raise ValueError(f"--val_split_fraction {fraction} is not between 0 and 1. For none, give --split train.")
        return fraction
    total = sum(path.stat().st_size for path in sources["train"])
    return min(VAL_FRACTION, VAL_BYTES / max(1, total))


def _plan(
    sources: Mapping[str, Sequence[Path]],
    root: Path,
    tokenizer: Tokenizer,
    destination: Path,
    fraction: float,
    column: str | None,
    separator: str | None,
    eos_token: str | None,
    add_bos: bool,
    seed: int,
) -> tuple[Job, dict[str, Any]]:
    """All that decides the result, and those of its parts that users choose, for the record."""
    separator = None if separator is None else separator.replace("\\n", "\n").replace("\\t", "\t")
    if separator == "":
        raise ValueError("--document_separator is empty. Leave it out, or give the text between two documents.")
    if add_bos and tokenizer.bos_id is None:
        raise ValueError(f"--add_bos true: the tokenizer in {tokenizer.dir} names no BOS token.")
    eos_id = tokenizer.token_to_id(eos_token) if eos_token else tokenizer.eos_id
    if eos_id is None:
        raise ValueError(
            f"The tokenizer in {tokenizer.dir} names no EOS token, without which documents run into each other. Say "
            "which of its tokens ends a document, for example: --eos_token '<|endoftext|>'."
        )
    eos_text = tokenizer.decode([eos_id], skip_special=False)
    separators = tuple(dict.fromkeys(text for text in (eos_text, separator) if text))
    corpus = plan_corpus(sources, root, val_fraction=fraction or None, column=column, separators=separators)
    options = {
        "text_column": corpus.column,
        "document_separator": separator,
        "val_split_fraction": fraction,
        "add_bos": add_bos,
        "seed": seed,
    }
    facts = {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint(),
        "eos_id": eos_id,
        "spelled": spelled_tokens(tokenizer),
        **options,
        "splits": corpus.splits,
        "files": [[file.name, file.form, file.size, file.changed] for file in corpus.files],
        "units": hashlib.sha256(repr([(unit.split, unit.extents) for unit in corpus.units]).encode()).hexdigest(),
    }
    job = Job(
        corpus=corpus,
        destination=destination,
        tokenizer_dir=tokenizer.dir,
        plan=hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        dtype=token_dtype(tokenizer.vocab_size),
        eos_id=eos_id,
        spelled=spelled_tokens(tokenizer),
        bos_id=tokenizer.bos_id if add_bos else None,
        val_fraction=fraction,
        seed=seed,
    )
    files = hashlib.sha256(json.dumps(facts.pop("files")).encode()).hexdigest()
    return job, {"recorded": options, "named": {**facts, "source files": files}}


# --- the destination -------------------------------------------------------------------------------------------------


def _guard_sources(job: Job) -> None:
    """Nothing that is read may lie where something is written or removed."""
    ours = [(job.destination / name).resolve() for name in (*SPLITS, TOKENIZER_DIR, WORK_DIR)]
    for path in [*(file.path for file in job.corpus.files), job.tokenizer_dir / "tokenizer.json"]:
        if any(path.resolve().is_relative_to(folder) for folder in ours):
            raise ValueError(
                f"--destination_path {job.destination}: {path}, which is read, lies where the result goes. Choose "
                "another destination."
            )


def _remove(destination: Path) -> None:
    for name in (*SPLITS, TOKENIZER_DIR, WORK_DIR):
        shutil.rmtree(destination / name, ignore_errors=True)
    (destination / RECORD_FILE).unlink(missing_ok=True)


def _claim(job: Job, options: dict[str, Any], tokenizer: Tokenizer) -> DatasetRecord | None:
    """Make the destination ours. The record where all is done already.

    Raises:
        ValueError: Something else is there.
    """
    plan = {"plan": job.plan, "facts": options["named"]}
    if not job.work_dir.is_dir():
        record = DatasetRecord.read(job.destination)
        if record is not None:
            differing = _differing(_record(job, options, tokenizer, [], record.splits), record)
            if not differing:
                return record
            raise ValueError(_occupied(job, f"another preparation ({', '.join(differing)} differ)"))
        there = [name for name in (*SPLITS, TOKENIZER_DIR) if (job.destination / name).exists()]
        if there:
            raise ValueError(_occupied(job, f"{' and '.join(there)} from something else"))
        _check_space(job)
    found = _read_plan(job)
    if found is None:
        with atomic_file(job.work_dir / PLAN_FILE) as temporary:
            temporary.write_text(json.dumps(plan), encoding="utf-8")
        found = _read_plan(job)  # another shard may have been quicker
    if found is None or found["plan"] != job.plan:
        facts = {} if found is None else found["facts"]
        differing = [name for name, value in options["named"].items() if facts.get(name) != value]
        raise ValueError(_occupied(job, f"an unfinished preparation ({', '.join(differing) or 'all'} differ)"))
    return None


def _read_plan(job: Job) -> dict[str, Any] | None:
    try:
        return json.loads((job.work_dir / PLAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _occupied(job: Job, what: str) -> str:
    return (
        f"--destination_path {job.destination} holds {what}. Choose another one, or replace it with --overwrite true."
    )


def _differing(ours: DatasetRecord, theirs: DatasetRecord) -> list[str]:
    """What two preparations do not have in common."""
    names = [n for n in ("tokenizer", "vocab_size", "eos_id", "dtype", "sources") if vars(ours)[n] != vars(theirs)[n]]
    keys = ours.options.keys() | theirs.options.keys()
    return names + sorted(key for key in keys if ours.options.get(key) != theirs.options.get(key))


def _check_space(job: Job) -> None:
    """Refuses what has no chance to fit: a token stands for hardly more than 5 bytes of text on average."""
    job.destination.mkdir(parents=True, exist_ok=True)
    text = sum(file.size * (EXPANSION if file.compression else 1) for file in job.corpus.files)
    needed, free = text * job.dtype.itemsize // 5, shutil.disk_usage(job.destination).free
    if needed > free:
        raise ValueError(
            f"--destination_path {job.destination}: about {needed / 1e9:,.1f} GB are needed, and {free / 1e9:,.1f} GB "
            "are free there. Free some space, or choose another destination."
        )


def _note_shards(job: Job, shard: Shard) -> None:
    """So that whoever merges can say which are missing."""
    with atomic_file(job.work_dir / SHARDS_FILE) as temporary:
        temporary.write_text(json.dumps(shard.count), encoding="utf-8")


# --- the work --------------------------------------------------------------------------------------------------------


def _work(job: Job, units: Sequence[Unit], num_workers: int | None, engine: Engine) -> None:
    """Do what is not done yet."""
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"--num_workers {num_workers}: at least one process is needed.")
    left = [unit for unit in units if read_result(job, unit) is None]
    total, done = sum(unit.size for unit in units), sum(unit.size for unit in units) - sum(unit.size for unit in left)
    if done:
        print(f"Going on where it stopped: {len(units) - len(left)} of {len(units)} units are done.")
    bar = tqdm(
        total=total,
        initial=done,
        desc="Tokenising",
        unit="B",
        unit_scale=True,
        disable=None,
        smoothing=0.05,
        leave=True,
    )
    with bar:
        _runner(engine, num_workers)(job, left, bar.update)


def _runner(engine: Engine, num_workers: int | None) -> Callable[[Job, Sequence[Unit], Report], None]:
    if engine == "ray":
        from litgpt.data.ray_units import run_on_ray

        return lambda job, units, report: run_on_ray(job, units, report, num_workers)
    from litgpt.data.unit_processes import run_in_processes

    return lambda job, units, report: run_in_processes(job, units, report, num_workers)


# --- the end ---------------------------------------------------------------------------------------------------------


def _finish(job: Job, options: dict[str, Any], tokenizer: Tokenizer) -> DatasetRecord:
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
    record = _record(job, options, tokenizer, results, splits)
    record.write(job.destination)
    for split in reversed(chunks):
        write_index(job.destination / split, chunks[split], job.dtype)
    shutil.rmtree(job.work_dir, ignore_errors=True)
    return record


def _made(job: Job) -> list[str]:
    """The splits that come of the corpus."""
    return [split for split in SPLITS if split in job.corpus.splits or (split == "val" and job.val_fraction)]


def _record(
    job: Job,
    options: dict[str, Any],
    tokenizer: Tokenizer,
    results: Sequence[UnitResult],
    splits: dict[str, SplitRecord],
) -> DatasetRecord:
    return DatasetRecord(
        tokenizer=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eos_id=job.eos_id,
        dtype=job.dtype.name,
        sources=job.corpus.splits,
        options=options["recorded"],
        rows_without_text=sum(result.without_text for result in results),
        splits=splits,
    )


def _all_results(job: Job) -> list[UnitResult]:
    results = [read_result(job, unit) for unit in job.corpus.units]
    missing = [number for number, result in enumerate(results) if result is None]
    if not missing:
        return results
    try:
        count = int(json.loads((job.work_dir / SHARDS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        count = 0
    shards = sorted({number % count + 1 for number in missing}) if count else []
    named = ", ".join(f"{shard}/{count}" for shard in shards[:20]) + (", ..." if len(shards) > 20 else "")
    which = f" They are those of --shard {named}." if shards else ""
    raise ValueError(
        f"--merge true: {len(missing)} of {len(results)} units of {job.destination} are not done.{which} Run these, "
        "or the same command without --shard and --merge, which does what is missing."
    )


def _check_documents(job: Job, results: Sequence[UnitResult]) -> None:
    records, without = (sum(getattr(result, name) for result in results) for name in ("records", "without_text"))
    if without and without == records:
        raise ValueError(
            f"The column {job.corpus.column!r} is empty in all {records:,} records. Name another with --text_column."
        )
    for split in _made(job):
        if not sum(result.documents[split] for result in results):
            held = split == "val" and job.val_fraction
            remedy = (
                f"Give a larger --val_split_fraction than {job.val_fraction:g}, or --split train."
                if held
                else "Look at its files."
            )
            raise ValueError(f"There is no document for {split} among {records:,}. {remedy}")


def _make_chunks(job: Job, split: str, results: Sequence[UnitResult]) -> list[ChunkInfo]:
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


def _concatenate(job: Job, group: Sequence[ChunkInfo], path: Path) -> ChunkInfo:
    files = [(job.work_dir / part.filename, part) for part in group]
    lengths = np.concatenate([np.diff(document_offsets(file, part, job.dtype)) for file, part in files])
    return write_chunk_bytes(path, lengths * job.dtype.itemsize, _bodies(files), job.dtype)


def _bodies(files: Sequence[tuple[Path, ChunkInfo]]) -> Iterator[bytes]:
    for path, part in files:
        with open(path, "rb") as file:
            file.seek(header_bytes(part.num_documents))
            while block := file.read(1 << 22):
                yield block


def _summary(record: DatasetRecord) -> str:
    return ", ".join(
        f"{name} {counted(split.tokens, 'token')} of {counted(split.documents, 'document')} in "
        f"{counted(split.chunks, 'chunk')}"
        for name, split in record.splits.items()
    )
