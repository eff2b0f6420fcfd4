"""Units worked on by processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, NamedTuple

from litgpt.data.corpus import Unit
from litgpt.data.source_files import Report
from litgpt.data.unit_tokens import UnitJob, prepare_unit
from litgpt.data.word_cache import WordCache
from litgpt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized


def run_in_processes(job: UnitJob, units: Sequence[Unit], report: Report, num_workers: int | None) -> None:
    """Work on `units`.

    Args:
        job: What they belong to.
        units: What to do.
        report: Told the bytes read.
        num_workers: Processes; None takes one per core. One works in this process.

    Raises:
        ValueError, SaveError: What `prepare_unit` raised; the first error ends all work.
    """
    workers = min(num_workers or cores(), len(units))
    if workers <= 1:
        if not units:
            return
        words = WordCache(Tokenizer(job.tokenizer_dir))
        for unit in units:
            prepare_unit(job, unit, words, report)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of the tokenizers library
    counter = context.Value("q", 0)
    seen = 0
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(job, counter))
    try:
        pending = {pool.submit(_do, unit) for unit in units}
        while pending:
            finished, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                future.result()
            report(counter.value - seen)
            seen = counter.value
        pool.shutdown()
    except BaseException as error:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()  # what it has not finished is a hidden file that does not count
        for process in processes:
            process.join()
        if isinstance(error, BrokenProcessPool):
            raise ValueError(
                "A worker process was ended from outside, most often because the memory is full. Run the same command "
                f"with fewer than num_workers={workers}; it goes on where it stopped."
            ) from None
        raise


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _UnitState(NamedTuple):
    """What a process works with."""

    job: UnitJob
    counter: Synchronized[int]
    """Bytes that all processes have read"""
    words: WordCache


_state: _UnitState  # in a process of the pool


def _begin(job: UnitJob, counter: Synchronized[int]) -> None:
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
    _state = _UnitState(job, counter, WordCache(Tokenizer(job.tokenizer_dir)))


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # only a worker calls this
    parent.join()
    os._exit(1)


def _do(unit: Unit) -> None:
    def report(size: int) -> None:
        with _state.counter.get_lock():
            _state.counter.value += size

    prepare_unit(_state.job, unit, _state.words, report)
