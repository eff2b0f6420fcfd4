"""Pretraining data out of a corpus: everything is tokenised once, into chunks that training streams.

The corpus is cut into units of work (`corpus`). Whoever works on one, a process, another machine or Ray, writes files
of its own for it (`unit_tokens`). When all units are done, their files, in the units' order, become the chunks, small
ones put together. So the result depends neither on who did what nor on how often the work was interrupted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from litgpt.checkpoint.atomic import atomic_file
from litgpt.cli.plural import counted
from litgpt.data.corpus import Unit
from litgpt.data.dataset_record import DatasetRecord
from litgpt.data.preparation_end import finish
from litgpt.data.preparation_plan import SHARDS_FILE, SPLITS, claim, guard_sources, make_plan, remove_work
from litgpt.data.source_files import Report
from litgpt.data.unit_tokens import UnitJob, read_result
from litgpt.tokenizer.tokenizer import Tokenizer

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
                    "shard=slurm: this is not a task of a SLURM array (SLURM_ARRAY_TASK_ID, _MIN and _COUNT are not "
                    "set). Submit it with `sbatch --array=1-8`, or give shard=I/N."
                ) from None
            index = (task - first) // step + 1
        else:
            parts = text.split("/")
            if len(parts) != 2 or not all(part.isdecimal() and len(part) < 8 for part in parts):
                raise ValueError(f"shard={text}: I/N is expected, such as 1/8 for the first of 8, or slurm.")
            index, count = map(int, parts)
        if not 1 <= index <= count:
            raise ValueError(f"shard={text}: shards are counted from 1, the first of 8 is 1/8, the last 8/8.")
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
        document_separator: What stands between the documents of a text file, besides EOS.
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
        raise ValueError(f"split={','.join(splits)}: train has to be among them; val is optional.")
    if overwrite and (shard or merge):
        raise ValueError(
            "`overwrite` cannot be combined with `shard` or `merge`: it would delete what the others have done."
        )
    if shard and merge:
        raise ValueError("merge=true finishes what all shards have done: run it without `shard`, when they are done.")
    begin = time.perf_counter()
    tokenizer = Tokenizer(tokenizer_dir)
    fraction = _val_fraction(sources, splits, val_split_fraction)
    job, options = make_plan(
        sources, root, tokenizer, destination, fraction, text_column, document_separator, eos_token, add_bos, seed
    )
    guard_sources(job)
    if overwrite:
        remove_work(destination)
    record = claim(job, options, tokenizer)
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
    record, seconds = finish(job, options, tokenizer), time.perf_counter() - begin
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
            why = "the validation text has files of its own" if "val" in sources else "`split` leaves val out"
            raise ValueError(f"val_split_fraction={fraction} has no effect here: {why}.")
        return 0.0
    if fraction is not None:
        if not 0 < fraction < 1:
            raise ValueError(f"val_split_fraction={fraction} is not between 0 and 1. For none, give split=train.")
        return fraction
    total = sum(path.stat().st_size for path in sources["train"])
    return min(VAL_FRACTION, VAL_BYTES / max(1, total))


def _note_shards(job: UnitJob, shard: Shard) -> None:
    """So that whoever merges can say which are missing."""
    with atomic_file(job.work_dir / SHARDS_FILE) as temporary:
        temporary.write_text(json.dumps(shard.count), encoding="utf-8")


def _work(job: UnitJob, units: Sequence[Unit], num_workers: int | None, engine: Engine) -> None:
    """Do what is not done yet."""
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers={num_workers}: at least one process is needed.")
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


def _runner(engine: Engine, num_workers: int | None) -> Callable[[UnitJob, Sequence[Unit], Report], None]:
    if engine == "ray":
        from litgpt.data.ray_units import run_on_ray

        return lambda job, units, report: run_on_ray(job, units, report, num_workers)
    from litgpt.data.unit_processes import run_in_processes

    return lambda job, units, report: run_in_processes(job, units, report, num_workers)


def _summary(record: DatasetRecord) -> str:
    return ", ".join(
        f"{name} {counted(split.tokens, 'token')} of {counted(split.documents, 'document')} in "
        f"{counted(split.chunks, 'chunk')}"
        for name, split in record.splits.items()
    )
