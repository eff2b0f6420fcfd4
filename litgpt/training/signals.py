"""Ending a run from outside without losing it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from litgpt.training.console import let_go_of_lost_terminal

# By what the run says that has stopped. SIGHUP comes when a terminal is closed or its connection lost.
STOP_SIGNALS = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C", "SIGHUP": "SIGHUP"}
FINISHING = "finishing this step, then saving a checkpoint. Ctrl-C again stops now, without one."


class StopSignals:
    """Within `with`, SIGTERM (SLURM, docker stop), SIGHUP and Ctrl-C only ask for a stop, which the loop does after its
    step.

    It is answered at once, since a step may take minutes. A second Ctrl-C does not wait for its end. A SIGHUP that is
    ignored, as by nohup, stays so.

    Args:
        answers: Whether this process says so; one of several does.
        then: Told by what the run is asked to stop, at once, so that other ranks hear of it before they begin another
            step.
    """

    def __init__(self, answers: bool = True, then: Callable[[str], None] | None = None) -> None:
        self.answers = answers
        self.then = then
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)):  # not on Windows
                if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        if name == "SIGHUP":
            let_go_of_lost_terminal()
        first, self.received = self.received is None, STOP_SIGNALS[name]
        if self.answers and first and name != "SIGHUP":  # whose terminal is gone
            # Not print: what the signal interrupts may be printing.
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"\n{self.received}: {FINISHING}\n".encode())
        if first and self.then is not None:
            with suppress(RuntimeError):  # another rank is lost: the loop will meet that, too
                self.then(self.received)


def shield_workers(loader: Any) -> None:
    """Has a loader's workers leave these signals to this process, which needs their batches to finish its step.

    A terminal, SLURM and systemd send them to all processes of a run. The workers end when this process ends them, or
    ends.
    """
    if isinstance(loader, DataLoader) and not isinstance(loader.worker_init_fn, ShieldedWorker):
        loader.worker_init_fn = ShieldedWorker(loader.worker_init_fn)


class ShieldedWorker:
    """A `worker_init_fn` that lets a worker ignore what is not its parent's.

    Args:
        then: What else the worker does at its start.
    """

    def __init__(self, then: Callable[[int], None] | None = None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
            # Not ignored altogether: SIGTERM is also how `multiprocessing` ends a worker, which it then waits for. A
            # handler is not told who has sent it; who waits for the signal is.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_end_by_parent, daemon=True).start()
        if self.then is not None:
            self.then(worker)


def _end_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
