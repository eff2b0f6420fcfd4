"""Learning from pairs: exact resume, any micro-batch size, any number of ranks, what is learned and what is left."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from litgpt.__main__ import main
from litgpt.adaptation.lora import LORA_WEIGHTS, apply_lora, read_lora
from litgpt.checkpoint import WEIGHTS, save_model
from litgpt.cli.flat import flattened
from litgpt.commands import finetune_dpo, finetune_lora
from litgpt.data import JSON, Preferences
from litgpt.runs.options import OPTIMIZER, FinetuneOptions
from litgpt.sources.load import load_model
from litgpt.training.arguments import EvalArgs, TrainArgs
from litgpt.training.metrics import read_metrics
from tests import checkpoint_files
from tests.data_damage import flip
from tests.training.conftest import assert_close_runs, assert_same_run, killed_in_step, on_two_ranks

SLOW = replace(OPTIMIZER, init_args={"lr": 0.0003})
METHODS = {
    # name: (own options, the file that its checkpoints hold)
    "full": ({"method": "full", "dpo_loss": "ipo", "optimizer": SLOW}, WEIGHTS),
    "lora": ({"lora_mlp": True, "lora_dropout": 0.1, "dpo_label_smoothing": 0.1}, LORA_WEIGHTS),
    "qlora": ({"quantize": "bnb.nf4", "lora_projection": True}, LORA_WEIGHTS),
    "dora": ({"lora_dora": True, "lora_dropout": 0.0, "lora_plus_ratio": 4.0}, LORA_WEIGHTS),
}
TRAIN_FIELDS = TrainArgs.__dataclass_fields__.keys() - {"logger_name"}
EVALUATION = EvalArgs(interval=4, max_iters=3, max_new_tokens=4)
FIGURES = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = checkpoint_files.chat_model(tmp_path_factory.mktemp("base"))
    model = load_model(directory)
    torch.manual_seed(0)
    model.init_weights()
    save_model(directory, model, model.config)
    return directory


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Ragged: replies of one to forty words; the numbers in order are preferred to those in reverse."""
    path = tmp_path_factory.mktemp("records") / "records.json"
    rows = []
    for n in range(2, 42):
        words = list(map(str, range(1, n + 1)))
        rows.append({"prompt": f"Count to {n}.", "chosen": " ".join(words), "rejected": " ".join(reversed(words))})
    path.write_text(json.dumps(rows))
    return path


def run(method: str, base: Path, records: Path, out_dir: Path, **options) -> list[dict]:
    """Trains with tiny settings; keyword arguments change them."""
    settings = {name: options.pop(name) for name in list(options) if name in TRAIN_FIELDS}
    small = {"global_batch_size": 8, "micro_batch_size": 4, "lr_warmup_steps": 2, "epochs": None}
    flattened(finetune_dpo.setup)(
        checkpoint_dir=base,
        out_dir=out_dir,
        data=Preferences(json_path=records, val_split_fraction=0.25, num_workers=0),
        train=replace(finetune_dpo.TRAIN, **{**small, **settings}),
        **{
            "eval": EVALUATION,
            "optimizer": replace(OPTIMIZER, init_args={"lr": 0.003}),
            **METHODS[method][0],
            **options,
        },
    )
    return read_metrics(out_dir / "metrics.csv")


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_resumed_equals_uninterrupted(method, base, records, tmp_path, monkeypatch):
    run(method, base, records, tmp_path / "whole", max_steps=12)
    with killed_in_step(9, monkeypatch):
        run(method, base, records, tmp_path / "parts", max_steps=12, save_interval=5)
    torch.manual_seed(7)
    run(method, base, records, tmp_path / "parts", max_steps=12, save_interval=5, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rows=12, file=METHODS[method][1])


@pytest.mark.parametrize("method", ["full", "dora"])
def test_one_by_eight_equals_eight_by_one(method, base, records, tmp_path):
    one = run(method, base, records, tmp_path / "one", max_steps=6, micro_batch_size=8, eval=EvalArgs(interval=99))
    eight = run(method, base, records, tmp_path / "eight", max_steps=6, micro_batch_size=1, eval=EvalArgs(interval=99))
    assert float(one[-1]["loss"]) != pytest.approx(float(one[0]["loss"]), rel=1e-3)
    for a, b in zip(one, eight, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-4)
        assert [float(a[name]) for name in FIGURES] == pytest.approx([float(b[name]) for name in FIGURES], abs=1e-4)


