"""Whether a change has made anything slower: the speed of two commits, in turn.

    python extensions/benchmarks/two_commits.py BEFORE [AFTER] --checkpoint_dir DIR --hf_dir DIR [--rounds 3]

BEFORE and AFTER are commits of this repository or directories with a tree of it; without AFTER it is this tree as it
stands. DIR holds one model in litgpt's format and in Hugging Face's. Each round does the same with both, A B A B, each
run a process of its own: decoding by one request (bf16 as the model itself, and int8 compiled), answers of a server to
eight clients, LoRA on packed rows, the conversion of the checkpoint, and `generate` up to its first token. Prints
medians and their ratios as a Markdown table; more than 1 is faster (for megabytes: less) after than before.
"""

import argparse
import csv
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import httpx
from neutral import tree
from serve_bombs import started
from side_by_side import ROOT, Program

PROMPT = "The history of the printing press begins with"
CLIENTS, REQUESTS, TOKENS = 8, 16, 48
LOWER_IS_BETTER = ("s", "MB")

Figures = dict[str, float]
"""A name with its unit -> what was measured"""


def program(root: Path) -> Program:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return Program(root.name, [sys.executable, "-m", "litgpt"], Path(sys.executable), environment)


def decode(root: Path, paths: argparse.Namespace, scratch: Path) -> Figures:
    script = str(root / "extensions/benchmarks/decode.py")
    words = [sys.executable, script, "--checkpoint_dir", str(paths.checkpoint_dir), "--runs", "3"]
    printed = subprocess.run(
        [*words, "--ours", "bf16 eager", "int8"],
        capture_output=True,
        text=True,
        check=True,
        env=program(root).environment,
    ).stdout
    rows = re.findall(r"^\| ours (.+?) \| ([\d.]+) \|", printed, re.MULTILINE)
    return {f"decode, {kind} (tokens/s)": float(rate) for kind, rate in rows}


def serve(root: Path, paths: argparse.Namespace, scratch: Path) -> Figures:
    options = ["--compile", "false", "--precision", "bf16-true", "--access_log", "false"]
    with started(root, str(paths.checkpoint_dir), options) as (url, _), ThreadPoolExecutor(CLIENTS) as clients:

        def ask(number: int) -> int:
            body = {"prompt": f"{number}. {PROMPT}", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=600)
            answer.raise_for_status()
            return answer.json()["usage"]["completion_tokens"]

        ask(0)
        start = time.perf_counter()
        tokens = sum(clients.map(ask, range(REQUESTS)))
        return {f"serve, {CLIENTS} clients (tokens/s)": tokens / (time.perf_counter() - start)}


def finetune(root: Path, paths: argparse.Namespace, scratch: Path) -> Figures:
    records = scratch / "records.json"
    counts = [" ".join(map(str, range(n))) for n in range(5, 205)]
    records.write_text(json.dumps([{"instruction": f"Count {len(c)}.", "input": "", "output": c} for c in counts]))
    words = ["finetune_lora", str(paths.checkpoint_dir), "--data", "JSON", "--data.json_path", str(records)]
    words += ["--data.val_split_fraction", "0.1", "--data.pack", "true", "--precision", "bf16-true"]
    words += ["--train.max_seq_length", "512", "--train.max_steps", "6", "--train.global_batch_size", "2"]
    words += ["--out_dir", str(scratch / "out"), "--overwrite", "true", "--eval.max_new_tokens", "8"]
    _, memory = program(root).run(words)
    with open(scratch / "out/metrics.csv", newline="") as file:
        rates = [float(row["tokens_per_sec"]) for row in csv.DictReader(file) if row["tokens_per_sec"]]
    return {"LoRA, packed (tokens/s)": statistics.median(rates[1:]), "LoRA, peak (MB)": memory}


def convert(root: Path, paths: argparse.Namespace, scratch: Path) -> Figures:
    seconds, memory = program(root).run(
        ["convert", str(paths.hf_dir), "--to", "litgpt", "--out", str(scratch / f"lit-{time.monotonic_ns()}")]
    )
    return {"convert (s)": seconds, "convert, peak (MB)": memory}


def first_token(root: Path, paths: argparse.Namespace, scratch: Path) -> Figures:
    words = ["generate", str(paths.checkpoint_dir), "--prompt", PROMPT, "--max_new_tokens", "1", "--compile", "false"]
    seconds, memory = program(root).run(words)
    return {"generate to the first token (s)": seconds, "generate, peak (MB)": memory}


TASKS: tuple[Callable[[Path, argparse.Namespace, Path], Figures], ...] = (first_token, convert, finetune, serve, decode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit or a directory")
    parser.add_argument("after", nargs="?", default=str(ROOT), help="another; by default this tree as it stands")
    parser.add_argument("--checkpoint_dir", type=Path, required=True)
    parser.add_argument("--hf_dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=[task.__name__ for task in TASKS])
    arguments = parser.parse_args()
    for name in ("checkpoint_dir", "hf_dir"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    with tempfile.TemporaryDirectory(prefix="two-commits-") as scratch:
        places = {name: tree(getattr(arguments, name), Path(scratch) / f"{name}-tree") for name in ("before", "after")}
        for name, (_, about) in places.items():
            print(f"- {name}: {about}")
        print(f"- Python {platform.python_version()}, torch {version('torch')}, {os.cpu_count()} cores\n")
        print("| | before | after | after / before | spread |\n|---|---|---|---|---|", flush=True)
        for task in TASKS:
            if not arguments.only or task.__name__ in arguments.only:
                compare(task, {name: root for name, (root, _) in places.items()}, arguments, Path(scratch))


def compare(task: Callable, roots: dict[str, Path], arguments: argparse.Namespace, scratch: Path) -> None:
    """Prints a row for each figure of a task."""
    found: dict[str, list[Figures]] = {name: [] for name in roots}
    for _ in range(arguments.rounds):
        for name, root in roots.items():
            work = scratch / name
            work.mkdir(exist_ok=True)
            found[name].append(task(root, arguments, work))
            print(f"{task.__name__}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    for what in found["before"][0]:
        sides = {name: [figures[what] for figures in runs] for name, runs in found.items()}
        before, after = (statistics.median(values) for values in sides.values())
        ratio = before / after if what.endswith(tuple(f"({unit})" for unit in LOWER_IS_BETTER)) else after / before
        spread = ", ".join(f"{min(values):.1f} to {max(values):.1f}" for values in sides.values())
        print(f"| {what} | {before:.1f} | {after:.1f} | {ratio:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
