"""The figures of the manual that are computed: `python tutorials/tables.py` brings its pages up to date.

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`. Memory is estimated on the shape of a published
model, without its weights; hyper-parameters are those of `config_hub/`, with the commands' own defaults.
"""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from litgpt.__main__ import main
from litgpt.adaptation.adapter import apply_adapter, apply_adapter_v2
from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.runs.memory_estimate import Usage, cache_bytes, estimate_memory
from litgpt.sources.meta import meta_model

TUTORIALS = Path(__file__).parent
CONFIG_HUB = TUTORIALS.parent / "config_hub"
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def update(text: str) -> str:
    """A page with its tables as they are now."""
    return MARKED.sub(lambda mark: f"{mark[1]}{TABLES[mark[2]]()}\n{mark[3]}", text)


def markdown(header: str, rows: Iterable[Iterable[object]]) -> str:
    rule = "|---" * header.count("|")
    lines = [f"| {header} |", f"{rule}|---|", *(f"| {' | '.join(map(str, row))} |" for row in rows)]
    return "\n".join(lines)


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"


# --- memory ----------------------------------------------------------------------------------------------------------

SIZES = [
    "SmolLM2-135M",
    "Llama-3.2-1B",
    "phi-2",
    "Llama-3.2-3B",
    "Qwen3-4B",
    "Mistral-7B-v0.3",
    "Llama-3.1-8B",
    "phi-4",
    "Qwen3-32B",
    "Llama-3.3-70B-Instruct",
]
EVERYTHING = {f"{layer}": True for layer in ("query", "key", "value", "projection", "mlp")}


@cache
def model_of(name: str, change: str = "", dtype: torch.dtype = torch.bfloat16, quantize: str | None = None) -> GPT:
    """A published model's shape, changed as the method's command does it, without memory for the weights."""
    model = meta_model(Config.from_name(name), quantize, dtype).to(dtype)
    if change == "lora":
        apply_lora(model, LoRASettings())
    elif change == "adapter_v2":
        apply_adapter_v2(model)
    return model


def needs(
    name: str, method: str, quantize: str | None = None, *, dtype: torch.dtype = torch.bfloat16, **usage: Any
) -> int:
    """Bytes on each GPU; `method` is inference, full, or what changes the model."""
    trains = method != "inference"
    settings = {"context": 512 if trains else 4096, "device": "cuda", **usage}
    model = model_of(name, "" if method in ("inference", "full") else method, dtype, quantize)
    settings["context"] = min(settings["context"], model.config.block_size)
    return sum(estimate_memory(model, Usage(trains, **settings)).values())


def memory_by_size() -> str:
    rows = []
    for name in SIZES:
        parameters = model_of(name).num_parameters()
        sizes = [
            needs(name, "inference"),
            needs(name, "inference", "bnb.nf4"),
            needs(name, "lora", "bnb.nf4"),
            needs(name, "lora"),
            needs(name, "adapter_v2"),
            needs(name, "full"),
            needs(name, "full", devices=8),
        ]
        rows.append([f"`{name}`", f"{parameters / 1e9:.2f}", *map(gigabytes, sizes)])
    return markdown(
        "model | parameters, billions | answering | answering, `bnb.nf4` | QLoRA | LoRA | Adapter v2 | all weights "
        "| all weights, each of 8 GPUs",
        rows,
    )


def remedies() -> str:
    """From what does not fit to what does, one step after the other, on Llama 3.1 8B."""
    steps: list[tuple[str, dict[str, Any]]] = [
        (
            "`finetune_full --precision 32-true --train.micro_batch_size 4 --train.max_seq_length 2048`",
            {"method": "full", "dtype": torch.float32, "batch_size": 4, "context": 2048},
        ),
        ("`--precision bf16-true`", {"dtype": torch.bfloat16}),
        ("`finetune_lora` instead", {"method": "lora"}),
        ("`--train.micro_batch_size 1`", {"batch_size": 1}),
        ("`--quantize bnb.nf4`", {"quantize": "bnb.nf4"}),
        ("`--train.activation_checkpointing full`", {"checkpointed": "full"}),
        ("`--train.max_seq_length 512`", {"context": 512}),
    ]
    settings: dict[str, Any] = {"name": "Llama-3.1-8B"}
    rows, before = [], None
    for text, change in steps:
        settings |= change
        size = needs(**settings)
        saved = "" if before is None else gigabytes(before - size)
        rows.append([text, gigabytes(size), saved])
        before = size
    return markdown("option, added to those above | GB | saves", rows)


