"""Seconds of a training step, uncompiled, with `--compiler torch` and with `--compiler thunder`, in turn.

python extensions/thunder/step_time.py [--rounds 7] [--precision 32-true] [--lora true]
"""

from __future__ import annotations

import argparse
import statistics
import time

import thunder
import torch

from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora
from litgpt.config import Config
from litgpt.devices.precision import PRECISIONS
from litgpt.model import GPT
from litgpt.training.compilers import choose_compiler, compile_blocks
from litgpt.training.loss import NextTokenLoss

LLAMA = {
    "block_size": 256, "n_layer": 4, "n_head": 8, "n_query_groups": 4, "n_embd": 512, "intermediate_size": 1408,
    "vocab_size": 8192, "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "rotary_percentage": 1.0,
    "parallel_residual": False, "bias": False,
}  # fmt: skip
BATCH, STEPS = 2, 3


class Trained:
    """A model with its optimizer, compiled by one of them, and how long its steps took."""

    def __init__(self, compiler: str | None, autocast: torch.dtype | None, lora: bool) -> None:
        torch.manual_seed(0)
        self.gpt = GPT(Config(name="llama", **LLAMA))
        self.gpt.init_weights()
        if lora:
            apply_lora(self.gpt, LoRASettings(r=8, dropout=0.0, mlp=True, projection=True))
            for name, parameter in self.gpt.named_parameters():
                parameter.requires_grad_(is_lora(name))
        compile_blocks(self.gpt, choose_compiler(False, compiler))
        self.loss, self.autocast = NextTokenLoss(self.gpt), autocast
        self.optimizer = torch.optim.AdamW([p for p in self.gpt.parameters() if p.requires_grad], lr=1e-3)
        self.generator = torch.Generator().manual_seed(1)
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self) -> None:
        idx = torch.randint(0, LLAMA["vocab_size"], (BATCH, LLAMA["block_size"] + 1), generator=self.generator)
        start = time.perf_counter()
        with torch.autocast("cpu", self.autocast, enabled=self.autocast is not None):
            loss = self.loss(idx[:, :-1], idx[:, 1:].contiguous()) / (BATCH * LLAMA["block_size"])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--lora", default="false", choices=["true", "false"])
    options = parser.parse_args()
    _, autocast = PRECISIONS[options.precision]
    names = {"none": None, "torch": "torch", "thunder": "thunder"}
    runs = {name: Trained(compiler, autocast, options.lora == "true") for name, compiler in names.items()}
    first = {}
    for name, run in runs.items():
        run.step()
        first[name] = run.seconds.pop()
        print(f"{name}: the first step took {first[name]:.1f} s", flush=True)
        run.step()
        run.seconds.clear()
    for _ in range(options.rounds):
        for run in runs.values():
            for _ in range(STEPS):
                run.step()
    print(f"torch {torch.__version__}, thunder {thunder.__version__}, {torch.get_num_threads()} threads, {options}")
    print("| compiler | first step | median step | of uncompiled | last loss |\n|---|---|---|---|---|")
    base = statistics.median(runs["none"].seconds)
    for name, run in runs.items():
        median = statistics.median(run.seconds)
        print(f"| {name} | {first[name]:.1f} s | {median:.3f} s | {median / base:.2f} | {run.losses[-1]:.5f} |")


if __name__ == "__main__":
    main()
