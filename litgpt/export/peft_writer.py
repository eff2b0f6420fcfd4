"""LoRA weights written as a PEFT adapter; see `litgpt.formats.peft`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.adaptation.lora import LoRASettings, adapted_rows
from litgpt.checkpoint.names import PEFT_CONFIG
from litgpt.config import Config
from litgpt.formats.architectures import ARCHITECTURES
from litgpt.formats.peft import (
    ADAPTER_MODEL,
    IN_MEMORY,
    MAGNITUDE,
    PREFIX,
    RowUpdate,
    Update,
    columns_of_parts,
    family_of,
    plain_number,
)
from litgpt.formats.rules import RuleTable
from litgpt.formats.safetensors_file import write_safetensors
from litgpt.sources.meta import meta_model, shapes_of


def export_peft(
    weights: dict[str, Tensor],
    settings: LoRASettings,
    config: Config,
    architecture: str,
    base: str,
    destination: Path,
    inside: str | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into a directory.

    Args:
        weights: The LoRA matrices by our names.
        settings: What they are.
        config: The model's shape.
        architecture: Its class in transformers.
        base: What PEFT is to know as the name or path of the model.
        destination: An existing directory.
        inside: What the text model is called in the multimodal model that the adapter is for; see `text_attribute`.

    Raises:
        ValueError: PEFT cannot hold the update of a layer; names it.
    """
    table = ARCHITECTURES[architecture].weights
    updates = _to_theirs(weights, settings, config, table)
    if inside is not None:
        updates = {_within(module, inside): update for module, update in updates.items()}
    tensors: dict[str, Tensor] = {}
    for module, update in updates.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = update.part.a
        tensors[f"{PREFIX}{module}.lora_B.weight"] = update.part.b
        if update.part.magnitude is not None:
            tensors[f"{PREFIX}{module}.{MAGNITUDE}"] = update.part.magnitude
    tensors = {name: tensor.float().contiguous() for name, tensor in sorted(tensors.items())}
    names = [name.removesuffix(".weight") for name, _ in table.to_theirs(shapes_of(config).items(), config)]
    # The other parts of a multimodal model may have modules of the same names.
    others = None if inside else [IN_MEMORY.get(name, name) for name in names]
    adapter_config = _adapter_config(updates, settings, base, others)
    (destination / PEFT_CONFIG).write_text(json.dumps(adapter_config, indent=2) + "\n", encoding="utf-8")
    write_safetensors(destination / ADAPTER_MODEL, tensors, tensors.items())


def _within(module: str, inside: str) -> str:
    """The name that a module of a text model has in a multimodal one."""
    return module if module == "lm_head" else f"model.{inside}.{module.partition('.')[2]}"


def _to_theirs(
    weights: dict[str, Tensor], settings: LoRASettings, config: Config, table: RuleTable
) -> dict[str, Update]:
    """Updates by the name of the module of theirs."""
    model = meta_model(config)
    layers = {
        name: rows for name, layer in model.named_modules() if (rows := adapted_rows(name, layer, config, settings))
    }
    families = dict.fromkeys(family_of(table, f"{name}.weight", config, True) for name in layers)
    experts = next((family.ours[0] for family in families if any(".experts." in name for name in family.ours)), None)
    if experts is not None:
        raise ValueError(
            f"PEFT cannot hold the update of {experts}: transformers has all experts of a layer in one tensor. "
            "Merge the weights with merge_lora and export the model with convert_from_litgpt; or finetune with "
            "lora_mlp=false."
        )
    updates: dict[str, Update] = {}
    for family in families:
        pieces = [name.removesuffix(".weight") for name in family.ours]
        rows = [layers.get(piece) or [(model.get_parameter(f"{piece}.weight").size(0), False)] for piece in pieces]
        blocks = [part for piece, of in zip(pieces, rows, strict=True) for part in _split(weights, piece, of)]
        columns = columns_of_parts(rows, blocks, settings.r)
        theirs, masks, magnitudes = (family.transform.to_theirs(each, config) for each in zip(*columns, strict=True))
        for name, b, mask, magnitude in zip(family.theirs, theirs, masks, magnitudes, strict=True):
            used = mask.any(0).nonzero().flatten().tolist()
            if not used:
                continue
            if settings.dora and not mask.any(1).all():
                raise ValueError(
                    f"PEFT cannot hold a DoRA update of some rows of {name} alone. Merge the weights with merge_lora, "
                    "or adapt queries, keys and values alike."
                )
            a = torch.cat([blocks[block].a for block in used])
            growth = len(used) ** (0.5 if settings.rs else 1)  # so that alpha / r, or alpha / sqrt(r), stays
            part = RowUpdate(a, b[:, used].flatten(1), magnitude if settings.dora else None)
            module = name.removesuffix(".weight")
            updates[IN_MEMORY.get(module, module)] = Update(part, plain_number(settings.alpha * growth))
    return updates


def _split(weights: dict[str, Tensor], name: str, rows: Sequence[tuple[int, bool]]) -> list[RowUpdate]:
    """The updated parts of a layer of ours."""
    sizes = [size for size, updated in rows if updated]
    if not sizes:
        return []
    magnitude = weights.get(f"{name}.lora_magnitude")
    magnitudes = magnitude.split(sizes) if magnitude is not None else [None] * len(sizes)
    a = weights[f"{name}.lora_A"].chunk(len(sizes))
    b = weights[f"{name}.lora_B"].split(sizes)
    return [RowUpdate(*part) for part in zip(a, b, magnitudes, strict=True)]


def _adapter_config(
    updates: dict[str, Update], settings: LoRASettings, base: str, modules: Sequence[str] | None
) -> dict[str, Any]:
    by_name: dict[str, tuple[int, float]] = {}
    for module, update in updates.items():
        by_name[_last(module)] = update.rank, update.alpha
    rank, alpha = Counter(by_name[_last(module)] for module in updates).most_common(1)[0][0]
    alone = modules is not None and all(module in updates for module in modules if _last(module) in by_name)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, (r, _) in by_name.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in by_name.items() if a != alpha},
        "lora_dropout": settings.dropout,
        "target_modules": sorted(by_name if alone else updates),
        "use_dora": settings.dora,
        "use_rslora": settings.rs,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _last(module: str) -> str:
    return module.rpartition(".")[2]
