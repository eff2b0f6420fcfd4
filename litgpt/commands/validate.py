"""Check a checkpoint, and estimate the memory it needs.

With --json, one object is printed:

    checkpoint   its path
    kind         litgpt, Hugging Face or GGUF, or what was learned on such a model: LoRA, PEFT or adapter; null where
                 the name is known and the checkpoint is not on this machine
    valid        what the exit code says; null likewise
    problems     a list of {group, fails, message, details}; group is files, config, tokenizer or weights, and what does
                 not fail is a warning
    unchecked    {group: why} of the groups that could not be looked at
    summary      name, architecture, parameters, dtypes (type: how many values), context, sliding_window, rows (of the
                 embedding), tied_head, tokens (of the tokenizer), prompt_format, special_tokens (bos, eos, pad, stop),
                 lora_weights, quantized, note; null where there is no readable configuration
    memory       precision, batch_size, context, devices, kv_cache, lora_r, device, device_bytes, methods (inference,
                 lora, qlora and full: parts in bytes, total, fits); null likewise
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import Any

import torch

from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.catalog import find_known
from litgpt.checkpoint.names import LORA_WEIGHTS
from litgpt.cli.plural import counted
from litgpt.config import Config
from litgpt.devices.accelerator import accelerator
from litgpt.devices.memory import memory_present
from litgpt.devices.precision import inference_dtypes, inference_precision
from litgpt.formats.hf_config import config_to_hf
from litgpt.kv_cache import LayerCache, layer_cache_of
from litgpt.model import GPT
from litgpt.prompts import ChatTemplate, PromptStyle, WrittenStyle
from litgpt.runs.memory_estimate import Usage, estimate_memory
from litgpt.sources.checks import examine
from litgpt.sources.find import find_checkpoint, find_here
from litgpt.sources.findings import GROUPS, Findings
from litgpt.sources.meta import meta_model
from litgpt.sources.source import Source
from litgpt.sources.tokenizer_checks import special_ids
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.frozen_weights import store_frozen_matrices

DEFAULT_CONTEXT = 4096
SHOWN_DETAILS = 20
METHOD_TITLES = {"inference": "inference", "lora": "LoRA", "qlora": "QLoRA", "full": "full"}


def setup(
    checkpoint_dir: Path,
    *,
    check_values: bool = False,
    precision: str | None = None,
    kv_cache: str | None = None,
    batch_size: int = 1,
    context: int | None = None,
    lora_r: int = 8,
    devices: int = 1,
    json: bool = False,
) -> None:
    """Check a checkpoint and estimate the memory it needs. The exit code is 0 if it passes, 1 if it fails.

    Files, configuration, tokenizer, and the name and shape of every weight are checked, all at once, without reading
    the weights. Warnings do not fail. Of a known name that has not been downloaded, only the memory is estimated.

    The estimate is of the most memory on each device: for inference (with a full cache), for finetuning with LoRA and
    QLoRA (4-bit weights) on queries and values, and for full finetuning with AdamW, which is that of pretraining too.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
            weights, a Hub id, or a known name of one that is below checkpoints/, or not downloaded yet.
        check_values: Read every weight once, too, and look for NaN, infinity and matrices of zeros.
        precision: To estimate for: 32-true, bf16-true, 16-true, bf16-mixed, 16-mixed. By default what this machine
            answers in.
        kv_cache: int8 for keys and values in 8 bits at inference.
        batch_size: Sequences at a time on each device, the micro-batch of training.
        context: Tokens of a sequence; at inference prompt and answer together. By default 4096, or the model's context
            where that is shorter.
        lora_r: Rank of the LoRA matrices.
        devices: Devices that training is spread over; they share weights, gradients and optimizer state.
        json: Print one JSON object.
    """
    for name, value in (("batch_size", batch_size), ("context", context), ("lora_r", lora_r), ("devices", devices)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} is not valid: give 1 or more.")
    device = torch.device(accelerator())
    precision = precision or inference_precision(device)
    inference_dtypes(precision, device)
    layer_cache = layer_cache_of(kv_cache)
    known = find_known(str(checkpoint_dir).removeprefix("checkpoints/"))
    path = find_here(checkpoint_dir, incomplete=True)
    if path is None and known is not None:
        findings = Findings(Path(known.repo_id), config=Config.from_name(known.name))
    else:
        path = path or find_checkpoint(checkpoint_dir, incomplete=True)
        findings = examine(path, check_values)
    report: dict[str, Any] = {
        "checkpoint": str(findings.path),
        "kind": findings.kind if path else None,
        "valid": findings.valid if path else None,
        "problems": [vars(problem) for problem in findings.problems],
        "unchecked": findings.unchecked if path else {},
        "summary": None,
        "memory": None,
    }
    if findings.config is not None:
        if context is not None and context > findings.config.block_size:
            limit = findings.config.block_size
            raise ValueError(f"--context {context} is beyond the model's context of {limit}. Give {limit} or less.")
        context = context or min(DEFAULT_CONTEXT, findings.config.block_size)
        report["summary"] = summarise(findings, findings.config)
        kind = findings.source.quantized if findings.source else None
        report["memory"] = estimate(
            findings.config, device, precision, batch_size, context, lora_r, devices, kind, layer_cache
        )
    if json:
        print(dumps(report, indent=2))
    else:
        file = checkpoint_dir.name
        inside = file if path and checkpoint_dir.parent.name == path.name and (path / file).is_file() else None
        print("\n".join(as_text(report, inside, check_values)))
    if not findings.valid:
        sys.exit(1)


# --- what is found ---------------------------------------------------------------------------------------------------


def summarise(findings: Findings, config: Config) -> dict[str, Any]:
    """What the checkpoint is."""
    tokenizer, source = findings.tokenizer, findings.source
    return {
        "name": config.name,
        "architecture": architecture_name(source, config),
        "parameters": meta_model(config).num_parameters(),
        "dtypes": dtypes(source) if source else {},
        "context": config.block_size,
        "sliding_window": config.sliding_window_size,
        "rows": config.padded_vocab_size,
        "tied_head": config.tie_embeddings,
        "tokens": tokenizer.vocab_size if tokenizer else None,
        "prompt_format": format_name(findings.style),
        "special_tokens": special_tokens(tokenizer) if tokenizer else {},
        "lora_weights": findings.path.is_dir() and (findings.path / LORA_WEIGHTS).is_file(),
        "quantized": source.quantized if source else None,
        "note": source.note if source else None,
    }


def architecture_name(source: Source | None, config: Config) -> str | None:
    """The Hugging Face class that computes the same; None where there is none."""
    known = getattr(source, "architecture", None)
    if known is not None:
        return known.name
    try:
        return config_to_hf(config)["architectures"][0]
    except ValueError:
        return None


def dtypes(source: Source) -> dict[str, int]:
    """How many values of the weights are of each type; a shared head counts once."""
    counts: dict[str, int] = {}
    for name, tensor in source.layout().items():
        if not (source.config.tie_embeddings and name == "lm_head.weight"):
            dtype = str(tensor.dtype).removeprefix("torch.")
            counts[dtype] = counts.get(dtype, 0) + tensor.numel()
    return counts


def format_name(style: PromptStyle | None) -> str | None:
    """The prompt format that chat uses."""
    if isinstance(style, ChatTemplate):
        return "the checkpoint's chat template"
    if isinstance(style, WrittenStyle):
        return style.format.name
    return None if style is None else type(style).__qualname__


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    return {**special_ids(tokenizer), "stop": sorted(tokenizer.stop_ids)}


# --- memory ----------------------------------------------------------------------------------------------------------


def estimate(
    config: Config,
    device: torch.device,
    precision: str,
    batch_size: int,
    context: int,
    lora_r: int,
    devices: int,
    kind: str | None,
    layer_cache: type[LayerCache],
) -> dict[str, Any]:
    """The memory that each use of the model needs on this kind of device, and what there is.

    Of weights that are quantised, inference keeps the `kind`; LoRA is estimated on plain ones, and QLoRA in 4 bits.
    Keys and values are in a `layer_cache`.
    """
    weights, compute = inference_dtypes(precision, device)
    present = memory_present(device)
    methods = {}
    for method in METHOD_TITLES:
        mixed = None if method == "qlora" else compute  # its products are in the type of the other weights
        model = model_for(method, config, compute or weights if method == "qlora" else weights, lora_r, kind)
        if mixed is not None and method == "lora":
            store_frozen_matrices(model, precision)
        model.layer_cache = layer_cache
        usage = Usage(method != "inference", mixed, batch_size, context, device.type, devices)
        parts = estimate_memory(model, usage)
        total = sum(parts.values())
        methods[method] = {"parts": parts, "total": total, "fits": None if present is None else total <= present}
    settings = {"precision": precision, "batch_size": batch_size, "context": context, "devices": devices}
    settings |= {"kv_cache": layer_cache.kind, "lora_r": lora_r, "device": device.type, "device_bytes": present}
    return {**settings, "methods": methods}


def model_for(method: str, config: Config, dtype: torch.dtype, lora_r: int, kind: str | None = None) -> GPT:
    """The model as it is used, without memory for its weights, which are quantised as `kind` for inference."""
    model = meta_model(config, {"qlora": "bnb.nf4", "inference": kind}.get(method), dtype).to(dtype)
    if method in ("lora", "qlora"):
        apply_lora(model, LoRASettings(r=lora_r))
    return model


# --- how it is told --------------------------------------------------------------------------------------------------


def as_text(report: dict[str, Any], inside: str | None = None, values: bool = False) -> Iterator[str]:
    """The report for a reader, line by line.

    Args:
        report: What is found.
        inside: The file that was named, where the directory is looked at in which it is.
        values: Whether the weights' values were looked at.
    """
    yield f"{report['checkpoint']} ({report['kind'] or 'known; not on this machine'})"
    if inside is not None:
        yield f"A checkpoint is more than one file: the whole directory of {inside} is checked."
    if report["summary"]:
        yield ""
        yield from summary_lines(report["summary"])
    if report["kind"]:
        yield ""
    for group in GROUPS if report["kind"] else ():
        problems = [problem for problem in report["problems"] if problem["group"] == group]
        sound = f"not checked: {report['unchecked'][group]}" if group in report["unchecked"] else "ok"
        if (group, sound, values) == ("weights", "ok", False):
            sound = "ok by names and shapes (--check_values true reads the values, too)"
        yield from problem_lines(group, problems, sound)
    if report["memory"]:
        yield ""
        yield from memory_lines(report["memory"])
    yield ""
    if report["kind"] is None:
        yield f"To download and check it: litgpt download {report['checkpoint']}"
        return
    failures = sum(problem["fails"] for problem in report["problems"])
    warnings = len(report["problems"]) - failures
    also = f", {counted(warnings, 'warning')}" if warnings else ""
    yield (
        f"The checkpoint passes{also}."
        if report["valid"]
        else f"The checkpoint fails: {counted(failures, 'error')}{also}."
    )


def summary_lines(summary: dict[str, Any]) -> Iterator[str]:
    types = ", ".join(summary["dtypes"])
    window = f", sliding window of {summary['sliding_window']:,}" if summary["sliding_window"] else ""
    tied = ", shared with the head" if summary["tied_head"] else ""
    known = {name: token for name, token in summary["special_tokens"].items() if token not in (None, [])}
    tokens = "" if summary["tokens"] is None else f"{summary['tokens']:,} tokens, "
    rows = {
        "model": summary["name"],
        "architecture": summary["architecture"] or "none of Hugging Face's",
        "parameters": f"{summary['parameters']:,}" + (f" in {types}" if types else ""),
        "context": f"{summary['context']:,} tokens{window}",
        "vocabulary": f"{tokens}{summary['rows']:,} rows in the embedding{tied}",
        "special tokens": ", ".join(f"{name} {token}" for name, token in known.items()),
        "prompt format": summary["prompt_format"],
        "quantised": summary["quantized"],
        "LoRA": f"{LORA_WEIGHTS} is there" if summary["lora_weights"] else None,
        "note": summary["note"],
    }
    for name, value in rows.items():
        if value:
            yield f"  {name:<16}{value}"


def problem_lines(group: str, problems: list[dict[str, Any]], sound: str = "ok") -> Iterator[str]:
    """A group's heading, and each of its problems; `sound` stands where there is none."""
    failures = sum(problem["fails"] for problem in problems)
    counts = [counted(failures, "error")] * bool(failures) + [counted(len(problems) - failures, "warning")] * (
        len(problems) > failures
    )
    yield f"  {group:<16}{', '.join(counts) or sound}"
    for problem in problems:
        yield f"    {'error' if problem['fails'] else 'warning'}: {problem['message']}"
        yield from (f"      {line}" for line in problem["details"][:SHOWN_DETAILS])
        if len(problem["details"]) > SHOWN_DETAILS:
            yield f"      ... and {len(problem['details']) - SHOWN_DETAILS:,} more (--json shows all)"


