"""A real shell in which `litgpt` starts at once: it is forked from a process that has imported torch already.

    with Shell(directory) as shell:
        done = shell.run("litgpt download list | grep SmolLM2", cwd)

The shell is bash, so pipes, `&&`, variables and other programs are real. The word `litgpt` finds a small script that
hands its arguments, directory, environment and three file descriptors to the process, which forks a child for them, and
passes signals on and the exit code back. What follows the arguments is decided by the test (`extra`): `--train.max_steps 2`
behind every `pretrain`, for example.
"""

import atexit
import importlib
import json
import os
import selectors
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

# Imported before the forks, some of which read the environment as they are imported: what the commands of a script set for
# huggingface_hub (HF_HUB_OFFLINE=1 litgpt ...) comes too late; give it to `Shell`.
PRELOADED = (
    "torch",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "jinja2",
    "jsonargparse",
    "lightning_fabric",
    "torch.utils.data",
    "litgpt.commands.pretrain",
    "litgpt.commands.finetune_full",
    "litgpt.commands.finetune_lora",
    "litgpt.commands.finetune_adapter",
    "litgpt.commands.generate",
    "litgpt.commands.chat",
    "litgpt.data",
    "litgpt.hub",
    "huggingface_hub",
    "matplotlib.figure",
    "torch.utils.tensorboard",
)

CLIENT = """\
#!{python} -SE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    job = json.dumps({{"argv": sys.argv, "cwd": os.getcwd(), "environment": dict(os.environ)}}).encode()
    socket.send_fds(server, [b"%16d" % len(job)], [0, 1, 2])
    server.sendall(job)
    answers = server.makefile()
    pid = int(answers.readline())
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: os.kill(pid, number))
    code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class Done(NamedTuple):
    """What a script left: its exit code and the two streams."""

    code: int
    out: str
    err: str


class Shell:
    """Starts the process that commands are forked from, in `directory`, where the script `litgpt` is put, too.

    Args:
        directory: An empty one; its path must be short, as those of sockets are.
        extra: Subcommand -> options that are put behind what was typed.
        environment: Variables of all commands, over those of this process.
    """

    def __init__(
        self,
        directory: Path,
        extra: Mapping[str, Sequence[object]] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        binaries = directory / "bin"
        binaries.mkdir()
        address = str(directory / "socket")
        (binaries / "litgpt").write_text(CLIENT.format(python=sys.executable, address=address))
        (binaries / "litgpt").chmod(0o755)
        path = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
        self.environment["PATH"] = path
        words = {name: [str(word) for word in options] for name, options in (extra or {}).items()}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.shell", address, json.dumps(words)],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C at pytest ends it by close()
        )
        self._process.stdout.readline()

    def __enter__(self) -> "Shell":
        return self

    def __exit__(self, *raised: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._process.stdout.close()

    def run(
        self,
        script: str,
        cwd: Path,
        stdin: str = "",
        timeout: float = 300,
        check: bool = False,
        together: bool = False,
    ) -> Done:
        """Runs a script to its end; a command in it that fails ends it, within a pipe, too.

        Args:
            check: Raise AssertionError, with what it printed, if it fails.
            together: What goes to stderr is in `out`, where it came, as on a terminal.
        """
        done = subprocess.run(
            self.command(script),
            cwd=cwd,
            env=self.environment,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if together else subprocess.PIPE,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            said = (done.stdout + (done.stderr or ""))[-6000:]
            raise AssertionError(f"{script}\nexit code {done.returncode}\n{said}")
        return Done(done.returncode, done.stdout, done.stderr or "")

    def start(self, script: str, cwd: Path) -> subprocess.Popen:
        """Starts a script that goes on until it is stopped: `.terminate()` ends it and the command that runs in it."""
        alone = len(script.strip().replace("\\\n", " ").splitlines()) == 1
        return subprocess.Popen(
            self.command(f"exec {script.lstrip()}" if alone else script),
            cwd=cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @staticmethod
    def command(script: str) -> list[str]:
        return ["bash", "-euo", "pipefail", "-c", script]


def serve(address: str, extra: Mapping[str, list[str]]) -> None:
    """Forks a child for every command that comes, until it is terminated."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    for name in PRELOADED:
        importlib.import_module(name)
    waiting: dict[int, socket.socket] = {}
    woken, ended = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as server, selectors.DefaultSelector() as selector:
        for own in (server, woken, ended):
            own.setblocking(False)
        signal.set_wakeup_fd(ended.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        server.bind(address)
        server.listen()
        selector.register(server, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        print("ready", flush=True)
        while True:
            for key, _ in selector.select():
                if key.fileobj is server:
                    connection, pid = fork(server, extra)
                    waiting[pid] = connection
                else:
                    woken.recv(1024)
            for pid, code in iter(reap, None):
                with waiting.pop(pid) as connection, suppress(BrokenPipeError):  # the client may have been killed
                    connection.sendall(b"%d\n" % code)


def reap() -> tuple[int, int] | None:
    """A child that has ended, and its exit code."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def fork(server: socket.socket, extra: Mapping[str, list[str]]) -> tuple[socket.socket, int]:
    """Runs the command that the next client wants in a child; the client is told its id."""
    connection, _ = server.accept()
    connection.setblocking(True)
    size, descriptors, _, _ = socket.recv_fds(connection, 16, 3)
    job = json.loads(connection.recv(int(size), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        connection.close()
        server.close()
        signal.set_wakeup_fd(-1)
        for name in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(name, signal.SIG_DFL)
        become(descriptors, extra, **job)
    connection.sendall(b"%d\n" % pid)
    for descriptor in descriptors:
        os.close(descriptor)
    return connection, pid


def become(
    descriptors: list[int], extra: Mapping[str, list[str]], argv: list[str], cwd: str, environment: dict[str, str]
) -> None:
    """Is the program, and exits as it does."""
    for stream, descriptor in enumerate(descriptors):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    sys.modules["__main__"].__spec__ = None  # who starts this program again (a launcher of ranks) starts the script
    words = argv[1:]
    if words and words[-1] not in ("list", "--help"):
        words += extra.get(words[0], [])
    from litgpt.__main__ import main

    code = main(words)
    # What an exit does, but for taking torch's modules apart object by object, which is a second of work.
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


def litgpt_commands(script: str) -> list[list[str]]:
    """The words after `litgpt` of each of a script's commands of it, what is piped, chained or commented out left off."""
    commands = []
    for line in script.replace("\\\n", " ").splitlines():
        for part in _parts(shlex.split(line, comments=True)):
            while part and ("=" in part[0] or part[0] in ("srun", "time")):
                part = part[1:]
            if part and part[0] == "litgpt":
                commands.append(part[1:])
    return commands


def _parts(words: list[str]) -> list[list[str]]:
    """The commands of a line."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("|", "&&", ";", "&", "||"):
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
