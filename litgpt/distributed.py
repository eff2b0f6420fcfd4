"""Devices and how training is spread over them: one device, DDP, or FSDP2.

The only module that knows one accelerator from another, beside the choice of the attention kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from litgpt.model import GPT, Block, Router

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# name -> (dtype of the weights, dtype to compute in where that is another)
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "64-true": (torch.float64, None),
}
Strategy = Literal["auto", "ddp", "fsdp"]
LONGEST_WORK = timedelta(days=14)  # of one process, while the others wait

# Peak dense bfloat16 (or float16) TFLOP/s without sparsity, from the makers' data sheets; the first name found counts.
PEAK_TFLOPS = {
    "b200": 2250, "gb200": 2500, "h200": 989, "h100 pcie": 756, "h100 nvl": 835, "h100": 989, "gh200": 989,
    "h20": 148, "a100": 312, "a800": 312, "a40": 150, "a30": 165, "a10g": 70, "a10": 125, "a6000": 155, "a5000": 111,
    "l40s": 362, "l40": 181, "l4": 121, "t4": 65, "v100": 125, "6000 ada": 364, "rtx 5090": 210, "rtx 4090": 165,
    "rtx 4080": 97, "rtx 3090": 71, "mi355x": 2300, "mi325x": 1307, "mi300x": 1307, "mi250x": 191, "mi250": 181,
}  # fmt: skip


def accelerator() -> str:
    """The best kind of device here: cuda (also for ROCm), mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_precision(device: str | None = None) -> str:
    """The precision to train in on a kind of device, unless told otherwise."""
    device = device or accelerator()
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return "32-true"


def inference_precision(device: torch.device) -> str:
    """The precision to answer in: bfloat16 where the device computes it in hardware, else float32."""
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    elif device.type == "mps":
        fast = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        fast = torch.get_device_module(device).is_bf16_supported()
    return "bf16-true" if fast else "32-true"


def inference_dtypes(precision: str, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype of the weights to answer with, and that of the computation where it is another.

    Raises:
        ValueError: no such precision, or the device cannot compute in it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision} is not known. Choose one of {', '.join(PRECISIONS)}.")
    if precision.startswith("64") and device.type == "mps":
        raise ValueError(f"--precision {precision} cannot act on an Apple GPU. Choose 32-true or less.")
    return PRECISIONS[precision]


def check_precision(precision: str, device: str | None = None) -> None:
    """Refuse a precision that is unknown, or that the kind of device cannot train in."""
    device = device or accelerator()
    if precision not in PRECISIONS:
        raise ValueError(f"--precision {precision} is unknown. Choose one of: {', '.join(PRECISIONS)}.")
    remedy = f"Choose another, for example --precision {default_precision(device)}."
    if precision.startswith("64") and device == "mps":
        raise ValueError(f"--precision {precision} does not exist on an Apple GPU. {remedy}")
    if precision.startswith("16") and device != "cuda":
        raise ValueError(f"--precision {precision} needs a GPU; this is {device}. {remedy}")
    if precision.startswith("bf16") and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"--precision {precision} is not supported by {torch.cuda.get_device_name()}. {remedy}")


def store_frozen_matrices(gpt: GPT, precision: str) -> None:
    """In mixed precision, keep frozen linear layers' weights in the type that is computed in.

    The numbers stay the same, bit for bit: autocast rounds these weights in every forward pass anyway, and, since it
    remembers copies of trained weights only, keeps a copy of each until the backward pass. So a frozen weight takes 2
    bytes instead of 4 + 2. Routers compute in float32, and a tied head is the embedding, too: they stay.

    Args:
        gpt: The model, not yet sharded.
        precision: One of PRECISIONS; nothing happens where it is not mixed.
    """
    _, dtype = PRECISIONS[precision]
    embedding = gpt.transformer["wte"].weight
    for layer in gpt.modules():
        if dtype is None or not isinstance(layer, nn.Linear) or isinstance(layer, Router) or layer.weight is embedding:
            continue
        for parameter in layer.parameters(recurse=False):
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def count_devices(devices: int | str, num_nodes: int = 1, kind: str | None = None) -> int:
    """How many devices `devices` means over all nodes: a number, "auto" or -1 for all, "0,2" for those two.

    Of the kind given, by default of the best there is.

    Raises:
        ValueError: There are not that many, or it is no number.
    """
    kind = kind or accelerator()
    present = {"cuda": torch.cuda.device_count, "mps": lambda: 1, "cpu": lambda: 1}[kind]()
    text = str(devices).strip()
    if text in ("auto", "-1"):
        count = present
    elif "," in text:
        count = len([part for part in text.split(",") if part.strip()])
    elif not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--devices {devices} is no number of devices. Give a number, or auto for all there are.")
    elif kind != "cpu" and int(text) > present:
        raise ValueError(f"--devices {text}, but there is {present} {kind} device here. Use --devices {present}.")
    else:
        count = int(text)
    if num_nodes < 1:
        raise ValueError(f"--num_nodes {num_nodes}: it must be at least 1.")
    if num_nodes > 1:
        check_slurm(count, num_nodes)
    return count * num_nodes


