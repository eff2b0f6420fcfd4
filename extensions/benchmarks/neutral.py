"""Whether two commits behave alike: losses, tokens, texts and files, bit for bit.

    python extensions/benchmarks/neutral.py BEFORE [AFTER]

BEFORE and AFTER are commits of this repository or directories with a tree of it; without AFTER it is this tree as it
stands. Both do the same by the command line alone, one process per command, one thread, one seed, in directories of the
same names: 20 steps each of `pretrain`, `finetune_full`, `finetune_lora` (with and without bnb.nf4) and `finetune_dpo`,
and 64 greedy tokens each of `generate`, `chat`, `serve` and `litgpt.LLM`. The model is a random Llama of two layers in
Hugging Face's format with a tokenizer trained on the spot.

Compared are, with all their digits, the losses and the other figures of metrics.csv but times; texts; tokens (of
`serve` with their log-probabilities, of `LLM` the ids); the names of all files that a run leaves, and the bytes in
those that do not tell the time. The table that it prints has a row for each, with a digest of what was found;
differences are listed below it. The exit code is 1 where anything differs, or failed.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import httpx
import numpy as np
from safetensors.numpy import save_file
from serve_bombs import started
from side_by_side import ROOT

STEPS, TOKENS = 20, 64
PATIENCE = 300  # seconds for one command
SEED = "7"
PROMPT = "Count to nine, and then tell me who is there."
TIMES = {"tokens_per_sec", "iter_time", "mfu", "time"}  # columns of metrics.csv
TELL_THE_TIME = ("metrics.csv", "logs.txt", "loss.png", "training_state.pth")

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
PRETRAINED = {"n_layer": 2, "n_head": 4, "n_embd": 64, "intermediate_size": 128, "block_size": 64, "vocab_size": 512}

TRAINING = {
    "train.max_steps": STEPS,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 4,
    "train.lr_warmup_steps": 4,
    "train.max_norm": 1.0,
    "train.save_interval": 10,
    "eval.interval": 10,
    "eval.max_iters": 2,
    "eval.max_new_tokens": 8,
    "optimizer.lr": 0.003,
    "data.num_workers": 0,
    "devices": 1,
    "logger_name": "csv",
    "seed": SEED,
}
RECORDS = {"data": "JSON", "data.json_path": "records.json", "data.val_split_fraction": 0.2}
PAIRS = {"data": "Preferences", "data.json_path": "pairs.json", "data.val_split_fraction": 0.2, "train.epochs": 5}
TEXTS = {"data": "TextFiles", "data.train_data_path": "texts", "tokenizer_dir": "base"}
LORA = {f"lora_{target}": True for target in ("key", "projection", "mlp", "head")}
GREEDY = {"temperature": 0, "max_new_tokens": TOKENS, "seed": SEED}

# The name of a run, and what is typed for it; it leaves its files in out/NAME.
RUNS: dict[str, tuple[list[str], dict[str, object]]] = {
    "pretrain": (["pretrain", "neutral"], {**TEXTS, **{f"model_config.{k}": v for k, v in PRETRAINED.items()}}),
    "finetune_full": (["finetune_full", "base"], RECORDS),
    "finetune_lora": (["finetune_lora", "base"], {**RECORDS, **LORA}),
    "QLoRA nf4": (["finetune_lora", "base"], {**RECORDS, **LORA, "quantize": "bnb.nf4"}),
    "finetune_dpo": (["finetune_dpo", "base"], PAIRS),
}

ASK_LLM = """if True:
    import json, sys
    from litgpt import LLM
    directory, prompt, most = sys.argv[1:]
    llm = LLM.load(directory)
    ids = llm.generate(prompt, max_new_tokens=int(most), temperature=0.0, return_as_token_ids=True)
    print(json.dumps(ids.tolist()))
