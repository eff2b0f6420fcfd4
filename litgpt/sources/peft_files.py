"""A PEFT adapter's own files, read and checked; see `litgpt.formats.peft`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt.checkpoint import read_state_dict
from litgpt.checkpoint.names import PEFT_CONFIG
from litgpt.cli.untrusted import is_slow, read_json_object, shown
from litgpt.config import Config
from litgpt.formats.peft import ADAPTER_BIN, ADAPTER_MODEL, MAGNITUDE, PREFIX, RowUpdate, Update
from litgpt.formats.recognition import text_name
from litgpt.formats.safetensors_file import read_safetensors

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


def base_of_peft(path: Path) -> str | None:
    """The name or path of the model that an adapter says it belongs to."""
    return read_peft_config(path).get("base_model_name_or_path") or None


def read_peft_config(path: Path) -> dict[str, Any]:
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


def check_config(adapter_config: dict[str, Any]) -> None:
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


def read_updates(path: Path, adapter_config: dict[str, Any], config: Config) -> dict[str, Update]:
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
            raise ValueError(f"'{file}': lora_A and lora_B of {module} are not matrices.")
        part = RowUpdate(tensors["lora_A"], tensors["lora_B"], tensors.get(MAGNITUDE))
        if EXPERTS.search(module):
            module, part = _of_all_experts(module, part, config)
        updates[module] = Update(part, _alpha_of(module, adapter_config))
    if not updates:
        raise ValueError(f"'{file}' is empty.")
    return updates


def of_text_model(updates: dict[str, Update], notes: list[str]) -> dict[str, Update]:
    """The updates of the text model in a multimodal one, by its names alone; others as they are."""
    named = {module: text_name(f"{module}.") for module in updates}
    if not any(name is not None and module != "lm_head" for module, name in named.items()):
        return updates
    text = {name.removesuffix("."): updates[module] for module, name in named.items() if name is not None}
    others = len(updates) - len(text)
    if others:
        notes.append(f"Of the adapter, {others} updates of other parts than the text model are left out.")
    return text


def check_experts(updates: dict[str, Update], adapter_config: dict[str, Any], config: Config, notes: list[str]) -> None:
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


def _of_all_experts(module: str, part: RowUpdate, config: Config) -> tuple[str, RowUpdate]:
    """The tensor that holds all experts of a layer, whose name only the shapes tell, and its update for each of them.

    Earlier versions of PEFT took a weight's rows for its input; then A and B are exchanged.
    """
    count, width, inner = config.n_expert or 1, config.n_embd, config.expert_size
    kinds = {(width, 2 * inner): "gate_up_proj", (inner, width): "down_proj"}
    rank, shape = len(part.a), (part.a.shape[1], part.b.shape[0])
    if config.n_expert is None or rank % count or part.b.shape[1] != rank or not {shape, shape[::-1]} & kinds.keys():
        raise ValueError(
            f"The PEFT adapter belongs to another model: {module} is not a tensor of {count} experts here, with lora_A "
            f"{list(part.a.shape)} and lora_B {list(part.b.shape)}."
        )
    a = part.a.unflatten(0, (count, -1))  # (E, r, in)
    b = part.b.unflatten(1, (-1, count)).permute(2, 0, 1)  # (E, out, r)
    if shape not in kinds:
        a, b, shape = b.mT, a.mT, shape[::-1]
    return f"{EXPERTS.sub('.experts', module)}.{kinds[shape]}", RowUpdate(a, b, None)