def check_slurm(devices: int, num_nodes: int) -> None:
    """Refuses to wait for processes on other nodes that SLURM was not told to start.

    Raises:
        ValueError: This is the batch script's one process, or srun starts another number on each node.
    """
    environment = os.environ
    if "SLURM_JOB_ID" not in environment or "TORCHELASTIC_RUN_ID" in environment:  # torchrun starts them itself
        return
    remedy = f"Start it with `srun --ntasks-per-node={devices} litgpt ...`."
    if "SLURM_STEP_ID" not in environment:
        raise ValueError(
            f"--num_nodes {num_nodes}: a batch script runs on the first node alone, and nothing starts litgpt on the "
            f"others. {remedy}"
        )
    tasks = environment.get("SLURM_NTASKS_PER_NODE", "an unknown number of")
    if tasks != str(devices):
        raise ValueError(
            f"--devices {devices} on each of {num_nodes} nodes, but SLURM has {tasks} tasks per node: there is one for "
            f"each device. {remedy}"
        )


def chosen_devices(devices: int | str, kind: str | None = None) -> list[torch.device]:
    """The devices of this machine that `devices` means, as for `count_devices`; on a CPU it so many times.

    Raises:
        ValueError: There is no such device.
    """
    kind, text = kind or accelerator(), str(devices).strip()
    if "," not in text:
        numbers = list(range(count_devices(devices, kind=kind)))
    else:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        numbers = [int(part) for part in parts if part.isdecimal()]
        if len(numbers) < len(parts) or (kind == "cuda" and max(numbers, default=0) >= torch.cuda.device_count()):
            raise ValueError(f"--devices {devices} names a device that there is not. Give a number, or auto for all.")
    return [torch.device(kind, number) if kind == "cuda" else torch.device(kind) for number in numbers]


def import_fabric() -> type[Fabric]:
    """lightning_fabric's Fabric, without torchmetrics: of that it wants to see the version alone, but would import it,
    and with it, where they are installed, transformers, torchvision and scipy: longer than all else a start takes."""
    with _version_only("torchmetrics"):
        from lightning_fabric import Fabric
    return Fabric


@contextmanager
def _version_only(package: str) -> Iterator[None]:
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
    precision = precision or default_precision()
    check_precision(precision)
    return Fabric(
        accelerator=accelerator(),
        devices=devices if "," in str(devices) or str(devices) in ("auto", "-1") else int(devices),
        num_nodes=num_nodes,
        precision=precision,
        strategy=_strategy(strategy, count),
    )


def _strategy(name: Strategy, devices: int) -> Any:
    if name not in ("auto", "ddp", "fsdp"):
        raise ValueError(f"--strategy {name} is unknown. Choose auto, ddp or fsdp.")
    if devices == 1:
        return "auto"
    if name == "ddp":
        from lightning_fabric.strategies import DDPStrategy

        # The root's forward runs once per micro-batch and uses every parameter: no search for unused ones.
        return DDPStrategy(gradient_as_bucket_view=True)
    from lightning_fabric.strategies import ModelParallelStrategy

    return ModelParallelStrategy(shard_module, data_parallel_size=devices, tensor_parallel_size=1)


