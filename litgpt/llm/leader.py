"""Rank 0 of a model that is split over processes: it starts the others, tells them what to do, and ends them."""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from litgpt.generation.rank_engine import News, RanksLost
from litgpt.llm.child_process import ChildProcess, ModelPart, RankJob
from litgpt.parallel.process_group import ProcessGroup


class Leader:
    """The other ranks of a model, seen from the first, which is in the process of whoever uses the model.

    They are processes of their own (`litgpt.llm.follower`), which know nothing of the script or notebook here. Each
    gets lines of JSON on its standard input. That ends when this process does, however it ends, and they end then.

    Args:
        devices: Where the ranks are, this one's first.
        part: How to load a rank's part of the model.

    Attributes:
        group: Through which the ranks exchange tensors.
        others: Their processes.
        on_loss: Called, in a thread of its own, where a process ends that nobody told to.
    """

    def __init__(self, devices: Sequence[torch.device], part: ModelPart) -> None:
        self.group = ProcessGroup(0, len(devices), devices[0])
        self._folder = Path(tempfile.mkdtemp(prefix="litgpt-"))
        self.others: list[_RankProcess] = []
        threads = torch.get_num_threads()
        self._end = weakref.finalize(self, _end, self.others, self.group, self._folder, threads, os.getpid())
        if devices[0].type == "cpu":
            threads = max(1, threads // len(devices))
            torch.set_num_threads(threads)
        for rank, device in enumerate(devices[1:], 1):
            job: RankJob = {
                **part,
                "rank": rank,
                "count": len(devices),
                "device": str(device),
                "folder": str(self._folder),
                "threads": threads,
            }
            self.others.append(_RankProcess(job, self.group))

    @property
    def on_loss(self) -> Callable[[RanksLost], None] | None:
        return self.others[0].on_loss

    @on_loss.setter
    def on_loss(self, call: Callable[[RanksLost], None] | None) -> None:
        for process in self.others:
            process.on_loss = call

    def rendezvous(self) -> None:
        """Waits until the others have loaded their parts, and opens the group.

        Raises:
            RanksLost: One of them could not.
        """
        for process in self.others:
            process.wait_until_ready()
        self.group.rendezvous(self._folder)

    def tell(self, news: News) -> None:
        self.check()
        for process in self.others:
            process.write(news)
        self.check()

    def hear(self) -> News | None:
        raise NotImplementedError("Rank 0 hears nothing.")

    def check(self) -> None:
        if not self._end.alive:
            failure = self.others[0].failure or RanksLost("The processes that share this model have been ended.")
            raise failure.with_traceback(None)  # each time it is raised, its traceback would grow
        for process in self.others:
            if process.failure is not None:
                raise process.failure.with_traceback(None)

    def lost(self, error: BaseException) -> RanksLost:
        for process in self.others:  # where one has ended, that is the cause, and perhaps not known yet
            process.expect_end(seconds=2 if isinstance(error, RuntimeError) else 0)
        failure = next((process.failure for process in self.others if process.failure), None)
        cause = f"{type(error).__name__}: {error}".removesuffix(": ")
        failure = failure or RanksLost(f"Rank 0 has lost step with the others ({cause}). Load the model again.")
        for process in self.others:
            process.failure = process.failure or failure
        self.close()
        return failure

    def close(self) -> None:
        """Ends the others."""
        self._end()

    def __reduce__(self) -> NoReturn:
        raise TypeError("A model that is split over several processes cannot be copied. Load it again.")


class _RankProcess(ChildProcess):
    """One of the other ranks. What reads from it holds no leader, so that one who is not used any more can go."""

    def __init__(self, job: RankJob, group: ProcessGroup) -> None:
        self.rank, self.group = job["rank"], group
        self.failure: RanksLost | None = None
        self.on_loss: Callable[[RanksLost], None] | None = None
        self._reason: str | None = None
        self._replies: queue.SimpleQueue[str] = queue.SimpleQueue()
        super().__init__("litgpt.llm.follower", job, name=f"litgpt-rank-{self.rank}", threads=job["threads"])

    def wait_until_ready(self) -> None:
        if self._replies.get() == "gone" and self.failure is not None:
            raise self.failure

    def received(self, message: dict[str, Any]) -> None:
        self._reason = message.get("error")
        if self._reason is None:
            self._replies.put("ready")

    def gone(self, how: str) -> None:
        self.failure = self.failure or RanksLost(
            f"Rank {self.rank}, a process that has a part of the model, is gone: {self._reason or how}. Load the model "
            "again."
        )
        self._replies.put("gone")
        self.group.abort()
        if self.on_loss is not None:
            self.on_loss(self.failure)


def _end(processes: list[_RankProcess], group: ProcessGroup, folder: Path, threads: int, owner: int) -> None:
    if os.getpid() != owner:
        return  # a copy of the process, made by fork, goes
    for process in processes:
        process.end()
    group.abort()
    for process in processes:
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(threads)
