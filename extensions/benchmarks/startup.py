"""How long a user waits for the program itself: help, the list of models, a subcommand's help.

python extensions/benchmarks/startup.py --peer /path/to/other/bin/litgpt
"""

import argparse
import tempfile
from pathlib import Path

from side_by_side import HEADER, alternate, ours_and, table

COMMANDS = (["--help"], ["download", "list"], ["pretrain", "--help"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", required=True, help="the other program's `litgpt` command")
    parser.add_argument("--runs", type=int, default=5, help="runs of each program")
    arguments = parser.parse_args()
    programs = ours_and(arguments.peer)
    with tempfile.TemporaryDirectory() as scratch:
        for program in programs:
            print(f"- {program.name}: {program.about(Path(scratch))}")
    print(f"\n{HEADER}")
    for words in COMMANDS:
        medians = alternate(programs, arguments.runs, lambda program, words=words: program.run(words))
        print(table(medians, f"`litgpt {' '.join(words)}`, "))


if __name__ == "__main__":
    main()
