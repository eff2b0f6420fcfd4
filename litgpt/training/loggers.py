"""Where metrics go besides metrics.csv: tensorboard, wandb, mlflow, or a logger class of the user's own."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

from litgpt.cli.own_code import import_named
from litgpt.cli.record import without_secrets
from litgpt.cli.suggest import did_you_mean
from litgpt.training.arguments import LogArgs

NAMES = ("csv", "tensorboard", "wandb", "mlflow")


class Logger:
    """A logger that keeps nothing: `metrics.csv` is written in any case, and is all that `csv` asks for."""

    def __init__(self, directory: Path, log: LogArgs, settings: dict[str, Any]) -> None:
        """Args: a directory for its files, the LogArgs, and the run's settings as plain values."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Record numbers by name at an optimizer step."""

    def log_checkpoint(self, directory: Path, name: str) -> None:
        """Upload a finished checkpoint."""

    def finish(self) -> None:
        """The run is over."""


class TensorBoardLogger(Logger):
    def __init__(self, directory: Path, log: LogArgs, settings: dict[str, Any]) -> None:
        _need("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))
        self.writer.add_text("settings", "\n".join(f"    {k}: {v}" for k, v in flat(settings).items()))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class WandbLogger(Logger):
    def __init__(self, directory: Path, log: LogArgs, settings: dict[str, Any]) -> None:
        wandb = _need("wandb", "wandb")
        directory.mkdir(parents=True, exist_ok=True)
        self.wandb = wandb
        try:
            self.run = wandb.init(
                project=log.project or "litgpt", name=log.run, group=log.group, dir=str(directory), config=settings
            )
        except wandb.errors.UsageError as error:
            raise ValueError(
                f"logger_name=wandb: {str(error).strip()} Run `wandb login`, set WANDB_API_KEY, or set "
                "WANDB_MODE=offline to send it later."
            ) from None

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.run.log(metrics, step=step)

    def log_checkpoint(self, directory: Path, name: str) -> None:
        artifact = self.wandb.Artifact(name, type="model")
        artifact.add_dir(str(directory))
        self.run.log_artifact(artifact)

    def finish(self) -> None:
        self.run.finish()


class MlflowLogger(Logger):
    def __init__(self, directory: Path, log: LogArgs, settings: dict[str, Any]) -> None:
        import os

        mlflow = _need("mlflow", "mlflow-skinny")
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            directory.mkdir(parents=True, exist_ok=True)
            # mlflow 3 has put its folders into maintenance and refuses them unless told.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            mlflow.set_tracking_uri((directory / "mlruns").absolute().as_uri())
        mlflow.set_experiment(log.project or "litgpt")
        self.mlflow = mlflow
        self.run = mlflow.start_run(run_name=log.run, tags={"group": log.group} if log.group else None)
        settings = {k: str(v)[:6000] for k, v in flat(settings).items()}  # mlflow's own limit
        mlflow.log_params(settings)

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(metrics, step=step)

    def log_checkpoint(self, directory: Path, name: str) -> None:
        self.mlflow.log_artifacts(str(directory), artifact_path=name)

    def finish(self) -> None:
        self.mlflow.end_run()


class ForeignLogger(Logger):
    """A user's own class with `log_metrics(metrics, step)`, such as Lightning's loggers have.

    It is made with those of its arguments that have one of the names save_dir, root_dir, dir (a directory for its
    files), name, version, project, group, config that it takes.
    """

    def __init__(self, cls: type, directory: Path, log: LogArgs, settings: dict[str, Any]) -> None:
        offered = {
            **dict.fromkeys(("save_dir", "root_dir", "dir"), str(directory)),
            **{"name": log.run or "litgpt", "project": log.project, "group": log.group, "config": settings},
        }
        taken = {k: v for k, v in offered.items() if k in inspect.signature(cls).parameters and v is not None}
        self.logger = cls(**taken)
        if hasattr(self.logger, "log_hyperparams"):
            self.logger.log_hyperparams(flat(settings))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.logger.log_metrics(metrics, step=step)

    def finish(self) -> None:
        if hasattr(self.logger, "finalize"):
            self.logger.finalize("success")


def check_logger(name: str, log: LogArgs) -> None:
    """Refuse, before any work, a logger that is unknown or not installed, and settings that it does not support."""
    if log.teamspace is not None:
        raise ValueError("`log.teamspace`: none of the loggers here has teamspaces. Leave it out.")
    if log.log_model and name not in ("wandb", "mlflow"):
        raise ValueError(f"log.log_model=true: the logger {name} takes no checkpoints; wandb and mlflow do.")
    if log.checkpoint_name is not None and not log.log_model:
        raise ValueError("`log.checkpoint_name` needs log.log_model=true: it names the uploaded checkpoint.")
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
    if name in packages:
        _need(name, packages[name])
    elif name != "csv":
        _load_class(name)


def make_logger(name: str, directory: Path, log: LogArgs, settings: dict[str, Any]) -> Logger:
    """The logger called `name`: one of NAMES, or the dotted path of a class."""
    settings = {**settings, **(without_secrets({"metadata": log.metadata}) if log.metadata else {})}
    own = {"csv": Logger, "tensorboard": TensorBoardLogger, "wandb": WandbLogger, "mlflow": MlflowLogger}
    if name in own:
        return own[name](directory, log, settings)
    return ForeignLogger(_load_class(name), directory, log, settings)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"epochs": 1}}` as `{"train.epochs": 1}`."""
    result = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            result.update(flat(value, f"{prefix}{name}."))
        else:
            result[f"{prefix}{name}"] = value
    return result


def _need(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"logger_name={module} needs the package {package}: pip install {package} (or 'litgpt[all]'). "
            "logger_name=csv needs nothing."
        ) from error


def _load_class(path: str) -> type:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_named(module), name) if module else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"logger_name={path}: {error}.") from error
    if not (isinstance(cls, type) and hasattr(cls, "log_metrics")):
        raise ValueError(
            f"logger_name={path} is unknown.{did_you_mean(path, NAMES)} Choose one of {', '.join(NAMES)}, or give "
            "the dotted path of a class with log_metrics(metrics, step)."
        )
    return cls
