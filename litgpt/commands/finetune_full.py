"""Finetune all weights of a model."""

import inspect
from functools import partial, wraps
from pathlib import Path

from litgpt import distributed
from litgpt.checkpoint import save_model
from litgpt.commands.finetuning import EVAL, LOGGER, OPTIMIZER, TRAIN, Finetuning, Options
from litgpt.data.base import DataModule
from litgpt.memory import Usage
from litgpt.training.arguments import EvalArgs, LogArgs, TrainArgs
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.state import Saved


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/full"),
    precision: str | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: distributed.Strategy = "auto",
    resume: bool | str | Path = False,
    overwrite: bool = False,
    data: DataModule | None = None,
    train: TrainArgs = TRAIN,
    eval: EvalArgs = EVAL,
    log: LogArgs = LogArgs(),  # noqa: B008
    optimizer: OptimizerSpec = OPTIMIZER,
    compile: bool = False,
    logger_name: str = LOGGER,
    seed: int = 1337,
    access_token: str | None = None,
    dry_run: bool = False,
) -> None:
    """Finetune all weights of a model.

    Args:
        checkpoint_dir: The model to finetune: a checkpoint directory, a known name, or a Hub id, downloaded if need be.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
        precision: 32-true, bf16-true, bf16-mixed or 16-mixed; by default mixed on a GPU and 32-true elsewhere.
        devices: Devices per node; auto takes all.
        num_nodes: Machines.
        strategy: Over several devices, fsdp shards the model (auto is fsdp), ddp copies it.
        resume: true continues from the newest checkpoint in out_dir; auto does so where there is one and starts afresh
            otherwise; a path continues from that checkpoint.
        overwrite: Delete the run that out_dir holds.
        data: What to train on, for example `--data JSON --data.json_path FILE`; by default Alpaca.
        train: How long, in which batches, with which schedule.
        eval: When to validate.
        log: For the loggers.
        optimizer: A torch.optim class or your own, and its arguments (--optimizer.lr 0.001).
        compile: Compile the model's blocks with torch.compile; the first step then takes long.
        logger_name: csv, tensorboard, wandb, mlflow, or the dotted path of a logger class.
        seed: Decides all random numbers.
        access_token: For downloading a gated model.
        dry_run: Stop before training: show what would be done, the memory needed and a training sample.
    """
    settings = dict(sorted(locals().items()))
    job = Finetuning(Options(**settings), settings)
    gpt = job.load_model().requires_grad_(True)
    outcome = job.train(gpt, Usage("full"), Saved(), partial(save_model, config=job.config))
    if outcome is not None and not outcome.interrupted:
        job.console.print(f"To talk with it, run:\nlitgpt chat {outcome.checkpoint}")


@wraps(setup)
def finetune(*args, **options) -> None:
    setup(*args, **options)


# The short name writes to a place of its own; all else is the same.
_parameters = inspect.signature(setup).parameters
finetune.__signature__ = inspect.Signature(
    [p.replace(default=Path("out/finetune")) if p.name == "out_dir" else p for p in _parameters.values()]
)
for command in (setup, finetune):
    command.options_elsewhere = {"lora_": "litgpt finetune_lora", "quantize": "litgpt finetune_lora"}
