"""Our program and a peer's in turn: A B A B, each run a process of its own, medians."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Program:
    """A `litgpt` command and the environment it runs in."""

    name: str
    command: list[str]
    python: Path
    environment: dict[str, str]

    def run(self, words: Sequence[str]) -> tuple[float, float]:
        """Seconds and peak resident megabytes of one run with these words, start of the interpreter included."""
        start = time.perf_counter()
        command = [*self.command, *words]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, env=self.environment, **quiet)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{' '.join(command)} failed (status {status}).")
        return time.perf_counter() - start, usage.ru_maxrss / 1024

    def about(self, scratch: Path) -> str:
        """Versions of what the program runs on; `scratch` is a directory with nothing to import."""
        script = """if True:
            import importlib.metadata, sys, litgpt
            program = getattr(litgpt, "__version__", None) or importlib.metadata.version("litgpt")
            print(program, sys.version.split()[0], importlib.metadata.version("torch"))
        """
        command = [str(self.python), "-c", script]
        result = subprocess.run(command, env=self.environment, cwd=scratch, capture_output=True, text=True, check=True)
        program, interpreter, torch = result.stdout.split()
        return f"litgpt {program}, Python {interpreter}, torch {torch}"


def ours_and(peer: str) -> list[Program]:
    """This tree's program, and the one whose `litgpt` command is at `peer`."""
    # The peer must not find this tree's package, and ours must be this tree's.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ours = Program("ours", [sys.executable, "-m", "litgpt"], Path(sys.executable), clean | {"PYTHONPATH": str(ROOT)})
    return [ours, Program("peer", [peer], Path(peer).with_name("python"), clean)]


def alternate(
    programs: list[Program], runs: int, once: Callable[[Program], tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Median seconds and megabytes of each program, run in turn."""
    results: dict[str, list[tuple[float, float]]] = {program.name: [] for program in programs}
    for _ in range(runs):
        for program in programs:
            seconds, memory = once(program)
            results[program.name].append((seconds, memory))
            print(f"{program.name}: {seconds:.2f} s, {memory:.0f} MB", file=sys.stderr)
    return {name: tuple(map(statistics.median, zip(*figures, strict=True))) for name, figures in results.items()}


def table(medians: dict[str, tuple[float, float]], what: str = "") -> str:
    """The rows of a Markdown table, the last one with the ratios."""
    rows = [f"| {what}{name} | {seconds:.2f} | {memory:.0f} |" for name, (seconds, memory) in medians.items()]
    ratios = [theirs / ours for ours, theirs in zip(medians["ours"], medians["peer"], strict=True)]
    return "\n".join([*rows, f"| {what}peer / ours | {ratios[0]:.2f} | {ratios[1]:.2f} |"])


HEADER = "| | wall time, s | peak resident memory, MB |\n|---|---|---|"
