"""How long a user waits for the program itself: help, the list of models, a subcommand's help, the first token.

python extensions/benchmarks/startup.py --peer /path/to/other/bin/litgpt --checkpoint DIR
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from side_by_side import HEADER, Program, alternate, ours_and, table

COMMANDS = (["--help"], ["download", "list"], ["pretrain", "--help"])
ANSWER = ["--prompt", "What do llamas eat?", "--top_k", "1", "--max_new_tokens", "8"]


def first_token(program: Program, checkpoint: str) -> tuple[float, float]:
    """Seconds from the start of `generate` to the first byte of its answer, and peak resident megabytes of the run."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [*program.command, "generate", checkpoint, *ANSWER],
        env=program.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    with process.stdout as answer:
        answer.read(1)
        seconds = time.perf_counter() - start
        answer.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(program.command)} generate {checkpoint} failed (status {status}).")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", required=True, help="the other program's `litgpt` command")
    parser.add_argument("--checkpoint", help="measure `generate` with this small model alone, to its first token")
    parser.add_argument("--runs", type=int, default=5, help="runs of each program")
    arguments = parser.parse_args()
    programs = ours_and(arguments.peer)
    with tempfile.TemporaryDirectory() as scratch:
        for program in programs:
            print(f"- {program.name}: {program.about(Path(scratch))}")
    print(f"\n{HEADER}")
    if arguments.checkpoint:
        medians = alternate(programs, arguments.runs, lambda program: first_token(program, arguments.checkpoint))
        print(table(medians, "`litgpt generate` to the first token, "))
        return
    for words in COMMANDS:
        medians = alternate(programs, arguments.runs, lambda program, words=words: program.run(words))
        print(table(medians, f"`litgpt {' '.join(words)}`, "))


if __name__ == "__main__":
    main()
