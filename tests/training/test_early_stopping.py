"""The best checkpoint is kept, and a run that no longer gets better ends; both go on exactly where a run was killed."""

import pytest
import torch

from litgpt.training.arguments import EvalArgs
from litgpt.training.criterion import Criterion
from litgpt.training.metrics import read_metrics
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.state import Progress, read_training_state
from tests.training.conftest import assert_same_run, killed_in_step, weights

STUCK = OptimizerSpec("AdamW", {"lr": 0.0})  # the first validation stays the best
PATIENT = EvalArgs(interval=2, max_iters=2, patience=2)


def test_out_of_patience(train, tmp_path, capsys):
    rows = train(tmp_path / "run", max_steps=40, optimizer=STUCK, eval=PATIENT)
    assert [row["step"] for row in rows if row["val_loss"]] == ["2", "4", "6"]
    assert len(rows) == 6
    assert read_training_state(tmp_path / "run/best")["progress"]["step"] == 2
    assert read_training_state(tmp_path / "run/final")["progress"]["stale_validations"] == 2
    best = f"Lowest validation loss: {float(rows[1]['val_loss']):.3f}, at step 2: {tmp_path / 'run/best'}"
    assert f"{best}\nNo lower one came in 2 validations (--eval.patience): training ends.\n" in capsys.readouterr().out
    # It stays finished, until it is given more patience.
    before = (tmp_path / "run/final/lit_model.pth").stat().st_mtime_ns
    train(tmp_path / "run", max_steps=40, optimizer=STUCK, eval=PATIENT, resume="auto")
    assert (tmp_path / "run/final/lit_model.pth").stat().st_mtime_ns == before
    more = EvalArgs(interval=2, max_iters=2, patience=3)
    assert len(train(tmp_path / "run", max_steps=40, optimizer=STUCK, eval=more, resume="auto")) == 8


def test_a_run_that_learns_is_not_stopped(train, tmp_path, capsys):
    rows = train(tmp_path / "run", max_steps=12, eval=PATIENT, keep_best=True)
    assert len(rows) == 12
    losses = {int(row["step"]): float(row["val_loss"]) for row in rows if row["val_loss"]}
    progress = Progress(**read_training_state(tmp_path / "run/best")["progress"])
    assert (progress.best_step, progress.best_value) == (12, min(losses.values()))
    output = capsys.readouterr().out
    assert "at step 12: " in output
    assert "No lower one" not in output
    for name, tensor in weights(tmp_path / "run/final").items():
        assert torch.equal(tensor, weights(tmp_path / "run/best")[name])


def test_no_best_unless_wanted(train, tmp_path):
    train(tmp_path / "run", max_steps=4, eval=EvalArgs(interval=2, max_iters=2))
    assert not (tmp_path / "run/best").exists()
    train(tmp_path / "run", max_steps=4, eval=EvalArgs(interval=2, max_iters=2), keep_best=True, overwrite=True)
    assert (tmp_path / "run/best/lit_model.pth").exists()
    with pytest.raises(ValueError, match="already holds a run"):
        train(tmp_path / "run", max_steps=4)
    train(tmp_path / "run", max_steps=1, overwrite=True)
    assert not (tmp_path / "run/best").exists()


def test_resumes_exactly_from_the_best(train, tmp_path, monkeypatch):
    """Killed after one validation in vain, with the best as the only checkpoint."""
    options = {"max_steps": 40, "optimizer": STUCK, "eval": PATIENT, "save_interval": None}
    train(tmp_path / "whole", **options)
    with killed_in_step(6, monkeypatch):
        train(tmp_path / "parts", **options)
    assert [int(row["step"]) for row in read_metrics(tmp_path / "parts/metrics.csv")] == [1, 2, 3, 4, 5]
    train(tmp_path / "parts", **options, resume="auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rows=6)


def test_resumes_exactly_from_the_middle_of_its_patience(train, tmp_path, monkeypatch):
    options = {"max_steps": 40, "optimizer": STUCK, "eval": PATIENT, "save_interval": 5}
    train(tmp_path / "whole", **options)
    with killed_in_step(6, monkeypatch):
        train(tmp_path / "parts", **options)
    train(tmp_path / "parts", **options, resume=tmp_path / "parts/step-00000005")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rows=6)


def test_a_loss_that_is_no_number_is_never_the_best():
    progress = Progress(step=1)
    assert not progress.judge(float("nan"), Criterion())
    assert progress.judge(2.0, Criterion())
    progress.step = 2
    assert not progress.judge(float("nan"), Criterion())
    assert not progress.judge(2.0, Criterion())
    assert (progress.best_step, progress.stale_validations) == (1, 2)


def test_patience_without_validation_data_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match=r"eval\.patience=2: there is no validation data"):
        train(tmp_path / "run", max_steps=2, eval=PATIENT, data={"val_split_fraction": 0.0})
