"""The checkpoint directory: finding it, reading and writing its weights, and saving it whole or not at all.

It holds `lit_model.pth` (weights), `model_config.yaml` (shape), the tokenizer's files and the model card's JSON files.
"""

from litgpt.checkpoint.atomic import SaveError, atomic_additions, atomic_directory, atomic_file
from litgpt.checkpoint.directory import (
    copy_companion_files,
    hf_weight_files,
    missing_files,
    resolve_checkpoint_dir,
    save_model,
)
from litgpt.checkpoint.names import COMPANION_FILES, CONFIG, HYPERPARAMETERS, WEIGHTS
from litgpt.checkpoint.weights import MappedTensors, Release, read_state_dict, unreadable
from litgpt.checkpoint.writer import raw_parts, write_state_dict

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
    "hf_weight_files",
    "missing_files",
    "raw_parts",
    "read_state_dict",
    "resolve_checkpoint_dir",
    "save_model",
    "unreadable",
    "write_state_dict",
]
