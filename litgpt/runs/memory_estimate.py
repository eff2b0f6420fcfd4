"""How much memory a model needs on each device, by what is done with it.

Weights and gradients are counted on the model itself, the cache on a `KVCache` without memory, and what comes and goes
in a step by the model's own code on tensors that have no values (`litgpt.runs.memory_count`). Tests hold the
activations to what autograd keeps, the peak of a step to that of a real one, and whole runs to the estimate.

Measured on a CPU with torch 2.15, as the growth of the process's peak resident memory over that of the bare program, in
GB of 1e9 bytes. Training: two steps of two micro-batches with AdamW.

    full        pythia-160m    32-true     4 x 512    measured 5.27   estimated 5.14
    full        SmolLM2-135M   32-true     2 x 512             4.72             4.81
    full        SmolLM2-135M   bf16-true   2 x 512             2.76             2.75
    full        SmolLM2-135M   bf16-mixed  2 x 512             4.35             4.33
    lora        SmolLM2-135M   32-true     2 x 512             4.67             4.67
    lora        SmolLM2-135M   bf16-true   4 x 512             4.79             4.79
    lora        SmolLM2-135M   bf16-mixed  4 x 512             5.29             5.27
    adapter v2  SmolLM2-135M   bf16-true   2 x 512             2.45             2.06
    inference   pythia-160m    32-true     8 x 512             1.16             1.11
    inference   SmolLM2-135M   32-true     4 x 2048            1.19             1.16
    inference   SmolLM2-135M   bf16-true   4 x 2048            0.59             0.63

LoRA is on all linear layers, with dropout, whose share of the allocator was fitted to the first of these rows; of 4.79
GB, 2.59 are in use (2.55 estimated). MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=65536 have the rest given
back, at a cost in time.

Not measured yet: GPUs, and several devices. The estimates in the table are of the formulas that the count replaced.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from litgpt.adaptation.lora import LoRALinear
from litgpt.model import GPT
from litgpt.runs.memory_count import inference_memory, training_memory

PROGRAM_BYTES = 750_000_000  # Python with torch and what training imports, or a GPU's context: before any tensor
SAMPLING_BYTES = 32  # of one logit while a token is drawn: probabilities, sorted ones and their places
# Of what comes and goes in training, what the C library keeps from a CPU's next allocation (measured); dropout on the
# inputs of LoRA's matrices scatters it.
HELD_BACK, HELD_BACK_WITH_DROPOUT = 0.4, 1.0


@dataclass(frozen=True)
class Usage:
    """What is done with a model; what is trained of it, and in which types it is, the model itself says.

    Attributes:
        trains: Whether it is trained, or answers.
        compute: The type to compute in where that is not the weights' (mixed precision).
        batch_size: Sequences at a time on one device.
        context: Tokens of each sequence; at inference prompt and answer together.
        device: Kind of device, as in torch.device.
        devices: Devices that share weights, gradients and optimizer state in training (FSDP2).
        optimizer_states: Bytes that the optimizer keeps for each byte of trained parameters: 2 for Adam and AdamW, 0
            for plain SGD (`OptimizerSpec.state_ratio` tells).
        checkpointed: The blocks of which only the input is kept, and the rest computed again afterwards: none, full
            (all), or N for every N-th.
    """

    trains: bool
    compute: torch.dtype | None = None
    batch_size: int = 1
    context: int = 4096
    device: str = "cpu"
    devices: int = 1
    optimizer_states: float = 2
    checkpointed: str | int = "none"


def estimate_memory(model: GPT, usage: Usage) -> dict[str, int]:
    """The most memory that each device needs, in bytes, by what it is for. The parts add up.

    In training it is the peak of a step with gradient accumulation: the gradients of earlier micro-batches are there
    while the activations of the next one are. A step of one micro-batch may stay below it.

    Args:
        model: The model on any device (the meta device will do) in the types that it will have: adapted, quantised, and
            what is not trained frozen.
        usage: What is done with it.
    """
    whole = weight_bytes(model)
    parts = {"program": PROGRAM_BYTES}
    if not usage.trains:
        parts["weights"] = whole
        parts["kv_cache"] = cache_bytes(model, usage)
        drawing = usage.batch_size * model.config.padded_vocab_size * SAMPLING_BYTES
        reading = inference_memory(model, usage.batch_size, usage.context, usage.device, usage.compute)
        parts["working"] = max(reading, drawing)
        return parts
    trained = weight_bytes(model, trained=True)
    if trained < whole:
        parts["weights"] = (whole - trained) // usage.devices
        parts["trained_weights"] = trained // usage.devices
    else:
        parts["weights"] = whole // usage.devices
    parts["gradients"] = trained // usage.devices
    parts["optimizer"] = int(trained * usage.optimizer_states) // usage.devices
    step = training_memory(model, usage.batch_size, usage.context, usage.device, usage.compute, usage.checkpointed)
    parts["activations"] = step.activations
    parts["working"] = step.working + _gathered(model, usage)
    if usage.device == "cpu":
        scattered = any(isinstance(m, LoRALinear) and isinstance(m.dropout, nn.Dropout) for m in model.modules())
        share = HELD_BACK_WITH_DROPOUT if scattered else HELD_BACK
        parts["allocator"] = int((parts["activations"] + parts["working"]) * share)
    return parts


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_bytes(module: nn.Module, trained: bool = False) -> int:
    """Of all parameters, or of the trained ones; a shared one counts once."""
    return sum(p.numel() * p.itemsize for p in module.parameters() if p.requires_grad or not trained)


# --- inference -------------------------------------------------------------------------------------------------------


def cache_bytes(model: GPT, usage: Usage) -> int:
    """The cache of keys and values: a window's worth where a layer has one, latents where attention is latent."""
    dtype = usage.compute or model.transformer.wte.weight.dtype
    cache = model.new_cache(usage.batch_size, usage.context, device="meta", dtype=dtype)
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in cache.tensors())


# --- training --------------------------------------------------------------------------------------------------------


def _gathered(model: GPT, usage: Usage) -> int:
    """FSDP2: two blocks at a time, and what is in no block, are whole on each device, with their gradients."""
    if usage.devices == 1:
        return 0
    blocks = model.transformer.h
    whole, trained = (
        weight_bytes(model, only) - weight_bytes(blocks, only) * max(0, len(blocks) - 2) // len(blocks)
        for only in (False, True)
    )
    return whole + trained
