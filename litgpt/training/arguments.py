"""Settings of a training run. The text under each field is its help on the command line.

Every interval counts optimizer steps, every learning rate is the optimizer's own, every time is in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from litgpt.training.steps import samples_in, steps_in

LRSchedule = Literal["cosine", "linear", "constant", "warmup-stable-decay"]


@dataclass
class TrainArgs:
    """How long to train, in which batches, and with which learning rate schedule."""

    save_interval: int | None = 1000
    """Optimizer steps between checkpoints; null saves only the final one"""
    log_interval: int = 1
    """Optimizer steps between log lines; between them a GPU is not waited for, with torch's fused optimizers on CUDA or
    ROCm"""
    global_batch_size: int = 64
    """Sequences per optimizer step, over all devices; the last step of an epoch has what is left"""
    micro_batch_size: int = 4
    """Sequences per forward pass on one device; smaller needs less memory, the result stays the same"""
    lr_warmup_steps: int | None = 100
    """Optimizer steps over which the learning rate rises to its peak"""
    lr_warmup_fraction: float | None = None
    """The same as a fraction of the whole run, instead of lr_warmup_steps"""
    epochs: int | float | None = None
    """Passes over the training data before training ends, such as 3 or 0.5; the last step of each is smaller where
    global_batch_size does not divide the data"""
    max_tokens: int | None = None
    """Training tokens, over all devices, before training ends"""
    max_steps: int | None = None
    """Optimizer steps before training ends"""
    max_time: float | None = None
    """Seconds of training before training ends, those before a resume included"""
    max_seq_length: int | None = None
    """Tokens per sequence; null takes the model's context length"""
    tie_embeddings: bool | None = None
    """Whether the output head shares the token embedding's weights; null takes what the model or checkpoint has"""
    max_norm: float | None = None
    """Gradients are scaled down to at most this norm; null does not clip"""
    skip_nonfinite: int | None = None
    """Steps in a row whose gradient may be NaN or infinite: they are passed over without an update, and counted, and
    one more ends the run; null ends it at the first. (With 16-mixed, the loss scaler passes over them)"""
    lr_schedule: LRSchedule = "cosine"
    """How the learning rate goes on after the warmup: down to min_lr along half a cosine or a line, constant, or
    constant and then down along a line (warmup-stable-decay)"""
    min_lr: float = 6e-5
    """Learning rate at the end of the decay"""
    lr_decay_iters: int | None = None
    """Optimizer steps over which the learning rate decays to min_lr; null takes the whole run"""
    lr_cooldown_fraction: float | None = None
    """Share of the run that the decay of warmup-stable-decay takes, at its end; null is 0.1"""
    learning_rate: float | None = None
    """Peak learning rate; another spelling of --optimizer.lr"""
    weight_decay: float | None = None
    """Weight decay; another spelling of --optimizer.weight_decay"""
    beta1: float | None = None
    """First of Adam's betas; another spelling of --optimizer.betas"""
    beta2: float | None = None
    """Second of Adam's betas; another spelling of --optimizer.betas"""
    gradient_accumulation_iters: int | None = None
    """Forward passes per optimizer step on one device; another way to say global_batch_size"""
    logger_name: str | None = None
    """Another spelling of --logger_name"""
    keep_last: int | None = None
    """Keep only this many of the newest step-* checkpoints; null keeps all"""
    keep_best: bool = False
    """Whether to keep the checkpoint with the best validation (eval.best_by), too, in out_dir/best"""
    activation_checkpointing: str | int = "none"
    """Keep only the input of these blocks and compute the rest again in the backward pass: none, full (all blocks), or
    N for every N-th; takes less memory and up to a third more time"""
    neftune_noise_alpha: float | None = None
    """Noise on the embeddings in training (NEFTune), 5 to 15; null is none"""

    def __post_init__(self) -> None:
        for name in ("log_interval", "global_batch_size", "micro_batch_size"):
            _check_at_least(f"train.{name}", getattr(self, name), 1)
        for name in (
            *("save_interval", "max_tokens", "max_steps", "max_seq_length"),
            *("lr_decay_iters", "gradient_accumulation_iters", "keep_last", "skip_nonfinite"),
        ):
            _check_at_least(f"train.{name}", getattr(self, name), 1)
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ValueError(f"train.epochs={self.epochs}: give a number of passes greater than 0, such as 1 or 0.5.")
        for name in ("lr_warmup_steps", "max_time", "max_norm", "min_lr", "learning_rate", "weight_decay"):
            _check_at_least(f"train.{name}", getattr(self, name), 0)
        for name in ("lr_warmup_fraction", "lr_cooldown_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"train.{name}={value} is not between 0 and 1.")
        self._check_schedule()
        self.activation_checkpointing = _blocks_to_checkpoint(self.activation_checkpointing)
        if self.neftune_noise_alpha is not None and self.neftune_noise_alpha <= 0:
            raise ValueError(
                f"train.neftune_noise_alpha={self.neftune_noise_alpha} must be positive; null is no noise."
            )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"train.{name}={value} is not in [0, 1).")

    def _check_schedule(self) -> None:
        if self.lr_schedule not in get_args(LRSchedule):
            raise ValueError(
                f"train.lr_schedule={self.lr_schedule!r} is unknown. Choose one of: {', '.join(get_args(LRSchedule))}."
            )
        if self.lr_schedule == "constant" and self.lr_decay_iters is not None:
            raise ValueError(
                f"train.lr_decay_iters={self.lr_decay_iters}: with train.lr_schedule=constant nothing decays. "
                "Leave one of them out."
            )
        if self.lr_cooldown_fraction is not None and self.lr_schedule != "warmup-stable-decay":
            raise ValueError(
                f"train.lr_cooldown_fraction={self.lr_cooldown_fraction} is for train.lr_schedule=warmup-stable-decay; "
                f"it is {self.lr_schedule}."
            )

    def set_batch_by_accumulation(self, devices: int, default_global_batch_size: int) -> None:
        """Let `gradient_accumulation_iters` set `global_batch_size`, unless that was given and says otherwise.

        Args:
            devices: Number of devices over all nodes.
            default_global_batch_size: What `global_batch_size` is when nobody sets it.
        """
        if self.gradient_accumulation_iters is None:
            return
        implied = self.micro_batch_size * self.gradient_accumulation_iters * devices
        if self.global_batch_size not in (implied, default_global_batch_size):
            raise ValueError(
                f"train.gradient_accumulation_iters={self.gradient_accumulation_iters} makes a global batch of "
                f"{self.micro_batch_size} (micro_batch_size) x {self.gradient_accumulation_iters} x {devices} "
                f"device(s) = {implied} sequences, but train.global_batch_size is {self.global_batch_size}. "
                "Give only one of the two."
            )
        self.global_batch_size = implied

    def accumulation(self, devices: int) -> int:
        """Forward passes per optimizer step on each of `devices` devices (all nodes counted)."""
        at_once = self.micro_batch_size * devices
        if self.global_batch_size % at_once:
            below, above = self.global_batch_size // at_once * at_once, math.ceil(self.global_batch_size / at_once)
            choices = f"{below} or {above * at_once}" if below else f"{above * at_once}"
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} is not divisible by `train.micro_batch_size` "
                f"{self.micro_batch_size} x {devices} device(s) = {at_once}. "
                f"Set `train.global_batch_size` to {choices}, or change `train.micro_batch_size` or `devices`."
            )
        return self.global_batch_size // at_once

    def last_step(self, tokens_per_sample: int | None, samples_per_epoch: int | None) -> int | None:
        """The step after which max_steps or max_tokens ends the run; None if neither does, or it cannot be told.

        Args: see `total_steps`.
        """
        ends = [] if self.max_steps is None else [self.max_steps]
        if self.max_tokens is not None and tokens_per_sample is not None:
            samples = math.ceil(self.max_tokens / tokens_per_sample)
            ends.append(steps_in(samples, self.global_batch_size, samples_per_epoch))
        return min(ends, default=None)

    def total_steps(self, tokens_per_sample: int | None, samples_per_epoch: int | None) -> int | None:
        """Optimizer steps until the first of max_steps, max_tokens and epochs ends the run; None if that is not known.

        Args:
            tokens_per_sample: Tokens in one sequence; None where that varies.
            samples_per_epoch: Sequences in the training data, where that is known.
        """
        last = self.last_step(tokens_per_sample, samples_per_epoch)
        ends = [] if last is None else [last]
        if self.epochs is not None and samples_per_epoch is not None:
            samples = samples_in(self.epochs, samples_per_epoch)
            ends.append(steps_in(samples, self.global_batch_size, samples_per_epoch))
        if self.epochs is not None and samples_per_epoch is None and not ends and self.max_time is None:
            raise ValueError(
                f"train.epochs={self.epochs}: the data does not say how long an epoch is. Set `train.max_steps`."
            )
        if not ends and self.max_time is None and self.max_tokens is None:
            raise ValueError(
                "Nothing ends this run: set one of `train.max_steps`, `train.max_tokens`, `train.max_time` or "
                "`train.epochs`."
            )
        return min(ends) if ends else None


