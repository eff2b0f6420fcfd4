"""What a run needs to continue exactly: weights, optimizer, counters, random numbers, place in the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from litgpt.checkpoint import WEIGHTS, read_state_dict
from litgpt.checkpoint.names import TRAINING_STATE
from litgpt.checkpoint.sums import check_archive
from litgpt.checkpoint.weights import remedy
from litgpt.devices.random_state import draw_apart, rng_state, set_rng_state
from litgpt.parallel.ranks import gathered_objects
from litgpt.parallel.sharding import copy_into, gathered
from litgpt.training.criterion import LOSS, Criterion
from litgpt.training.inputs import Inputs

if TYPE_CHECKING:
    from lightning_fabric import Fabric

STATE_FILE = TRAINING_STATE


class _State(TypedDict):
    progress: dict[str, Any]
    """The fields of `Progress`"""
    world_size: int
    optimizer_class: str
    optimizer: dict[int, dict[str, Any]]
    """See `optimizer_state`"""
    scaler: dict[str, Any]
    """Of the precision, where it has one"""
    rng: list[dict[str, Any]]
    """Each rank's random numbers, see `rng_state`"""


class TrainingState(_State, total=False):
    """What a checkpoint holds besides the weights."""

    inputs: dict[str, Any] | None
    """See `Inputs.saved`; earlier checkpoints have none"""


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done"""
    iteration: int = 0
    """Forward passes done on each device"""
    tokens: int = 0
    """Tokens that went into the model, padding left out, over all devices"""
    position: int = 0
    """Place in the stream of training samples, over all devices"""
    order: str | None = None
    """What decides which samples these are; None in checkpoints of before it was noted"""
    seconds: float = 0.0
    """Time spent training"""
    skipped: int = 0
    """Steps without an update, since their gradient was not finite"""
    skipped_in_row: int = 0
    """Of these, the last ones, if the last step is one"""
    val_loss: float | None = None
    """The last validation loss"""
    best_by: str = LOSS
    """The figure by which a checkpoint is the best, see `Criterion`"""
    best_value: float | None = None
    """The best value of it after a trained step"""
    best_step: int | None = None
    """The step it is of"""
    stale_validations: int = 0
    """Validations since then"""

    def judge_by(self, criterion: Criterion) -> None:
        """From here on this figure decides; what was the best by another one counts no more."""
        if self.best_by != criterion.name:
            self.best_by, self.best_value, self.best_step, self.stale_validations = criterion.name, None, None, 0

    @classmethod
    def from_saved(cls, values: dict[str, Any]) -> Progress:
        """What a checkpoint says, also one from before the best could be judged by another figure than the loss."""
        values = dict(values)
        if "best_val_loss" in values:
            values["best_value"] = values.pop("best_val_loss")
        return cls(**values)

    def judge(self, value: float | None, criterion: Criterion) -> bool:
        """Take note of a validation after this step; whether its figure is the best so far."""
        best = criterion.is_better(value, self.best_value)
        if best:
            self.best_value, self.best_step = value, self.step
        self.stale_validations = 0 if best else self.stale_validations + 1
        return best


@dataclass(frozen=True)
class Saved:
    """Which of a model's weights a run's checkpoints hold, and in which file; the rest comes from elsewhere."""

    file: str = WEIGHTS
    wanted: Callable[[str], bool] = lambda name: True

    def of(self, module: nn.Module) -> dict[str, Tensor]:
        """These weights, by name."""
        return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if self.wanted(name)}


def whole_weights(module: nn.Module, saved: Saved) -> dict[str, Tensor]:
    """The saved weights by name, gathered where sharded. Every rank must call this; tied ones stay one tensor."""
    whole: dict[int, Tensor] = {}
    weights = {}
    for name, tensor in saved.of(module).items():
        if id(tensor) not in whole:
            whole[id(tensor)] = gathered(tensor.detach())
        weights[name] = whole[id(tensor)]
    return weights


def load_weights(module: nn.Module, checkpoint: Path, saved: Saved) -> None:
    """Put the saved weights of a checkpoint directory into `module`, which may be sharded."""
    found, own = read_state_dict(checkpoint / saved.file), saved.of(module)
    wrong = sorted(found.keys() ^ own.keys())
    wrong += [name for name in found.keys() & own.keys() if found[name].shape != own[name].shape]
    if wrong:
        raise ValueError(
            f"The checkpoint {checkpoint} belongs to another model: {', '.join(wrong[:5])} "
            f"({len(wrong)} weight(s) in all) differ. Resume with the settings that the run was started with."
        )
    for name, tensor in own.items():
        copy_into(tensor, found[name])


def optimizer_state(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    """The optimizer's state by the parameter's number, gathered where it is sharded. Every rank must call this."""
    state = optimizer.state_dict()["state"]
    return {
        number: {k: gathered(v).cpu() if isinstance(v, Tensor) else v for k, v in values.items()}
        for number, values in state.items()
    }


def load_optimizer_state(optimizer: Optimizer, saved: dict[int, dict[str, Any]]) -> None:
    """Put a saved state into an optimizer over the same parameters. Its settings stay as they were built."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if saved and max(saved) >= len(parameters):
        raise ValueError("The saved optimizer state belongs to another model or optimizer. Resume with its settings.")
    for number, values in saved.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                values[key] = torch.empty_like(parameters[number], dtype=value.dtype)
                copy_into(values[key], value)
    optimizer.load_state_dict({"state": saved, "param_groups": optimizer.state_dict()["param_groups"]})
    for number, values in saved.items():  # torch has given them the parameter's type, which may round them
        loaded = optimizer.state[parameters[number]]
        for key, value in values.items():
            if isinstance(value, Tensor) and loaded[key].dtype != value.dtype:
                loaded[key] = value.to(loaded[key].device)


