"""LoRA and QLoRA of an 8B Llama shape on one GPU: tokens per second, MFU and peak memory, at 4k context, packed.

    python extensions/benchmarks/finetune_gpu.py

trains Llama-3.1-8B's shape with random weights, made on the device, for a few steps: rank 8 on queries, keys, values,
the output projection and the MLP, bf16-true, AdamW, rows of several documents of one length; once for each of LoRA and
QLoRA (nf4), eager and compiled. Memory is the most that was allocated from the first training step on. Beside it stand
figures published elsewhere for an 8B Llama: LoRA in bf16 at 4k on one H100, 12,473 tokens/s; QLoRA, 7.4 GiB. A small
shape shows on a CPU that the arithmetic works: `--model pythia-14m --context 128 --device cpu`.
"""

import argparse
import gc
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from litgpt.devices.accelerator import accelerator
from litgpt.devices.memory import memory_used
from litgpt.parallel.fabric import PEAK_TFLOPS

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.quantization.layers import quantized_layers, replace_linears
from litgpt.sources.meta import give_memory, meta_model
from litgpt.training.activation_checkpointing import checkpoint_blocks
from litgpt.training.loss import NextTokenLoss
from litgpt.training.metrics import flops_per_token

PUBLISHED = {"LoRA": "12,473 tokens/s (one H100)", "QLoRA nf4": "7.4 GiB"}
WEIGHT_STD = 0.02


@dataclass
class Figures:
    tokens_per_second: float
    mfu: float | None
    memory: float  # bytes
    losses: tuple[float, float]  # of the first and the last step, per token


def random_model(config: Config, quantize: str | None, device: torch.device) -> GPT:
    """The shape with random weights in bfloat16, quantised where asked for, never whole in both forms."""
    gpt = meta_model(config)
    if quantize is not None:
        replace_linears(gpt, quantize, torch.bfloat16)
    give_memory(gpt, torch.bfloat16, device)
    gpt.init_weights()
    for _, layer in quantized_layers(gpt):
        shape = layer.out_features, layer.in_features
        layer.load_weight(torch.randn(shape, dtype=torch.bfloat16, device=device) * WEIGHT_STD)
        if layer.bias is not None:
            layer.bias.data.zero_()
    return gpt


def packed_rows(config: Config, rows: int, context: int, documents: int, device: torch.device) -> dict:
    """A batch (rows, context) of random tokens, each row in this many documents of one length."""
    length = context // documents
    place = torch.arange(length * documents, device=device).expand(rows, -1).contiguous()
    idx, targets = torch.randint(0, config.vocab_size, (2, rows, length * documents), device=device)
    packed = {"document_ids": place // length, "positions": place % length} if documents > 1 else {}
    return {"idx": idx, "targets": targets, **packed}


def measure(arguments: argparse.Namespace, quantize: str | None, compiled: bool) -> Figures:
    """Trains for `--warmup` steps and then for `--steps` that count."""
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    config = Config.from_name(arguments.model)
    gpt = random_model(config, quantize, device)
    apply_lora(gpt, LoRASettings(r=arguments.lora_r, key=True, projection=True, mlp=True, dropout=arguments.dropout))
    gpt.train()
    flops = flops_per_token(gpt, arguments.context // arguments.documents)
    checkpoint_blocks(gpt, arguments.activation_checkpointing)
    if compiled:
        for block in gpt.transformer.h:
            block.compile()
    module = NextTokenLoss(gpt)
    trained = [p for p in gpt.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    batch = packed_rows(config, arguments.micro_batch_size, arguments.context, arguments.documents, device)
    tokens = batch["idx"].numel()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds, losses = [], []
    for _ in range(arguments.warmup + arguments.steps):
        start = time.perf_counter()
        loss = module(**batch) / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
    rate = tokens / statistics.median(seconds[arguments.warmup :])
    name = torch.cuda.get_device_name(device).lower() if on_gpu else ""
    peak = next((tflops for key, tflops in PEAK_TFLOPS.items() if key in name), None)
    mfu = None if peak is None else rate * flops / (peak * 1e12)
    return Figures(rate, mfu, memory_used(device), (losses[0], losses[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="Llama-3.1-8B", help="a known name; its shape is taken")
    parser.add_argument("--device", default=accelerator())
    parser.add_argument("--context", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--documents", type=int, default=4, help="in each row; 1 is plain causal attention")
    parser.add_argument("--micro_batch_size", type=int, default=1, help="rows at a time")
    parser.add_argument("--activation_checkpointing", default="none", help="none or full")
    parser.add_argument("--lora_r", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0, help="of LoRA")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts, compilation among them")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", choices=["eager", "compiled"], default=None)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(
        f"{arguments.model}, {name}, torch {torch.__version__}, bf16-true, rank {arguments.lora_r}, rows of "
        f"{arguments.context} tokens in {arguments.documents} document(s), micro-batches of "
        f"{arguments.micro_batch_size}, activation checkpointing {arguments.activation_checkpointing}\n\n"
        "| | tokens/s | MFU | peak memory, GiB | loss, first and last step | published elsewhere |\n"
        "|---|---|---|---|---|---|"
    )
    for method, quantize in (("LoRA", None), ("QLoRA nf4", "bnb.nf4")):
        for compiled in (False, True):
            if arguments.only is not None and compiled != (arguments.only == "compiled"):
                continue
            figures = measure(arguments, quantize, compiled)
            mfu = "" if figures.mfu is None else f"{figures.mfu:.1%}"
            first, last = figures.losses
            print(
                f"| {method}, {'compiled' if compiled else 'eager'} | {figures.tokens_per_second:,.0f} | {mfu} | "
                f"{figures.memory / 2**30:.2f} | {first:.3f}, {last:.3f} | {PUBLISHED[method]} |",
                flush=True,
            )
            torch.compiler.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
