"""The plan of a data set's preparation, and the directory that it claims."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt.checkpoint.atomic import atomic_file
from litgpt.data.corpus import EXPANSION, plan_corpus
from litgpt.data.dataset_record import FORMAT, RECORD_FILE, TOKENIZER_DIR, DatasetRecord, SplitRecord
from litgpt.data.text_reading import spelled_tokens
from litgpt.data.token_chunks import (
    token_dtype,
)
from litgpt.data.unit_tokens import WORK_DIR, UnitJob, UnitResult
from litgpt.tokenizer.tokenizer import Tokenizer

PLAN_FILE = "plan.json"
SHARDS_FILE = "shards.json"
SPLITS = ("train", "val")


def make_plan(
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
) -> tuple[UnitJob, dict[str, Any]]:
    """All that decides the result, and those of its parts that users choose, for the record."""
    separator = None if separator is None else separator.replace("\\n", "\n").replace("\\t", "\t")
    if separator == "":
        raise ValueError("`document_separator` is empty. Leave it out, or give the text between two documents.")
    if add_bos and tokenizer.bos_id is None:
        raise ValueError(f"add_bos=true: the tokenizer in {tokenizer.dir} names no BOS token.")
    eos_id = tokenizer.token_to_id(eos_token) if eos_token else tokenizer.eos_id
    if eos_id is None:
        raise ValueError(
            f"The tokenizer in {tokenizer.dir} names no EOS token, without which documents run into each other. Say "
            "which of its tokens ends a document, for example: eos_token='<|endoftext|>'."
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
    job = UnitJob(
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


def guard_sources(job: UnitJob) -> None:
    """Nothing that is read may lie where something is written or removed."""
    ours = [(job.destination / name).resolve() for name in (*SPLITS, TOKENIZER_DIR, WORK_DIR)]
    for path in [*(file.path for file in job.corpus.files), job.tokenizer_dir / "tokenizer.json"]:
        if any(path.resolve().is_relative_to(folder) for folder in ours):
            raise ValueError(
                f"destination_path={job.destination}: {path}, which is read, lies where the result goes. Choose "
                "another destination."
            )


def remove_work(destination: Path) -> None:
    for name in (*SPLITS, TOKENIZER_DIR, WORK_DIR):
        shutil.rmtree(destination / name, ignore_errors=True)
    (destination / RECORD_FILE).unlink(missing_ok=True)


def claim(job: UnitJob, options: dict[str, Any], tokenizer: Tokenizer) -> DatasetRecord | None:
    """Make the destination ours. The record where all is done already.

    Raises:
        ValueError: Something else is there.
    """
    plan = {"plan": job.plan, "facts": options["named"]}
    if not job.work_dir.is_dir():
        record = DatasetRecord.read(job.destination)
        if record is not None:
            differing = _differing(record_of(job, options, tokenizer, [], record.splits), record)
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


def _read_plan(job: UnitJob) -> dict[str, Any] | None:
    try:
        return json.loads((job.work_dir / PLAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _occupied(job: UnitJob, what: str) -> str:
    return f"destination_path={job.destination} holds {what}. Choose another one, or replace it with overwrite=true."


def _differing(ours: DatasetRecord, theirs: DatasetRecord) -> list[str]:
    """What two preparations do not have in common."""
    names = [n for n in ("tokenizer", "vocab_size", "eos_id", "dtype", "sources") if vars(ours)[n] != vars(theirs)[n]]
    keys = ours.options.keys() | theirs.options.keys()
    return names + sorted(key for key in keys if ours.options.get(key) != theirs.options.get(key))


def _check_space(job: UnitJob) -> None:
    """Refuses what has no chance to fit: a token stands for hardly more than 5 bytes of text on average."""
    job.destination.mkdir(parents=True, exist_ok=True)
    text = sum(file.size * (EXPANSION if file.compression else 1) for file in job.corpus.files)
    needed, free = text * job.dtype.itemsize // 5, shutil.disk_usage(job.destination).free
    if needed > free:
        raise ValueError(
            f"destination_path={job.destination}: about {needed / 1e9:,.1f} GB are needed, and {free / 1e9:,.1f} GB "
            "are free there. Free some space, or choose another destination."
        )


def record_of(
    job: UnitJob,
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