"""


class Failure(Exception):
    """A command has failed, or left something else than was asked of it."""


@dataclass
class Finding:
    """Something that is to be equal before and after: values by what they are of."""

    values: dict[str, str] = field(default_factory=dict)
    gist: str = ""
    """The values in a few words"""
    failed: bool = False

    def __str__(self) -> str:
        return self.gist if self.failed else f"{self.gist} `{digest(json.dumps(self.values).encode())[:8]}`"


Findings = dict[str, Finding]


@dataclass
class Side:
    """One of the two trees, and the directory that its commands work in."""

    name: str
    root: Path
    work: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.root), "LITGPT_CACHE_DIR": str(self.work / "cache")}

    def python(self, *words: object, stdin: str = "") -> str:
        """Runs the interpreter with these words; what it prints."""
        command = [sys.executable, *map(str, words)]
        try:
            done = subprocess.run(
                command,
                env=self.environment,
                cwd=self.work,
                input=stdin,
                capture_output=True,
                encoding="utf-8",
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"not at its end after {PATIENCE} s") from None
        if done.returncode:
            raise Failure(f"exit code {done.returncode}: {(done.stderr.strip() or done.stdout.strip())[-300:]}")
        return done.stdout

    def litgpt(self, words: list[str], options: dict[str, object], stdin: str = "") -> str:
        """Runs a command of the tree."""
        given = [word for name, value in options.items() for word in (f"--{name}", value)]
        return self.python("-m", "litgpt", *words, *given, stdin=stdin)


# --- what both work on ------------------------------------------------------------------------------------------------


def make_inputs(work: Path) -> None:
    """A model, a text, records and pairs."""
    make_model(work / "base")
    (work / "texts").mkdir()
    text = (ROOT / "config_hub/pretrain/data/shakespeare.txt").read_bytes()[:40_000]
    (work / "texts/play.txt").write_bytes(text)
    counts = {n: list(map(str, range(1, n + 1))) for n in range(2, 42)}
    records = [{"instruction": f"Count to {n}.", "input": "", "output": " ".join(c)} for n, c in counts.items()]
    pairs = [
        {"prompt": f"Count to {n}.", "chosen": " ".join(c), "rejected": " ".join(reversed(c))}
        for n, c in counts.items()
    ]
    (work / "records.json").write_text(json.dumps(records))
    (work / "pairs.json").write_text(json.dumps(pairs))


def make_model(directory: Path) -> None:
    """A Llama as Hugging Face has it, of random weights so large that its texts do not soon repeat themselves."""
    sys.path.insert(0, str(ROOT))
    from tests import tokenizer_files

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    chat = {"chat_template": tokenizer_files.CHATML, "eos_token": "<|im_end|>"}
    tokenizer_files.byte_level(directory, chat, special)
    vocabulary = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    config = {**MODEL, "vocab_size": len(vocabulary), "eos_token_id": vocabulary["<|im_end|>"], "bos_token_id": None}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    width, inner, size = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = width * config["num_key_value_heads"] // config["num_attention_heads"]
    random = np.random.default_rng(int(SEED))

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.normal(0, 1.5 / columns**0.5, (rows, columns)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(size, width)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name, rows in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            weights[f"{block}.self_attn.{name}_proj.weight"] = matrix(rows, width)
        for name, rows, columns in (("gate", inner, width), ("up", inner, width), ("down", width, inner)):
            weights[f"{block}.mlp.{name}_proj.weight"] = matrix(rows, columns)
        for name in ("input", "post_attention"):
            weights[f"{block}.{name}_layernorm.weight"] = np.ones(width, np.float32)
    weights["model.norm.weight"] = np.ones(width, np.float32)
    weights["lm_head.weight"] = matrix(size, width)
    weights["lm_head.weight"][[vocabulary[token] for token in special]] = 0  # never likely: no text ends early
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


# --- what is found ----------------------------------------------------------------------------------------------------


def train(side: Side, name: str) -> Findings:
    """One run of training."""
    words, options = RUNS[name]
    directory = side.work / "out" / name.replace(" ", "-")
    side.litgpt(words, {**TRAINING, **options, "out_dir": directory.relative_to(side.work)})
    with open(directory / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    losses = {f"loss of step {row['step']}": float(row["loss"]).hex() for row in rows if row["loss"]}
    expect("losses", len(losses), STEPS)
    figures = {
        f"{column} of step {row['step']}": float(value).hex()
        for row in rows
        for column, value in row.items()
        if value and column not in TIMES | {"step", "loss"}
    }
    first, *_, last = map(float.fromhex, losses.values())
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    names = {path.relative_to(directory).as_posix(): path for path in files}
    steady = {name: content(path) for name, path in names.items() if not path.name.startswith(TELL_THE_TIME)}
    return {
        f"{name}: losses": Finding(losses, f"{len(losses)}: {first:.6f} to {last:.6f}"),
        f"{name}: other figures": Finding(figures, f"{len(figures)}"),
        f"{name}: names of files": Finding(dict.fromkeys(names, "there"), f"{len(names)}"),
        f"{name}: what is in them": Finding(steady, f"{len(steady)} files"),
    }


def content(path: Path) -> str:
    """The digest of a file; of torch's archives, of all members, without the random name that they stand under."""
    if not zipfile.is_zipfile(path):
        return digest(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: digest(archive.read(name)) for name in archive.namelist()}
    return digest(json.dumps(members, sort_keys=True).encode())


