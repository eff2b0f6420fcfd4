"""What a training run was asked to do: the options that all training commands take.

Their defaults are those of finetuning. `litgpt pretrain` has others, and options of its own, in its signature.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from litgpt.cli.secret import Secret
from litgpt.data.base import DataModule
from litgpt.parallel.fabric import Strategy
from litgpt.training.arguments import EvalArgs, LogArgs, TrainArgs
from litgpt.training.optimizers import OptimizerSpec

TRAIN = TrainArgs(
    save_interval=1000, global_batch_size=16, micro_batch_size=1, lr_warmup_steps=100, epochs=5, keep_best=True
)
EVAL = EvalArgs(interval=100, max_new_tokens=100)
OPTIMIZER = OptimizerSpec("torch.optim.AdamW", {})


@dataclass
class RunOptions:
    """The options that every training command takes."""

    precision: str | None = None
    """32-true, bf16-true, bf16-mixed or 16-mixed; by default mixed on a GPU and 32-true elsewhere."""
    devices: int | str = 1
    """Devices per node; auto takes all."""
    num_nodes: int = 1
    """Machines."""
    strategy: Strategy = "auto"
    """Over several devices, fsdp shards the model (auto is fsdp), ddp copies it."""
    resume: bool | str | Path = False
    """true continues from the newest checkpoint in out_dir; auto does so where there is one and starts afresh
    otherwise; a path continues from that checkpoint."""
    overwrite: bool = False
    """Delete the run that out_dir holds."""
    data: DataModule | None = None
    """What to train on, for example `--data JSON --data.json_path FILE`; by default Alpaca."""
    train: TrainArgs = field(default_factory=lambda: replace(TRAIN))
    """How long, in which batches, with which schedule."""
    eval: EvalArgs = field(default_factory=lambda: replace(EVAL))
    """When to validate."""
    log: LogArgs = field(default_factory=LogArgs)
    """For the loggers."""
    optimizer: OptimizerSpec = field(default_factory=lambda: OPTIMIZER)
    """A torch.optim class or your own, and its arguments (--optimizer.lr 0.001)."""
    compile: bool = False
    """Compile the model's blocks with torch.compile; the first step then takes long."""
    compiler: str | None = None
    """What compiles the blocks; naming one implies --compile true: torch (the default), or thunder for Lightning
    Thunder (extensions/thunder)."""
    logger_name: str = "csv"
    """csv, tensorboard, wandb, mlflow, or the dotted path of a logger class."""
    seed: int = 1337
    """Decides all random numbers."""
    access_token: Secret | None = None
    """For downloading a gated model."""


@dataclass
class FinetuneOptions(RunOptions):
    """The options that every finetuning command takes."""

    chat_template: str | None = None
    """Name of the checkpoint's chat template to train with, where it has several; by default the usual one, and
    tool_use where a record has tools."""
    dry_run: bool = False
    """Stop before training: show what would be done, the memory needed and a training sample."""