def remedies_full() -> str:
    """All weights of Llama 3.2 3B: what each option saves where it is the only one."""
    start = {"name": "Llama-3.2-3B", "method": "full", "batch_size": 4, "context": 2048}
    changes: list[tuple[str, dict[str, Any]]] = [
        ("`finetune_full --precision bf16-true --train.micro_batch_size 4 --train.max_seq_length 2048`", {}),
        ("`--train.micro_batch_size 1`", {"batch_size": 1}),
        ("`--train.activation_checkpointing full`", {"checkpointed": "full"}),
        ("`--train.activation_checkpointing 2`", {"checkpointed": 2}),
        ("`--train.max_seq_length 1024`", {"context": 1024}),
        ("`--devices 2`", {"devices": 2}),
        ("`--devices 8`", {"devices": 8}),
    ]
    sizes = [needs(**start | change) for _, change in changes]
    return markdown(
        "alone | GB on each GPU | saves",
        (
            [text, gigabytes(size), gigabytes(sizes[0] - size) if change else ""]
            for (text, change), size in zip(changes, sizes, strict=True)
        ),
    )


def parts() -> str:
    """What the memory is taken by, for two ways to finetune Llama 3.2 3B."""
    shown = {}
    for title, change, kind in (("all weights", "", None), ("LoRA", "lora", None), ("QLoRA", "lora", "bnb.nf4")):
        usage = Usage(True, context=2048, device="cuda")
        shown[title] = estimate_memory(model_of("Llama-3.2-3B", change, quantize=kind), usage)
    names = list(dict.fromkeys(part for estimate in shown.values() for part in estimate))
    rows: list[list[str]] = []
    for name in sorted(names, key=["program", "weights", "trained_weights", "gradients"].count, reverse=True):
        cells = (gigabytes(estimate[name]) if name in estimate else "" for estimate in shown.values())
        rows.append([name.replace("_", " "), *cells])
    rows.append(["together", *(gigabytes(sum(estimate.values())) for estimate in shown.values())])
    return markdown("GB | " + " | ".join(shown), rows)


def cache_by_size() -> str:
    rows = []
    for name in ("Llama-3.2-1B", "Llama-3.1-8B", "Gemma-2-9b", "Mistral-7B-v0.3", "Qwen3-32B"):
        model = model_of(name)
        sizes = [
            cache_bytes(model, Usage(False, batch_size=1, context=min(context, model.config.block_size)))
            if context <= model.config.block_size
            else None
            for context in (4096, 32_768, 131_072)
        ]
        rows.append([f"`{name}`", *("" if size is None else f"{size / 1e9:.2f}" for size in sizes)])
    return markdown("GB for one conversation of | 4,096 tokens | 32,768 | 131,072", rows)


def lora_parameters() -> str:
    rows = []
    for name in ("SmolLM2-135M", "Llama-3.2-1B", "phi-2", "Llama-3.1-8B"):
        cells = []
        for rank, layers in ((8, {}), (8, EVERYTHING), (64, EVERYTHING)):
            model = meta_model(Config.from_name(name))
            apply_lora(model, LoRASettings(r=rank, **layers))
            cells.append(trained(model))
        rows.append([f"`{name}`", *cells])
    return markdown(
        "trained, and the file | `--lora_r 8` (query, value) | all layers of the blocks | the same, `--lora_r 64`", rows
    )


def adapter_parameters() -> str:
    rows = []
    for name in ("SmolLM2-135M", "Llama-3.2-1B", "phi-2", "Llama-3.1-8B"):
        cells = []
        for apply in (apply_adapter, apply_adapter_v2):
            model = meta_model(Config.from_name(name))
            apply(model)
            cells.append(trained(model))
        rows.append([f"`{name}`", *cells])
    return markdown("trained, and the file | `finetune_adapter` | `finetune_adapter_v2`", rows)