def generate(side: Side) -> Findings:
    text = side.litgpt(["generate", "base"], {**GREEDY, "prompt": PROMPT, "precision": "32-true"})
    return {"generate: text": text_finding(text)}


def chat(side: Side) -> Findings:
    """A conversation of two prompts with what LoRA has learned."""
    text = side.litgpt(["chat", "out/finetune_lora/final"], GREEDY, stdin=f"{PROMPT}\nGo on.\n\n")
    return {"chat: text": text_finding(text)}


def serve(side: Side) -> Findings:
    """A reply and the continuation of a text, with the log-probabilities of their tokens."""
    with started(side.root, str(side.work / "base"), ["--compile", "false"]) as (url, _):
        limits = {"max_tokens": TOKENS, "temperature": 0}
        messages = {"messages": [{"role": "user", "content": PROMPT}], "logprobs": True, "top_logprobs": 2}
        reply = posted(f"{url}/v1/chat/completions", {**messages, **limits})
        continued = posted(f"{url}/v1/completions", {"prompt": PROMPT, "logprobs": 2, **limits})
        predicted = posted(f"{url}/predict", {"prompt": PROMPT, "temperature": 0, "max_new_tokens": TOKENS})
    for answer in (reply, continued):
        expect("tokens", answer["usage"]["completion_tokens"], TOKENS)
    texts = reply["choices"][0]["message"]["content"], continued["choices"][0]["text"], predicted["output"]
    tokens = reply["choices"][0]["logprobs"]["content"]
    columns = continued["choices"][0]["logprobs"]
    values = {f"token {place} of the reply": json.dumps(token) for place, token in enumerate(tokens, 1)}
    values |= {f"{name} of the text": json.dumps(column) for name, column in columns.items()}
    return {
        "serve: texts": Finding(dict(zip(("reply", "text", "/predict"), texts, strict=True)), shortened(texts[0])),
        "serve: tokens, log-probabilities": Finding(values, f"{len(tokens)}"),
    }


def posted(url: str, body: dict[str, object]) -> dict:
    response = httpx.post(url, json=body, timeout=PATIENCE)
    if response.status_code != 200:
        raise Failure(f"{url}: {response.status_code}, {response.text[:300]}")
    return response.json()


def ask_llm(side: Side) -> Findings:
    """Token ids by the Python API, which has one name wherever its parts lie."""
    ids = json.loads(side.python("-c", ASK_LLM, "base", PROMPT, TOKENS))
    expect("tokens", len(ids), TOKENS)
    values = {f"token {place}": str(token) for place, token in enumerate(ids, 1)}
    return {"LLM.generate: token ids": Finding(values, f"{len(ids)}: {' '.join(map(str, ids[:4]))} ...")}


def text_finding(text: str) -> Finding:
    return Finding({f"line {number}": line for number, line in enumerate(text.splitlines(), 1)}, shortened(text))


def shortened(text: str) -> str:
    """A text's first words, fit for a cell of a table."""
    return f"{len(text)} characters: {text.strip()[:16]!r}".replace("|", "\\|").replace("`", "'")


