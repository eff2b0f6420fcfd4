"""Units worked on by a Ray cluster (Ray Data), whose machines have a file system in common."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from litgpt.data.corpus import Unit
from litgpt.data.source_files import Report
from litgpt.data.unit_tokens import UnitJob, prepare_unit
from litgpt.data.word_cache import WordCache
from litgpt.tokenizer.tokenizer import Tokenizer


def require_ray() -> None:
    """Raises ValueError where Ray is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError(f"engine=ray needs Ray Data ({error}): pip install 'litgpt[ray]'.") from None


def run_on_ray(job: UnitJob, units: Sequence[Unit], report: Report, num_workers: int | None) -> None:
    """As `run_in_processes`, on the cluster that RAY_ADDRESS names, else on one started on this machine."""
    require_ray()
    import ray
    import ray.data

    if not units:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs what is raised, too
    ray.data.DataContext.get_current().enable_progress_bars = False
    job = _with_absolute_paths(job)
    rows = [{"place": place} for place in range(len(units))]
    work = partial(_do, ray.put((job, list(units))))
    results = ray.data.from_items(rows, override_num_blocks=len(units)).map(work, num_cpus=1, concurrency=num_workers)
    for row in results.iter_rows():
        if row["error"]:
            raise ValueError(row["error"])
        report(int(row["size"]))


def _with_absolute_paths(job: UnitJob) -> UnitJob:
    """A worker's current directory is another one."""
    files = tuple(replace(file, path=file.path.absolute()) for file in job.corpus.files)
    return replace(
        job,
        corpus=replace(job.corpus, files=files),
        destination=job.destination.absolute(),
        tokenizer_dir=job.tokenizer_dir.absolute(),
    )


def _do(reference: Any, row: dict[str, int]) -> dict[str, Any]:
    import ray

    job, units = ray.get(reference)
    unit = units[row["place"]]
    try:
        prepare_unit(job, unit, _words(job.tokenizer_dir), lambda size: None)
    except (ValueError, OSError) as error:  # raised here, it would come wrapped in several layers of Ray
        return {"size": 0, "error": str(error)}
    return {"size": unit.size, "error": ""}


@lru_cache(maxsize=1)
def _words(directory: Path) -> WordCache:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a task for each core already
    return WordCache(Tokenizer(directory))
