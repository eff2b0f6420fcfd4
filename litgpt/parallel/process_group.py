"""Processes of one machine that exchange tensors, in a group of their own.

Torch's default group stays free for what else runs in the same process, such as a Trainer, and there may be several
such groups. They meet in a folder and, without GPUs, speak through the loopback interface: no other machine can join.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

MEETING = timedelta(seconds=60)  # all have loaded their parts before
EXCHANGE = timedelta(hours=1)  # a process that is gone is noticed at once; this is for one that hangs


class ProcessGroup:
    """One process's end of a group.

    Args:
        rank: Which of the processes this is.
        count: How many there are.
        device: Where the tensors are that this one exchanges: NCCL on CUDA, gloo elsewhere.
    """

    def __init__(self, rank: int, count: int, device: torch.device) -> None:
        self.rank, self.count, self.device = rank, count, device
        self._backend: Any = None
        self._together = False

    def rendezvous(self, folder: Path) -> None:
        """Find the others. Every process calls this, with the same folder, which is empty before.

        Raises:
            RuntimeError: Not all have come in time.
        """
        store = dist.FileStore(str(folder / "meeting"), self.count)
        store.set_timeout(MEETING)
        if self.device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = EXCHANGE
            self._backend = dist.ProcessGroupNCCL(store, self.rank, self.count, nccl)
            return
        gloo: Any = dist.ProcessGroupGloo  # torch's own stub lacks the options, and the argument that takes them
        options = gloo._Options()
        # By default it takes the address of the machine's name, which others might reach and some machines lack.
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = EXCHANGE
        self._backend = gloo(store, self.rank, self.count, options)

    @contextlib.contextmanager
    def together(self) -> Generator[None]:
        """What all processes do at the same time; nothing is exchanged outside of it."""
        self._together = True
        try:
            yield
        finally:
            self._together = False

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of all processes' tensors."""
        self._now().allreduce([tensor]).wait()

    def all_reduce_min(self, number: float) -> float:
        """The minimum of all processes' numbers."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        tensor = torch.tensor([number], dtype=torch.float64, device=self.device)
        self._now().allreduce([tensor], options).wait()
        return tensor.item()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """(..., n) of each process -> (..., n * count), concatenated in the order of their ranks."""
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        self._now().allgather([parts], [tensor]).wait()
        return torch.cat(parts, dim=-1)

    def broadcast(self, tensor: Tensor) -> None:
        """Replace a tensor by rank 0's."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._now().broadcast([tensor], options).wait()

    def abort(self) -> None:
        """Has an exchange fail that waits for a process which is gone. Safe from any thread."""
        if self._backend is not None and self.device.type == "cuda":  # gloo notices by itself
            self._backend.abort()

    def _now(self) -> Any:
        if not self._together:
            raise RuntimeError(
                f"This model is split over {self.count} processes (tensor_parallel), which must all call it: it "
                "answers, but cannot be called directly. Load it again without tensor_parallel for that."
            )
        return self._backend
