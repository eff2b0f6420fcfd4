"""The one training loop: pretraining and every way of finetuning run through `fit`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from litgpt.checkpoint import SaveError, atomic_directory
from litgpt.devices.random_state import draw_apart
from litgpt.parallel.ranks import all_reduce, gathered_objects
from litgpt.training.arguments import EvalArgs, TrainArgs
from litgpt.training.batches import BatchStream, MicroBatch
from litgpt.training.criterion import LOSS, Criterion
from litgpt.training.gradients import Gradients
from litgpt.training.inputs import Inputs
from litgpt.training.last_step import LastStep
from litgpt.training.loss import NATS_PER_TOKEN, loss_module
from litgpt.training.metrics import val_column
from litgpt.training.recorder import Recorder, figures_in_words, metrics_in_words
from litgpt.training.run_directory import RunDirectory
from litgpt.training.schedule import Schedule
from litgpt.training.signals import StopSignals, shield_workers
from litgpt.training.state import STATE_FILE, Progress, Saved, collect, restore, whole_weights
from litgpt.training.validation import validate

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule

FINISHED = "finished"
NEVER = 1 << 62


class TrainingDiverged(ValueError):
    """The loss or its gradient is no longer a number."""


@dataclass(frozen=True)
class Generated:
    """What became of texts that the model wrote after a validation; the same figures on every rank."""

    text: str = ""
    """To print"""
    metrics: dict[str, float | None] = field(default_factory=dict)
    """How answers to the validation data score, None where that failed"""


@dataclass
class Run:
    """All that `fit` works with besides model, optimizer and data."""

    train: TrainArgs
    evaluation: EvalArgs
    schedule: Schedule
    total_steps: int | None
    """How many steps the run has (see `TrainArgs.total_steps`); None where that is not known beforehand"""
    last_step: int | None
    """The step that ends it, if the data does not before (see `TrainArgs.last_step`)"""
    directory: RunDirectory
    recorder: Recorder
    save: Callable[[Path, dict[str, Tensor]], None]
    """Writes weights and what belongs to them (config, tokenizer) into a directory; called on rank 0"""
    generate: Callable[[], Generated] | None = None
    """Has the model write something as it is now; called after each validation, on every rank"""
    criterion: Criterion = Criterion()  # noqa: RUF009 - it does not change
    """By which figure a checkpoint is the best"""
    resume: Path | None = None
    """Checkpoint to continue from"""
    saved: Saved = Saved()  # noqa: RUF009 - it does not change
    """Which weights the checkpoints hold"""
    inputs: Inputs | None = None
    """What the run works on, for a resumed one to be compared with"""


@dataclass
class Outcome:
    """How a run ended."""

    progress: Progress
    checkpoint: Path
    """The newest checkpoint"""
    interrupted: str | None = None
    """SIGTERM or Ctrl-C, if that ended the run before its end"""


def fit(
    fabric: Fabric,
    model: _FabricModule,
    optimizer: Optimizer,
    batches: BatchStream,
    val_batches: Iterable[Any],
    run: Run,
) -> Outcome:
    """Train until the first of the limits in `run.train` is reached.

    Args:
        fabric: The devices, launched.
        model: A `LossModule`, set up by `fabric`.
        optimizer: Over the model's trainable parameters, set up by `fabric`.
        batches: This rank's training micro-batches.
        val_batches: Validation batches, the same on every rank; empty for none.
        run: Settings, and where results go.

    Raises:
        TrainingDiverged: The loss or its gradient is NaN or infinite; nothing of that reaches the weights.
        SaveError: A checkpoint could not be written; earlier ones are untouched.
    """
    train, evaluation, recorder = run.train, run.evaluation, run.recorder
    accumulation = train.accumulation(fabric.world_size)
    inner = getattr(optimizer, "optimizer", optimizer)  # the optimizer itself, without Fabric's wrapper
    loss = loss_module(model)
    gpt = loss.gpt
    progress = Progress()
    draw_apart(fabric.global_rank)
    if run.resume is not None:
        progress, note = restore(fabric, gpt, inner, run.resume, run.saved, run.inputs)
        if note is not None:
            recorder.console.print(note)
        batches.seek(progress.position)
        if batches.order != progress.order:
            recorder.console.print(other_order(progress.order, batches.order))
    progress.order = batches.order
    progress.judge_by(run.criterion)
    if evaluation.patience and not val_batches:
        raise ValueError(
            f"eval.patience={evaluation.patience}: there is no validation data. Add some, or leave it out."
        )
    watch = LossWatch(fabric)
    gradients = Gradients(fabric, loss, inner, train.skip_nonfinite or 0, progress)
    count = TokenCount(fabric, progress, recorder)

    def validation() -> dict[str, float | None]:
        with recorder.off_the_clock():
            return validate_and_tell(fabric, model, val_batches, run, progress)

    def save(directory: Path) -> None:
        with recorder.off_the_clock():
            check_finite(watch, gradients, run, progress)
            count.settle()
            progress.seconds = recorder.seconds
            save_checkpoint(fabric, gpt, inner, progress, run, directory)

    for loader in (batches.loader, val_batches):
        shield_workers(loader)
    model.train()
    last_step = LastStep(progress.step) if fabric.world_size > 1 else None
    with (
        StopSignals(recorder.console.active, last_step.ask_to_stop if last_step else None) as signals,
        recorder.running(progress, run.total_steps, resumed=run.resume is not None),
    ):
        if evaluation.initial_validation and val_batches and progress.step == 0:
            recorder.write({"step": 0, **validation()}, None)
        stop = started_as = stop_reason(run, progress, batches, signals, last_step)
        while stop is None:
            logs = (progress.step + 1) % train.log_interval == 0
            learning_rate = run.schedule.apply(inner, progress.step)
            step_batches = [batch.checked(gpt.config.padded_vocab_size) for batch in batches.next_step(accumulation)]
            moved = partial(recorder.console.within_step, progress.step, of=len(step_batches))
            sums, terms = accumulate_gradients(fabric, model, step_batches, moved)
            progress.step += 1
            progress.iteration += len(step_batches)
            progress.position = batches.position
            grad_norm = gradients.prepare(progress.step, train.max_norm, wanted=logs)
            losses = torch.where(gradients.left_out, 0, sums[:, 0]) if train.skip_nonfinite else sums[:, 0]
            watch.see(losses, progress.step, step_batches)
            if gradients.step(optimizer):
                check_finite(watch, gradients, run, progress)
            optimizer.zero_grad()
            count.add(step_batches)

            # From here on the device may be waited for, but only in steps that log, validate or save.
            if logs or fabric.world_size == 1:
                count.settle()
            stop = stop_reason(run, progress, batches, signals, last_step)
            final = stop == FINISHED and evaluation.final_validation
            validates = bool(val_batches) and (progress.step % evaluation.interval == 0 or final)
            if logs or validates or stop:
                check_finite(watch, gradients, run, progress)
                count.settle()
                mean, *figures = (all_reduce(fabric, sums.sum(dim=0), "sum") / terms).tolist()
                norm = None if grad_norm is None else grad_norm.item()
                row = recorder.step(progress, batches.epoch, loss=mean, learning_rate=learning_rate, grad_norm=norm)
                row |= zip(loss.figures, figures, strict=True)
                if validates:
                    row |= validation()
                recorder.write(row, progress.val_loss)
                if validates:
                    is_best = progress.judge(row.get(run.criterion.column), run.criterion)
                    if is_best and (train.keep_best or evaluation.patience):
                        save(run.directory.best)
                    stop = stop or out_of_patience(run, progress)
            if stop is None and train.save_interval and progress.step % train.save_interval == 0:
                save(run.directory.step(progress.step))

        interrupted = stop if stop != FINISHED else None
        checkpoint = run.directory.final if interrupted is None else run.directory.step(progress.step)
        if started_as is None or checkpoint != run.resume:
            save(checkpoint)
    if progress.skipped:
        recorder.console.print(f"Steps without an update, since their gradient was not finite: {progress.skipped}")
    if progress.best_step is not None and run.directory.best.is_dir():
        recorder.console.print(best_line(run, progress))
    return Outcome(progress, checkpoint, interrupted)


def accumulate_gradients(
    fabric: Fabric, model: _FabricModule, batches: list[MicroBatch], moved: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor | int]:
    """Add up the gradient of one optimizer step: that of the loss per term (target token) over all micro-batches and
    ranks.

    Args:
        fabric: The devices.
        model: A `LossModule`, set up by `fabric`.
        batches: This rank's micro-batches of the step.
        moved: Told how many of them are done, after each.

    Returns:
        The loss and the further figures of each micro-batch, summed over this rank's terms, (micro-batches, 1 + F)
        float32; and the number of terms in all of them on all ranks.
    """
    loss = loss_module(model)
    own_terms = sum(loss.num_terms(batch) for batch in batches)
    terms: Tensor | int = max(own_terms, 1)
    if fabric.world_size > 1:  # stays on the device: reading it would wait for the device
        terms = all_reduce(fabric, torch.tensor(own_terms, device=fabric.device), "sum").clamp(min=1)
    # Data-parallel training averages gradients over ranks; the sum is wanted.
    scale = fabric.world_size / terms
    sums = []
    for number, batch in enumerate(batches, start=1):
        waits = number < len(batches)
        with fabric.no_backward_sync(model, enabled=waits) if fabric.world_size > 1 else nullcontext():
            on_device = batch.to(fabric.device)
            batch_sums = model(on_device.idx, on_device.targets, **on_device.inputs).reshape(-1)  # (1 + F,)
            fabric.backward(batch_sums[0] * scale)
        sums.append(batch_sums.detach().float())
        if moved is not None:
            moved(number)
    return torch.stack(sums), terms


def stop_reason(
    run: Run, progress: Progress, batches: BatchStream, signals: StopSignals, last_step: LastStep | None
) -> str | None:
    """Why training stops here: FINISHED, the name of a signal, or None to go on.

    Clocks and signals differ between ranks, which agree by `last_step`.
    """
    train = run.train
    if batches.has_ended or (run.last_step is not None and progress.step >= run.last_step):
        return FINISHED
    if train.max_tokens is not None and progress.tokens >= train.max_tokens:
        return FINISHED
    if out_of_patience(run, progress):
        return FINISHED
    reason = signals.received
    if reason is None and train.max_time is not None and run.recorder.seconds >= train.max_time:
        reason = FINISHED
    if last_step is None:
        return reason
    if reason is not None:
        last_step.ask_to_stop(reason)
    return last_step.begin(progress.step + 1)


def other_order(saved: str | None, now: str | None) -> str:
    """What to say where a saved position is one in another order of samples."""
    before = saved or "by an earlier version of litgpt, whose order was another"
    return (
        f"Note: this checkpoint was saved while training on {before}; now it is {now or 'an order of its own'}. The "
        "run does not go on exactly where it was in the data: until the end of this epoch, some samples may come "
        "again and others not at all."
    )


def out_of_patience(run: Run, progress: Progress) -> str | None:
    """FINISHED if no validation was the best so far for as long as `--eval.patience` allows."""
    patience = run.evaluation.patience
    return FINISHED if patience is not None and progress.stale_validations >= patience else None


def best_line(run: Run, progress: Progress) -> str:
    """Where the best checkpoint is, and whether the run ended because nothing better came."""
    best, better = ("Highest", "higher") if run.criterion.higher_is_better else ("Lowest", "lower")
    line = f"{best} {run.criterion.in_words}: {progress.best_value:.3f}, at step {progress.best_step}: "
    line += str(run.directory.best)
    if out_of_patience(run, progress):
        line += f"\nNo {better} one came in {progress.stale_validations} validations (--eval.patience): training ends."
    return line


class TokenCount:
    """Adds up the tokens of all ranks, each with batches of lengths of its own, only when the sum is asked for."""

    def __init__(self, fabric: Fabric, progress: Progress, recorder: Recorder) -> None:
        self.fabric, self.progress, self.recorder = fabric, progress, recorder
        self.iterations = self.tokens = 0

    def add(self, batches: list[MicroBatch]) -> None:
        """Count the micro-batches of this rank in one step."""
        self.iterations += len(batches)
        self.tokens += sum(batch.num_tokens for batch in batches)

    def settle(self) -> None:
        """Bring `progress` and the recorder up to date. Every rank must call this."""
        if not self.iterations:
            return
        tokens = self.tokens
        if self.fabric.world_size > 1:
            tokens = int(all_reduce(self.fabric, torch.tensor(tokens, device=self.fabric.device), "sum"))
        self.progress.tokens += tokens
        self.recorder.count(self.iterations, tokens)
        self.iterations = self.tokens = 0


class LossWatch:
    """Notes the first micro-batch whose loss is not a number, without waiting for the device in each step."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.first_bad = torch.tensor(NEVER, device=fabric.device)  # its place in `unchecked`
        self.unchecked: list[tuple[int, str]] = []

    def see(self, losses: Tensor, step: int, batches: list[MicroBatch]) -> None:
        """Look at the losses (micro-batches,) of a step."""
        places = torch.arange(len(batches), device=losses.device) + len(self.unchecked)
        bad = torch.where(torch.isfinite(losses), NEVER, places)
        self.first_bad = torch.minimum(self.first_bad, bad.min())
        self.unchecked += [(step, batch.described()) for batch in batches]

    def check(self, directory: RunDirectory) -> None:
        """Stop training if a loss seen so far was no number. Every rank must call this."""
        first = all_reduce(self.fabric, self.first_bad, "min")
        if int(first) == NEVER:
            self.unchecked.clear()
            return
        step, batch = self.unchecked[int(first)]
        culprits = gathered_objects(self.fabric, batch if int(self.first_bad) == int(first) else None)
        raise TrainingDiverged(
            f"The loss became NaN or infinite at step {step}, in the {' and the '.join(filter(None, culprits))}. "
            f"{what_to_do(directory)}"
        )


