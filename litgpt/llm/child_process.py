"""A process of our own that has a model, or a part of one, and exchanges lines of JSON with this one."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, TypedDict

PATIENCE = 10  # seconds that a process has to end after it was told to


class ModelPart(TypedDict):
    """How a rank loads its part of a model."""

    checkpoint: str
    dtype: str
    quantize: str | None
    kv_cache: str | None


class RankJob(ModelPart):
    """What a rank other than the first does, and where."""

    rank: int
    count: int
    device: str
    folder: str
    """In which the ranks meet"""
    threads: int


class ReplicaJob(TypedDict):
    """How a process loads a copy of a model, and what it answers with."""

    checkpoint: str
    device: str
    precision: str
    quantize: str | None
    kv_cache: str | None
    max_slots: int
    threads: int


class ChildProcess:
    """Runs a module in a process of its own, which knows nothing of the script or notebook here.

    It gets lines of JSON on its standard input, the first being its job, null the last. That input ends when this
    process does, however it ends, and it ends then.

    Args:
        module: What it runs, as `python -m`.
        job: What it is to do, a `RankJob` or `ReplicaJob`.
        name: Of the thread here that reads what it says.
        threads: How many it computes with.
    """

    def __init__(self, module: str, job: Mapping[str, object], *, name: str, threads: int) -> None:
        self.is_over = False  # it was told to end
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C is for this process, which tells the others
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._input, self._output = self.process.stdin, self.process.stdout
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)
        self._reader.start()
        self.write(job)

    def received(self, message: dict[str, Any]) -> None:
        """Called in a thread of its own with each line that the process writes."""
        raise NotImplementedError

    def gone(self, how: str) -> None:
        """Called in that thread where the process ends that nobody told to."""
        raise NotImplementedError

    def write(self, what: object) -> None:
        """Sends a line."""
        try:
            self._input.write(json.dumps(what).encode() + b"\n")
            self._input.flush()
        except OSError:
            if not self.is_over:
                self.expect_end(PATIENCE)

    def expect_end(self, seconds: float) -> None:
        """Waits for what is read from a process that has ended or is about to."""
        self._reader.join(seconds)

    def end(self) -> None:
        """Tells it to end."""
        self.is_over = True
        self.write(None)
        with contextlib.suppress(OSError):  # it is gone already
            self._input.close()

    def wait(self) -> None:
        """Waits until it has ended, and makes it end if need be."""
        try:
            self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        for line in self._output:
            self.received(json.loads(line))
        code = self.process.wait()
        if not self.is_over:
            self.gone(f"it was killed by signal {-code}" if code < 0 else f"it ended with exit code {code}")
