"""A PEFT adapter as LoRA weights of ours; see `litgpt.formats.peft`."""

from __future__ import annotations

import re
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from litgpt.adaptation.lora import TARGETS, LoRASettings, adapted_rows
from litgpt.config import Config
from litgpt.formats.architectures import ARCHITECTURES
from litgpt.formats.peft import IN_MEMORY, RowUpdate, Update, columns_of_parts, family_of, plain_number
from litgpt.formats.rules import Family, RuleTable
from litgpt.formats.written_config import export_config
from litgpt.sources.meta import meta_model
from litgpt.sources.peft_files import check_config, check_experts, of_text_model, read_peft_config, read_updates
from litgpt.sources.source import Source


def import_peft(path: Path, base: Source, notes: list[str] | None = None) -> tuple[dict[str, Tensor], LoRASettings]:
    """The LoRA matrices of a PEFT adapter by our names, and what they are.

    Ours have one rank, one alpha and the same targets in all layers: what is smaller is filled up, with an update that
    does nothing yet; where scalings differ, B takes up the difference.

    Args:
        path: The directory.
        base: The model that it belongs to. Its weights are read only for DoRA that leaves out some layers.
        notes: Gets a line for everything in it that is left out, or that was wanted and is not in it.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: The adapter is of another kind, or belongs to another model; names what is in the way.
    """
    adapter_config, config = read_peft_config(path), base.config
    check_config(adapter_config)
    table = ARCHITECTURES[export_config(config, base.files, base.dtype)["architectures"][0]].weights
    notes = [] if notes is None else notes
    updates = of_text_model(read_updates(path, adapter_config, config), notes)
    check_experts(updates, adapter_config, config, notes)
    first = next(iter(updates.values()))
    scaling = _scaling(first, adapter_config)
    parts = _to_ours(updates, scaling, adapter_config, config, table)
    settings = _settings(parts, scaling, adapter_config, config)
    return _filled(parts, settings, base), settings


def _scaling(update: Update, adapter_config: dict[str, Any]) -> float:
    return update.alpha / (update.rank**0.5 if adapter_config.get("use_rslora") else update.rank)


def _to_ours(
    updates: dict[str, Update], scaling: float, adapter_config: dict[str, Any], config: Config, table: RuleTable
) -> dict[tuple[str, int], RowUpdate]:
    """Parts by the name of our layer and their number in it, all with the same scaling."""
    model = meta_model(config)
    weights = model.state_dict()
    shapes = dict(table.to_theirs(weights.items(), config))
    families: dict[Family, dict[str, RowUpdate]] = {}
    stacks = {module: update for module, update in updates.items() if update.part.a.dim() == 3}
    for module, update in updates.items():
        if module in stacks:
            continue
        name = _name_in_files(module, table, config)
        family = family_of(table, name, config, False)
        _check_shapes(name, update.part, shapes[name])
        families.setdefault(family, {})[name] = _scaled(update.part, _scaling(update, adapter_config) / scaling)
    parts: dict[tuple[str, int], RowUpdate] = {}
    for module, update in stacks.items():
        for name, part in _of_each_expert(module, update.part, config, table).items():
            if f"{name}.weight" not in weights:
                raise ValueError(f"The PEFT adapter belongs to another model: there is no {name} here.")
            parts[name, 0] = _scaled(part, _scaling(update, adapter_config) / scaling)
    for family, adapted in families.items():
        blocks = [adapted[name] for name in family.theirs if name in adapted]
        rank = max(len(block.a) for block in blocks)
        rows = [[(len(shapes[name]), name in adapted)] for name in family.theirs]
        columns = columns_of_parts(rows, [RowUpdate(x.a, _widened(x.b, rank), x.magnitude) for x in blocks], rank)
        ours, masks, magnitudes = (family.transform.to_ours(each, config) for each in zip(*columns, strict=True))
        sizes = [[size for size, _ in _every_part(model, name, config)] for name in family.ours]
        split = sum(map(len, sizes)) > len(family.theirs)
        for name, of, *pieces in zip(family.ours, sizes, ours, masks, magnitudes, strict=True):
            for number, (b, mask, magnitude) in enumerate(zip(*(piece.split(of) for piece in pieces), strict=True)):
                used = mask.any(0).nonzero().flatten().tolist()
                a = [blocks[block].a for block in used]
                b = [b[:, block, : len(blocks[block].a)] for block in used]
                lengths = magnitude if adapter_config.get("use_dora") else None
                part = RowUpdate(torch.cat(a), torch.cat(b, dim=1), lengths) if used else None
                if part is not None and split and pieces[0].any():
                    part = _without_empty_columns(part)
                if part is not None and len(part.a):
                    parts[name.removesuffix(".weight"), number] = part
    return parts


def _of_each_expert(module: str, part: RowUpdate, config: Config, table: RuleTable) -> dict[str, RowUpdate]:
    """The update of each expert's layers, by our names, from that of the tensor that holds all of a layer's."""
    layer = re.search(r"\.layers\.(\d+)\.", module)
    if layer is None:
        raise ValueError(f"PEFT adapter: {module} is not a layer of this model that can be adapted.")
    layers = ("fc_1", "fc_2") if module.endswith("gate_up_proj") else ("proj",)
    name, count = f"transformer.h.{layer[1]}.mlp.experts.{{}}.{{}}", len(part.a)
    family = family_of(table, name.format(0, layers[0]) + ".weight", config, True)
    if len(family.theirs) == 1 and len(family.ours) > 1:  # one tensor in the files, too, maybe in an order of its own
        rows = family.transform.to_ours([part.b.mT], config)
        return {
            ours.removesuffix(".weight"): RowUpdate(part.a[number % count], each, None)
            for number, (ours, each) in enumerate(zip(family.ours, rows, strict=True))
        }
    halves = part.b.chunk(len(layers), dim=1)
    return {
        name.format(expert, ours): RowUpdate(part.a[expert], half[expert], None)
        for ours, half in zip(layers, halves, strict=True)
        for expert in range(count)
    }


