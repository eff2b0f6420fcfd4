"""How PyTorch's threads on a CPU share the machine. Importing `litgpt` settles it, before torch does."""

import math
import os
from collections.abc import Iterable
from pathlib import Path

SPINS = 1000
"""How often a thread looks for work before it sleeps. By default threads look 300,000 times, and so take the core from
the one that they wait for where another program runs: measured 2 to 10 times as slow there, and no quicker where none
does (extensions/benchmarks/results/2026-11-30-threads.md)."""
LIMITS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us")


def settle_threads(limits: Iterable[str | Path] = LIMITS) -> None:
    """Chooses how threads wait and, in a container with a share of the machine's cores, their number; by the variables
    of the environment that OpenMP reads when torch is imported. What the user has set there stays.

    Args:
        limits: Files that may say how much processor time there is, in the form of Linux' control groups.
    """
    environment = os.environ
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", str(SPINS))
    if "OMP_NUM_THREADS" not in environment and (cores := allowed_cores(limits)) is not None:
        environment["OMP_NUM_THREADS"] = str(cores)


def allowed_cores(limits: Iterable[str | Path]) -> int | None:
    """How many cores' time a container gives, rounded up; None where it gives all of them.

    PyTorch sees to it which cores a process may run on, and not how much of their time it gets
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max).
    """
    for file in map(Path, limits):
        try:
            quota, *period = file.read_text().split()
            period = int(period[0] if period else file.with_name("cpu.cfs_period_us").read_text())
            if int(quota) > 0 and period > 0 and (cores := math.ceil(int(quota) / period)) < (os.cpu_count() or 1):
                return cores
        except (OSError, ValueError, IndexError):  # no such limit: "max", -1, or another system
            continue
    return None