def shard_module(module: nn.Module, mesh: Any) -> nn.Module:
    """Shard a module's parameters over `mesh["data_parallel"]`, block by block (FSDP2,
    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)."""
    from torch.distributed.fsdp import fully_shard

    data_parallel = mesh["data_parallel"]
    for block in [m for m in module.modules() if isinstance(m, Block)]:
        fully_shard(block, mesh=data_parallel)
    return fully_shard(module, mesh=data_parallel)


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Inside, each device has all parameters of a module that `shard_module` may have sharded, so that a rank can run
    it without the others. Every rank must call this, after the module's first forward pass."""
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    # The hooks around each part's forward pass would let go of its parameters again, and remember the pass for a
    # backward one: the ranks then gather the parameters of different parts, and wait for each other forever.
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.unshard()
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, before, after in hooks:
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


def own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters by name, each as an optimizer has it: of one that `shard_module` has sharded, the sharded one. (A
    forward pass without a backward one leaves whole ones in its place.)"""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return list(module.named_parameters())


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameters are spread over devices."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in module.parameters())


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. Every rank must call this for the same tensors in the same order."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded, and then keeps only its part."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(target, DTensor):
        whole = source.to(target.device, target.dtype)
        target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
    else:
        target.copy_(source)


def gathered_objects(fabric: Fabric, value: Any) -> list[Any]:
    """What each rank has, in the order of the ranks. Every rank must call this."""
    values = [value] * fabric.world_size
    if fabric.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def store_of_ranks() -> torch.distributed.Store:
    """The keys and values on the host of rank 0 over which the processes have met: words between them that go past the
    devices."""
    return torch.distributed.distributed_c10d._get_default_store()


def once_per_node(fabric: Fabric, work: Callable[[], object]) -> None:
    """Do some work in one process of each node, while the others wait for it. Every rank must call this.

    They wait for days if need be: the process group's own barrier ends after 10 to 30 minutes, and downloading and
    tokenising a corpus takes hours.
    """
    others = fabric.world_size > 1
    # On gloo whatever the device: NCCL's watchdog would count the waiting as a hang.
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WORK) if others else None
    if fabric.local_rank == 0:
        work()
    if group is not None:
        torch.distributed.barrier(group)
        torch.distributed.destroy_process_group(group)


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


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def memory_used(device: torch.device) -> float:
    """The most memory used so far, in bytes: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return float(torch.mps.driver_allocated_memory())
    status = Path("/proc/self/status")
    if status.exists():  # in kB; ru_maxrss would count the parent process's memory before exec
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(peak.split()[1]) * 1024
    import resource

    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak_rss if sys.platform == "darwin" else peak_rss * 1024)


def memory_present(device: torch.device) -> int | None:
    """Bytes of memory that the device has: of the GPU, or of the machine, as far as its control group lets the process
    have it. None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container; "max" where there is none
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(present, int(text)) if text.isdecimal() else present


def memory_free(device: torch.device) -> int | None:
    """Bytes of memory that nobody uses now. None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    present = memory_present(device)
    if device.type == "mps":
        return present - torch.mps.driver_allocated_memory()
    meminfo = Path("/proc/meminfo")
    if present is None or not meminfo.exists():
        return present
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return min(present, int(available.split()[1]) * 1024)


def give_back() -> None:
    """Returns memory to the system that was freed: the C library keeps what lies between other pieces."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch on every device."""
    import random

    import numpy as np

    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)


def draw_apart(rank: int) -> None:
    """From now on, torch draws other numbers on each rank (dropout, noise), which follow from the seed; rank 0 goes on.

    Called once the initial weights are there, which are the same on all ranks. Python's and numpy's numbers stay the
    same, too: a data module may shuffle by them, and all ranks must read one order.
    """
    if rank:
        torch.manual_seed(torch.initial_seed() + rank)


def rng_state() -> dict[str, Any]:
    """The state of every random number generator of this process, as plain values and tensors."""
    import random

    import numpy as np

    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": list(random.getstate()[1]),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every random number generator of this process where `rng_state` found it."""
    import random

    import numpy as np

    random.setstate((3, tuple(state["python"]), None))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def rank_from_environment() -> int:
    """This process's rank as the launcher says, before anything is launched."""
    return next((int(os.environ[name]) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), 0)
