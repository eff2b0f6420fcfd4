"""`litgpt finetune*` as typed: what a run leaves, that its schedule acts, and that its best checkpoint serves."""

import json
import re
import shutil
from pathlib import Path

import pytest

from litgpt.checkpoint import save_model
from litgpt.sources.load import load_model
from litgpt.training.metrics import read_metrics
from tests import checkpoint_files

RECORDS = [
    {"instruction": "What is the capital of France?", "input": "", "output": "The capital of France is Paris."},
    {"instruction": "Translate to Spanish:", "input": "Hello world", "output": "Hola mundo"},
]
JSON_DATA = ["--data", "JSON", "--data.json_path", "data/my_dataset.json"]
QUICK = ["--train.max_steps", 2, "--train.lr_warmup_steps", 1, "--data.num_workers", 0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    directory = checkpoint_files.chat_model(tmp_path_factory.mktemp("tiny"))
    model = load_model(directory)
    model.init_weights()
    save_model(directory, model, model.config)
    return directory


@pytest.fixture(autouse=True)
def place(tiny, tmp_path, monkeypatch) -> Path:
    """A directory to work in, with two models and data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("microsoft/phi-2", "meta-llama/Llama-2-7b-hf"):
        shutil.copytree(tiny, tmp_path / "checkpoints" / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/my_dataset.json").write_text(json.dumps(RECORDS * 8))
    return tmp_path


@pytest.fixture
def run(litgpt):
    """Runs a command, which must end well, and gives what it printed."""

    def words(*argv: object) -> str:
        result = litgpt(*argv)
        assert result.code == 0, result.err
        return result.out

    return words


def test_the_events_of_a_run_are_cleared_away_with_it(run):
    options = ["--train.micro_batch_size", 1, "--train.global_batch_size", 4, *QUICK]
    run("finetune", "microsoft/phi-2", *JSON_DATA, *options, "--train.logger_name", "tensorboard")
    assert list(Path("out/finetune/lightning_logs").rglob("events.out.tfevents.*"))
    run("finetune", "microsoft/phi-2", *JSON_DATA, *options, "--overwrite", "true")
    assert not Path("out/finetune/lightning_logs").exists()


def test_a_schedule_of_ones_own_and_a_longer_context(run):
    schedule = ["--train.learning_rate", "3e-4", "--train.lr_warmup_steps", 2, "--train.min_lr", "3e-6"]
    schedule += ["--train.lr_decay_iters", 4, "--train.max_steps", 5, "--data.num_workers", 0]
    longer = ["--train.max_seq_length", 128, "--train.micro_batch_size", 1, "--train.global_batch_size", 1]
    run("finetune_lora", "meta-llama/Llama-2-7b-hf", *JSON_DATA, *schedule, *longer)
    rates = [float(row["learning_rate"]) for row in read_metrics(Path("out/finetune/lora/metrics.csv"))]
    assert max(rates) == pytest.approx(3e-4)
    assert rates[-1] == pytest.approx(3e-6)


def test_validation_keeps_the_best(run):
    """A tenth is held back; the best checkpoint by its loss is named, and merges like the last."""
    data = [*JSON_DATA, "--data.val_split_fraction", 0.1]
    out = run("finetune_lora", "meta-llama/Llama-2-7b-hf", *data, *QUICK, "--eval.interval", 1)
    best = re.search(r"Lowest validation loss: [\d.]+, at step \d: (\S+)", out)
    assert best[1] == "out/finetune/lora/best"
    assert sorted(p.name for p in Path(best[1]).glob("*.pth*")) == ["lit_model.pth.lora", "training_state.pth"]
    run("merge_lora", best[1])
    assert run("generate", best[1], "--prompt", "What is machine learning?", "--max_new_tokens", 4)
