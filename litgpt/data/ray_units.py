"""Units worked on by a Ray cluster (Ray Data), whose machines have a file system in common."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from litgpt.checkpoint.atomic import SaveError
from litgpt.data.corpus import Unit
from litgpt.data.source_files import Report
from litgpt.data.unit_tokens import Job, prepare_unit
from litgpt.tokenizer import Tokenizer


def require_ray() -> None:
    """Raises ValueError where Ray is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--engine ray needs Ray Data ({error}): pip install 'litgpt[ray]'.") from None


def run_on_ray(job: Job, units: Sequence[Unit], report: Report, num_workers: int | None) -> None:
    """As `run_in_processes`, on the cluster that RAY_ADDRESS names, else on one started on this machine."""
    require_ray()
    import ray
    import ray.data

    if not units:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    job = _with_absolute_paths(job)
    rows = [{"place": place} for place in range(len(units))]
    work = partial(_do, ray.put((job, list(units))))
    results = ray.data.from_items(rows, override_num_blocks=len(units)).map(work, num_cpus=1, concurrency=num_workers)
    try:
        for row in results.iter_rows():
            report(int(row["size"]))
    except Exception as error:
        raise _own_error(error) from None


def _with_absolute_paths(job: Job) -> Job:
    """A worker's current directory is another one."""
    files = tuple(replace(file, path=file.path.absolute()) for file in job.corpus.files)
    return replace(
        job,
        corpus=replace(job.corpus, files=files),
        destination=job.destination.absolute(),
        tokenizer_dir=job.tokenizer_dir.absolute(),
    )


def _do(reference: Any, row: dict[str, int]) -> dict[str, int]:
    import ray

    job, units = ray.get(reference)
    unit = units[row["place"]]
    prepare_unit(job, unit, _tokenizer(job.tokenizer_dir), lambda size: None)
    return {"size": unit.size}


@lru_cache(maxsize=1)
def _tokenizer(directory: Path) -> Tokenizer:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a task for each core already
    return Tokenizer(directory)


def _own_error(error: BaseException) -> BaseException:
    """What the worker raised, out of what Ray wraps around it."""
    found: BaseException | None = error
    while found is not None:
        cause = getattr(found, "cause", None) or found.__cause__
        if isinstance(cause, ValueError | OSError) and type(cause) in (ValueError, SaveError, FileNotFoundError):
            return cause
        found = cause
    return error
