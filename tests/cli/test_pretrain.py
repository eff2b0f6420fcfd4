"""`litgpt pretrain` as it is typed: in recipes, in the seeds' spellings, and wrongly."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from litgpt.__main__ import main
from litgpt.config import Config
from litgpt.runs.memory_estimate import Usage, estimate_memory
from litgpt.sources.load import load_model
from litgpt.sources.meta import meta_model
from litgpt.training.metrics import flops_per_token, read_metrics

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "config_hub/pretrain/data/shakespeare.txt"
TINY = """
model_name: tiny
block_size: 32
n_layer: 2
n_head: 2
n_embd: 32
intermediate_size: 64
rotary_percentage: 0.25
parallel_residual: true
bias: true
tokenizer_vocab_size: 300
logger_name: csv
devices: 1
micro_batch_size: 2
global_batch_size: 4
lr_warmup_steps: 2
max_steps: 3
eval: {max_iters: 2, interval: 2}
data:
  class_path: litgpt.data.TextFiles
  init_args: {train_data_path: texts, num_workers: 0}
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory with a small text and a recipe in the seeds' flat style."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/one.txt").write_bytes(TEXT.read_bytes()[:20_000])
    (tmp_path / "tiny.yaml").write_text(TINY)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def run(*words: str) -> int:
    return main(["pretrain", *words])


def fails(capsys, *words: str) -> str:
    """What an impossible command says; it must fail without a traceback and before it writes a run."""
    code = run(*words)
    err = capsys.readouterr().err
    assert code in (1, 2), err
    assert "Traceback" not in err
    assert err.startswith("error: ")
    return err


def settings(out_dir: str = "out/pretrain") -> dict:
    return yaml.safe_load(Path(out_dir, "hyperparameters.yaml").read_text())


def test_flat_recipe_runs_and_its_record_repeats_it(place, capsys):
    assert run("--config", "tiny.yaml") == 0
    config = Config.from_checkpoint(Path("out/pretrain/final"))
    assert (config.name, config.n_layer, config.rotary_percentage, config.block_size) == ("tiny", 2, 0.25, 32)
    assert config.vocab_size == 300
    assert {p.name for p in Path("out/pretrain/final").iterdir()} == {
        *("lit_model.pth", "model_config.yaml", "config.json", "tokenizer.json", "tokenizer_config.json"),
        *("hyperparameters.yaml", "training_state.pth"),
    }
    assert settings() == settings("out/pretrain/final")
    first = read_metrics(place / "out/pretrain/metrics.csv")
    assert len(first) == 3
    assert run("--config", "out/pretrain/hyperparameters.yaml", "--out_dir", "again") == 0
    assert [r["loss"] for r in read_metrics(place / "again/metrics.csv")] == [r["loss"] for r in first]
    printed = capsys.readouterr().out
    assert "litgpt chat out/pretrain/final" in printed
    assert f"Saving checkpoint to '{Path('out/pretrain/final')}'" in printed


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_dry_run_says_what_the_model_will_take(place, capsys, precision):
    """Its figures are those of the model that is then trained, though it makes no tokenizer, no weights and no files."""
    words = ["--config", "tiny.yaml", "--precision", precision, "--train.epochs", "1", "--train.max_seq_length", "24"]
    assert run(*words, "--dry_run", "true") == 0
    dry = capsys.readouterr().out
    assert "--dry_run: nothing was trained." in dry
    assert "Steps: at most 3, and no more than train.epochs 1 of the data" in dry
    assert not (place / "out").exists()
    assert not (place / "cache").exists()

    assert run(*words) == 0
    gpt = load_model(place / "out/pretrain/final")
    usage = Usage(trains=True, batch_size=2, context=24)
    for line in (
        f"Number of trainable parameters: {sum(p.numel() for p in gpt.parameters()):,} (100.00% of all)",
        "Number of non-trainable parameters: 0",
        f"FLOPs per token: {flops_per_token(gpt, 24):,.0f} (forward and backward pass)",
        "Tokens per step: 2 sequences x 2 accumulation x 1 device x 24 tokens = 96",
        f"Estimated memory: {sum(estimate_memory(gpt, usage).values()) / 1e9:.1f} GB at full length",
    ):
        assert line in dry
    trained = (place / "out/pretrain/logs.txt").read_text()
    figures = [line for line in dry.splitlines() if line.startswith(("Number", "FLOPs", "Tokens", "Estimated"))]
    assert all(line in trained for line in figures)


