"""How quickly a device reads its memory, which bounds how quickly it decodes: every step reads every weight."""

from __future__ import annotations

import time

import torch

from litgpt.devices.memory import memory_free

SMALLEST = 256 * 2**20  # bytes that are read at least: more than most caches hold
TIMES = 5


def read_bandwidth(device: torch.device, num_bytes: int, times: int = TIMES) -> float:
    """Bytes per second of the quickest of some passes over an array, as the STREAM benchmark counts them
    (https://www.cs.virginia.edu/stream/), but for reading alone, with as many threads as torch has.

    Args:
        device: Whose memory.
        num_bytes: How long the array is, if not shorter than 256 MiB or longer than a quarter of what is free. As long
            as what is compared with it: a cache that holds the one holds the other.
        times: How many passes.
    """
    room = memory_free(device)
    size = max(SMALLEST, num_bytes)
    if room is not None:
        size = max(2**20, min(size, room // 4))
    values = torch.ones(size // 4, dtype=torch.float32, device=device)
    halves = values.chunk(2)
    best = 0.0
    for read in (values.sum, lambda: torch.dot(halves[0], halves[1][: halves[0].numel()])):
        for _ in range(times):
            started = time.perf_counter()
            read().item()  # waits for the device
            best = max(best, values.nbytes / (time.perf_counter() - started))
    return best
