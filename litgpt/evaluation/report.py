"""What an evaluation leaves: a table for the reader, results.json and samples in the form of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import litgpt
from litgpt.checkpoint import atomic_file
from litgpt.evaluation.bos import bos_policy
from litgpt.evaluation.work import Evaluated

RESULTS = "results.json"
MERGED = ("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """The results of several runs as those of one."""
    together: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            if name in MERGED:
                together.setdefault(name, {}).update(value)
            else:
                together[name] = value
    return together


def facts(
    *,
    checkpoint: Path | str,
    started: float,
    model: Evaluated,
    template: str | None,
    system_instruction: str | None,
    fewshot_as_multiturn: bool,
    settings: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """What has to be known to have the same figures again, by the names that the harness gives it.

    Args:
        checkpoint: What the user named.
        started: When, in seconds of `time.time`.
        model: The same, loaded.
        template: The text of the chat template, where one was applied.
        system_instruction, fewshot_as_multiturn: As the user says.
        settings: How the model was loaded.
        options: How the run was made.
    """
    ended, tokenizer = time.time(), model.tokenizer
    return {
        "config": {"model": "litgpt", "model_args": {"pretrained": str(checkpoint)}, **options},
        "litgpt": {"version": litgpt.__version__, **settings, "bos": bos_policy(tokenizer)},
        "date": started,
        "lm_eval_version": _version("lm_eval"),
        "transformers_version": _version("transformers"),
        "torch_version": _version("torch"),
        "platform": f"{platform.platform()}, Python {platform.python_version()}",
        "tokenizer_eos_token": [tokenizer.special_tokens.get("eos_token"), str(tokenizer.eos_id)],
        "tokenizer_bos_token": [tokenizer.special_tokens.get("bos_token"), str(tokenizer.bos_id)],
        "eot_token_id": tokenizer.eos_id,
        "max_length": model.config.block_size,
        "model_source": "litgpt",
        "model_name": model.name,
        "model_name_sanitized": re.sub(r"[\"<>:/|\\?*\[\]]+", "__", model.name),
        "system_instruction": system_instruction,
        "system_instruction_sha": _sha(system_instruction),
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "chat_template": template,
        "chat_template_sha": _sha(template),
        "start_time": started,
        "end_time": ended,
        "total_evaluation_time_seconds": str(ended - started),
    }


def save(results: dict[str, Any], out_dir: Path, copy: Path | None, log_samples: bool) -> Path:
    """Writes results.json, and each task's samples next to it where they are wanted.

    Args:
        results: In the harness's form; samples are taken out.
        out_dir: Where to.
        copy: Another file for the results.
        log_samples: Write samples_TASK_DATE.jsonl for each task.

    Returns:
        The file of the results.
    """
    samples = results.pop("samples", {})
    results["task_hashes"] = {
        task: _sha("".join(one["doc_hash"] + one["prompt_hash"] + one["target_hash"] for one in of_task))
        for task, of_task in samples.items()
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, default=_plain, ensure_ascii=False)
    for file in filter(None, (out_dir / RESULTS, copy)):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as place:
            place.write_text(text, encoding="utf-8")
    if log_samples and samples:
        from lm_eval.loggers import EvaluationTracker

        tracker = EvaluationTracker(output_path=str(out_dir / RESULTS))
        tracker.date_id = datetime.now().isoformat().replace(":", "-")
        for task, of_task in samples.items():
            tracker.save_results_samples(task_name=task, samples=of_task)
    return out_dir / RESULTS


def tables(results: dict[str, Any]) -> str:
    """All figures for the reader; of a partial run with how much of it is done."""
    lines = []
    if results.get("partial"):
        for name, counts in results["n-samples"].items():
            lines.append(f"PARTIAL: {name}: {counts['effective']} of {counts['original']} documents")
    lines.append(figures_table(results))
    if results.get("groups"):
        lines += ["", figures_table(results, "groups")]
    return "\n".join(lines)


def figures_table(results: dict[str, Any], column: str = "results") -> str:
    """The figures of all tasks (or "groups") in Markdown."""
    key = "Groups" if column == "groups" else "Tasks"
    rows = [[key, "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr"]]
    for name, figures in results[column].items():
        shown = figures.get("alias", name)
        for metric_and_filter, value in sorted(figures.items()):
            metric, comma, filter = metric_and_filter.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{filter}")
            better = results["higher_is_better"].get(name, {}).get(metric)
            rows.append(
                [
                    shown,
                    str(results["versions"].get(name, "N/A")),
                    filter,
                    str(results["n-shot"].get(name, "")),
                    metric,
                    {True: "↑", False: "↓"}.get(better, ""),
                    _digits(value),
                    "" if error is None else "±",
                    "" if error is None else _digits(error),
                ]
            )
            shown = ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["|" + "|".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + "|" for row in rows]
    lines.insert(1, "|" + "|".join("-" * width for width in widths) + "|")
    return "\n".join(lines)


def _digits(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _sha(text: str | None) -> str | None:
    return hashlib.sha256(text.encode("utf-8")).hexdigest() if text else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """What JSON does not know, as the harness writes it."""
    if isinstance(value, set):
        return sorted(value, key=str)
    return value.item() if hasattr(value, "item") else str(value)