def expect(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise Failure(f"{found} {what}, not {wanted}")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- both compared ----------------------------------------------------------------------------------------------------


def tasks() -> Iterator[tuple[str, Callable[[Side], Findings]]]:
    """All that both sides do, in the order that it needs."""
    for name in RUNS:
        yield name, lambda side, name=name: train(side, name)
    yield from (("generate", generate), ("chat", chat), ("serve", serve), ("LLM.generate", ask_llm))


def found(side: Side, name: str, task: Callable[[Side], Findings]) -> Findings:
    print(f"{side.name}: {name}", file=sys.stderr, flush=True)
    try:
        return task(side)
    except (Failure, SystemExit, OSError, ValueError, LookupError, httpx.HTTPError) as error:
        return {name: Finding({"": str(error)}, f"failed: {' '.join(str(error).split())[-160:]}", failed=True)}


def compared(before: Findings, after: Findings) -> Iterator[tuple[str, bool, list[str]]]:
    """A row of the table for each finding, whether it is equal, and what differs."""
    for what in dict.fromkeys([*before, *after]):
        one, other = (findings.get(what, Finding(gist="none", failed=True)) for findings in (before, after))
        names = dict.fromkeys([*one.values, *other.values])
        differing = [name for name in names if one.values.get(name) != other.values.get(name)]
        equal = not (differing or one.failed or other.failed)
        details = [
            f"- {what}, {name or 'error'}: {said(one.values.get(name))} before, {said(other.values.get(name))} after"
            for name in differing[:3]
        ]
        if len(differing) > 3:
            details.append(f"- {what}: {len(differing) - 3} more of {len(names)} differ")
        yield f"| {what} | {one} | {other} | {'yes' if equal else '**no**'} |", equal, details


def said(value: str | None) -> str:
    if value is None:
        return "none"
    number = f" ({float.fromhex(value)!r})" if value.startswith(("0x", "-0x")) else ""
    return (value if len(value) < 80 else f"{value[:80]}...") + number


def tree(named: str, place: Path) -> tuple[Path, str]:
    """The directory of a commit's files, written under `place`, or of a tree; and what to call it."""
    if Path(named, "litgpt", "__main__.py").is_file():
        return Path(named).resolve(), f"the tree {named}"
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{named}^{{commit}}"],
        capture_output=True,
        text=True,
    )
    if commit.returncode:
        sys.exit(f"{named} is neither a commit of this repository nor a directory with a tree of it.")
    place.mkdir()
    archive = subprocess.run([*git, "archive", commit.stdout.strip()], capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive.stdout, check=True)
    about = [*git, "log", "-1", "--format=%h, %s", commit.stdout.strip()]
    return place, subprocess.run(about, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit or a directory")
    parser.add_argument("after", nargs="?", default=str(ROOT), help="another; by default this tree as it stands")
    parser.add_argument("--only", nargs="*", choices=[name for name, _ in tasks()], help="some of the tasks alone")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="neutral-") as scratch:
        sides = []
        (Path(scratch) / "inputs").mkdir()
        make_inputs(Path(scratch) / "inputs")
        for name in ("before", "after"):
            root, about = tree(getattr(arguments, name), Path(scratch) / f"{name}-tree")
            shutil.copytree(Path(scratch) / "inputs", Path(scratch) / name)
            side = Side(name, root, Path(scratch) / name)
            package = Path(side.python("-c", "import litgpt; print(litgpt.__file__)").strip())
            if root not in package.parents:
                sys.exit(f"{name}: the interpreter imports {package}, which is not in {root}.")
            print(f"- {name}: {about}")
            sides.append(side)
        print(f"- Python {platform.python_version()}, torch {version('torch')}, {platform.machine()}, one thread\n")
        print("| what | before | after | equal |\n|---|---|---|---|", flush=True)
        results, differences = [], []
        for name, task in tasks():
            if arguments.only and name not in arguments.only:
                continue
            for row, equal, details in compared(*(found(side, name, task) for side in sides)):
                print(row, flush=True)
                results.append(equal)
                differences += details
    print("\n" + "\n".join([*differences, "", ""] if differences else []), end="")
    print(f"{sum(results)} of {len(results)} are equal.")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
