"""Several processes of one run, as a user starts them: one message for one error, a lost rank is called that, and
whoever is waited for is named."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from litgpt.parallel import launcher
from litgpt.parallel.fabric import describe_devices
from tests.training.conftest import SHAPE, TEXT
from tests.training.two_ranks import free_port

ROOT = Path(__file__).parents[2]
SHAPE_OPTIONS = [f"--model_config.{name}={value}" for name, value in SHAPE.items()]


class Started:
    """A command of `python -m litgpt`, and what it has printed so far."""

    def __init__(self, place: Path, *options: object, **environment: str) -> None:
        text = place / "text.txt"
        text.write_bytes(TEXT.read_bytes()[:20_000])
        command = [sys.executable, "-m", "litgpt", "pretrain", "tiny", *SHAPE_OPTIONS, "--out_dir", place / "out"]
        command += ["--data", "TextFiles", "--data.train_data_path", text, "--data.num_workers", 0]
        command += ["--tokenizer_vocab_size", 300, "--train.global_batch_size", 8, "--train.micro_batch_size", 2]
        command += ["--logger_name", "csv", *options]
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LITGPT_CACHE_DIR": str(place / "cache")}
        kept = {
            k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
        }
        self.process = subprocess.Popen(
            list(map(str, command)),
            env={**kept, **variables, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=lambda: self.lines.extend(self.process.stdout))
        self._reader.daemon = True
        self._reader.start()

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """The first line with it."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in list(self.lines):
                if re.search(pattern, line):
                    return line
            time.sleep(0.05)
        raise AssertionError(f"no {pattern!r} in:\n{''.join(self.lines)}")

    def children(self) -> list[int]:
        """The processes that it has started."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in found]

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """Its exit code and all that it printed."""
        code = self.process.wait(seconds)
        self._reader.join(seconds)  # until the last process that writes there is gone
        assert not self._reader.is_alive()
        return code, "".join(self.lines)


@pytest.fixture
def start(tmp_path):
    running = []

    def run(*options: object, **environment: str) -> Started:
        running.append(Started(tmp_path, *options, **environment))
        return running[-1]

    yield run
    for started in running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.process.pid, signal.SIGKILL)


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")


def test_one_error_of_several_processes_is_one_message(start):
    started = start("--devices", 2, "--train.epochs", 1, "--data.val_split_fraction", 0, "--eval.patience", 2)
    code, printed = started.end(180)
    assert code == 1
    assert printed.count("error: --eval.patience 2: there is no validation data.") == 1
    assert printed.count("error:") == 1
    assert "Traceback" not in printed
    assert "lost" not in printed


@needs_proc
def test_a_rank_that_was_killed_is_called_lost(start):
    started = start("--devices", 2, "--train.max_steps", 1_000_000)
    started.wait_for("step 3 ")
    (child,) = started.children()
    os.kill(child, signal.SIGKILL)
    code, printed = started.end()
    assert code == 1
    assert re.findall("^error: .*", printed, re.MULTILINE) == [
        line
        for line in printed.splitlines()
        if line.startswith(f"error: Rank 1 of 2 (process {child}) was lost: SIGKILL")
    ]
    assert "--resume auto" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("code", "kills", "said"),
    [
        (-signal.SIGKILL, 1, "SIGKILL ended it, since the machine has run out of memory."),
        (-signal.SIGKILL, 0, "SIGKILL ended it (the system does so where memory runs out; `dmesg` would say it)."),
        (-signal.SIGSEGV, 0, "SIGSEGV ended it."),
        (3, 0, "it ended with exit code 3."),
        (130, 0, None),
        (0, 0, None),
        (None, 0, None),
    ],
)
def test_how_a_rank_was_lost_is_said(monkeypatch, code, kills, said):
    monkeypatch.setattr(launcher, "_out_of_memory_kills", lambda: 5)
    ranks = launcher.RankTopology(4, 0, 2, 6, started_here=True)
    ranks.children = {5: SimpleNamespace(poll=lambda: code, pid=77)}
    monkeypatch.setattr(launcher, "_out_of_memory_kills", lambda: 5 + kills)
    lost = ranks._lost()
    assert (lost or "").startswith(f"Rank 5 of 6 (process 77) was lost: {said} " if said else "")
    assert (lost is None) == (said is None)
    ranks.folder.rmdir()


@pytest.mark.slow
@needs_proc
def test_the_others_end_where_the_first_rank_was_killed(start):
    started = start("--devices", 2, "--train.max_steps", 1_000_000)
    started.wait_for("step 3 ")
    started.process.kill()
    code, printed = started.end()
    assert code == -signal.SIGKILL
    assert printed.count(f"error: Rank 0 of 2 (process {started.process.pid}) was lost: it ended without a word") == 1
    assert "Traceback" not in printed


def test_nodes_that_do_not_come_are_named_and_ctrl_c_ends_the_wait(start):
    started = start("--devices", 1, "--num_nodes", 2, "--train.max_steps", 1, MASTER_PORT="29511")
    line = started.wait_for("waits for rank")
    assert (
        "Rank 0 of 2 waits for rank 1, at 127.0.0.1:29511 (MASTER_ADDR and MASTER_PORT), for up to 10 minutes." in line
    )
    assert "--num_nodes 2 needs the same command on each of 2 machines" in line
    started.process.send_signal(signal.SIGINT)
    code, printed = started.end(20)
    assert code == 130
    assert printed.endswith("\nInterrupted.\n")


@pytest.mark.slow
def test_two_nodes_meet(tmp_path):
    """By hand: the second waits for the first, and then both train."""
    port = str(free_port())
    places = [tmp_path / name for name in ("first", "second")]
    nodes = []
    for rank, place in reversed(list(enumerate(places))):
        place.mkdir()
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": str(rank)}
        nodes.append(Started(place, "--devices", 1, "--num_nodes", 2, "--train.max_steps", 2, **variables))
        if rank:
            nodes[-1].wait_for("Rank 1 of 2 waits for rank 0, at 127.0.0.1")
            assert not launcher._is_open("127.0.0.1", int(port))
    for node in nodes:
        assert node.end(120)[0] == 0, node.lines
    assert "2 x CPU process" in "".join(nodes[1].lines)


def test_more_processes_than_cores_are_said(monkeypatch):
    strategy = SimpleNamespace(parallel_devices=[0] * 8, precision=SimpleNamespace(precision="32-true"))
    fabric = SimpleNamespace(device=torch.device("cpu"), strategy=strategy, world_size=8)
    monkeypatch.setattr("litgpt.parallel.fabric.usable_cores", lambda: 2)
    described = describe_devices(fabric)
    assert "Note: 8 processes share 2 CPU core(s) here" in described
    assert "than --devices 2 or fewer" in described
    monkeypatch.setattr("litgpt.parallel.fabric.usable_cores", lambda: 8)
    assert "Note" not in describe_devices(fabric)
