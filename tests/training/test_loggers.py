"""Every logger gets every number."""

import builtins
import json

import pytest

from litgpt.training.arguments import LogArgs
from litgpt.training.loggers import check_logger, flat, make_logger


def test_tensorboard(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = train(tmp_path / "run", max_steps=3, logger_name="tensorboard")
    events = EventAccumulator(str(tmp_path / "run/lightning_logs/tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([float(r["loss"]) for r in rows])
    assert len(events.Scalars("val_loss")) == 1


def test_mlflow(train, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log = LogArgs(project="plays", run="one", group="tests", log_model=True, checkpoint_name="bard")
    rows = train(tmp_path / "run", max_steps=2, logger_name="mlflow", log=log)
    client = mlflow.MlflowClient((tmp_path / "run/logs/mlruns").as_uri())
    experiment = client.get_experiment_by_name("plays")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["group"]) == ("one", "FINISHED", "tests")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [m.value for m in history] == [float(r["loss"]) for r in rows]
    assert "bard/lit_model.pth" in [a.path for a in client.list_artifacts(run.info.run_id, "bard")]


def test_wandb_without_a_login_says_what_to_do(train, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"^logger_name=wandb: No API key configured\. Run `wandb login`"):
        train(tmp_path / "run", max_steps=1, logger_name="wandb", log=LogArgs())


def test_wandb(train, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path / "run", max_steps=2, logger_name="wandb", log=LogArgs(project="plays", metadata={"who": "me"}))
    assert list((tmp_path / "run/logs").glob("wandb/offline-run-*/run-*.wandb"))


class OwnLogger:
    made: list["OwnLogger"] = []  # noqa: RUF012

    def __init__(self, save_dir: str, name: str = "x"):
        self.save_dir, self.name, self.rows, self.ended = save_dir, name, {}, None
        OwnLogger.made.append(self)

    def log_metrics(self, metrics, step=None):
        self.rows[step] = metrics

    def finalize(self, status):
        self.ended = status


def test_a_class_of_ones_own(train, tmp_path):
    OwnLogger.made.clear()
    rows = train(tmp_path / "run", max_steps=2, logger_name=f"{__name__}.OwnLogger", log=LogArgs(run="mine"))
    (logger,) = OwnLogger.made
    assert (logger.save_dir, logger.name, logger.ended) == (str(tmp_path / "run/logs"), "mine", "success")
    assert logger.rows[2]["loss"] == float(rows[1]["loss"])


@pytest.mark.parametrize(
    ("name", "log", "message"),
    [
        ("tensorbord", LogArgs(), "Did you mean 'tensorboard'"),
        ("litlogger", LogArgs(), "litlogger is unknown.*csv, tensorboard, wandb, mlflow"),
        ("no.such.Logger", LogArgs(), "no.such.Logger: No module named 'no'"),
        ("json.JSONDecoder", LogArgs(), "a class with log_metrics"),
        ("csv", LogArgs(log_model=True), "log.log_model=true: the logger csv"),
        ("csv", LogArgs(teamspace="x"), "`log.teamspace`"),
        ("wandb", LogArgs(checkpoint_name="x"), "needs log.log_model=true"),
    ],
)
def test_wrong_loggers_are_explained(name, log, message):
    with pytest.raises(ValueError, match=message):
        check_logger(name, log)


def test_a_missing_package_says_what_to_install(monkeypatch, tmp_path):
    real = builtins.__import__
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.setattr(builtins, "__import__", real)
    with pytest.raises(ValueError, match=r"needs the package wandb: pip install wandb"):
        check_logger("wandb", LogArgs())


def test_without_logs_txt(train, tmp_path):
    train(tmp_path / "run", max_steps=1, log=LogArgs(save_logs=False))
    assert not (tmp_path / "run/logs.txt").exists()


def test_flat_settings():
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": {}}) == {"a.b": 1, "a.c.d": 2, "e": {}}
    make_logger("csv", None, LogArgs(), json.loads("{}")).log_metrics({"loss": 1.0}, 1)
