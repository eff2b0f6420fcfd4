"""Which optimizer to use, named on the command line or in a recipe, and how to build it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from litgpt.cli.own_code import import_named
from litgpt.cli.suggest import did_you_mean
from litgpt.quantization.layers import import_bitsandbytes
from litgpt.training.arguments import TrainArgs
from litgpt.training.muon import VOCABULARY, MuonWithAdamW

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}  # where torch.optim has fused kernels
STAND_IN = 512  # the longest side of a parameter that shows what an optimizer keeps
ADAMW_STATES = 2.0  # tensors of a parameter's own size


@dataclass
class OptimizerSpec:
    """An optimizer class and the arguments it is built with, apart from the parameters."""

    class_path: str = "torch.optim.AdamW"
    """Name of a torch.optim class, or the dotted path of any optimizer class"""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Its arguments, such as lr and weight_decay"""

    def load_class(self) -> type[Optimizer]:
        """The optimizer class; a ValueError names what is wrong with `class_path`.

        torch's Muon takes matrices alone: `MuonWithAdamW` stands in for it.
        """
        module_name, _, name = self.class_path.rpartition(".")
        if module_name.partition(".")[0] == "bitsandbytes":
            import_bitsandbytes()
        try:
            found = getattr(import_named(module_name or "torch.optim"), name, None)
        except ImportError as error:
            raise ValueError(f"optimizer={self.class_path}: cannot import {module_name} ({error}).") from error
        if not (isinstance(found, type) and issubclass(found, Optimizer)):
            known = [n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, Optimizer)]
            raise ValueError(
                f"optimizer={self.class_path} is not an optimizer class.{did_you_mean(name, known)} "
                "Give the name of a torch.optim class or the dotted path of your own."
            )
        return MuonWithAdamW if found is torch.optim.Muon else found

    def argument_names(self) -> list[str]:
        """The arguments that the class takes besides the parameters."""
        parameters = list(inspect.signature(self.load_class()).parameters.values())[1:]
        return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]

    def check(self) -> None:
        """Refuse arguments that the class does not take."""
        known = self.argument_names()
        takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self.load_class()).parameters.values())
        for name in self.init_args:
            if name not in known and not takes_any:
                raise ValueError(
                    f"`optimizer.{name}`: {self.class_path} takes no {name!r}.{did_you_mean(name, known)} "
                    f"It takes: {', '.join(known)}."
                )

    def check_strategy(self, sharded: bool) -> None:
        """Refuse an optimizer that cannot train parameters which are spread over devices."""
        if sharded and self.load_class().__module__.startswith("bitsandbytes."):
            raise ValueError(
                f"optimizer={self.class_path} cannot train weights that are sharded over devices. "
                "Use strategy=ddp, or an optimizer of torch."
            )

    def with_train_args(self, train: TrainArgs, default: OptimizerSpec) -> OptimizerSpec:
        """Apply `train.learning_rate`, `weight_decay`, `beta1` and `beta2`; refuse them where this says otherwise.

        Args:
            train: Holds the other spellings; None there means not given.
            default: What the optimizer is when nobody sets it: what differs from it was given.
        """
        settings: dict[str, Any] = {}
        if train.learning_rate is not None:
            settings["lr"] = train.learning_rate
        if train.weight_decay is not None:
            settings["weight_decay"] = train.weight_decay
        if train.beta1 is not None or train.beta2 is not None:
            beta1, beta2 = self.init_args.get("betas") or default.init_args.get("betas") or (0.9, 0.999)
            settings["betas"] = (_pick(train.beta1, beta1), _pick(train.beta2, beta2))
        names = {"lr": "learning_rate", "weight_decay": "weight_decay", "betas": "beta1/beta2"}
        for name, value in settings.items():
            given = _value(name, self.init_args.get(name))
            if given not in (None, _value(name, value), _value(name, default.init_args.get(name))):
                raise ValueError(
                    f"`train.{names[name]}` says {value}, but `optimizer.{name}` says {given}. Give only one of them."
                )
        spec = replace(self, init_args={**self.init_args, **settings})
        spec.check()
        return spec

    def state_ratio(self, parameters: Iterable[tuple[str, Parameter]]) -> float:
        """Bytes that the optimizer keeps for each byte of these parameters: 2 with AdamW, 0 with plain SGD.

        It is asked: one step on small stand-ins, of the same kinds, shows what it keeps. One that takes no such step
        (LBFGS wants a closure) is taken for AdamW.

        Args:
            parameters: By name, on any device.
        """
        kept, whole, ratios = 0.0, 0, {}
        for name, parameter in parameters:
            kind = (name.endswith(VOCABULARY), parameter.dtype, *(min(size, STAND_IN) for size in parameter.shape))
            if kind not in ratios:
                ratios[kind] = self._ratio_of(name, torch.zeros(kind[2:], dtype=parameter.dtype))
            size = parameter.numel() * parameter.itemsize
            kept, whole = kept + size * ratios[kind], whole + size
        return kept / whole if whole else 0.0

    def _ratio_of(self, name: str, values: Tensor) -> float:
        stand_in = Parameter(values)
        stand_in.grad = torch.zeros_like(values)
        try:
            with torch.random.fork_rng(devices=[]):
                optimizer = self.build([(name, stand_in)])
                optimizer.step()
        except Exception:  # a class of the user's own may raise anything
            return ADAMW_STATES
        state = [value for value in optimizer.state[stand_in].values() if isinstance(value, Tensor) and value.ndim]
        return sum(value.numel() * value.itemsize for value in state) / (values.numel() * values.itemsize)

    def build(self, params: Iterable) -> Optimizer:
        """The optimizer over `params`, fused where torch can.

        Args:
            params: Parameters, (name, parameter) pairs, or parameter groups. Names tell Muon which matrices are the
                embedding and the head.
        """
        self.check()
        params, found = list(params), self.load_class()
        if found is not MuonWithAdamW:
            params = [item[1] if isinstance(item, tuple) else item for item in params]
        args = {name: _value(name, value) for name, value in self.init_args.items()}
        if "fused" in self.argument_names() and not {"fused", "foreach"} & args.keys() and _can_fuse(params):
            args["fused"] = True
        self.check_strategy(sharded=any(hasattr(p, "full_tensor") for p in _tensors(params)))
        try:
            return found(params, **args)
        except (TypeError, ValueError) as error:
            shown = ", ".join(f"{name}={value}" for name, value in self.init_args.items())
            raise ValueError(f"optimizer={self.class_path} with {shown or 'no arguments'}: {error}") from error


def _pick(first: Any, second: Any) -> Any:
    return second if first is None else first


def _value(name: str, value: Any) -> Any:
    """Numbers written as YAML 1.1 strings (6e-4) as numbers, betas as a tuple."""
    if isinstance(value, (list, tuple)):
        return tuple(_value(name, v) for v in value)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _tensors(params: list) -> list[Parameter]:
    return [p for group in params for p in (group["params"] if isinstance(group, dict) else [group])]


def _can_fuse(params: list) -> bool:
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in _tensors(params))
