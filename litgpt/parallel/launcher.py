"""The processes (ranks) of one run: started, waited for, watched; and what goes wrong in one of them is said once.

Torch's own launcher, SLURM or MPI may start them as well. Then they are only waited for here.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_fabric import Fabric

FOLDER = "LITGPT_RANKS"  # environment variable: where the ranks of a machine leave word for each other
PARENT = "LITGPT_RANKS_PARENT"  # environment variable: the process that has started this one
CLAIM = "told"  # the file of the one that says what went wrong
SOON, LONGEST_MEETING = 5.0, 600.0  # seconds: until it is said who is waited for, and until that ends
GRACE = 10.0  # seconds that a rank has to end by itself once another one has failed
LOST = ("connection closed", "connection reset", "connection refused", "broken pipe", "socket", "gloo", "nccl", "store")

GO_ON = "The run ends here; the same command with --resume auto goes on from its newest checkpoint."
INTERRUPTED = 130  # exit code of a rank that a second Ctrl-C ended

_here: RankTopology | None = None


class LostRank(ValueError):
    """Another process of the run has ended or cannot be reached."""


class RankTopology:
    """What this process knows of the others.

    Args:
        rank: Which one this is, over all machines.
        local_rank: The same on this machine.
        local: How many there are on this machine.
        world_size: How many there are.
        started_here: Whether the first one of this machine starts the others.
    """

    def __init__(self, rank: int, local_rank: int, local: int, world_size: int, started_here: bool) -> None:
        self.rank, self.local_rank, self.local, self.world_size = rank, local_rank, local, world_size
        self.children: dict[int, subprocess.Popen] = {}
        self.parent = int(os.environ.get(PARENT, os.getppid()))
        self.out_of_memory = _out_of_memory_kills()
        if started_here:
            self.folder = Path(tempfile.mkdtemp(prefix="litgpt-ranks-"))
        elif FOLDER in os.environ:
            self.folder = Path(os.environ[FOLDER])
        else:  # one launcher started all of this machine's, and no two have one port
            name = f"litgpt-ranks-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}-{_started(os.getppid())}"
            self.folder = Path(tempfile.gettempdir()) / name
        self.is_parent, self.is_child = started_here, not started_here and FOLDER in os.environ

    def start(self, address: str, port: int) -> None:
        """Start the other ranks of this machine, each with the command that this process was started with."""
        first = self.rank - self.local_rank
        os.environ.update(
            MASTER_ADDR=address, MASTER_PORT=str(port), NODE_RANK=str(first // self.local),
            LOCAL_RANK="0", WORLD_SIZE=str(self.world_size),
        )  # fmt: skip
        module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m litgpt`
        program = [os.path.abspath(sys.argv[0])] if module is None else ["-m", module.name]
        command = [sys.executable, *program, *sys.argv[1:]]
        for local_rank in range(1, self.local):
            environment = {**os.environ, "LOCAL_RANK": str(local_rank)}
            environment |= {FOLDER: str(self.folder), PARENT: str(os.getpid())}
            self.children[first + local_rank] = subprocess.Popen(command, env=environment)
        atexit.register(self.end, GRACE)

    def watch(self) -> None:
        """Have a thread notice where a process that belongs to this one is gone."""
        if self.children or self.is_child:
            threading.Thread(target=self._watch, daemon=True, name="ranks").start()

    def _watch(self) -> None:
        while True:
            time.sleep(0.3)
            lost = self._lost()
            if lost is not None:
                if self.claim():
                    print(f"\nerror: {lost}", file=sys.stderr, flush=True)
                # Whoever waits for it in a collective is told so by the connection, or hangs.
                time.sleep(GRACE)
                self._kill()
                os._exit(1)

    def _lost(self) -> str | None:
        """Which process has gone that should not have, in words."""
        if self.is_child and os.getppid() != self.parent:
            first = self.rank - self.local_rank
            return (
                f"Rank {first} of {self.world_size} (process {self.parent}) was lost: it ended without a word, as one "
                f"does that was killed{self._memory()}. {GO_ON}"
            )
        for rank, process in self.children.items():
            code = process.poll()
            if code in (None, 0, INTERRUPTED):
                continue
            how = f"it ended with exit code {code}"
            if code < 0:
                with contextlib.suppress(ValueError):
                    how = f"{signal.Signals(-code).name} ended it{self._memory() if -code == signal.SIGKILL else ''}"
            return f"Rank {rank} of {self.world_size} (process {process.pid}) was lost: {how}. {GO_ON}"
        return None

    def _memory(self) -> str:
        """What is known of the reason."""
        if _out_of_memory_kills() > self.out_of_memory:
            return ", since the machine has run out of memory"
        return " (the system does so where memory runs out; `dmesg` would say it)"

    def claim(self) -> bool:
        """Whether this rank is the one of its machine that says what went wrong: the first that asks."""
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            os.close(os.open(self.folder / CLAIM, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            return False
        except OSError:
            return True  # better twice than never
        return True

    def is_claimed(self, seconds: float) -> bool:
        """Whether another rank says what went wrong, now or soon."""
        until = time.monotonic() + seconds
        while not (self.folder / CLAIM).exists():
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    def end(self, seconds: float) -> None:
        """Wait for the processes that this one has started, and end those that are there after that time."""
        until = time.monotonic() + seconds
        for process in self.children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self._kill()
        if self.is_parent:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _kill(self) -> None:
        for process in self.children.values():
            if process.poll() is None:
                process.kill()  # in a collective it hears nothing else
                process.wait()


def launch(fabric: Fabric) -> None:
    """Start the other processes of a run, where no launcher has, and wait until all are there.

    Raises:
        LostRank: Not all have come in time.
    """
    global _here
    _here = None
    strategy = fabric.strategy
    environment = getattr(strategy, "cluster_environment", None)
    local = len(getattr(strategy, "parallel_devices", None) or [0])
    world_size = local * getattr(strategy, "num_nodes", 1)
    if environment is None or world_size == 1:
        fabric.launch()
        return
    started_here = not environment.creates_processes_externally
    local_rank = environment.local_rank()
    rank = environment.node_rank() * local + local_rank
    _here = ranks = RankTopology(rank, local_rank, local, world_size, started_here)
    address, port = environment.main_address, environment.main_port
    if started_here:
        ranks.start(address, port)
    ranks.watch()
    store = None
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # torchrun has brought all together itself
        store = rendezvous(ranks, address, port)
    fabric.launch()
    del store


def rendezvous(ranks: RankTopology, address: str, port: int, limit: float = LONGEST_MEETING) -> object:
    """Wait until all ranks are there. It can be interrupted, and says after a while who is missing, and where.

    Returns:
        The store that they meet in, to be kept until torch has opened it itself.
    """
    from datetime import timedelta

    from torch.distributed import DistNetworkError, TCPStore

    begin, told = time.monotonic(), False
    where = f"{address}:{port} (MASTER_ADDR and MASTER_PORT)"

    def wait(what: str) -> None:
        nonlocal told
        waited = time.monotonic() - begin
        if waited > limit:
            raise LostRank(f"{what} for {limit / 60:.0f} minutes, at {where}: not all processes of this run have come.")
        if waited > SOON * (1 if ranks.world_size > ranks.local else 6) and not told and ranks.local_rank == 0:
            told = True
            print(f"{what}, at {where}, for up to {limit / 60:.0f} minutes. {_start_the_others(ranks)}", flush=True)
        time.sleep(0.2)

    while ranks.rank and not _is_open(address, port):
        wait(f"Rank {ranks.rank} of {ranks.world_size} waits for rank 0")
    while True:
        try:
            store = TCPStore(
                address, port, is_master=ranks.rank == 0, wait_for_workers=False, multi_tenant=True,
                timeout=timedelta(seconds=60),
            )  # fmt: skip
            break
        except DistNetworkError as error:
            if ranks.rank == 0:
                raise LostRank(
                    f"Rank 0 cannot listen on port {port} ({error}). Set MASTER_PORT to a free one, on every machine."
                ) from error
            wait(f"Rank {ranks.rank} of {ranks.world_size} waits for rank 0")
    store.set(_key(ranks.rank), "here")
    while missing := [rank for rank in range(ranks.world_size) if not store.check([_key(rank)])]:
        listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        wait(f"Rank {ranks.rank} of {ranks.world_size} waits for rank {listed}")
    if told:
        print("All processes are there.", flush=True)
    return store


def _key(rank: int) -> str:
    return f"litgpt/here/{rank}"


def _start_the_others(ranks: RankTopology) -> str:
    if ranks.world_size == ranks.local:
        return "Ctrl-C ends it."
    nodes = ranks.world_size // ranks.local
    return (
        f"--num_nodes {nodes} needs the same command on each of {nodes} machines, started there by srun or torchrun, "
        "or by hand, with MASTER_ADDR (the address of the first), MASTER_PORT (a free port of it) and NODE_RANK (0, "
        "1, ...) set. Ctrl-C ends it."
    )


def _is_open(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def first_cause(error: BaseException) -> BaseException | None:
    """What this process has to say of an error: itself, that another rank was lost, or nothing, since one of the others
    says it."""
    if _here is None:
        return error
    if not isinstance(error, KeyboardInterrupt | SystemExit) and _is_lost_connection(error):
        if _here.is_claimed(GRACE if _here.local > 1 else 1.0):
            return None
        if isinstance(error, LostRank):
            return error if _here.claim() else None
        first = str(error).strip().partition("\n")[0]
        error = LostRank(
            f"Rank {_here.rank} of {_here.world_size} has lost the connection to another one ({first}). What ended "
            f"that one is said where it ran. {GO_ON}"
        )
    return error if _here.claim() else None


def _is_lost_connection(error: BaseException) -> bool:
    if isinstance(error, LostRank):
        return True
    text = f"{type(error).__name__} {error}".lower()
    is_torchs = isinstance(error, RuntimeError) or type(error).__name__.startswith("Dist")
    return is_torchs and any(word in text for word in LOST)


def end(failed: bool) -> None:
    """This process ends; those that it has started end, too: soon, where something has gone wrong, since they wait for
    this one, and have said what they have to say."""
    if _here is not None:
        _here.end(2.0 if failed else LONGEST_MEETING)


def _out_of_memory_kills() -> int:
    """How many processes Linux has ended for want of memory since it started; 0 where it does not say."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)


def _started(process: int) -> str:
    """When a process was started, so that its number is never taken for that of another one."""
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
