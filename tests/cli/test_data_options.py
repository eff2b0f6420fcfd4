"""Finetuning data as it is named on the command line: `--data JSON --data.json_path FILE`."""

import json
from pathlib import Path

import pytest
import torch

from litgpt.data import HFDataset
from litgpt.training.metrics import read_metrics
from tests import tokenizer_files
from tests.markdown import Page

SHAPE = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "intermediate_size": 64,
    "block_size": 128,
    "vocab_size": 400,
    "padded_vocab_size": 400,
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a tokenizer and a few records."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    tokenizer_files.byte_level(tmp_path / "tokenizer", {"chat_template": tokenizer_files.CHATML})
    records = [{"instruction": f"Say {i}.", "output": "word " * (i % 7 + 1)} for i in range(40)]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def train(litgpt):
    """A few steps of a tiny model on the data that is named."""
    shape = [f"--model_config.{key}={value}" for key, value in SHAPE.items()]
    fixed = ["--tokenizer_dir", "tokenizer", "--logger_name", "csv", "--devices", "1", "--precision", "32-true"]
    batches = ["--train.global_batch_size", "4", "--train.micro_batch_size", "2", "--train.lr_warmup_steps", "1"]
    evaluation = ["--eval.interval", "2", "--train.max_seq_length", "96"]

    def run(*words: str):
        return litgpt("pretrain", "tiny", *shape, *fixed, *batches, *evaluation, *words)

    return run


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--data.pack", "true", "--data.prompt_style", "chatml"],
        ["--data.prompt_style", "checkpoint", "--data.mask_prompt", "true"],
    ],
)
def test_records_are_trained_on_for_an_epoch(train, options):
    words = ["--data", "JSON", "--data.json_path", "records.jsonl", "--data.val_split_fraction", "0.1", *options]
    result = train(*words, "--train.epochs", "2", "--out_dir", "out", "--optimizer.lr", "0.003")
    assert result.code == 0, result.err
    rows = read_metrics(Path("out/metrics.csv"))
    assert float(rows[-1]["val_loss"]) < float(rows[0]["loss"]) - 0.5
    if not options:
        assert len(rows) == 18  # 36 records, 4 a step, twice
        assert "36 samples of 36 records (instruction/input/output)" in result.out
        assert "Prompt style: the checkpoint's chat template. The loss is on the replies only." in result.out
        assert "for another prompt style: --data.prompt_style alpaca" in result.out
    elif options[0] == "--data.pack":
        assert len(rows) < 18
        assert "% full." in result.out
    else:
        assert "Prompt style: the checkpoint's chat template. The loss is on the replies only." in result.out


def test_what_is_wrong_is_one_line(train):
    result = train("--data", "JSON", "--data.json_path", "nowhere.json", "--train.max_steps", "1")
    assert result.code != 0
    assert "--data.json_path nowhere.json: no such file or folder" in result.err
    assert "Traceback" not in result.err
    Path("bad.jsonl").write_text('{"instruction": "a", "answer": "b"}\n')
    result = train("--data", "JSON", "--data.json_path", "bad.jsonl", "--train.max_steps", "1", "--out_dir", "other")
    assert "bad.jsonl, line 1: has no 'output'" in result.err
    result = train("--data", "JSON", "--data.json_path", "records.jsonl", "--data.on_long", "cut")
    assert "on_long" in result.err
    assert result.code != 0


def test_columns_and_splits_are_taken_and_the_token_is_not_recorded(train):
    words = [
        "--data.repo_id",
        "a/b",
        "--data.columns",
        "{instruction: question, output: answer}",
        "--data.access_token",
        "hf_x",
    ]
    result = train("--data", "HFDataset", *words, "--print_config")
    assert "columns:\n      instruction: question\n      output: answer" in result.out
    assert "hf_x" not in result.out
    assert "hf_x" not in repr(HFDataset("a/b", access_token="hf_x"))


def test_a_data_module_of_ones_own_is_found(train):
    page = Page(Path(__file__).parents[2] / "tutorials/prepare_dataset.md")
    Path("my_module.py").write_text(next(block.text for block in page.blocks if block.title == "my_module.py"))
    Path("proverbs.txt").write_text("The early bird | catches the worm.\n" * 20)
    result = train("--data", "my_module.Proverbs", "--data.seed", "3", "--train.max_steps", "2")
    assert result.code == 0, result.err
    assert "19 samples of 19 records (proverbs)" in result.out


def test_every_data_set_is_offered(litgpt):
    out = litgpt("pretrain", "--data.help").out
    names = [
        "Alpaca",
        "Alpaca2k",
        "AlpacaGPT4",
        "Deita",
        "Dolly",
        "FLAN",
        "HFDataset",
        "JSON",
        "LIMA",
        "LitData",
        "LongForm",
        "MicroLlama",
        "OpenWebText",
        "TextFiles",
        "TinyLlama",
        "TinyStories",
    ]
    assert [name for name in names if name not in out.split()] == []
    for name in names:
        described = litgpt("pretrain", "--data.help", name)
        assert described.code == 0
        assert "--data.seed" in described.out