def memory_lines(memory: dict[str, Any]) -> Iterator[str]:
    """A table: a row for each part, a column for each use."""
    methods = memory["methods"]
    spread = f", training on {memory['devices']} devices (figures of each)" if memory["devices"] > 1 else ""
    yield (
        f"Memory in GB at {memory['precision']} for {memory['batch_size']} x {memory['context']:,} tokens at a time, "
        f"LoRA with r={memory['lora_r']}{spread}:"
    )
    yield f"  {'':<16}" + "".join(f"{METHOD_TITLES[method]:>11}" for method in methods)
    parts = list(dict.fromkeys(part for method in ("inference", "qlora", "full") for part in methods[method]["parts"]))
    for part in parts:
        values = [method["parts"].get(part) for method in methods.values()]
        cells = "".join(f"{in_gigabytes(value):>11}" for value in values)
        yield f"  {part.replace('_', ' '):<16}{cells}".rstrip()
    yield f"  {'total':<16}" + "".join(f"{in_gigabytes(method['total']):>11}" for method in methods.values())
    if memory["device_bytes"] is not None:
        fits = ["yes" if method["fits"] else "no" for method in methods.values()]
        yield f"  {'fits here':<16}" + "".join(f"{answer:>11}" for answer in fits)
        yield f"This machine's {memory['device']} has {memory['device_bytes'] / 1e9:.1f} GB."


def in_gigabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"
