"""Lightning Fabric for a run's devices: one device, DDP, or FSDP2; and what a run uses, in words."""

from __future__ import annotations

import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from lightning_fabric import Fabric
from litgpt.cli.option_names import on_command_line
from litgpt.devices.accelerator import accelerator, count_devices, usable_cores
from litgpt.devices.precision import Precision, check_precision, default_precision, settle_bf16
from litgpt.parallel.ranks import rank_from_environment
from litgpt.parallel.sharding import shard_module

Strategy = Literal["auto", "ddp", "fsdp"]


# Peak dense bfloat16 (or float16) TFLOP/s without sparsity, from the makers' data sheets; the first name found counts.
PEAK_TFLOPS = {
    "b200": 2250, "gb200": 2500, "h200": 989, "h100 pcie": 756, "h100 nvl": 835, "h100": 989, "gh200": 989,
    "h20": 148, "a100": 312, "a800": 312, "a40": 150, "a30": 165, "a10g": 70, "a10": 125, "a6000": 155, "a5000": 111,
    "l40s": 362, "l40": 181, "l4": 121, "t4": 65, "v100": 125, "6000 ada": 364, "rtx 5090": 210, "rtx 4090": 165,
    "rtx 4080": 97, "rtx 3090": 71, "mi355x": 2300, "mi325x": 1307, "mi300x": 1307, "mi250x": 191, "mi250": 181,
}  # fmt: skip


def import_fabric() -> type[Fabric]:
    """lightning_fabric's Fabric, without torchmetrics: of that it wants to see the version alone, but would import it,
    and with it, where they are installed, transformers, torchvision and scipy: longer than all else a start takes."""
    with _version_only("torchmetrics"):
        from lightning_fabric import Fabric
    return Fabric


@contextmanager
def _version_only(package: str) -> Generator[None]:
    """Inside, what imports a package gets nothing but its version; unless it is there already, or not installed."""
    spec = None if package in sys.modules else find_spec(package)
    if spec is None:
        yield
        return
    stand_in = ModuleType(package)
    stand_in.__dict__.update(__version__=version(package), __spec__=spec)
    sys.modules[package] = stand_in
    try:
        yield
    finally:
        del sys.modules[package]


def make_fabric(
    devices: int | str = "auto", num_nodes: int = 1, precision: str | None = None, strategy: Strategy = "auto"
) -> Fabric:
    """A Fabric for these devices, not launched yet.

    Args:
        devices: Number of devices per node, or "auto" for all there are (on a CPU: one process).
        num_nodes: Number of machines.
        precision: One of PRECISIONS; None chooses by the device.
        strategy: With several devices, "fsdp" shards weights, gradients and optimizer state (FSDP2), "ddp" keeps a
            copy of all on each device; "auto" is fsdp.
    """
    Fabric = import_fabric()
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # what it would announce, describe_devices says
    count = count_devices(devices, num_nodes)
    return Fabric(
        accelerator=accelerator(),
        devices=devices if "," in str(devices) or str(devices) in ("auto", "-1") else int(devices),
        num_nodes=num_nodes,
        precision=settled_precision(precision),
        strategy=_strategy(strategy, count),
    )


def settled_precision(asked: str | None) -> Precision:
    """The precision to train in: what is asked for, or else what the device is made for. Where that would be many times
    slower than another it is the other, and rank 0 says so.

    Raises:
        ValueError: It is unknown, or the device cannot do it at all.
    """
    precision, note = settle_bf16(check_precision(asked or default_precision()), accelerator())
    if note is not None and rank_from_environment() == 0:
        print(on_command_line(note), file=sys.stderr, flush=True)
    return precision


def _strategy(name: Strategy, devices: int) -> Any:
    if name not in ("auto", "ddp", "fsdp"):
        raise ValueError(f"strategy={name} is unknown. Choose auto, ddp or fsdp.")
    if devices == 1:
        return "auto"
    if name == "ddp":
        from lightning_fabric.strategies import DDPStrategy

        # The root's forward runs once per micro-batch and uses every parameter: no search for unused ones.
        return DDPStrategy(gradient_as_bucket_view=True)
    from lightning_fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(shard_module, data_parallel_size=devices, tensor_parallel_size=1)


def describe_devices(fabric: Fabric) -> str:
    """What the run uses, in words: `2 x NVIDIA H100 80GB HBM3, bf16-mixed, FSDP2`."""
    device = fabric.device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "mps":
        name = "Apple MPS"
    else:
        name = f"CPU process with {torch.get_num_threads()} thread(s)"
    strategy = {"ModelParallelStrategy": ", FSDP2", "DDPStrategy": ", DDP"}.get(type(fabric.strategy).__name__, "")
    line = f"{fabric.world_size} x {name}, {precision_of(fabric)}{strategy}"
    here, cores = len(getattr(fabric.strategy, "parallel_devices", None) or [0]), usable_cores()
    if device.type == "cpu" and here > cores:
        line += (
            f"\nNote: {here} processes share {cores} CPU core(s) here, and each holds what a device would: that is "
            f"slower than --devices {cores} or fewer, and takes more memory. It shows what as many GPUs would do."
        )
    return line


def precision_of(fabric: Fabric) -> str:
    """The precision that the Fabric was made with."""
    return str(fabric.strategy.precision.precision)


def peak_flops(fabric: Fabric) -> float | None:
    """Operations per second that all devices together can do at best in 16 bits; None where that is not known."""
    if fabric.device.type != "cuda" or "16" not in precision_of(fabric):
        return None
    name = torch.cuda.get_device_name(fabric.device).lower()
    peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
    return None if peak is None else peak * 1e12 * fabric.world_size
