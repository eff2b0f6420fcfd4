"""Evaluation: `litgpt evaluate` and lm-evaluation-harness with its own backend for Hugging Face models.

Both score the same answers: four continuations after a passage of Shakespeare each, in float32, 16 at a time. Measured
from outside, by what the progress bars on a terminal say: seconds from the start of the program to the first result,
and requests per second from the first line of the bar to its last.

    python extensions/benchmarks/evaluate.py --checkpoint checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
"""

import argparse
import fcntl
import json
import os
import pty
import random
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

from side_by_side import ROOT

BAR = re.compile(rb"(?:Scoring answers|Running loglikelihood requests):[^\r\n]*?\s(\d+)/(\d+)\s")
TEXT = ROOT / "config_hub" / "pretrain" / "data" / "shakespeare.txt"


def make_task(folder: Path, documents: int, words: int) -> None:
    """A task whose answers are what follows a passage, and what follows three others."""
    draw, text = random.Random(0), TEXT.read_text().split()
    records = []
    for _ in range(documents):
        places = [draw.randrange(words, len(text) - 20) for _ in range(4)]
        lengths = [draw.randint(4, 12) for _ in range(4)]
        records.append(
            {
                "question": " ".join(text[places[0] - draw.randint(words // 2, words) : places[0]]),
                "choices": [
                    " ".join(text[place : place + length]) for place, length in zip(places, lengths, strict=True)
                ],
                "answer": 0,
            }
        )
    (folder / "passages.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {
        "task": "passages",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "passages.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    (folder / "passages.yaml").write_text(json.dumps(settings))


def measure(command: list[str], scratch: Path) -> tuple[float, float, float]:
    """Seconds to the first result, requests per second, and seconds of all, of one run on a terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # or else the bars have no room
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment, cwd=scratch)
    os.close(slave)
    seen, shown = b"", []
    while True:
        try:
            seen += os.read(master, 1 << 16)
        except OSError:  # the other end is closed
            break
        now = time.perf_counter()
        for match in BAR.finditer(seen):
            shown.append((int(match[1]), int(match[2]), now))
        seen = seen[-400:] if not BAR.search(seen) else seen[max(match.end() for match in BAR.finditer(seen)) :]
    if process.wait():
        sys.exit(f"{' '.join(command)} failed:\n{seen.decode(errors='replace')}")
    seconds = time.perf_counter() - began
    start, total = shown[0][2], shown[0][1]
    first = next(now for done, _, now in shown if done)
    end = next(now for done, _, now in shown if done == total)
    return first - began, total / (end - start), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint directory, litgpt's")
    parser.add_argument("--lm_eval", default=str(Path(sys.executable).with_name("lm_eval")), help="the peer's program")
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--words", type=int, default=160, help="of the longest passage; the shortest has half of them")
    parser.add_argument("--batch_size", default="16")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    checkpoint = arguments.checkpoint.resolve()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        make_task(scratch, arguments.documents, arguments.words)
        export = [sys.executable, "-m", "litgpt", "convert_from_litgpt", str(checkpoint), str(scratch / "hf")]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([*export, "--format", "safetensors"], check=True, env=environment, stdout=subprocess.DEVNULL)
        common = ["--tasks", "passages", "--include_path", str(scratch), "--batch_size", arguments.batch_size]
        ours = [sys.executable, "-m", "litgpt", "evaluate", str(checkpoint), *common, "--dtype", "float32"]
        ours += ["--out_dir", str(scratch / "ours")]
        peer = [
            arguments.lm_eval,
            "--model",
            "hf",
            "--model_args",
            f"pretrained={scratch / 'hf'},dtype=float32",
            *common,
        ]
        peer += ["--device", "cpu", "--output_path", str(scratch / "peer")]
        results: dict[str, list[tuple[float, float, float]]] = {"litgpt evaluate": [], "lm_eval --model hf": []}
        for _ in range(arguments.runs):
            for program, command in zip(results, (ours, peer), strict=True):
                results[program].append(measure(command, scratch))
                print(program, *(f"{value:.2f}" for value in results[program][-1]), file=sys.stderr, flush=True)
        figures = json.loads((scratch / "ours" / "results.json").read_text())["results"]["passages"]
        theirs = json.loads(next((scratch / "peer").rglob("results_*.json")).read_text())["results"]["passages"]
        print(f"acc {figures['acc,none']:.4f} and {theirs['acc,none']:.4f}, ", end="")
        print(f"acc_norm {figures['acc_norm,none']:.4f} and {theirs['acc_norm,none']:.4f}\n")
    print("| | seconds to the first result | requests per second | seconds in all |\n|---|---|---|---|")
    medians = {
        program: [statistics.median(column) for column in zip(*runs, strict=True)] for program, runs in results.items()
    }
    for program, values in medians.items():
        print(f"| {program} | {values[0]:.1f} | {values[1]:.2f} | {values[2]:.1f} |")
    (first, rate, whole), (peer_first, peer_rate, peer_whole) = medians.values()
    print(f"| ratio | {peer_first / first:.2f} | {rate / peer_rate:.2f} | {peer_whole / whole:.2f} |")


if __name__ == "__main__":
    main()
