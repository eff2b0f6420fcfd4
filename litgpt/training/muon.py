"""Muon for the hidden matrices, AdamW for the rest, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

# Rows of these belong to tokens: they see few of the batches, and are no maps from space to space.
VOCABULARY = ("wte.weight", "lm_head.weight")


class MuonWithAdamW(Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) moves a matrix by its momentum made orthogonal.

    That is for matrices; vectors, the embedding and the output head are AdamW's. Muon's steps are scaled to the size of
    AdamW's (https://arxiv.org/abs/2502.16982), so that one learning rate and one weight decay serve both.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of either; without names no matrix is known to be the
            embedding's or the head's, and all are Muon's.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
        momentum: Muon's.
        nesterov: Muon's.
        ns_coefficients: Of the Newton-Schulz iteration that makes the momentum orthogonal.
        eps: What keeps its normalisation from dividing by zero.
        ns_steps: Iterations.
        adjust_lr_fn: How steps are scaled by the matrix's shape, see torch.optim.Muon.
        betas: AdamW's.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        matrices, rest = separate(list(params))
        both = {"lr": lr, "weight_decay": weight_decay}
        self._parts: list[Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(
                matrices,
                **both,
                momentum=momentum,
                nesterov=nesterov,
                ns_coefficients=ns_coefficients,
                eps=eps,
                ns_steps=ns_steps,
                adjust_lr_fn=adjust_lr_fn,
            )
            self._parts.append(muon)
        if rest:
            self._parts.append(torch.optim.AdamW(rest, **both, betas=betas))
        super().__init__([group for part in self._parts for group in part.param_groups], both)
        self._share()

    def _share(self) -> None:
        """Let the parts work on this optimizer's groups and state."""
        groups = iter(self.param_groups)
        for part in self._parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss


def separate(params: list) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parameter groups of Muon's matrices, and of the rest; each keeps its group's settings."""
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    matrices: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in groups:
        pairs = [item if isinstance(item, tuple) else ("", item) for item in group["params"]]
        for wanted, into in ((True, matrices), (False, rest)):
            chosen = [p for name, p in pairs if _is_map(name, p) == wanted]
            if chosen:
                into.append({**group, "params": chosen})
    return matrices, rest


def _is_map(name: str, parameter: Parameter) -> bool:
    return parameter.ndim == 2 and not name.endswith(VOCABULARY)
