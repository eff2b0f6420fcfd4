"""LoRA weights as PEFT holds them (https://github.com/huggingface/peft), read and written.

A PEFT adapter is a directory with `adapter_config.json` and `adapter_model.safetensors`: for each adapted module of the
Hugging Face model its `lora_A` (r, in), `lora_B` (out, r) and, of DoRA, `lora_magnitude_vector` (out,). Which module of
theirs is which of ours, and which of its rows, says the architecture's rule table: the rows of B go the way of the
weight's rows. An update of ours that has several parts (queries, keys, values) and is one module there becomes one
update of their joint rank, with the parts' A one below the other and their B in columns of their own.

Experts have updates of their own, each under its name, as transformers 4 had them, or all of a layer in one pair of
matrices (`target_parameters`), as transformers 5 holds their weights: `lora_A` (E * r, in), expert after expert, and
`lora_B` (out, r * E), rank after rank. Of a multimodal model the modules are those of its text model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from litgpt.checkpoint import hf_weight_files, read_state_dict
from litgpt.checkpoint.names import PEFT_CONFIG
from litgpt.config import Config
from litgpt.convert.architectures import ARCHITECTURES
from litgpt.convert.export import export_config
from litgpt.convert.recognition import text_name
from litgpt.convert.rules import Family, RuleTable
from litgpt.convert.safetensors_file import read_safetensors, write_safetensors
from litgpt.convert.source import Source, meta_model, shapes_of
from litgpt.lora import TARGETS, LoRASettings, adapted_rows
from litgpt.untrusted import is_slow, read_json_object, shown

ADAPTER_MODEL, ADAPTER_BIN = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
# Modules that transformers 5 calls other than its files do: by their name in the files.
IN_MEMORY = {"embed_out": "lm_head"}
# What holds all experts of a layer; around it the wrapper of another such tensor.
EXPERTS = re.compile(r"\.experts(\.base_layer)*$")
LAYERS_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
# Entries of adapter_config.json that change what is computed, and the values with which they do not.
NEUTRAL = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "megatron_config": (None,),
}
# Ways to initialise that change the base weights: the adapter then belongs to others than the checkpoint's.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass
class Part:
    """The update of some rows: `scaling * B A`; or those of all experts of a layer."""

    a: Tensor
    """(r, in), or (E, r, in)"""
    b: Tensor
    """(rows, r), or (E, rows, r)"""
    magnitude: Tensor | None
    """(rows,) of DoRA"""


@dataclass
class Update:
    """The update of one module of theirs, or of a tensor of all experts in a layer."""

    part: Part
    alpha: float

    @property
    def rank(self) -> int:
        return self.part.a.shape[-2]


def is_peft_alone(path: Path) -> bool:
    """Whether a directory holds a PEFT adapter and no model beside it."""
    return (path / PEFT_CONFIG).is_file() and not hf_weight_files(path)


# --- writing ---------------------------------------------------------------------------------------------------------


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
    families = dict.fromkeys(_family(table, f"{name}.weight", config, True) for name in layers)
    experts = next((family.ours[0] for family in families if any(".experts." in name for name in family.ours)), None)
    if experts is not None:
        raise ValueError(
            f"PEFT cannot hold the update of {experts}: transformers has all experts of a layer in one tensor. "
            "Merge the weights with merge_lora and export the model with convert_from_litgpt; or finetune with "
            "--lora_mlp false."
        )
    updates: dict[str, Update] = {}
    for family in families:
        pieces = [name.removesuffix(".weight") for name in family.ours]
        rows = [layers.get(piece) or [(model.get_submodule(piece).out_features, False)] for piece in pieces]
        blocks = [part for piece, of in zip(pieces, rows, strict=True) for part in _split(weights, piece, of)]
        columns = _columns(rows, blocks, settings.r)
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
            part = Part(a, b[:, used].flatten(1), magnitude if settings.dora else None)
            module = name.removesuffix(".weight")
            updates[IN_MEMORY.get(module, module)] = Update(part, _plain(settings.alpha * growth))
    return updates


def _family(table: RuleTable, name: str, config: Config, ours: bool) -> Family:
    family = table.family(name, config, ours)
    if family is None:
        raise ValueError(f"PEFT adapter: {name} is no layer of this model that can be adapted.")
    return family


def _split(weights: dict[str, Tensor], name: str, rows: Sequence[tuple[int, bool]]) -> list[Part]:
    """The updated parts of a layer of ours."""
    sizes = [size for size, updated in rows if updated]
    if not sizes:
        return []
    magnitude = weights.get(f"{name}.lora_magnitude")
    magnitudes = magnitude.split(sizes) if magnitude is not None else [None] * len(sizes)
    a = weights[f"{name}.lora_A"].chunk(len(sizes))
    b = weights[f"{name}.lora_B"].split(sizes)
    return [Part(*part) for part in zip(a, b, magnitudes, strict=True)]


def _columns(rows: list[list[tuple[int, bool]]], blocks: list[Part], rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each tensor of a family: B (rows, blocks, r), which blocks update which rows, and the lengths of the rows."""
    columns, block = [], 0
    for layer in rows:
        total, start = sum(size for size, _ in layer), 0
        b, magnitude = torch.zeros(total, len(blocks), rank), torch.zeros(total)
        mask = torch.zeros(total, len(blocks), dtype=torch.bool)
        for size, updated in layer:
            if updated:
                part, place = blocks[block], slice(start, start + size)
                b[place, block], mask[place, block] = part.b.float(), True
                if part.magnitude is not None:
                    magnitude[place] = part.magnitude.float()
                block += 1
            start += size
        columns.append((b, mask, magnitude))
    return columns


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


