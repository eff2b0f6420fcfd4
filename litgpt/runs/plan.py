"""What a run is going to do: the length of its sequences, its logger, and its plan in words."""

from litgpt.config import Config
from litgpt.training.arguments import LogArgs, TrainArgs
from litgpt.training.batches import BatchStream
from litgpt.training.console import Console
from litgpt.training.loggers import check_logger
from litgpt.training.loop import Outcome
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.schedule import Schedule

LOGGER = "tensorboard"


def choose_logger(name: str, other: str | None, log: LogArgs, default: str = LOGGER) -> str:
    """One logger out of `--logger_name`, which is `default` unless given, and `--train.logger_name`, checked."""
    if other is not None and name not in (default, other):
        raise ValueError(f"--logger_name says {name} and --train.logger_name says {other}. Give only one of them.")
    check_logger(other or name, log)
    return other or name


def sequence_length(train: TrainArgs, config: Config) -> int:
    """Tokens per training sequence."""
    if train.max_seq_length is not None and train.max_seq_length > config.block_size:
        raise ValueError(
            f"--train.max_seq_length {train.max_seq_length} is longer than the model's context of {config.block_size}. "
            f"Give {config.block_size} or less. Only `litgpt pretrain` makes the context of a new model larger, with "
            f"--model_config.block_size {train.max_seq_length}."
        )
    return train.max_seq_length or config.block_size


def plan_lines(
    train: TrainArgs,
    schedule: Schedule,
    steps: int | None,
    tokens: int,
    batches: BatchStream,
    optimizer: OptimizerSpec,
    varies: bool = False,
    sample: str = "sequences",
) -> list[str]:
    """What one step is, how many there are, and what may surprise about the schedule.

    `tokens` are those of a `sample`; the most of one where that `varies`.
    """
    accumulation, most = train.accumulation(batches.world_size), "up to " if varies else ""
    lines = [
        f"Tokens per step: {train.micro_batch_size} {sample} x {accumulation} accumulation x {batches.world_size} "
        f"device(s) x {most}{tokens} tokens = {most}{train.global_batch_size * tokens:,}",
        f"Steps: {steps:,}" if steps else f"Steps: not known beforehand (max_time {train.max_time} s)",
    ]
    per_epoch = batches.samples_per_epoch
    if per_epoch and per_epoch < train.global_batch_size:
        lines.append(
            f"Note: there are {per_epoch:,} training {sample}, fewer than train.global_batch_size "
            f"{train.global_batch_size}: a step is a pass over all of them."
        )
    elif per_epoch and (batches.end or 0) >= per_epoch and per_epoch % train.global_batch_size:
        rest = per_epoch % train.global_batch_size
        lines[-1] += f", the last of each epoch with {rest} of {train.global_batch_size} {sample}"
    if steps and schedule.warmup_steps >= steps:
        lines.append(f"Note: the warmup of {schedule.warmup_steps} steps outlasts the run; the peak is not reached.")
    peak = float(optimizer.init_args.get("lr", "inf"))
    if schedule.min_lr > peak:
        lines.append(f"Note: train.min_lr {schedule.min_lr:g} is above the peak of {peak:g}: no decay takes place.")
    return lines


def stop_early(console: Console, outcome: Outcome) -> None:
    console.print(
        f"Stopped by {outcome.interrupted} after step {outcome.progress.step}. To go on, run the same command with "
        "--resume auto"
    )
    if outcome.interrupted == "Ctrl-C":
        raise SystemExit(130)