def collect(fabric: Fabric, optimizer: Optimizer, progress: Progress, inputs: Inputs | None = None) -> TrainingState:
    """Everything besides the weights that a checkpoint needs. Every rank must call this."""
    return {
        "inputs": None if inputs is None else inputs.saved(),
        "progress": asdict(progress),
        "world_size": fabric.world_size,
        "optimizer_class": type(optimizer).__name__,
        "optimizer": optimizer_state(optimizer),
        "scaler": dict(fabric.strategy.precision.state_dict()),
        "rng": gathered_objects(fabric, rng_state()),
    }


def restore(
    fabric: Fabric,
    module: nn.Module,
    optimizer: Optimizer,
    checkpoint: Path,
    saved: Saved,
    inputs: Inputs | None = None,
) -> tuple[Progress, str | None]:
    """Bring model, optimizer and random numbers to where a checkpoint was saved.

    Returns:
        How far the run has come, and what is to be said of settings that have changed since.

    Raises:
        ValueError: The checkpoint is damaged, or of a run on something else.
    """
    state = read_training_state(checkpoint)
    note = inputs.compare(state.get("inputs"), checkpoint) if inputs is not None else None
    if state["optimizer_class"] != type(optimizer).__name__:
        raise ValueError(
            f"optimizer={type(optimizer).__name__}, but the run in {checkpoint} was trained with "
            f"{state['optimizer_class']}. Resume it with the same optimizer, or start from its weights with "
            "`initial_checkpoint_dir`."
        )
    load_weights(module, checkpoint, saved)
    load_optimizer_state(optimizer, state["optimizer"])
    fabric.strategy.precision.load_state_dict(state["scaler"])
    # With another number of ranks there is no exact continuation: ranks that were not there begin with new numbers.
    states, rank = state["rng"], fabric.global_rank
    set_rng_state(states[rank] if rank < len(states) else states[0])
    if rank >= len(states):
        draw_apart(rank)
    return Progress.from_saved(state["progress"]), note


def read_training_state(checkpoint: Path) -> TrainingState:
    """What `collect` gathered, read without executing anything, and compared with the sums that it was written with.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(_damaged(path, error)) from error


def saved_step(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at; only what is needed for that is read, and no sum compared.

    Raises:
        ValueError: It is damaged.
    """
    path = checkpoint / STATE_FILE
    try:
        return int(torch.load(path, map_location="meta", weights_only=True)["progress"]["step"])
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(_damaged(path, error)) from error


def check_checkpoint(checkpoint: Path) -> None:
    """Compares all that a resume needs of a checkpoint with the sums that it was written with.

    Raises:
        ValueError: Something is damaged or missing.
    """
    path = checkpoint / STATE_FILE
    try:
        check_archive(path)
    except (OSError, ValueError) as error:
        raise ValueError(_damaged(path, error)) from error
    saved_step(checkpoint)  # it can be opened, too, which a file without sums had not to show so far
    weights = sorted(checkpoint.glob(f"{WEIGHTS}*"))
    # Beside LoRA's and an adapter's there may be the merged ones, which a resume does without.
    needed = [file for file in weights if file.name != WEIGHTS] or weights
    if not needed:
        raise ValueError(f"{checkpoint} holds no weights. {remedy(path)}")
    for file in needed:
        read_state_dict(file)


def _damaged(path: Path, error: Exception) -> str:
    first = str(error).partition("\n")[0]
    return f"{path} is damaged ({first.removeprefix('it is damaged, ')}). {remedy(path)}"
