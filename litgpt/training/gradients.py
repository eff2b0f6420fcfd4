"""The last look at a step's gradient before the optimizer takes it: its norm, clipping, and whether it is finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from litgpt.parallel.ranks import all_reduce
from litgpt.parallel.sharding import is_sharded, own_parameters

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from litgpt.training.state import Progress


class Gradients:
    """Keeps gradients that are not finite (NaN or infinite) away from the weights.

    A step with such a gradient changes nothing: neither weights nor the optimizer's state. Its samples are passed over,
    and its step counts. More than `allowed` of them in a row end the run.

    On CUDA and ROCm, nothing is waited for: the optimizers of torch that are fused leave their update out on the
    device, by the flag that a GradScaler gives them, and all later ones, too, once the run is to end; `failure` and
    `settle` say so where the device is waited for anyway. With any other optimizer or device, each step is waited for.
    Where the precision has a scaler of its own (16-mixed), which leaves out such steps itself, only norms are computed
    here.

    Args:
        fabric: The devices.
        module: The `LossModule` that is trained, set up by `fabric`: its parameters' names are said.
        optimizer: Over its parameters, without Fabric's wrapper.
        allowed: Steps in a row that may be passed over.
        progress: Where they are counted.
    """

    def __init__(
        self, fabric: Fabric, module: nn.Module, optimizer: Optimizer, allowed: int, progress: Progress
    ) -> None:
        self.fabric, self.optimizer, self.allowed, self.progress = fabric, optimizer, allowed, progress
        trained = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
        names = {id(parameter): name.removeprefix("gpt.") for name, parameter in own_parameters(module)}
        # As the backward pass comes to them: the head first, then from the last layer on down.
        order = {number: place for place, number in enumerate(reversed(names))}
        order |= {number: -1 for number, name in names.items() if name.startswith("lm_head")}
        self.parameters = sorted(trained.values(), key=lambda parameter: order.get(id(parameter), len(order)))
        self.names = [names.get(id(parameter), "one without a name") for parameter in self.parameters]
        self.sharded = fabric.world_size > 1 and is_sharded(module)
        self.scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
        flagged = fabric.device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)
        self.waits = not flagged or self.scaled  # on a CPU, that takes no time
        device = fabric.device
        self.in_row = torch.tensor(progress.skipped_in_row, device=device)
        self.count = torch.tensor(progress.skipped, device=device)
        self.ended_at = torch.tensor(0, device=device)  # the step that was one too many; 0 for none
        self.bad = torch.zeros(len(self.names), dtype=torch.bool, device=device)  # in the last such gradient
        self.left_out = torch.tensor(False, device=device)  # whether the gradient that was prepared is to do nothing

    def prepare(self, step: int, max_norm: float | None, wanted: bool) -> Tensor | None:
        """Look at the gradient of `step`, and scale it down to `max_norm`.

        Returns:
            Its norm before that, a scalar; None where nobody needs it (not `wanted`, nothing to clip, a scaler).
        """
        if self.scaled and max_norm is None and not wanted:
            return None
        self.fabric.strategy.precision.unscale_gradients(self.optimizer)
        gradients = [None if p.grad is None else _own_part(p.grad) for p in self.parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        norms = _norms(present)  # (present,)
        norm = torch.linalg.vector_norm(norms)
        if self.sharded:
            norm = all_reduce(self.fabric, norm.square(), "sum").sqrt()
        if not self.scaled:
            self._note(step, norm, norms, [gradient is not None for gradient in gradients])
        if max_norm is not None:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for dtype in {gradient.dtype for gradient in present}:
                torch._foreach_mul_([g for g in present if g.dtype == dtype], scale.to(dtype))
        return norm

    def _note(self, step: int, norm: Tensor, norms: Tensor, present: list[bool]) -> None:
        finite, bad = norm.isfinite(), ~norms.isfinite()
        if not all(present):  # such as experts that no token went to
            places = torch.tensor(present).nonzero()[:, 0].to(bad.device, non_blocking=True)
            bad = torch.zeros_like(self.bad).index_copy(0, places, bad)
        ended = self.ended_at > 0
        self.bad = torch.where(finite | ended, self.bad, bad)
        self.in_row = torch.where(finite, 0, self.in_row + 1)
        self.count = self.count + ~finite
        self.ended_at = torch.where(~ended & (self.in_row > self.allowed), step, self.ended_at)
        self.left_out = ~finite | (self.ended_at > 0)

    def step(self, optimizer: Optimizer) -> bool:
        """Have the optimizer (with Fabric's wrapper) make its update, if the gradient allows. True where it is known
        already that there was none."""
        if self.waits and self.left_out.item():
            return True
        if self.waits:
            optimizer.step()
            return False
        given: dict[str, Any] = vars(self.optimizer)  # among which a GradScaler puts its flag
        given["found_inf"] = self.left_out.float()
        optimizer.step()
        del given["found_inf"]
        return False

    def settle(self) -> str | None:
        """Bring `progress` up to date. Every rank must call this, and gets the same.

        Returns:
            What was passed over since the last call, in words; None for nothing.
        """
        if self.scaled:
            return None
        count, self.progress.skipped_in_row = int(self.count), int(self.in_row)
        new, self.progress.skipped = count - self.progress.skipped, count
        if not new:
            return None
        which = "The gradient is not finite" if new == 1 else f"The gradients of {new} steps are not finite"
        return (
            f"{which} ({self._where()}): passed over, without an update. In a row: {self.progress.skipped_in_row} "
            f"(--train.skip_nonfinite {self.allowed}), in all: {count}."
        )

    def failure(self) -> str | None:
        """Why the run cannot go on, in words; None where it can. Every rank must call this, and gets the same."""
        step = 0 if self.scaled else int(self.ended_at)
        if not step:
            return None
        row = f", as {self.allowed} in a row were before it (`train.skip_nonfinite`)" if self.allowed else ""
        return (
            f"The gradient of step {step} is not finite (NaN or infinite){row}: {self._where()}. The weights are as "
            "they were before it."
        )

    def _where(self) -> str:
        """In which parameters, the one nearest to the loss first: from there it spreads."""
        bad = self.bad.to(torch.int32)
        if self.sharded:
            bad = all_reduce(self.fabric, bad, "max")
        names = [name for name, is_bad in zip(self.names, bad.tolist(), strict=True) if is_bad]
        if not names:
            return "its norm overflows, though each parameter's does not"
        return f"in {len(names)} of {len(self.names)} parameters, nearest to the loss in {names[0]}"


def _own_part(gradient: Tensor) -> Tensor:
    """What this rank has of a gradient that may be sharded."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _norms(gradients: Sequence[Tensor]) -> Tensor:
    """Of each, (len(gradients),), in float32 at least: 16 bits would round them, and float16 overflow."""
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype))
