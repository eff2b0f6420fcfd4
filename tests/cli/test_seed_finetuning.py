"""The commands about finetuning that the manual names, as typed there, on a tiny model and data on this disk."""

import json
import re
import shutil
from pathlib import Path

import pytest

from litgpt.checkpoint import save_model
from litgpt.convert import load_model
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
    """A directory to work in, with the models and the data that the manual speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("microsoft/phi-2", "meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-2-7b-hf"):
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


def test_all_weights_with_tensorboard(run):
    model, batches = "meta-llama/Meta-Llama-3-8B", ["--train.micro_batch_size", 1, "--train.global_batch_size", 4]
    options = ["--train.learning_rate", "2e-5", "--train.logger_name", "tensorboard", *QUICK]
    run("finetune", model, *JSON_DATA, *options, *batches)
    assert float(read_metrics(Path("out/finetune/metrics.csv"))[-1]["learning_rate"]) <= 2e-5
    assert "step 2" in Path("out/finetune/logs.txt").read_text()
    assert list(Path("out/finetune/lightning_logs").rglob("events.out.tfevents.*"))
    assert Path("out/finetune/final/lit_model.pth").is_file()
    # ... and is cleared away with the run.
    run("finetune", model, *JSON_DATA, *QUICK, *batches, "--overwrite", "true")
    assert not Path("out/finetune/lightning_logs").exists()


def test_lora_merged_into_a_directory_and_asked(run):
    """Workflow 2: train, merge, use; `LLM.load` reads what `generate` reads."""
    switches = {"query": True, "key": False, "value": True, "projection": True, "mlp": False, "head": False}
    options = [word for name, on in switches.items() for word in (f"--lora_{name}", str(on).lower())]
    options += ["--lora_r", 16, "--lora_alpha", 32, "--lora_dropout", 0.05, "--train.learning_rate", "1e-4"]
    batches = ["--train.epochs", 3, "--train.micro_batch_size", 4, "--train.global_batch_size", 8]
    out = run("finetune_lora", "microsoft/phi-2", *JSON_DATA, *options, *QUICK, *batches, "--out_dir", "out/phi2-lora")
    assert "Saved LoRA weights to 'out/phi2-lora/final/lit_model.pth.lora'" in out
    assert "Saved merged weights to 'out/phi2-lora/final/lit_model.pth'" in out
    out = run("merge_lora", "out/phi2-lora/final", "--out_dir", "out/phi2-merged")
    assert "Saved merged weights to 'out/phi2-merged/lit_model.pth'" in out
    for directory in ("out/phi2-lora/final", "out/phi2-merged"):
        question = ["--prompt", "What is machine learning?", "--max_new_tokens", 4, "--top_k", 1]
        assert run("generate", directory, *question)


def test_lora_writes_where_the_manual_says(run):
    run("finetune_lora", "microsoft/phi-2", *JSON_DATA, *QUICK, "--train.learning_rate", "1e-4")
    assert Path("out/finetune/lora/final/lit_model.pth.lora").is_file()
    run("finetune_full", "microsoft/phi-2", *JSON_DATA, *QUICK, "--train.learning_rate", "3e-5")
    assert Path("out/finetune/full/final/lit_model.pth").is_file()


def test_lora_merged_by_the_file_that_the_manual_names(run):
    """`final_lora.pth` in the directory of the run's model; the result is X-merged/, and answers."""
    final = "checkpoints/meta-llama/finetuned"
    run("finetune_lora", "meta-llama/Llama-2-7b-hf", *JSON_DATA, *QUICK, "--out_dir", "out/lora")
    shutil.copytree("out/lora/final", final)
    run("merge_lora", f"{final}/final_lora.pth")
    merged = Path(f"{final}-merged")
    assert (merged / "lit_model.pth").is_file()
    assert run("generate", f"{merged}/", "--prompt", "What is machine learning?", "--max_new_tokens", 4)


@pytest.mark.parametrize(
    ("options", "accumulation"),
    [
        (["--train.gradient_accumulation_iters", 4], 4),
        (
            ["--train.micro_batch_size", 1, "--train.global_batch_size", 32, "--train.gradient_accumulation_iters", 32],
            32,
        ),
        (["--train.global_batch_size", 128, "--train.micro_batch_size", 2], 64),
    ],
)
def test_accumulation(run, options, accumulation):
    out = run("finetune_lora", "microsoft/phi-2", *JSON_DATA, *options, *QUICK, "--dry_run", "true")
    assert f"x {accumulation} accumulation" in out


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


def test_four_bits_and_a_smaller_rank(run):
    options = ["--quantize", "bnb.nf4", "--lora_r", 4, "--train.micro_batch_size", 1]
    out = run("finetune_lora", "microsoft/phi-2", *JSON_DATA, *options, *QUICK, "--train.global_batch_size", 1)
    assert "Saved merged weights to 'out/finetune/lora/final/lit_model.pth'" in out


def test_mixed_precision(run):
    options = ["--precision", "bf16-mixed", "--train.global_batch_size", 1]
    run("finetune_lora", "meta-llama/Llama-2-7b-hf", *JSON_DATA, *options, *QUICK)