def _name_in_files(module: str, table: RuleTable, config: Config) -> str:
    earlier = [file for file, memory in IN_MEMORY.items() if memory == module]
    names = [f"{name}.weight" for name in (module, *earlier)]
    return next((name for name in names if table.family(name, config, ours=False)), names[0])


def _every_part(model: nn.Module, weight: str, config: Config) -> list[tuple[int, bool]]:
    """The parts of a layer of ours that can be adapted apart."""
    name = weight.removesuffix(".weight")
    everything = LoRASettings(**dict.fromkeys(TARGETS, True))
    rows = adapted_rows(name, model.get_submodule(name), config, everything)
    if rows is None:
        raise ValueError(f"PEFT adapter: the update of {name} is not supported (LoRA leaves this layer as it is).")
    return rows


def _check_shapes(name: str, part: RowUpdate, weight: Tensor) -> None:
    if part.a.shape[1] != weight.shape[1] or part.b.shape[0] != weight.shape[0] or part.b.shape[1] != len(part.a):
        raise ValueError(
            f"The PEFT adapter belongs to another model: {name} is {list(weight.shape)} here, its lora_A "
            f"{list(part.a.shape)} and lora_B {list(part.b.shape)}."
        )


def _scaled(part: RowUpdate, factor: float) -> RowUpdate:
    return part if factor == 1 else RowUpdate(part.a, part.b * factor, part.magnitude)


def _widened(b: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(b, (0, rank - b.shape[1]))


def _without_empty_columns(part: RowUpdate) -> RowUpdate:
    """Without the ranks that belong to other rows of the module that was theirs."""
    kept = part.b.any(0)
    return RowUpdate(part.a[kept], part.b[:, kept], part.magnitude)


def _settings(
    parts: dict[tuple[str, int], RowUpdate], scaling: float, adapter_config: dict[str, Any], config: Config
) -> LoRASettings:
    """What the whole is: every target that some part belongs to, and the largest rank."""
    model = meta_model(config)
    switches = {}
    for target in TARGETS:
        alone = LoRASettings(**{name: name == target for name in TARGETS})
        names = {layer for layer, _ in parts}
        rows = {name: adapted_rows(name, model.get_submodule(name), config, alone) for name in names}
        switches[target] = any((of := rows[layer]) is not None and of[number][1] for layer, number in parts)
    rank = max(len(part.a) for part in parts.values())
    rs = bool(adapter_config.get("use_rslora"))
    return LoRASettings(
        r=rank,
        alpha=plain_number(scaling * (rank**0.5 if rs else rank)),
        dropout=adapter_config.get("lora_dropout") or 0.0,
        dora=bool(adapter_config.get("use_dora")),
        rs=rs,
        **switches,
    )


def _filled(parts: dict[tuple[str, int], RowUpdate], settings: LoRASettings, base: Source) -> dict[str, Tensor]:
    """All matrices that a model with these settings has; those that are not there do nothing."""
    weights: dict[str, Tensor] = {}
    lengths = _Lengths(base)
    for name, layer in meta_model(base.config).named_modules():
        rows = adapted_rows(name, layer, base.config, settings)
        if rows is None:
            continue
        of_layer, starts = [], [0, *accumulate(size for size, _ in rows)]
        for number, (size, updated) in enumerate(rows):
            if not updated:
                continue
            part = _full_rank(parts.get((name, number)), size, layer.get_parameter("weight").shape[1], settings.r)
            if settings.dora and part.magnitude is None:
                part.magnitude = lengths.of(f"{name}.weight")[starts[number] : starts[number + 1]]
            of_layer.append(part)
        weights[f"{name}.lora_A"] = torch.cat([part.a for part in of_layer])
        weights[f"{name}.lora_B"] = torch.cat([part.b for part in of_layer])
        if settings.dora:
            weights[f"{name}.lora_magnitude"] = torch.cat([part.magnitude for part in of_layer])
    return weights


class _Lengths:
    """The lengths of the rows of a checkpoint's matrices, read when first asked for."""

    def __init__(self, base: Source) -> None:
        self.base = base

    def of(self, name: str) -> Tensor:
        """(rows,)."""
        return self._all[name]

    @cached_property
    def _all(self) -> dict[str, Tensor]:
        return {name: tensor.float().norm(dim=1) for name, tensor in self.base.weights() if tensor.dim() == 2}


def _full_rank(part: RowUpdate | None, rows: int, width: int, rank: int) -> RowUpdate:
    """A part of rank `rank`; what is added has a random A, so that it can learn, and B zero."""
    if part is None:
        part = RowUpdate(torch.empty(0, width), torch.empty(rows, 0), None)
    missing = rank - len(part.a)
    if not missing:
        return part
    a = torch.empty(rank, width)
    nn.init.kaiming_uniform_(a, a=5**0.5)
    return RowUpdate(torch.cat([part.a, a[:missing]]), _widened(part.b, rank), part.magnitude)