def test_a_dry_run_needs_no_data_and_leaves_the_run_that_is_there(place, capsys):
    assert run("--config", "tiny.yaml") == 0
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert run("pythia-14m", "--dry_run", "true", "--overwrite", "true", "--devices", "1") == 0
    out = capsys.readouterr().out
    gpt = meta_model(Config.from_name("pythia-14m"))
    assert f"Number of trainable parameters: {gpt.num_parameters():,} (100.00% of all)" in out
    assert "x 512 tokens = 262,144\nSteps: 11,444,092\n" in out  # 3e12 tokens
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
    assert "--train.max_seq_length 513 is longer" in fails(
        capsys, "pythia-14m", "--dry_run", "true", "--train.max_seq_length", "513"
    )


def test_a_dry_run_counts_what_optimizer_and_precision_take(place, capsys):
    """Of Pythia-160M: AdamW keeps two values for each of 162 million weights, in the type of the weights."""
    needs = {}
    for optimizer, precision in (("AdamW", "32-true"), ("SGD", "32-true"), ("AdamW", "bf16-true")):
        words = [f"--optimizer={optimizer}", "--optimizer.lr=0.1", f"--precision={precision}", "--devices=1"]
        assert run("pythia-160m", "--dry_run", "true", "--train.micro_batch_size=1", *words) == 0
        estimate = re.search(r"Estimated memory: ([\d.]+) GB", capsys.readouterr().out)
        needs[optimizer, precision] = float(estimate[1])
    whole = needs["AdamW", "32-true"]
    assert whole - needs["SGD", "32-true"] == pytest.approx(2 * 4 * 0.1623, abs=0.11)
    assert whole - needs["AdamW", "bf16-true"] > 4 * 2 * 0.1623 - 0.11  # weights and gradients, too, take half


def test_every_spelling_of_the_optimizer(place):
    for words, expected in (
        (["--optimizer.lr", "0.005"], ("torch.optim.AdamW", 0.005, 0.1)),
        (["--train.learning_rate", "2e-5"], ("torch.optim.AdamW", 2e-5, 0.1)),
        (["--optimizer", "SGD", "--optimizer.lr", "0.1"], ("torch.optim.SGD", 0.1, None)),
        (
            ["--optimizer.class_path", "torch.optim.SGD", "--optimizer.init_args.lr", "0.1"],
            ("torch.optim.SGD", 0.1, None),
        ),
    ):
        assert run("--config", "tiny.yaml", "--max_steps", "2", "--overwrite", "true", *words) == 0
        kept = settings()["optimizer"]
        rate = float(read_metrics(place / "out/pretrain/metrics.csv")[1]["learning_rate"])
        assert (kept["class_path"], kept["init_args"].get("weight_decay")) == (expected[0], expected[2])
        assert rate == pytest.approx(expected[1]), words


def test_seed_document_spellings_act(place):
    """What the seeds type: `--train.logger_name`, accumulation, decay length, `--train.lr_warmup_steps=1`."""
    words = ["--train.gradient_accumulation_iters", "3", "--train.lr_decay_iters", "2", "--train.min_lr", "1e-5"]
    recipe = TINY.replace("global_batch_size: 4\n", "").replace("logger_name: csv\n", "")
    Path("seed.yaml").write_text(recipe)
    assert run("--config", "seed.yaml", "--train.lr_warmup_steps=1", "--train.logger_name", "csv", *words) == 0
    rows = read_metrics(place / "out/pretrain/metrics.csv")
    assert rows[0]["tokens"] == str(2 * 3 * 32)
    assert [float(r["learning_rate"]) for r in rows] == pytest.approx([4e-4, 4e-4, 1e-5])
    assert not (place / "out/pretrain/logs").exists()


def test_resume_and_overwrite(place, capsys):
    assert run("--config", "tiny.yaml", "--train.save_interval", "2") == 0
    error = fails(capsys, "--config", "tiny.yaml")
    assert "--resume auto" in error
    assert run("--config", "tiny.yaml", "--resume", "auto") == 0
    assert run("--config", "tiny.yaml", "--resume", "out/pretrain/step-00000002", "--train.max_steps", "4") == 0
    assert [r["step"] for r in read_metrics(place / "out/pretrain/metrics.csv")] == ["1", "2", "3", "4"]
    assert run("--config", "tiny.yaml", "--overwrite", "true", "--train.max_steps", "1") == 0
    assert [r["step"] for r in read_metrics(place / "out/pretrain/metrics.csv")] == ["1"]