def _plain(number: float) -> int | float:
    """Without the last digits' error of a root, and an integer where it is one."""
    number = float(f"{number:.12g}")
    return int(number) if number.is_integer() else number


# --- reading ---------------------------------------------------------------------------------------------------------


def base_of(path: Path) -> str | None:
    """The name or path of the model that an adapter says it belongs to."""
    return _read_config(path).get("base_model_name_or_path") or None


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
    adapter_config, config = _read_config(path), base.config
    _check_config(adapter_config)
    table = ARCHITECTURES[export_config(config, base.files, base.dtype)["architectures"][0]].weights
    notes = [] if notes is None else notes
    updates = _of_text_model(_read_updates(path, adapter_config, config), notes)
    _check_experts(updates, adapter_config, config, notes)
    first = next(iter(updates.values()))
    scaling = _scaling(first, adapter_config)
    parts = _to_ours(updates, scaling, adapter_config, config, table)
    settings = _settings(parts, scaling, adapter_config, config)
    return _filled(parts, settings, base), settings


def _read_config(path: Path) -> dict[str, Any]:
    content = read_json_object(path / PEFT_CONFIG)
    alphas = content.get("alpha_pattern") or {}
    wrong = [
        key
        for key, fits in (
            ("base_model_name_or_path", isinstance(content.get("base_model_name_or_path") or "", str)),
            ("lora_alpha", _is_number(content.get("lora_alpha", 8))),
            ("lora_dropout", _is_number(content.get("lora_dropout") or 0)),
            ("alpha_pattern", isinstance(alphas, dict) and all(map(_is_number, alphas.values()))),
        )
        if not fits
    ]
    if wrong:
        given = ", ".join(f"{key}={shown(content[key])}" for key in wrong)
        raise ValueError(f"'{path / PEFT_CONFIG}' describes no adapter: {given}. Download it again.")
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _check_config(adapter_config: dict[str, Any]) -> None:
    problems = [
        f"{key}={shown(adapter_config[key])}"
        for key, neutral in NEUTRAL.items()
        if key in adapter_config and adapter_config[key] not in neutral
    ]
    start = adapter_config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        problems.append(f"init_lora_weights={shown(start)}, which has changed the base weights")
    if problems:
        raise ValueError(
            f"This PEFT adapter cannot be used: {', '.join(problems)} is not supported. Merge it into its model with "
            "peft (merge_and_unload) and convert the result."
        )