def trained(model: GPT) -> str:
    """How many parameters are trained, and the bytes they take in float32."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{count / 1e6:.2f} million, {count * 4 / 1e6:.1f} MB"


# --- recipes ---------------------------------------------------------------------------------------------------------


@cache
def defaults(command: str) -> dict[str, Any]:
    """A command's settings where nothing is given."""
    with redirect_stdout(io.StringIO()) as out:
        code = main([command, "--print_config"])
    assert code == 0, out.getvalue()
    return yaml.safe_load(out.getvalue())


def overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, those above winning."""
    result = dict(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(name), dict)
        result[name] = overlaid(below[name], value) if both else value
    return result


def recipes(kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A kind's recipes (full, lora, qlora), with what they do not say taken from the command."""
    command = "finetune_full" if kind == "full" else "finetune_lora"
    for path in sorted(CONFIG_HUB.glob(f"finetune/*/{kind}.yaml")):
        yield path.parent.name, overlaid(defaults(command), yaml.safe_load(path.read_text()))


def finetuning(kind: str) -> str:
    rows = []
    for name, settings in recipes(kind):
        train, optimizer = settings["train"], settings["optimizer"]
        devices, batch, rows_at_once = settings["devices"], train["global_batch_size"], train["micro_batch_size"]
        length = f"{train['epochs']}" + (f", to step {train['max_steps']}" if train["max_steps"] else "")
        row = [
            f"[`{name}`](../config_hub/finetune/{name}/{kind}.yaml)",
            f"{optimizer['lr']:.0e}".replace("e-0", "e-"),
            f"{train['min_lr']:.0e}".replace("e-0", "e-"),
            train["lr_warmup_steps"],
            length,
            f"{batch} = {rows_at_once} x {batch // rows_at_once // devices} x {devices}",
            optimizer["weight_decay"],
        ]
        if kind != "full":
            chosen = [
                part for part in ("query", "key", "value", "projection", "mlp", "head") if settings[f"lora_{part}"]
            ]
            usual = chosen == ["query", "key", "value", "projection", "mlp"]
            layers = "all" if len(chosen) == 6 else "all but head" if usual else ", ".join(chosen)
            row += [settings["lora_r"], settings["lora_alpha"], settings["lora_dropout"], layers]
        rows.append(row)
    header = "recipe | peak | end | warmup, steps | epochs | sequences a step = at once x accumulated x devices | decay"
    return markdown(header + (" | r | alpha | dropout | layers" if kind != "full" else ""), rows)


def pretraining() -> str:
    rows = []
    for path in sorted(CONFIG_HUB.glob("pretrain/*.yaml")):
        own = yaml.safe_load(path.read_text())
        inside = {
            name: {k: own.pop(k) for k in list(own) if k in defaults("pretrain")[name]} for name in ("train", "eval")
        }
        settings = overlaid(defaults("pretrain"), overlaid(inside, own))
        train = settings["train"]
        context = (
            train["max_seq_length"] or settings.get("block_size") or (settings["model_config"] or {}).get("block_size")
        )
        context = context or Config.from_name(settings["model_name"]).block_size
        batch = train["global_batch_size"]
        optimizer = settings["optimizer"].get("init_args") or settings["optimizer"]
        tokens = train["max_tokens"] if train["max_steps"] is None else train["max_steps"] * batch * context
        warmup = (
            train["lr_warmup_steps"] if train["lr_warmup_fraction"] is None else f"{train['lr_warmup_fraction']:.0%}"
        )
        rows.append(
            [
                f"[`{path.stem}`](../config_hub/pretrain/{path.name})",
                f"{batch:,} x {context:,} = {batch * context:,}",
                f"{tokens:,}",
                optimizer["lr"],
                train["min_lr"],
                warmup,
                optimizer.get("weight_decay", "default"),
            ]
        )
    return markdown("recipe | tokens a step | tokens in all | peak | end | warmup | decay", rows)


TABLES: dict[str, Callable[[], str]] = {
    "memory": memory_by_size,
    "parts": parts,
    "remedies": remedies,
    "remedies-full": remedies_full,
    "cache": cache_by_size,
    "lora-parameters": lora_parameters,
    "adapter-parameters": adapter_parameters,
    "full": lambda: finetuning("full"),
    "lora": lambda: finetuning("lora"),
    "qlora": lambda: finetuning("qlora"),
    "pretraining": pretraining,
}

if __name__ == "__main__":
    for page in sorted(TUTORIALS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = update(before)
        if after != before:
            page.write_text(after, encoding="utf-8")
            print(f"updated {page.name}")
