"""The commands of the page about finetuning do what it says; what the page cannot run here is at least read."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests import checkpoint_files

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "tutorials/finetune.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [shlex.split(line.removeprefix("srun "), comments=True)[1:] for line in LINES if "litgpt finetune" in line]
HERE = [words for words in COMMANDS if "JSON" in words and "--devices" not in words]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with the page's data, and with a tiny model under the names of the page's."""
    directory = tmp_path_factory.mktemp("place")
    for name in ("microsoft/phi-2", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        (directory / "checkpoints" / name).mkdir(parents=True)
        checkpoint_files.chat_model(directory / "checkpoints" / name, block_size=1024)
    records = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(n)))} for n in range(2, 30)]
    (directory / "my_data.json").write_text(json.dumps(records))
    return directory


def test_the_page_is_read_as_a_whole():
    assert len(COMMANDS) >= 11
    assert len(HERE) >= 9


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_of_the_page_exists(litgpt, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = litgpt(*words, "--print_config")
    assert result.code == 0, result.err


@pytest.mark.parametrize("words", HERE, ids=" ".join)
def test_what_a_command_would_do(litgpt, place, words, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(place / "cache"))
    start = ["--adapter_start_layer", 1] if words[0].startswith("finetune_adapter") else []  # the model has two layers
    result = litgpt(*words, *start, "--data.num_workers", 0, "--dry_run", "true")
    assert result.code == 0, result.err
    said = (
        "trainable parameters: ",
        "non-trainable",
        "Tokens per step",
        "Steps: ",
        "Estimated memory",
        "One training sample",
    )
    for line in said:
        assert line in result.out
    assert ("packed" in result.out or "rows" in result.out) == ("--data.pack" in words)


def test_what_the_page_says_of_the_files_of_a_run(litgpt, place, monkeypatch):
    """A run, gone on with, merged from its best checkpoint, and asked."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(place / "cache"))
    first = [*HERE[0], "--data.num_workers", 0, "--eval.interval", 2, "--train.lr_warmup_steps", 1]
    first[first.index("--train.max_steps") + 1] = "4"
    run = litgpt(*first)
    assert run.code == 0, run.err
    assert "out/finetune/lora/best" in run.out
    assert litgpt(*first, "--resume", "auto", "--train.max_steps", 5).code == 0
    names = {path.name for path in Path("out/finetune/lora").iterdir()}
    assert {"best", "final", "hyperparameters.yaml", "metrics.csv", "logs.txt"} <= names
    assert litgpt("merge_lora", "out/finetune/lora/best").code == 0
    assert litgpt("generate", "out/finetune/lora/best", "--prompt", "What?", "--max_new_tokens", 3).code == 0