def check_finite(watch: LossWatch, gradients: Gradients, run: Run, progress: Progress) -> None:
    """Stop training where a loss, or too many gradients, seen so far were no numbers. Every rank must call this."""
    failure = gradients.failure()
    if failure is None:
        note = gradients.settle()
        if note is not None:
            run.recorder.console.print(f"step {progress.step} | {note}")
    watch.check(run.directory)  # it knows the samples
    if failure is not None:
        raise TrainingDiverged(f"{failure} {what_to_do(run.directory)}")


def what_to_do(directory: RunDirectory) -> str:
    """The ways out for a run that cannot go on."""
    newest = directory.newest()
    last = f"The last good checkpoint is {newest}; resume from it" if newest else "There is no checkpoint; restart"
    return (
        f"{last} with a smaller `optimizer.lr`, a longer `train.lr_warmup_steps`, clipped gradients "
        "(train.max_norm=1.0), or leave to pass over a few such steps (train.skip_nonfinite=5)."
    )


def validate_and_tell(
    fabric: Fabric, model: _FabricModule, val_batches: Iterable[Any], run: Run, progress: Progress
) -> dict[str, float | None]:
    """Validate, have the model write what is wanted of it, and print both; the columns of the record."""
    start, console, module = time.perf_counter(), run.recorder.console, loss_module(model)
    loss, *values = validate(fabric, model, val_batches, run.evaluation.max_iters)
    progress.val_loss = loss
    seconds = time.perf_counter() - start
    figures = dict(zip(module.figures, values, strict=True))
    shown = figures_in_words(figures)
    if module.unit == NATS_PER_TOKEN:
        shown = f", perplexity: {math.exp(loss):.2f}" if loss < 100 else ", perplexity: huge"
    console.print(f"step {progress.step} | loss val: {loss:.3f}{shown} | val time: {seconds:.2f} s")
    generated = Generated() if run.generate is None else run.generate()
    if generated.metrics:
        seconds = time.perf_counter() - start - seconds
        console.print(f"step {progress.step} | {metrics_in_words(generated.metrics)} | answer time: {seconds:.2f} s")
    if generated.text:
        console.print(generated.text)
    return {val_column(name): value for name, value in {LOSS: loss, **figures, **generated.metrics}.items()}


def save_checkpoint(
    fabric: Fabric, gpt: nn.Module, optimizer: Optimizer, progress: Progress, run: Run, directory: Path
) -> None:
    """Save all that a resume needs under `directory`, complete or not at all. Every rank must call this."""
    weights, state = whole_weights(gpt, run.saved), collect(fabric, optimizer, progress, run.inputs)
    run.recorder.console.print(f"Saving checkpoint to {str(directory)!r}")
    error: Exception | None = None
    if fabric.global_rank == 0:
        try:
            with atomic_directory(directory, overwrite=True) as temporary:
                run.save(temporary, weights)
                torch.save(state, temporary / STATE_FILE)
            run.directory.prune(run.train.keep_last)
        except Exception as caught:
            error = caught
    if fabric.world_size > 1:  # or the other ranks would wait forever for this one
        failed = fabric.broadcast(None if error is None else str(error))
        if failed is not None and error is None:
            raise SaveError(failed)
    if error is not None:
        raise error
