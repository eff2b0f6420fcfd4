"""A model in several processes, each of which has all of it: they share the requests."""

from __future__ import annotations

import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from litgpt.cli.secret import Secret
from litgpt.devices.accelerator import chosen_devices
from litgpt.devices.precision import inference_precision
from litgpt.generation.interface import MAX_SLOTS
from litgpt.generation.request import Output, Request, TokenLogprob
from litgpt.generation.worker import Deliver, Ticket
from litgpt.llm.child_process import ChildProcess, ReplicaJob
from litgpt.llm.llm import LLM
from litgpt.llm.loading import LoadOptions, load_parts
from litgpt.llm.placement import Placement, named_device

Taken = TypeVar("Taken")
AHEAD = 2  # times the slots: this many requests a process has at a time


class ReplicaLost(ChildProcessError):
    """A process that has a copy of the model is gone."""


class Replicas:
    """A model here, and copies of it in other processes. As a context, ends these at its end.

    Args:
        checkpoint: What the user named.
        devices: Where the copies are, this process's first.
        max_slots: How many requests each runs at a time; None leaves it to the engine.
        precision: As for `LLM.load`; by default what the device is best at.
        quantize, kv_cache, access_token: As for `LLM.load`.

    Attributes:
        llm: The model here.
        precision: In which all compute.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        devices: Sequence[torch.device],
        *,
        max_slots: int | None = None,
        precision: str | None = None,
        quantize: str | None = None,
        kv_cache: str | None = None,
        access_token: Secret | str | None = None,
    ) -> None:
        self.count, self.max_slots = len(devices), max_slots or MAX_SLOTS
        self.precision = precision or inference_precision(devices[0])
        self._threads = torch.get_num_threads()
        self._others: list[_Replica] = []
        threads = self._threads
        if devices[0].type == "cpu" and self.count > 1:
            threads = max(1, threads // self.count)
            torch.set_num_threads(threads)
        options = LoadOptions(self.precision, quantize, access_token=access_token, kv_cache=kv_cache)
        placement = Placement([devices[0]])
        try:
            # First here: what is wrong with the checkpoint is said once, and a download is made once.
            self.llm = LLM(load_parts(checkpoint, options, placement=placement, max_slots=self.max_slots))
            for device in devices[1:]:
                job: ReplicaJob = {
                    "checkpoint": str(checkpoint),
                    "device": str(device),
                    "precision": self.precision,
                    "quantize": quantize,
                    "kv_cache": kv_cache,
                    "max_slots": self.max_slots,
                    "threads": threads,
                }
                self._others.append(_Replica(job, len(self._others) + 1))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Replicas:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, requests: Sequence[Request], take: Callable[[int, Output], tuple[Taken, bool]]) -> Iterator[Taken]:
        """Answers some requests; as `LiveEngine.run`. Neighbours go to the same process, which reads what they share
        once; one that is quick gets more of them.

        Raises:
            ReplicaLost: A process is gone.
        """
        if not self._others:
            yield from self.llm.live.run(requests, take)
            return
        for request in requests:
            self.llm.worker.engine.check(request)
        left = deque(enumerate(requests))
        outputs: queue.SimpleQueue[tuple[int, Output | Exception]] = queue.SimpleQueue()
        submits = [self.llm.worker.submit, *(other.submit for other in self._others)]
        running: dict[int, tuple[int, Ticket | _Ticket]] = {}  # by the index of the request: who has it
        has = [0] * len(submits)

        def dispatch(who: int) -> None:
            if has[who] > (AHEAD - 1) * self.max_slots:
                return
            for _ in range(min(self.max_slots, len(left))):
                index, request = left.popleft()
                ticket = submits[who](request, lambda output, index=index: outputs.put((index, output)))
                running[index] = who, ticket
                has[who] += 1

        try:
            for _ in range(AHEAD):
                for who in range(len(submits)):
                    dispatch(who)
            while running:
                index, output = outputs.get()
                if isinstance(output, Exception):
                    raise output
                if index not in running:
                    continue  # came before its process knew that it had been enough
                piece, is_enough = take(index, output)
                if output.finish_reason is not None or is_enough:
                    who, ticket = running.pop(index)
                    has[who] -= 1
                    if output.finish_reason is None:
                        ticket.cancel()
                    dispatch(who)
                yield piece
        finally:
            for _, ticket in running.values():
                ticket.cancel()

    def close(self) -> None:
        """Ends the other processes."""
        for other in self._others:
            other.end()
        for other in self._others:
            other.wait()
        self._others.clear()
        torch.set_num_threads(self._threads)


class _Ticket:
    """A request that another process has."""

    def __init__(self, replica: _Replica, number: int) -> None:
        self.replica, self.number = replica, number

    def cancel(self) -> None:
        self.replica.deliveries.pop(self.number, None)
        self.replica.write({"cancel": self.number})


class _Replica(ChildProcess):
    """A copy of the model in a process of its own (`litgpt.llm.replica`)."""

    def __init__(self, job: ReplicaJob, number: int) -> None:
        self.number, self._reason = number, ""
        self.failure: ReplicaLost | None = None
        self.deliveries: dict[int, Deliver] = {}
        self._submitted = 0
        super().__init__("litgpt.llm.replica", job, name=f"litgpt-replica-{number}", threads=job["threads"])

    def submit(self, request: Request, deliver: Deliver) -> _Ticket:
        if self.failure is not None:
            raise self.failure
        self._submitted += 1
        self.deliveries[self._submitted] = deliver
        self.write({"submit": self._submitted, "request": asdict(request)})
        return _Ticket(self, self._submitted)

    def received(self, message: dict[str, Any]) -> None:
        if "error" in message:
            self._reason = message["error"]
            return
        for name in ("logprobs", "prompt_logprobs"):
            message[name] = [TokenLogprob(*value) for value in message[name]]
        output = Output(**message)
        finished = output.finish_reason is not None
        deliver = self.deliveries.pop(output.request, None) if finished else self.deliveries.get(output.request)
        if deliver is not None:
            deliver(output)

    def gone(self, how: str) -> None:
        self.failure = ReplicaLost(
            f"Process {self.number}, which has a copy of the model, is gone: {self._reason or how}."
        )
        for deliver in list(self.deliveries.values()):
            deliver(self.failure)


def replica_devices(devices: int | str = 1, device: str | None = None) -> list[torch.device]:
    """Where the copies of a model go.

    Args:
        devices: How many, or their numbers as 0,2; auto takes all. On a CPU, the number of processes.
        device: cpu, cuda, mps or one such as cuda:1; by default the best there is.

    Raises:
        ValueError: There is no such device.
    """
    kind, _, number = (device or "auto").partition(":")
    try:
        best = named_device(kind)
    except ValueError:
        raise ValueError(f"device={device}: there is none here. Give cpu, or leave it out for the best.") from None
    if number:
        if str(devices) != "1":
            raise ValueError(f"device={device} names one device, and devices={devices} asks for others. Give one.")
        places = chosen_devices(f"{number},", kind=best.type)
    elif str(devices) == "1":
        places = [best]
    else:
        places = chosen_devices(devices, kind=best.type)
    if len(places) > 1 and best.type == "cpu" and len(places) > (os.cpu_count() or 1):
        raise ValueError(f"devices={devices} is more processes than this machine has cores ({os.cpu_count()}).")
    return places