@dataclass
class EvalArgs:
    """When and on how much data to validate."""

    interval: int = 600
    """Optimizer steps between validations"""
    max_new_tokens: int | None = None
    """Tokens to generate at most, as a sample after each validation and as each answer that metrics score; null
    generates none during training"""
    max_iters: int = 100
    """Validation batches of micro_batch_size sequences, over all devices"""
    initial_validation: bool = False
    """Whether to validate before the first step"""
    final_validation: bool = True
    """Whether to validate after the last step"""
    patience: int | None = None
    """Validations without a new best one (best_by) after which training ends; null trains on. It keeps the best
    checkpoint, in out_dir/best"""
    evaluate_example: str | int = "first"
    """Which validation example to generate a reply for while finetuning: first, random or its number"""
    metrics: list[str | dict[str, Any]] | dict[str, Any] | str | None = None
    """What to score answers to the validation samples by while finetuning: a list of exact_match, rouge, bleu, classes
    of torchmetrics.text such as CHRFScore, dotted paths of others, or {class_path: ..., init_args: ..., name: ...}.
    Each gives columns of metrics.csv, such as val_exact_match; null generates no answers"""
    max_answers: int | None = 100
    """Validation samples that are answered for the metrics, from the first on, over all devices; null answers all"""
    best_by: str = "loss"
    """The figure of a validation by which keep_best and patience tell the best: loss, or one that metrics give, such as
    exact_match or rougeL"""

    def __post_init__(self) -> None:
        for name in ("interval", "max_iters", "max_new_tokens", "patience", "max_answers"):
            _check_at_least(f"eval.{name}", getattr(self, name), 1)
        if isinstance(self.metrics, str):
            self.metrics = [name.strip() for name in self.metrics.split(",") if name.strip()]
        elif isinstance(self.metrics, dict):
            self.metrics = [self.metrics]
        if isinstance(self.evaluate_example, str) and self.evaluate_example not in ("first", "random"):
            if not self.evaluate_example.isdecimal():
                raise ValueError(
                    f"eval.evaluate_example={self.evaluate_example!r} is not first, random or an example's number."
                )
            self.evaluate_example = int(self.evaluate_example)


@dataclass
class LogArgs:
    """Where the loggers put a run and what goes with it."""

    project: str | None = None
    """Project (wandb) or experiment (mlflow) that the run belongs to"""
    run: str | None = None
    """Name of the run (wandb, mlflow)"""
    group: str | None = None
    """Group of runs that this one belongs to (wandb, mlflow)"""
    teamspace: str | None = None
    """Teamspace of a hosted logger; refused, since none of the loggers here has one"""
    metadata: dict | None = None
    """More settings to record with the run (wandb, mlflow, tensorboard)"""
    log_model: bool = False
    """Whether to upload the final checkpoint as an artifact (wandb, mlflow)"""
    save_logs: bool = True
    """Whether to keep the printed lines in logs.txt too"""
    checkpoint_name: str | None = None
    """Name of the uploaded checkpoint (with log_model)"""


def _blocks_to_checkpoint(value: str | int) -> str | int:
    text = str(value)
    if text in ("none", "full"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"train.activation_checkpointing={value!r} is not none, full or a number N for every N-th block."
        )
    return int(text)


def _check_at_least(name: str, value: float | None, low: int) -> None:
    if value is not None and value < low:
        raise ValueError(f"{name}={value} is too small: it must be at least {low}.")
