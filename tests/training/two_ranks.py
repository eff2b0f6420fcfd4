"""Two processes that train together, without the time that starting them takes.

    python -m tests.training.two_ranks

imports what training needs, once, and then forks two ranks for each program that it is told to run, as a launcher like
torchrun would start them. One line of JSON in, the exit codes out.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[2]


class TwoRanks:
    """Runs programs that train with `devices=2`: two processes, gloo between them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.two_ranks"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, program: Path, *arguments: str) -> tuple[list[int], str]:
        """The exit codes of both ranks, and what they printed."""
        output = program.with_suffix(".txt")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        job = {"argv": [str(program), *arguments], "environment": environment, "output": str(output)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline()), output.read_text()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def serve() -> None:
    """Runs what comes on stdin."""
    import litgpt.commands.finetune_dpo
    import litgpt.commands.finetune_lora
    import litgpt.commands.pretrain  # noqa: F401
    import tests.training.conftest  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        port = free_port()
        ranks = {}
        for rank in (0, 1):
            pid = os.fork()
            if pid == 0:
                become(rank, port, **job)
            ranks[pid] = rank
        codes = [0, 0]
        while ranks:
            pid, status = os.wait()
            codes[ranks.pop(pid)] = code = os.waitstatus_to_exitcode(status)
            if code:  # the other would wait for it
                for pid in ranks:
                    os.kill(pid, signal.SIGKILL)
        print(json.dumps(codes), flush=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def become(rank: int, port: int, argv: list[str], environment: dict[str, str], output: str) -> None:
    """Runs the program as one of the two ranks, and exits."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment, LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    serve()