@pytest.mark.parametrize(
    "tokenizer", [["--tokenizer_dir", "out/pretrain/final"], []], ids=["named", "the checkpoint's own"]
)
def test_continued_pretraining_on_another_text(place, capsys, tokenizer):
    assert run("--config", "tiny.yaml") == 0
    (place / "texts2").mkdir()
    (place / "texts2/two.txt").write_bytes(TEXT.read_bytes()[500_000:520_000])
    words = ["tiny", "--initial_checkpoint_dir", "out/pretrain/final", *tokenizer]
    words += [
        "--out_dir",
        "second",
        "--data",
        "TextFiles",
        "--data.train_data_path",
        "texts2",
        "--data.num_workers",
        "0",
    ]
    words += ["--train.max_tokens", "1_000", "--train.global_batch_size=4", "--logger_name=csv", "--devices=1"]
    words += ["--optimizer.lr", "0", "--eval.initial_validation", "true", "--eval.max_iters", "2"]
    assert run(*words) == 0
    before, after = (torch.load(p / "final/lit_model.pth") for p in (place / "out/pretrain", place / "second"))
    assert all(torch.equal(before[name], after[name]) for name in before)  # nothing is learnt at a rate of 0
    texts = [(p / "final/tokenizer.json").read_text() for p in (place / "out/pretrain", place / "second")]
    assert texts[0] == texts[1]
    assert read_metrics(place / "second/metrics.csv")[-1]["tokens"] == str(8 * 128)  # 1,000 rounded up to a step
    capsys.readouterr()
    assert run(*words, "--out_dir", "with the default", "--optimizer.lr", "4e-4") == 0
    assert "A tenth is usual for going on: --optimizer.lr 4e-05." in capsys.readouterr().out
    Path("other.yaml").write_text(TINY.replace("n_embd: 32", "n_embd: 64"))
    error = fails(capsys, *words[:5], "--out_dir", "third", "--model_config.n_embd", "64", *words[7:])
    assert "does not fit the model" in error


def test_the_head_is_tied_as_the_model_has_it(place):
    """By name as it was published, from a checkpoint as that has it, and otherwise where the settings say so."""
    recipe = TINY.replace("model_name: tiny", "model_name: SmolLM2-135M\nn_query_groups: 2")
    Path("known.yaml").write_text(recipe.replace("max_steps: 3", "max_steps: 1"))
    start = ["--initial_checkpoint_dir", "named/final", "--tokenizer_dir", "named/final"]
    for out_dir, words, tied in (
        ("named", [], True),
        ("named and untied", ["--train.tie_embeddings", "false"], False),
        ("continued", start, True),
        ("continued and untied", [*start, "--train.tie_embeddings", "false"], False),
    ):
        if start[0] in words:
            words = [*words, "--tokenizer_vocab_size", "null"]
        assert run("--config", "known.yaml", "--out_dir", out_dir, *words) == 0
        weights = torch.load(place / out_dir / "final/lit_model.pth")
        places = {weights[name].data_ptr() for name in ("lm_head.weight", "transformer.wte.weight")}
        assert (len(places) == 1) == tied, out_dir


def test_a_data_module_of_ones_own(place):
    Path("my_data.py").write_text(
        "import torch\n"
        "from litgpt.data import DataModule\n"
        "class Counting(DataModule):\n"
        "    def __init__(self, first: int = 0):\n"
        "        self.first = first\n"
        "    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):\n"
        "        self.batch_size, self.length = batch_size, max_seq_length\n"
        "    def train_dataloader(self):\n"
        "        rows = [torch.arange(self.first, self.first + self.length + 1) % 50 for _ in range(12)]\n"
        "        return torch.utils.data.DataLoader(rows, batch_size=self.batch_size)\n"
    )
    recipe = TINY.partition("data:")[0].replace("tokenizer_vocab_size: 300\n", "vocab_size: 60\n")
    Path("own.yaml").write_text(recipe)
    assert run("--config", "own.yaml", "--data", "my_data.Counting", "--data.first", "7") == 0
    assert settings()["data"] == {"class_path": "my_data.Counting", "init_args": {"first": 7}}
    assert not (place / "out/pretrain/final/tokenizer.json").exists()
    rows = read_metrics(place / "out/pretrain/metrics.csv")
    assert [r["val_loss"] for r in rows] == ["", "", ""]


