"""Tokenising a corpus for pretraining: MB/s and memory, ours, LitGPT's and `datasets.map` in turn.

    python extensions/benchmarks/prepare_dataset.py --peer peers/litgpt-0.5.13/bin/litgpt \
        --tokenizer DIRECTORY --text FILE --mb 200

makes a corpus of `--mb` MB out of the lines of FILE (repeated in another order each time, in documents of 1 to 6 KB),
as .jsonl and as 16 files of text, and runs, A B C A B C, each a process of its own:

- ours: `litgpt prepare_dataset` of the .jsonl with `--num_workers 2`
- LitGPT: its `TextFiles(train_data_path=FOLDER).prepare_data()`, what its `pretrain --data TextFiles` does first
- datasets: `load_dataset("json").map(tokenize, batched=True, num_proc=2)` with transformers' fast tokenizer, no more

Printed are medians of MB/s, start of the interpreter included, and of the peak of the memory of all processes (PSS, so
that shared pages count once), and the seconds of CPU of all processes, which other work on the machine hardly changes.
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
from side_by_side import Program, ours_and

LITGPT = """
import sys
from pathlib import Path
from litgpt.data import TextFiles
from litgpt.tokenizer.tokenizer import Tokenizer
if __name__ == "__main__":
    data = TextFiles(train_data_path=Path(sys.argv[1]))
    data.connect(tokenizer=Tokenizer(sys.argv[2]), batch_size=1, max_seq_length=2048)
    data.prepare_data()
"""
DATASETS = """
import sys
from datasets import load_dataset
from transformers import AutoTokenizer
if __name__ == "__main__":
    source, tokenizer, cache = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    data = load_dataset("json", data_files=source, split="train", cache_dir=cache)
    def tokenize(batch):
        return tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)
    data = data.map(tokenize, batched=True, num_proc=2, remove_columns=["text"])
    print(sum(map(len, data.with_format("arrow")[:1000]["input_ids"].to_pylist())))
"""


def make_corpus(folder: Path, text: Path, size: int) -> tuple[Path, Path]:
    """The corpus as a .jsonl file and as a folder of 16 text files."""
    lines, records, texts = text.read_text().splitlines(keepends=True), folder / "corpus.jsonl", folder / "texts"
    texts.mkdir(parents=True)
    rng, written = random.Random(0), 0
    files = [open(texts / f"{number:02}.txt", "w") for number in range(16)]  # noqa: SIM115
    with open(records, "w") as file:
        while written < size:
            for start in range(0, len(lines), 400):  # other neighbours each time
                block = lines[start : start + 400]
                rng.shuffle(block)
                place = 0
                while place < len(block):
                    count = rng.randrange(15, 80)
                    document = "".join(block[place : place + count])
                    place += count
                    file.write(json.dumps({"text": document}) + "\n")
                    files[written * 16 // (size + 1_000_000) % 16].write(document + "\n")
                    written += len(document.encode())
                if written >= size:
                    break
    for file in files:
        file.close()
    return records, texts


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float, float]:
    """Seconds of a run, the most memory of all its processes in MB, and the CPU's seconds of all of them."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(os.devnull, "w") as quiet:
        process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=subprocess.PIPE)
    peak, tree = 0.0, psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        try:
            for one in [tree, *tree.children(recursive=True)]:
                total += one.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
        peak = max(peak, total / 1e6)
        time.sleep(0.5)
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed: {process.stderr.read().decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, peak, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", required=True, help="the `litgpt` of LitGPT 0.5.13")
    parser.add_argument("--tokenizer", required=True, type=Path, help="directory with tokenizer.json")
    parser.add_argument("--text", required=True, type=Path, help="a text file")
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--scratch", required=True, type=Path, help="an empty folder")
    options = parser.parse_args()
    scratch = options.scratch.absolute()
    records, texts = make_corpus(scratch, options.text, options.mb * 1_000_000)
    size = sum(path.stat().st_size for path in texts.iterdir()) / 1e6
    ours, peer = ours_and(options.peer)
    results: dict[str, list[tuple[float, float, float]]] = {"ours": [], "LitGPT": [], "datasets": []}
    for number in range(options.runs):
        for name, found in results.items():
            found.append(
                once(name, ours, peer, options.tokenizer.absolute(), records, texts, scratch / f"{name}-{number}")
            )
            seconds, peak, cpu = found[-1]
            print(f"{name}: {size / seconds:.2f} MB/s, {seconds:.1f} s, {peak:,.0f} MB, {cpu:.1f} s of CPU", flush=True)
    print(f"\n{size:.1f} MB of text\n")
    print("| | MB/s | seconds of CPU | peak memory of all processes, MB |\n|---|---|---|---|")
    for name, found in results.items():
        seconds, peak, cpu = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"| {name} | {size / seconds:.2f} | {cpu:.0f} | {peak:,.0f} |")
    for program in (ours, peer):
        print(f"- {program.name}: {program.about(scratch)}")


def once(
    name: str, ours: Program, peer: Program, tokenizer: Path, records: Path, texts: Path, out: Path
) -> tuple[float, float, float]:
    """One run into a folder that is not there yet."""
    if name == "ours":
        words = ["prepare_dataset", "--source_path", records, "--checkpoint_dir", tokenizer, "--destination_path", out]
        result = measured([*ours.command, *map(str, words), "--num_workers", "2"], ours.environment)
    elif name == "LitGPT":
        copy = out / "texts"  # it writes next to its sources
        shutil.copytree(texts, copy)
        result = measured([str(peer.python), "-c", LITGPT, str(copy), str(tokenizer)], peer.environment)
    else:
        script = out / "map.py"
        out.mkdir()
        script.write_text(DATASETS)
        environment = {**ours.environment, "TOKENIZERS_PARALLELISM": "false", "HF_HOME": str(out / "home")}
        command = [sys.executable, str(script), str(records), str(tokenizer), str(out / "cache")]
        result = measured(command, environment)
    shutil.rmtree(out)
    return result


if __name__ == "__main__":
    main()
