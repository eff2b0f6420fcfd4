"""The estimate of what comes and goes in a step, and with `--measure` what tensors really take, on a CPU.

    python extensions/benchmarks/memory_peaks.py [--measure]

Each line is a method, a model, a precision and megabytes of activations and working memory together: the most beside
weights, gradients, optimizer state and the KV cache, in one micro-batch, or in answering. Without `--measure`, it runs
on earlier commits, too (with their files on PYTHONPATH).
"""

import contextlib
import sys
from collections.abc import Callable

import torch

from litgpt.adaptation.adapter import apply_adapter, apply_adapter_v2
from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.config import Config
from litgpt.devices.precision import PRECISIONS
from litgpt.model import GPT
from litgpt.quantization.layers import replace_linears
from litgpt.runs.memory_estimate import Usage, estimate_memory
from litgpt.training.activation_checkpointing import checkpoint_blocks
from litgpt.training.frozen_weights import store_frozen_matrices
from litgpt.training.loss import NextTokenLoss

ROWS, TOKENS = 2, 512
LLAMA = {"block_size": 512, "n_layer": 6, "n_embd": 512, "n_head": 8, "n_query_groups": 2, "vocab_size": 8000}
LLAMA |= {"padding_multiple": 8, "rotary_percentage": 1.0, "parallel_residual": False, "bias": False}
LLAMA |= {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 1408}
MOE = {"mlp_class_name": "LLaMAMoE", "n_expert": 8, "n_expert_per_token": 2, "moe_intermediate_size": 256}
LATENT = {"kv_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "q_lora_rank": 128}
MODELS = {
    "llama": {},
    "moe": MOE,
    "gemma2": {"mlp_class_name": "GemmaMLP", "attention_logit_softcapping": 50.0, "norm_unit_offset": True},
    "latent": {"n_query_groups": 8, "latent_attention": LATENT},
}
EVERYWHERE = LoRASettings(key=True, projection=True, mlp=True)


def qlora(model: GPT) -> None:
    replace_linears(model, "bnb.nf4", model.transformer["wte"].weight.dtype)
    apply_lora(model, EVERYWHERE)


METHODS: dict[str, Callable[[GPT], object]] = {
    "full": lambda model: None,
    "lora": lambda model: apply_lora(model, EVERYWHERE),
    "qlora": qlora,
    "adapter": apply_adapter,
    "adapter_v2": apply_adapter_v2,
    "answering": lambda model: None,
}
RUNS = [(method, "llama", precision, "none") for method in METHODS for precision in ("32-true", "bf16-true")]
RUNS += [(method, "llama", "bf16-mixed", "none") for method in ("full", "lora", "answering")]
RUNS += [(method, "llama", "bf16-true", choice) for method in ("full", "lora") for choice in ("full", 2)]
RUNS += [(method, name, "bf16-true", "none") for name in MODELS for method in ("full", "lora") if name != "llama"]
RUNS += [("answering", name, "bf16-true", "none") for name in MODELS if name != "llama"]


def build(method: str, name: str, precision: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(**{**LLAMA, **MODELS[name]}))
    model.init_weights()
    model.to(PRECISIONS[precision][0])
    METHODS[method](model)
    store_frozen_matrices(model, precision)
    return model


def measured(model: GPT, method: str, compute: torch.dtype | None, checkpointed: str | int) -> int:
    """The most bytes of tensors at a time."""
    from litgpt.runs.live_memory import LiveMemory

    memory = LiveMemory()
    for tensor in (*model.parameters(), *model.buffers()):
        memory.ignore(tensor)
        if tensor.requires_grad and method != "answering":
            tensor.grad = torch.zeros_like(tensor)
            memory.ignore(tensor.grad)
    precision = torch.autocast("cpu", compute) if compute else contextlib.nullcontext()
    idx = torch.randint(0, 8000, (ROWS, TOKENS))
    if method == "answering":
        cache = model.eval().new_cache(ROWS, TOKENS, dtype=compute)
        for tensor in cache.tensors():
            memory.ignore(tensor)
        with torch.no_grad(), precision, memory, memory.measured() as calls:
            model.hidden_states(idx, cache=cache.select(torch.arange(ROWS), is_empty=True))
        return calls.peak
    checkpoint_blocks(model.train(), checkpointed)
    module = NextTokenLoss(model)
    with memory, memory.measured() as step:
        with precision:
            loss = module(idx, idx)
        loss.backward()
    return step.peak


def main(measures: bool) -> None:
    for method, name, precision, checkpointed in RUNS:
        model, compute = build(method, name, precision), PRECISIONS[precision][1]
        usage = Usage(method != "answering", compute, ROWS, TOKENS, checkpointed=checkpointed)
        parts = estimate_memory(model, usage)
        line = f"{method:10} {name:7} {precision:10} {checkpointed!s:5}"
        line += f" {(parts.get('activations', 0) + parts['working']) / 1e6:9.2f}"
        if measures:
            line += f" {measured(model, method, compute, checkpointed) / 1e6:9.2f}"
        print(line, flush=True)


if __name__ == "__main__":
    main("--measure" in sys.argv)
