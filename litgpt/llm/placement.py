"""Where a model goes: the devices that a user names, what loads it there, and what runs it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from litgpt.config import Config
from litgpt.devices.accelerator import accelerator as best_accelerator
from litgpt.devices.accelerator import chosen_devices
from litgpt.generation.engine import Engine
from litgpt.generation.interface import EngineOptions, GenerationEngine
from litgpt.kv_cache import layer_cache_of
from litgpt.model import GPT
from litgpt.quantization.layers import FOUR_BIT_KINDS
from litgpt.sources.adapted import AdapterSource
from litgpt.sources.load import load_model
from litgpt.sources.meta import meta_model
from litgpt.sources.part import check_whole
from litgpt.sources.source import Source, Watch

if TYPE_CHECKING:  # what shares a model between devices is imported where several do
    from litgpt.llm.child_process import ModelPart
    from litgpt.llm.leader import Leader

STRATEGIES = ("sequential", "tensor_parallel")


class Placement:
    """Some devices, and how they share a model.

    Args:
        devices: Where it goes; inputs and outputs are on the first.
        strategy: "sequential" puts some blocks on each device, "tensor_parallel" a part of every layer, in a process
            for each; None for one device.

    Attributes:
        leader: What runs the other processes, where there are some and the model is loaded.
    """

    def __init__(self, devices: Sequence[torch.device], strategy: str | None = None) -> None:
        self.devices, self.strategy = list(devices), strategy
        self.leader: Leader | None = None

    def __str__(self) -> str:
        """Such as "cpu", or "2 x cuda, sequential"."""
        kind = self.device.type
        return f"{len(self.devices)} x {kind}, {self.strategy}" if self.strategy else kind

    @property
    def is_split(self) -> bool:
        """Whether this process has only a part of the model."""
        return self.strategy == "tensor_parallel"

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs are."""
        return self.devices[0]

    def check(self, source: Source, quantize: str | None, compile: bool) -> None:
        """Refuse a model or options that cannot be shared so, before any weights are read.

        Raises:
            ValueError: Says what is not supported.
        """
        if self.strategy is None:
            return
        if compile:
            raise ValueError(
                f"compile=true cannot be combined with {self.strategy}: what the devices exchange is not compiled. "
                "Leave it out, or take one device."
            )
        if self.strategy == "sequential":
            from litgpt.parallel.sequential import place_blocks

            place_blocks(meta_model(source.config), len(self.devices))
            return
        check_whole(source)
        if quantize not in (None, *FOUR_BIT_KINDS):
            raise ValueError(
                f"quantize={quantize} cannot be combined with tensor_parallel: bitsandbytes' 4 bits alone are stored "
                f"in parts. Choose one of: {', '.join(FOUR_BIT_KINDS)}; or take sequential."
            )
        if isinstance(source, AdapterSource):
            raise ValueError(
                f"'{source.files}' holds an adapter, which cannot be split over processes (tensor_parallel). Take "
                "sequential, or one device."
            )
        from litgpt.parallel.tensor_parallel import check_split

        check_split(source.config, len(self.devices))

    def load(
        self,
        checkpoint: Path | str,
        source: Source,
        *,
        dtype: torch.dtype,
        quantize: str | None,
        kv_cache: str | None = None,
        watch: Watch,
    ) -> GPT:
        """Load a model, here or everywhere.

        Args:
            checkpoint: What the user named.
            source: The same, opened.
            dtype, quantize, watch: As for `load_model`.
            kv_cache: As for `layer_cache_of`.

        Raises:
            RanksLost: One of several processes could not load its part.
        """
        if self.strategy == "sequential":
            model = self._load_in_blocks(source, dtype, quantize, watch)
        elif self.strategy == "tensor_parallel":
            part: ModelPart = {
                "checkpoint": str(checkpoint),
                "dtype": str(dtype).removeprefix("torch."),
                "quantize": quantize,
                "kv_cache": kv_cache,
            }
            model = self._load_in_parts(part, source, dtype, quantize, watch)
        else:
            model = load_model(source, dtype=dtype, device=self.device, quantize=quantize, watch=watch)
        model.layer_cache = layer_cache_of(kv_cache)
        return model

    def _load_in_blocks(self, source: Source, dtype: torch.dtype, quantize: str | None, watch: Watch) -> GPT:
        from litgpt.parallel.sequential import connect_blocks, place_blocks, placed_weights

        places = place_blocks(meta_model(source.config), len(self.devices))
        device = placed_weights(places, self.devices)
        model = load_model(source, dtype=dtype, device=device, quantize=quantize, watch=watch)
        connect_blocks(model, places, self.devices)
        return model

    def _load_in_parts(
        self, part: ModelPart, source: Source, dtype: torch.dtype, quantize: str | None, watch: Watch
    ) -> GPT:
        from litgpt.llm.leader import Leader
        from litgpt.parallel.tensor_parallel import split_model

        self.leader = Leader(self.devices, part)
        try:
            split = partial(split_model, group=self.leader.group)
            model = load_model(source, dtype=dtype, device=self.device, quantize=quantize, split=split, watch=watch)
            self.leader.rendezvous()
        except BaseException:
            self.leader.close()
            raise
        return model

    def make_engine(self, model: GPT, options: EngineOptions) -> GenerationEngine:
        """The engine of a model that was loaded so."""
        if self.leader is not None:
            from litgpt.generation.rank_engine import RankEngine

            return RankEngine(
                model,
                self.leader,
                autocast=options.autocast,
                max_slots=options.max_slots,
                fixed_length=options.fixed_length,
            )
        return Engine(
            model,
            max_slots=options.max_slots,
            compile=options.compile,
            autocast=options.autocast,
            fixed_length=options.fixed_length,
        )

    def on_loss(self, call: Callable[[BaseException], None]) -> None:
        """Have a function called, in a thread of its own, where another process ends that nobody told to."""
        if self.leader is not None:
            self.leader.on_loss = call

    def close(self) -> None:
        """End the other processes, if there are any."""
        if self.leader is not None:
            self.leader.close()


