"""What a run is going to do, in figures and in words, before it does any of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from litgpt.cli.plural import counted
from litgpt.config import Config
from litgpt.devices.memory import memory_present
from litgpt.model import GPT
from litgpt.quantization.layers import num_parameters
from litgpt.runs.memory_estimate import Usage, estimate_memory
from litgpt.training.arguments import LogArgs, TrainArgs
from litgpt.training.batches import BatchStream
from litgpt.training.loggers import check_logger
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.schedule import Schedule


def choose_logger(name: str, other: str | None, log: LogArgs, default: str) -> str:
    """One logger out of `--logger_name`, which is `default` unless given, and `--train.logger_name`, checked."""
    if other is not None and name not in (default, other):
        raise ValueError(f"`logger_name` says {name} and `train.logger_name` says {other}. Give only one of them.")
    check_logger(other or name, log)
    return other or name


def sequence_length(train: TrainArgs, config: Config) -> int:
    """Tokens per training sequence."""
    if train.max_seq_length is not None and train.max_seq_length > config.block_size:
        raise ValueError(
            f"train.max_seq_length={train.max_seq_length} is longer than the model's context of {config.block_size}. "
            f"Give {config.block_size} or less. Only `litgpt pretrain` makes the context of a new model larger, with "
            f"model_config.block_size={train.max_seq_length}."
        )
    return train.max_seq_length or config.block_size


@dataclass(frozen=True)
class Plan:
    """What one step is, and how many there are.

    Attributes:
        train: The settings.
        world_size: Devices, all nodes counted.
        tokens: Of a row; the most of one where that `varies`.
        batches: The training data; None where it has not been opened.
        varies: Whether rows have lengths of their own.
        rows_per_sample: 2 for a pair of replies.
    """

    train: TrainArgs
    world_size: int
    tokens: int
    batches: BatchStream | None
    varies: bool = False
    rows_per_sample: int = 1

    @property
    def tokens_per_sample(self) -> int:
        return self.tokens * self.rows_per_sample

    @property
    def last_step(self) -> int | None:
        """See `TrainArgs.last_step`."""
        return self.train.last_step(None if self.varies else self.tokens_per_sample, self._samples_per_epoch)

    @property
    def total_steps(self) -> int | None:
        """See `TrainArgs.total_steps`; of data that has not been opened, the end is not known."""
        if self._end_is_unknown:
            return self.last_step
        return self.train.total_steps(None if self.varies else self.tokens_per_sample, self._samples_per_epoch)

    @property
    def schedule(self) -> Schedule:
        return Schedule.of(self.train, self.total_steps)

    @property
    def _samples_per_epoch(self) -> int | None:
        return None if self.batches is None else self.batches.samples_per_epoch

    @property
    def _end_is_unknown(self) -> bool:
        return self.batches is None and self.train.epochs is not None

    def lines(self, optimizer: OptimizerSpec) -> list[str]:
        """The plan in words, and what may surprise about the schedule."""
        train, tokens, most = self.train, self.tokens_per_sample, "up to " if self.varies else ""
        sample = "sequence" if self.rows_per_sample == 1 else "pair"
        samples = f"{sample}s"
        lines = [
            f"Tokens per step: {counted(train.micro_batch_size, sample)} x {train.accumulation(self.world_size)} "
            f"accumulation x {counted(self.world_size, 'device')} x {most}{tokens} tokens = "
            f"{most}{train.global_batch_size * tokens:,}"
        ]
        steps, per_epoch = self.total_steps, self._samples_per_epoch
        if self._end_is_unknown:
            limit = f"at most {steps:,}, and no more than" if steps else "as many as"
            lines.append(f"Steps: {limit} train.epochs {train.epochs} of the data, which a dry run does not open")
            return lines
        lines.append(f"Steps: {steps:,}" if steps else f"Steps: not known beforehand (max_time {train.max_time} s)")
        if steps and train.epochs is not None and train.max_tokens is None and steps < (train.max_steps or 0):
            lines[-1] += f" (train.epochs {train.epochs} ends the run before train.max_steps {train.max_steps:,})"
        if self.batches is not None and per_epoch and per_epoch < train.global_batch_size:
            lines.append(
                f"Note: there are {per_epoch:,} training {samples}, fewer than train.global_batch_size "
                f"{train.global_batch_size}: a step is a pass over all of them."
            )
        elif self.batches is not None and per_epoch and (self.batches.end or 0) >= per_epoch:
            rest = per_epoch % train.global_batch_size
            if rest:
                lines[-1] += f", the last of each epoch with {rest} of {train.global_batch_size} {samples}"
        schedule = self.schedule
        if steps and schedule.warmup_steps >= steps:
            warmup = schedule.warmup_steps
            lines.append(f"Note: the warmup of {warmup} steps outlasts the run; the peak is not reached.")
        peak = float(optimizer.init_args.get("lr", "inf"))
        if schedule.min_lr > peak:
            low = schedule.min_lr
            lines.append(f"Note: train.min_lr {low:g} is above the peak of {peak:g}: no decay takes place.")
        return lines


def parameter_lines(gpt: GPT) -> list[str]:
    """How many parameters a model has, and how many of them are trained."""
    trained, everything = gpt.num_parameters(trainable_only=True), num_parameters(gpt)
    return [
        f"Number of trainable parameters: {trained:,} ({trained / everything:.2%} of all)",
        f"Number of non-trainable parameters: {everything - trained:,}",
    ]


def memory_line(gpt: GPT, usage: Usage, device: torch.device, remedies: str) -> str:
    """The estimate of the memory that each device needs, beside what it has.

    Args:
        gpt: The model as it is trained, on any device.
        usage: How it is trained.
        device: Where.
        remedies: Options that need less.
    """
    needed, present = sum(estimate_memory(gpt, usage).values()), memory_present(device)
    line = f"Estimated memory: {needed / 1e9:.1f} GB at full length"
    if present is None:
        return line
    line += f"; the device has {present / 1e9:.1f} GB"
    return line if needed <= present else f"{line}. To need less: {remedies}"
