"""Precisions by name: the type of the weights, and the type of the computation."""

from __future__ import annotations

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


def _is_known(precision: str) -> TypeGuard[Precision]:
    return precision in PRECISIONS