def _read_updates(path: Path, adapter_config: dict[str, Any], config: Config) -> dict[str, Update]:
    """Updates by the name of the module of theirs, or of the tensor that holds all experts of a layer."""
    file = next((path / name for name in (ADAPTER_MODEL, ADAPTER_BIN) if (path / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"'{path}' holds neither {ADAPTER_MODEL} nor {ADAPTER_BIN}. Download it again.")
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_state_dict(file)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if ".base_layer." in name and ".lora_" not in name:  # peft writes the weight of an adapted head, too
            continue
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_A|lora_B|{MAGNITUDE})(\.default)?(\.weight)?", name)
        if match is None:
            raise ValueError(f"'{file}': {name} is not supported (only LoRA of linear layers).")
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    updates = {}
    for module, tensors in found.items():
        if not {"lora_A", "lora_B"} <= tensors.keys() or (MAGNITUDE in tensors) != bool(adapter_config.get("use_dora")):
            raise ValueError(f"'{file}': of {module} there is only {', '.join(sorted(tensors))}.")
        if tensors["lora_A"].dim() != 2 or tensors["lora_B"].dim() != 2 or 0 in tensors["lora_A"].shape:
            raise ValueError(f"'{file}': lora_A and lora_B of {module} are no matrices.")
        part = Part(tensors["lora_A"], tensors["lora_B"], tensors.get(MAGNITUDE))
        if EXPERTS.search(module):
            module, part = _of_all_experts(module, part, config)
        updates[module] = Update(part, _alpha_of(module, adapter_config))
    if not updates:
        raise ValueError(f"'{file}' is empty.")
    return updates


def _of_text_model(updates: dict[str, Update], notes: list[str]) -> dict[str, Update]:
    """The updates of the text model in a multimodal one, by its names alone; others as they are."""
    named = {module: text_name(f"{module}.") for module in updates}
    if not any(name is not None and module != "lm_head" for module, name in named.items()):
        return updates
    text = {name.removesuffix("."): updates[module] for module, name in named.items() if name is not None}
    others = len(updates) - len(text)
    if others:
        notes.append(f"Of the adapter, {others} updates of other parts than the text model are left out.")
    return text


def _check_experts(
    updates: dict[str, Update], adapter_config: dict[str, Any], config: Config, notes: list[str]
) -> None:
    """A mixture that was adapted by the names of its experts' layers, where transformers 5 has no layers of that name,
    has learned nothing in them, and nothing has said so."""
    targets = adapter_config.get("target_modules")
    wanted = [name for name in targets if name in LAYERS_OF_EXPERTS] if isinstance(targets, list) else []
    if config.mlp_class_name == "LLaMAMoE" and wanted and not any(".experts" in module for module in updates):
        notes.append(f"The adapter was to have updates of the experts ({', '.join(wanted)}), and has none.")


def _alpha_of(module: str, adapter_config: dict[str, Any]) -> float:
    for pattern, alpha in (adapter_config.get("alpha_pattern") or {}).items():
        if is_slow(pattern, alternatives=True):
            raise ValueError(f"The alpha_pattern {shown(pattern)} of the PEFT adapter could take for ever. Correct it.")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        except re.error as error:
            raise ValueError(f"The alpha_pattern {shown(pattern)} of the PEFT adapter is wrong: {error}.") from None
    return adapter_config.get("lora_alpha", 8)


def _scaling(update: Update, adapter_config: dict[str, Any]) -> float:
    return update.alpha / (update.rank**0.5 if adapter_config.get("use_rslora") else update.rank)


def _to_ours(
    updates: dict[str, Update], scaling: float, adapter_config: dict[str, Any], config: Config, table: RuleTable
) -> dict[tuple[str, int], Part]:
    """Parts by the name of our layer and their number in it, all with the same scaling."""
    model = meta_model(config)
    weights = model.state_dict()
    shapes = dict(table.to_theirs(weights.items(), config))
    families: dict[Family, dict[str, Part]] = {}
    stacks = {module: update for module, update in updates.items() if update.part.a.dim() == 3}
    for module, update in updates.items():
        if module in stacks:
            continue
        name = _name_in_files(module, table, config)
        family = _family(table, name, config, False)
        _check_shapes(name, update.part, shapes[name])
        families.setdefault(family, {})[name] = _scaled(update.part, _scaling(update, adapter_config) / scaling)
    parts: dict[tuple[str, int], Part] = {}
    for module, update in stacks.items():
        for name, part in _of_each_expert(module, update.part, config, table).items():
            if f"{name}.weight" not in weights:
                raise ValueError(f"The PEFT adapter belongs to another model: there is no {name} here.")
            parts[name, 0] = _scaled(part, _scaling(update, adapter_config) / scaling)
    for family, adapted in families.items():
        blocks = [adapted[name] for name in family.theirs if name in adapted]
        rank = max(len(block.a) for block in blocks)
        rows = [[(len(shapes[name]), name in adapted)] for name in family.theirs]
        columns = _columns(rows, [Part(x.a, _widened(x.b, rank), x.magnitude) for x in blocks], rank)
        ours, masks, magnitudes = (family.transform.to_ours(each, config) for each in zip(*columns, strict=True))
        sizes = [[size for size, _ in _every_part(model, name, config)] for name in family.ours]
        split = sum(map(len, sizes)) > len(family.theirs)
        for name, of, *pieces in zip(family.ours, sizes, ours, masks, magnitudes, strict=True):
            for number, (b, mask, magnitude) in enumerate(zip(*(piece.split(of) for piece in pieces), strict=True)):
                used = mask.any(0).nonzero().flatten().tolist()
                a = [blocks[block].a for block in used]
                b = [b[:, block, : len(blocks[block].a)] for block in used]
                lengths = magnitude if adapter_config.get("use_dora") else None
                part = Part(torch.cat(a), torch.cat(b, dim=1), lengths) if used else None
                if part is not None and split and pieces[0].any():
                    part = _without_empty_columns(part)
                if part is not None and len(part.a):
                    parts[name.removesuffix(".weight"), number] = part
    return parts


def _of_all_experts(module: str, part: Part, config: Config) -> tuple[str, Part]:
    """The tensor that holds all experts of a layer, whose name only the shapes tell, and its update for each of them.

    Earlier versions of PEFT took a weight's rows for its input; then A and B are exchanged.
    """
    count, width, inner = config.n_expert or 1, config.n_embd, config.moe_intermediate_size or config.intermediate_size
    kinds = {(width, 2 * inner): "gate_up_proj", (inner, width): "down_proj"}
    rank, shape = len(part.a), (part.a.shape[1], part.b.shape[0])
    if config.n_expert is None or rank % count or part.b.shape[1] != rank or not {shape, shape[::-1]} & kinds.keys():
        raise ValueError(
            f"The PEFT adapter belongs to another model: {module} is no tensor of {count} experts here, with lora_A "
            f"{list(part.a.shape)} and lora_B {list(part.b.shape)}."
        )
    a = part.a.unflatten(0, (count, -1))  # (E, r, in)
    b = part.b.unflatten(1, (-1, count)).permute(2, 0, 1)  # (E, out, r)
    if shape not in kinds:
        a, b, shape = b.mT, a.mT, shape[::-1]
    return f"{EXPERTS.sub('.experts', module)}.{kinds[shape]}", Part(a, b, None)


def _of_each_expert(module: str, part: Part, config: Config, table: RuleTable) -> dict[str, Part]:
    """The update of each expert's layers, by our names, from that of the tensor that holds all of a layer's."""
    layer = re.search(r"\.layers\.(\d+)\.", module)
    if layer is None:
        raise ValueError(f"PEFT adapter: {module} is no layer of this model that can be adapted.")
    layers = ("fc_1", "fc_2") if module.endswith("gate_up_proj") else ("proj",)
    name, count = f"transformer.h.{layer[1]}.mlp.experts.{{}}.{{}}", len(part.a)
    family = _family(table, name.format(0, layers[0]) + ".weight", config, True)
    if len(family.theirs) == 1 and len(family.ours) > 1:  # one tensor in the files, too, maybe in an order of its own
        rows = family.transform.to_ours([part.b.mT], config)
        return {
            ours.removesuffix(".weight"): Part(part.a[number % count], each, None)
            for number, (ours, each) in enumerate(zip(family.ours, rows, strict=True))
        }
    halves = part.b.chunk(len(layers), dim=1)
    return {
        name.format(expert, ours): Part(part.a[expert], half[expert], None)
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


def _check_shapes(name: str, part: Part, weight: Tensor) -> None:
    if part.a.shape[1] != weight.shape[1] or part.b.shape[0] != weight.shape[0] or part.b.shape[1] != len(part.a):
        raise ValueError(
            f"The PEFT adapter belongs to another model: {name} is {list(weight.shape)} here, its lora_A "
            f"{list(part.a.shape)} and lora_B {list(part.b.shape)}."
        )


def _scaled(part: Part, factor: float) -> Part:
    return part if factor == 1 else Part(part.a, part.b * factor, part.magnitude)


def _widened(b: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(b, (0, rank - b.shape[1]))


def _without_empty_columns(part: Part) -> Part:
    """Without the ranks that belong to other rows of the module that was theirs."""
    kept = part.b.any(0)
    return Part(part.a[kept], part.b[:, kept], part.magnitude)


def _settings(
    parts: dict[tuple[str, int], Part], scaling: float, adapter_config: dict[str, Any], config: Config
) -> LoRASettings:
    """What the whole is: every target that some part belongs to, and the largest rank."""
    model = meta_model(config)
    switches = {}
    for target in TARGETS:
        alone = LoRASettings(**{name: name == target for name in TARGETS})
        names = {layer for layer, _ in parts}
        rows = {name: adapted_rows(name, model.get_submodule(name), config, alone) for name in names}
        switches[target] = any(rows[layer] is not None and rows[layer][number][1] for layer, number in parts)
    rank = max(len(part.a) for part in parts.values())
    rs = bool(adapter_config.get("use_rslora"))
    return LoRASettings(
        r=rank,
        alpha=_plain(scaling * (rank**0.5 if rs else rank)),
        dropout=adapter_config.get("lora_dropout") or 0.0,
        dora=bool(adapter_config.get("use_dora")),
        rs=rs,
        **switches,
    )


def _filled(parts: dict[tuple[str, int], Part], settings: LoRASettings, base: Source) -> dict[str, Tensor]:
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
            part = _full_rank(parts.get((name, number)), size, layer.in_features, settings.r)
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


def _full_rank(part: Part | None, rows: int, width: int, rank: int) -> Part:
    """A part of rank `rank`; what is added has a random A, so that it can learn, and B zero."""
    if part is None:
        part = Part(torch.empty(0, width), torch.empty(rows, 0), None)
    missing = rank - len(part.a)
    if not missing:
        return part
    a = torch.empty(rank, width)
    nn.init.kaiming_uniform_(a, a=5**0.5)
    return Part(torch.cat([part.a, a[:missing]]), _widened(part.b, rank), part.magnitude)
