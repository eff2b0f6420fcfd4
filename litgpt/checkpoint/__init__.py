"""The checkpoint directory: what it holds, reading and writing its weights, and saving it whole or not at all.

It holds `lit_model.pth` (weights), `model_config.yaml` (shape), the tokenizer's files and the model card's JSON files.
What needs torch is imported on first use: whoever only saves a file whole does not wait for it.
"""

import importlib
from typing import Any

from litgpt.checkpoint.atomic import SaveError, atomic_additions, atomic_directory, atomic_file
from litgpt.checkpoint.names import COMPANION_FILES, CONFIG, HYPERPARAMETERS, WEIGHTS

_PLACES = {
    "MappedTensors": "litgpt.checkpoint.weights",
    "Release": "litgpt.checkpoint.weights",
    "copy_companion_files": "litgpt.checkpoint.directory",
    "fill_companion_files": "litgpt.checkpoint.directory",
    "hf_weight_files": "litgpt.checkpoint.directory",
    "holds_adaptation": "litgpt.checkpoint.directory",
    "holds_adaptation_alone": "litgpt.checkpoint.directory",
    "holds_tokenizer": "litgpt.checkpoint.directory",
    "is_peft_alone": "litgpt.checkpoint.directory",
    "missing_files": "litgpt.checkpoint.directory",
    "plain_names": "litgpt.checkpoint.wrappers",
    "raw_parts": "litgpt.checkpoint.writer",
    "read_state_dict": "litgpt.checkpoint.weights",
    "save_model": "litgpt.checkpoint.directory",
    "unreadable": "litgpt.checkpoint.weights",
    "write_state_dict": "litgpt.checkpoint.writer",
}
__all__ = [
    "COMPANION_FILES",
    "CONFIG",
    "HYPERPARAMETERS",
    "WEIGHTS",
    "MappedTensors",
    "Release",
    "SaveError",
    "atomic_additions",
    "atomic_directory",
    "atomic_file",
    "copy_companion_files",
    "fill_companion_files",
    "hf_weight_files",
    "holds_adaptation",
    "holds_adaptation_alone",
    "holds_tokenizer",
    "is_peft_alone",
    "missing_files",
    "plain_names",
    "raw_parts",
    "read_state_dict",
    "save_model",
    "unreadable",
    "write_state_dict",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'litgpt.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
