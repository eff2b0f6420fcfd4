"""A real run in a process of its own: prints by how many bytes its peak grew over what the bare program takes.

    python -m tests.measured_run METHOD MODEL PRECISION BATCH_SIZE CONTEXT

METHOD is inference (prompts, then a few tokens with the cache), full, lora, qlora or adapter_v2 (two optimizer steps of
two micro-batches with AdamW, as in training).

Only anonymous memory counts, read after each of torch's operations. The peak that the system keeps (VmHWM) has the pages
of the libraries in it, 0.3 GB, which a machine under load takes away and brings back whenever it likes.
"""

import contextlib
import resource
import sys
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt.adaptation.adapter import apply_adapter_v2
from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.config import Config
from litgpt.devices.precision import PRECISIONS
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.model import GPT
from litgpt.quantization.layers import replace_linears
from litgpt.sources.meta import give_memory, meta_model
from litgpt.training.frozen_weights import store_frozen_matrices
from litgpt.training.loss import NextTokenLoss
from litgpt.training.optimizers import OptimizerSpec

NEW_TOKENS = 8


def anonymous_memory() -> int:
    """Bytes that the process has now, without files."""
    _, resident, of_files, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(of_files)) * resource.getpagesize()


class Peak(TorchDispatchMode):
    """The most anonymous memory within `with`, in bytes over what there was at its beginning."""

    def __enter__(self) -> "Peak":
        self.before, self.grown = anonymous_memory(), 0
        return super().__enter__()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.grown = max(self.grown, anonymous_memory() - self.before)
        return result


def make(config: Config, dtype: torch.dtype) -> GPT:
    model = meta_model(config)
    give_memory(model, dtype, "cpu")
    model.init_weights()
    return model


def change(model: GPT, method: str, precision: str) -> GPT:
    """As the finetuning commands do, with LoRA on all linear layers."""
    if method == "qlora":
        replace_linears(model, "bnb.nf4", PRECISIONS[precision][0])
    if method in ("lora", "qlora"):
        apply_lora(model, LoRASettings(key=True, projection=True, mlp=True))
    elif method == "adapter_v2":
        apply_adapter_v2(model, start_layer=0)
    store_frozen_matrices(model, precision)
    return model


def train(method: str, config: Config, precision: str, batch_size: int, context: int) -> None:
    weights, compute = PRECISIONS[precision]
    gpt = change(make(config, weights).train(), method, precision)
    module = NextTokenLoss(gpt)
    optimizer = OptimizerSpec("AdamW", {"lr": 1e-4}).build([p for p in gpt.parameters() if p.requires_grad])
    for _ in range(2):
        for _ in range(2):
            idx = torch.randint(0, config.vocab_size, (batch_size, context))
            with torch.autocast("cpu", compute) if compute else contextlib.nullcontext():
                loss = module(idx, idx)
            (loss / idx.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()


def generate(config: Config, precision: str, batch_size: int, context: int) -> None:
    weights, compute = PRECISIONS[precision]
    engine = Engine(make(config, weights).eval(), autocast=compute)
    prompts = torch.randint(0, config.vocab_size, (batch_size, context - NEW_TOKENS)).tolist()
    engine.complete([Request(prompt, NEW_TOKENS, Sampling(0.8)) for prompt in prompts])


def main(method: str, name: str, precision: str, batch_size: int, context: int) -> None:
    run = generate if method == "inference" else partial(train, method)
    small = Config(n_layer=1, n_embd=32, n_head=2, vocab_size=512, block_size=64)
    with Peak():  # imports what it needs
        run(small, precision, 1, 32)
    with Peak() as peak:
        run(Config.from_name(name, block_size=context), precision, batch_size, context)
    print(peak.grown)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
