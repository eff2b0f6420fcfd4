"""What is wrong with a checkpoint, all of it at once, without reading its weights into memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from litgpt.checkpoint import CONFIG, holds_adaptation_alone
from litgpt.config import Config
from litgpt.formats.hf_config import config_from_hf, differences
from litgpt.sources.door import open_model
from litgpt.sources.file_checks import check_files, read_companion
from litgpt.sources.findings import Findings
from litgpt.sources.fit import rows_at_once
from litgpt.sources.source import Source
from litgpt.sources.tokenizer_checks import check_tokenizer
from litgpt.sources.weight_stream import WeightProgress


def examine(path: Path, check_values: bool = False) -> Findings:
    """Checks a checkpoint directory of any kind, or a .gguf file; what was learned on a model, together with that.

    Args:
        path: Where it is; it may be incomplete.
        check_values: Read every weight once, too.
    """
    findings = Findings(path)
    if path.is_dir():
        check_files(findings)
        with findings.catching("config"):
            findings.config = _read_config(findings)
    if not findings.failed("files", "config"):
        with findings.catching("weights" if path.is_dir() else "files"):
            source = findings.source = open_model(path)
            findings.config = source.config
            _check_types(findings, source)
    files = findings.source.files if findings.source else path if path.is_dir() else None
    if files is not None:
        check_tokenizer(findings, files)
    if check_values and findings.source:
        with findings.catching("weights"):
            _check_values(findings, findings.source)
    return findings


# --- configuration ---------------------------------------------------------------------------------------------------


def _read_config(findings: Findings) -> Config | None:
    """The model's shape as its files say, None where there are none (that is said already)."""
    path = findings.path
    if holds_adaptation_alone(path):  # that of its model counts
        return None
    if findings.kind == "litgpt":
        if not (path / CONFIG).is_file():
            return None
        config = Config.from_checkpoint(path)
        _compare_configs(findings, config)
        return config
    if not (path / "config.json").is_file() or any("config.json" in p.message for p in findings.problems):
        return None
    content = read_companion(path / "config.json")
    content.pop("quantization_config", None)  # whether the weights are as it says, they show when they are opened
    return config_from_hf(content, f"{path.resolve().parent.name}/{path.resolve().name}")


def _compare_configs(findings: Findings, config: Config) -> None:
    """Beside model_config.yaml there may be a config.json, which other programs go by."""
    file = findings.path / "config.json"
    try:
        other = config_from_hf(read_companion(file), config.name)
    except (OSError, ValueError):  # unreadable: said already; of an architecture that only we know: no matter
        return
    names = [name for name in differences(other, config) if name != "tie_embeddings"]
    if names:
        values = ", ".join(f"{name} ({getattr(config, name)!r} and {getattr(other, name)!r})" for name in names)
        remedy = f"{CONFIG} counts here; other programs go by config.json. Correct the wrong one."
        findings.warn("config", f"{CONFIG} and config.json disagree on {values}. {remedy}")


# --- weights ---------------------------------------------------------------------------------------------------------


def _check_types(findings: Findings, source: Source) -> None:
    odd = [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in source.layout().items()
        if not tensor.is_floating_point()
    ]
    if odd:
        findings.fail("weights", "Some weights are not fractions. Download the unquantised checkpoint.", odd)


def _check_values(findings: Findings, source: Source) -> None:
    broken, zero = [], []
    previous: Tensor | None = None
    for name, tensor in WeightProgress(source, title="Checking")(source.weights()):
        if tensor is previous:  # a tied head
            continue
        previous = tensor
        finite, nothing = _look_at(tensor, source)
        if not finite:
            broken.append(name)
        elif nothing and tensor.dim() > 1:
            zero.append(name)
    if broken:
        findings.fail("weights", "Weights are NaN or infinite. Download or train the checkpoint again.", broken)
    if zero:
        message = "Whole matrices are zero, as a download with holes leaves them. Download the checkpoint again."
        findings.fail("weights", message, zero)


def _look_at(tensor: Tensor, source: Source) -> tuple[bool, bool]:
    """Whether all values are finite, and whether all are zero; a few megabytes at a time."""
    finite = nothing = True
    for part in tensor.split(rows_at_once(tensor)) if tensor.dim() else [tensor]:
        values = part.to(torch.float32) if part.dtype.itemsize == 1 else part
        finite = finite and bool(torch.isfinite(values).all())
        nothing = nothing and not values.any()
        source.release(part)
    return finite, nothing
