"""The kinds of accelerators, and which of this machine's a run or a model is to use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def accelerator() -> str:
    """The best kind of device here: cuda (also for ROCm), mps or cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def count_devices(devices: int | str, num_nodes: int = 1, kind: str | None = None) -> int:
    """How many devices `devices` means over all nodes: a number, "auto" or -1 for all, "0,2" for those two.

    Of the kind given, by default of the best there is.

    Raises:
        ValueError: There are not that many, or it is not a number.
    """
    kind = kind or accelerator()
    present = {"cuda": torch.cuda.device_count, "mps": lambda: 1, "cpu": lambda: 1}[kind]()
    text = str(devices).strip()
    if text in ("auto", "-1"):
        count = present
    elif "," in text:
        count = len([part for part in text.split(",") if part.strip()])
    elif not text.isdecimal() or int(text) < 1:
        raise ValueError(f"devices={devices} is not a number of devices. Give a number, or auto for all there are.")
    elif kind != "cpu" and int(text) > present:
        raise ValueError(f"devices={text}, but there is {present} {kind} device here. Use devices={present}.")
    else:
        count = int(text)
    if num_nodes < 1:
        raise ValueError(f"num_nodes={num_nodes}: it must be at least 1.")
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
            f"num_nodes={num_nodes}: a batch script runs on the first node alone, and nothing starts litgpt on the "
            f"others. {remedy}"
        )
    tasks = environment.get("SLURM_NTASKS_PER_NODE", "an unknown number of")
    if tasks != str(devices):
        raise ValueError(
            f"devices={devices} on each of {num_nodes} nodes, but SLURM has {tasks} tasks per node: there is one for "
            f"each device. {remedy}"
        )


def chosen_devices(devices: int | str, kind: str | None = None) -> list[torch.device]:
    """The devices of this machine that `devices` means, as for `count_devices`; on a CPU that device, this many times.

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
            raise ValueError(f"devices={devices} names a device that there is not. Give a number, or auto for all.")
    return [torch.device(kind, number) if kind == "cuda" else torch.device(kind) for number in numbers]


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """What the maker calls a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