ON_TWO_RANKS = """
import sys
from pathlib import Path
from tests.training.test_finetune_dpo import run
method, base, records, out_dir, strategy = sys.argv[1:]
run(method, Path(base), Path(records), Path(out_dir), max_steps=6, micro_batch_size=2, devices=2, strategy=strategy)
"""


@pytest.mark.parametrize(("method", "strategy"), [("full", "fsdp"), ("dora", "ddp"), ("dora", "fsdp")])
def test_two_ranks_equal_one(method, strategy, base, records, tmp_path):
    one = run(method, base, records, tmp_path / "one", max_steps=6, micro_batch_size=2)
    on_two_ranks(ON_TWO_RANKS, tmp_path, method, base, records, tmp_path / "two", strategy)
    assert_close_runs(tmp_path / "one", tmp_path / "two", range(1, 7), METHODS[method][1])
    for a, b in zip(one, read_metrics(tmp_path / "two/metrics.csv"), strict=True):
        for name in (*FIGURES, *(f"val_{figure}" for figure in FIGURES if a["val_loss"])):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-4), (a["step"], name)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_is_preferred_is_learned(method, base, records, tmp_path, capsys):
    """... on pairs that were held out; at the start, the model is the reference."""
    evaluation = replace(EVALUATION, interval=15, initial_validation=True)
    rows = run(method, base, records, tmp_path, max_steps=30, eval=evaluation, lr_warmup_steps=3)
    before, after = rows[0], rows[-1]
    assert [float(before[f"val_{name}"]) for name in FIGURES[:3]] == pytest.approx([0, 0, 0], abs=1e-4)
    assert float(after["val_reward_accuracy"]) >= 0.9
    assert float(after["val_reward_margin"]) > 0.2
    assert float(after["val_loss"]) < float(before["val_loss"])
    for row in rows[1:]:
        margin = float(row["reward_chosen"]) - float(row["reward_rejected"])
        assert margin == pytest.approx(float(row["reward_margin"]), abs=1e-4)
    said = capsys.readouterr().out
    assert f", reward margin: {float(after['val_reward_margin']):.3f}, reward accuracy: " in said
    assert "perplexity" not in said
    assert "Count to" in said  # the sample answer