def place(accelerator: str = "auto", devices: int | str = "auto", strategy: str | None = None) -> Placement:
    """The devices that a user names.

    Args:
        accelerator: cpu, cuda, gpu, mps, or auto for the best there is.
        devices: How many, or their numbers as 0,2. Without a strategy it is one.
        strategy: How several of them share the model.

    Raises:
        ValueError: There is no such device, or no such strategy.
    """
    device = named_device(accelerator)
    if strategy is None:
        if str(devices) not in ("auto", "1"):
            raise ValueError(
                f"devices={devices} is not supported without `generate_strategy`: 'sequential' puts some of the "
                "model's blocks on each device, 'tensor_parallel' a part of every layer."
            )
        return Placement([device])
    if strategy not in STRATEGIES:
        raise ValueError(f"generate_strategy={strategy} is unknown. Give {' or '.join(STRATEGIES)}, or leave it out.")
    targets = chosen_devices(devices, device.type)
    return Placement(targets, strategy if len(targets) > 1 else None)


def named_device(kind: str) -> torch.device:
    """The device of an accelerator's name.

    Raises:
        ValueError: There is none.
    """
    best = best_accelerator()
    kind = {"auto": best, "gpu": "cuda"}.get(kind, kind)
    if kind not in ("cpu", best):
        raise ValueError(f"accelerator={kind}: there is none here. Give cpu or auto, which is {best}.")
    return torch.device(kind)


def fixed_length(size: int | str | None, config: Config) -> int | None:
    """How many tokens the KV cache always has room for, of what a user gives as `fixed_kv_cache_size`.

    Raises:
        ValueError: That is more than the model's context, or less than two.
    """
    length = config.block_size if size == "max_model_supported" else size
    if length is None:
        return None
    if not isinstance(length, int) or not 1 < length <= config.block_size:
        raise ValueError(
            f"fixed_kv_cache_size={size!r} is not valid: give 2 to {config.block_size}, the model's context."
        )
    return length