def test_precisions(place, capsys):
    assert run("--config", "tiny.yaml", "--precision", "bf16-true") == 0
    assert {t.dtype for t in torch.load("out/pretrain/final/lit_model.pth").values()} == {torch.bfloat16}
    assert run("--config", "tiny.yaml", "--precision", "bf16-mixed", "--overwrite", "true") == 0
    assert {t.dtype for t in torch.load("out/pretrain/final/lit_model.pth").values()} == {torch.float32}
    assert run("--config", "tiny.yaml", "--precision", "64-true", "--overwrite", "true") == 0
    assert torch.load(place / "out/pretrain/final/lit_model.pth")["lm_head.weight"].dtype == torch.float64
    error = fails(capsys, "--config", "tiny.yaml", "--precision", "bf16", "--out_dir", "x")
    assert "--precision bf16 is unknown. Choose one of: 32-true" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--global_batch_size", "5"], "--train.global_batch_size 5 is not divisible by --train.micro_batch_size 2"),
        (["--train.micro_batch_size", "0"], "train.micro_batch_size 0 is too small"),
        (["--data.train_data_path", "nowhere"], "--data.train_data_path nowhere: no such file or folder"),
        (["--data.train_data_path", "empty"], "holds no .txt file (it is empty)"),
        (["--model_config.block_size", "50000"], "too short"),
        (["--train.max_seq_length", "33"], "--train.max_seq_length 33 is longer than the model's context of 32"),
        (["--tokenizer_vocab_size", "100"], "--tokenizer_vocab_size 100 is too small"),
        (["--tokenizer_vocab_size", "null"], "--tokenizer_dir"),
        (["--tokenizer_dir", "nowhere/at/all", "--tokenizer_vocab_size", "null"], "nowhere/at/all"),
        (["--optimizer", "AdmW"], "AdamW"),
        (["--optimizer.learning_rte", "1"], "learning_rte"),
        (["--logger_name", "tensorbord"], "Did you mean 'tensorboard'"),
        (["--resume", "true"], "there is no checkpoint of a run in out/pretrain"),
        (["--devices", "many"], "--devices many is not a number of devices"),
        (["--strategy", "magic"], "magic"),
        (["--train.max_step", "1"], "Did you mean '--train.max_steps'"),
        (["--eval.evaluate_example", "random"], "--eval.evaluate_example is for finetuning"),
        (["--initial_checkpoint_dir", "nowhere"], "nowhere"),
        (["--model_config.n_head", "3"], "n_head"),
        (["--max_steps", "null", "--train.max_tokens", "null"], "Nothing ends this run"),
    ],
)
def test_mistakes_are_explained_before_any_work(place, capsys, words, message):
    (place / "empty").mkdir()
    error = fails(capsys, "--config", "tiny.yaml", *words)
    assert message in error
    assert not (place / "out/pretrain/final").exists()
    assert not (place / "out/pretrain/metrics.csv").exists()


def test_no_data_and_unknown_model(capsys):
    assert "--data TextFiles" in fails(capsys, "pythia-14m", "--logger_name=csv")
    data = [
        "--data",
        "TextFiles",
        "--data.train_data_path",
        "texts",
        "--tokenizer_vocab_size",
        "300",
        "--logger_name=csv",
    ]
    assert "pythia-14m" in fails(capsys, "pythia-14n", *data, "--devices=1")


@pytest.mark.parametrize("recipe", sorted((ROOT / "config_hub/pretrain").glob("*.yaml")), ids=lambda p: p.name)
def test_packaged_recipes_are_complete(recipe, capsys):
    """Every recipe parses, names a model that exists, and comes to a batch that divides."""
    assert run("--config", f"config_hub/pretrain/{recipe.name}", "--print_config") == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    train = resolved["train"]
    assert train["global_batch_size"] % train["micro_batch_size"] == 0
    assert resolved["out_dir"].startswith("out/pretrain/")
