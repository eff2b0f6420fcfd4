"""Precisions by name: the type of the weights, and the type of the computation."""

from __future__ import annotations

import time
from typing import Literal, TypeGuard

import torch

from litgpt.devices.accelerator import accelerator

Precision = Literal["32-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed", "64-true"]
# name -> (dtype of the weights, dtype to compute in where that is another)
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "64-true": (torch.float64, None),
}


def default_precision(device: str | None = None) -> str:
    """The precision to train in on a kind of device, unless told otherwise."""
    device = device or accelerator()
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    return "32-true"


def inference_precision(device: torch.device) -> str:
    """The precision to answer in: bfloat16 where the device computes it in hardware, else float32."""
    if device.type == "cpu":
        fast = computes_bf16()
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
        raise ValueError(f"precision={precision} is not known. Choose one of {', '.join(PRECISIONS)}.")
    if precision.startswith("64") and device.type == "mps":
        raise ValueError(f"precision={precision} is not supported on an Apple GPU. Choose 32-true or less.")
    return PRECISIONS[precision]


def check_precision(precision: str, device: str | None = None) -> Precision:
    """The precision itself; one that is unknown, or that the kind of device cannot train in, is refused.

    Raises:
        ValueError: It is one of those.
    """
    device = device or accelerator()
    if not _is_known(precision):
        raise ValueError(f"precision={precision} is unknown. Choose one of: {', '.join(PRECISIONS)}.")
    remedy = f"Choose another, for example precision={default_precision(device)}."
    if precision.startswith("64") and device == "mps":
        raise ValueError(f"precision={precision} does not exist on an Apple GPU. {remedy}")
    if precision.startswith("16") and device != "cuda":
        raise ValueError(f"precision={precision} needs a GPU; this is {device}. {remedy}")
    if precision.startswith("bf16") and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError(f"precision={precision} is not supported by {torch.cuda.get_device_name()}. {remedy}")
    return precision


def computes_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this CPU, if need be in float32 within: it does from AVX-512 on.
    Elsewhere torch has loops for it that are tens to hundreds of times as slow as a product in float32."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def bf16_slowdown(times: int = 3) -> float:
    """How many times as long a product takes on this CPU in bfloat16 as in float32: measured, in some milliseconds."""

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        a @ b
        runs = []
        for _ in range(times):
            started = time.perf_counter()
            a @ b
            runs.append(time.perf_counter() - started)
        return min(runs)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def settle_bf16(precision: Precision, device: str) -> tuple[Precision, str | None]:
    """The precision to train in where one is asked for, and what to say of it.

    A CPU without products in bfloat16 trains in float32. That is decided by what it can do, which every rank and every
    resumed run finds alike; what is measured is only told.

    Args:
        precision: What is asked for.
        device: The kind of device.
    """
    if device != "cpu" or not precision.startswith("bf16") or (computes_bf16() and multiplies_bf16()):
        return precision, None
    slower = f"precision={precision}: this CPU has no arithmetic for bfloat16, in which a product takes "
    slower += f"{bf16_slowdown():.1f} times as long here as in float32"
    if multiplies_bf16():
        return precision, f"{slower}. precision=32-true is the quicker one."
    memory = ", and weights, gradients and optimizer state take twice the memory" if precision == "bf16-true" else ""
    return "32-true", f"{slower}. So the run is in 32-true{memory}."


def _is_known(precision: str) -> TypeGuard[Precision]:
    return precision in PRECISIONS