def test_what_lora_leaves_behind(base, records, tmp_path):
    """The merged model is the reference with the updates."""
    run("lora", base, records, tmp_path, max_steps=3)
    update, settings, of = read_lora(tmp_path / "final")
    assert of == str(base)
    adapted = load_model(base, dtype=torch.float32)
    apply_lora(adapted, settings)
    adapted.load_state_dict(update, strict=False)
    merged, before = load_model(tmp_path / "final", dtype=torch.float32), load_model(base, dtype=torch.float32)
    idx = torch.randint(0, 700, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(merged(idx), adapted.eval()(idx), rtol=1e-5, atol=1e-5)
        assert (merged(idx) - before(idx)).abs().max() > 1e-3


def test_full_computes_the_reference_once(base, records, tmp_path, monkeypatch, capsys):
    """A resumed run takes the one of before, whatever the weights are by then, if it is whole; one on other data does
    not."""
    calls, real = [], finetune_dpo.reference_log_probs
    monkeypatch.setattr(finetune_dpo, "reference_log_probs", lambda *args: calls.append(args) or real(*args))
    run("full", base, records, tmp_path / "out", max_steps=2)
    assert len(calls) == 2  # of the training and of the validation pairs
    run("full", base, records, tmp_path / "out", max_steps=3, resume="auto")
    assert len(calls) == 2
    reference = tmp_path / "out" / finetune_dpo.REFERENCE_FILE
    flip(reference, reference.read_bytes().index(torch.load(reference)["log_probs"][0].numpy().tobytes()))
    run("full", base, records, tmp_path / "out", max_steps=4, resume="auto")
    assert "reference.pth is damaged" in capsys.readouterr().out
    assert len(calls) == 4
    calls.clear()
    others = json.loads(records.read_text())[:20]
    (tmp_path / "others.json").write_text(json.dumps(others))
    with pytest.raises(ValueError, match="the training data: "):
        run("full", base, tmp_path / "others.json", tmp_path / "out", max_steps=5, resume="auto")
    assert len(calls) == 2


def test_the_learning_rate_goes_with_the_method(base, records, tmp_path):
    options = {"optimizer": OPTIMIZER, "max_steps": 1, "lr_warmup_steps": 0, "eval": EvalArgs(interval=99)}
    for method, rate in (("lora", 5e-5), ("full", 5e-6)):
        assert float(run(method, base, records, tmp_path / method, **options)[0]["learning_rate"]) == rate
    given = run("lora", base, records, tmp_path / "given", **options, learning_rate=0.002)
    assert float(given[0]["learning_rate"]) == 0.002


def test_noise_and_checkpointed_activations(base, records, tmp_path):
    """Blocks computed again, with LoRA on again, draw the same numbers; the reference has no noise."""
    options = {"max_steps": 3, "eval": EvalArgs(interval=99)}
    plain = run("lora", base, records, tmp_path / "plain", **options)
    again = run("lora", base, records, tmp_path / "again", activation_checkpointing="full", **options)
    assert [row["loss"] for row in plain] == [row["loss"] for row in again]
    noisy = run("lora", base, records, tmp_path / "noisy", neftune_noise_alpha=5.0, **options)
    assert noisy[0]["loss"] != plain[0]["loss"]


def test_a_dry_run_shows_a_pair(base, records, tmp_path, capsys):
    run("lora", base, records, tmp_path / "out", max_steps=2, dry_run=True)
    out = capsys.readouterr().out
    for line in (
        "Training data: 30 pairs of 30 records (prompt/chosen/rejected); ",
        "Tokens per step: 4 pairs x 2 accumulation x 1 device x up to ",
        "Estimated memory: ",
        "One pair, the chosen reply, what is not trained on in <<...>>:\n<<<|im_start|>user\nCount to",
        "The same, the rejected reply, what is not trained on in <<...>>:\n<<<|im_start|>user\nCount to",
        "--dry_run: nothing was trained.",
    ):
        assert line in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 4}, "--lora_r 4 is for --method lora"),
        ({"quantize": "bnb.nf4"}, "--quantize bnb.nf4 is for --method lora"),
        ({"lora_plus_ratio": 2.0}, "--lora_plus_ratio 2.0 is for --method lora"),
    ],
)
def test_what_full_has_no_use_for_is_refused(options, message, base, records, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("full", base, records, tmp_path, **options)


def test_data_of_the_other_kind_is_refused_by_name(base, records, tmp_path):
    with pytest.raises(ValueError, match=r"`data` is missing: a chosen and a rejected.*data=Preferences"):
        finetune_dpo.setup(base, tmp_path / "out")
    with pytest.raises(ValueError, match="data=JSON holds no pairs of replies"):
        finetune_dpo.setup(base, tmp_path / "out", options=FinetuneOptions(data=JSON(json_path=records)))
    with pytest.raises(ValueError, match="data=Preferences holds pairs of replies, from which `litgpt finetune_dpo`"):
        finetune_lora.setup(base, tmp_path / "out", options=FinetuneOptions(data=Preferences(json_path=records)))


def test_the_command_line(base, records, tmp_path, capsys):
    words = ["finetune_dpo", base, "--data", "Preferences", "--data.json_path", records, "--out_dir", tmp_path / "out"]
    words += ["--dpo_loss", "ipo", "--dpo_beta", "0.5", "--train.max_steps", "1", "--lora_r", "2", "--devices", "1"]
    assert main(list(map(str, words))) == 0
    assert "litgpt chat" in capsys.readouterr().out
    [row] = read_metrics(tmp_path / "out/metrics.csv")
    assert float(row["loss"]) == pytest.approx(1.0)  # (0 - 1 / (2 beta))^2
    recorded = (tmp_path / "out/final/hyperparameters.yaml").read_text()
    assert "dpo_loss: ipo" in recorded
    assert main(list(map(str, [*words[:-2], "--dpo_beta", "-1"]))) != 0
    assert "--dpo_beta -1.0: must be positive" in capsys.readouterr().err
