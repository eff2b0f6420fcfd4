"""The memory of a device: how much there is, how much is used, and giving it back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import torch


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


def forget_peak(device: torch.device) -> bool:
    """Have `memory_used` count from now on; False where the system cannot, and it goes on from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # https://man7.org/linux/man-pages/man5/proc_pid_clear_refs.5.html
    except OSError:
        return False
    return device.type == "cpu"


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
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    present = memory_present(device)
    meminfo = Path("/proc/meminfo")
    if present is None or not meminfo.exists():
        return present
    available = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    return min(present, int(available.split()[1]) * 1024)


def give_back() -> None:
    """Returns memory to the system that was freed: the C library keeps what lies between other pieces."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)
