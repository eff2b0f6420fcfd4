"""Whether weights are those of the model that a configuration describes."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from litgpt.checkpoint import Release
from litgpt.cli.plural import counted
from litgpt.config import Config
from litgpt.formats.config_json import read_config_json
from litgpt.formats.recognition import text_model

_LEAST_TENSORS = 4  # of a layer, in any format: the weights of attention and MLP, going in and out
_FEW_MODULES = 500  # layers and experts, which take half a second
BLOCK = re.compile(r"transformer\.h\.(\d+)\.")
LEARNED = re.compile(r"\.lora_|\.adapter_|\.gating_factor")  # what finetuning has put next to a model's own weights


def rows_at_once(tensor: Tensor) -> int:
    """How many rows of a large tensor to have in memory at a time: a few megabytes."""
    return max(1, 2**20 // max(1, tensor[:1].numel())) if tensor.dim() else 1


def excess(config: Config, tensors: Iterable[Tensor]) -> list[str]:
    """One line for everything that makes a model larger than such files could fill; to be asked before it is built.

    A configuration of a few lines can stand for any number of modules. Models of few are built at once, and compared
    with the files tensor by tensor.

    Args:
        config: The shape of the model.
        tensors: All that the files hold.
    """
    if config.n_layer * (1 + config.n_expert) <= _FEW_MODULES:
        return []
    count, size = 0, 0
    for tensor in tensors:
        count, size = count + 1, size + tensor.nbytes
    lines = []
    if config.n_layer * _LEAST_TENSORS > count:
        lines.append(f"  missing: {config.n_layer:,} layers (n_layer) have more than {count:,} tensors, all there are")
    parameters = least_parameters(config)
    if parameters > 2 * size:  # as many as in four bits each
        lines.append(f"  missing: such a model has over {parameters:,} parameters, the files have {size:,} bytes")
    return lines


def least_parameters(config: Config) -> int:
    """A lower bound on the number of a model's parameters."""
    width, latent = config.n_embd, config.latent_attention or {}
    attention = config.n_head * latent.get("v_head_dim", config.head_size) * width  # its projection alone
    dense = 2 * config.intermediate_size * width
    sparse, layers = dense, config.n_layer
    if config.mlp_class_name == "LLaMAMoE":
        sparse = 3 * config.n_expert * config.expert_size * width
        layers = max(0, config.n_layer - (config.first_k_dense_replace or 0))
    mlps = layers * sparse + (config.n_layer - layers) * dense
    return config.padded_vocab_size * width + config.n_layer * attention + mlps


def compare_shapes(wanted: dict[str, Tensor], found: dict[str, Tensor], wanted_by: str, found_in: str) -> list[str]:
    """One line for every name that is missing, unexpected or has a wrong shape."""
    lines = [f"  missing: {name} {list(wanted[name].shape)}" for name in wanted if name not in found]
    lines += [f"  unexpected: {name} {list(found[name].shape)}" for name in found if name not in wanted]
    lines += [
        f"  wrong shape: {name} is {list(found[name].shape)} in {found_in}, {list(like.shape)} in {wanted_by}"
        for name, like in wanted.items()
        if name in found and found[name].shape != like.shape
    ]
    return lines


def left_out(names: Sequence[str], model: str) -> str | None:
    """The note about tensors that a model has no place for, by kind, as one of each layer is there."""
    if not names:
        return None
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    shown = ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} other kinds" if len(kinds) > 4 else "")
    one = len(names) == 1
    what = f"{len(names)} tensor{'' if one else 's'} that {model} does not have {'is' if one else 'are'} left out"
    return f"{what} ({shown})."


def says_tied(path: Path) -> bool:
    try:
        return bool(text_model(read_config_json(path / "config.json")).get("tie_word_embeddings"))
    except (OSError, ValueError):
        return False


def same_values(one: Tensor, other: Tensor, release: Release) -> bool:
    """Whether two tensors are equal, compared part by part so that mapped files stay out of memory."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    for a, b in zip(one.split(rows_at_once(one)), other.split(rows_at_once(one)), strict=True):
        if not torch.equal(a, b):
            return False
        release(a)
        release(b)
    return True


def first_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    return next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)


def misfit(weights: Path, description: str, problems: list[str]) -> str:
    """The message about weights that are not those of the model that a configuration describes."""
    count = counted(len(problems), "problem")
    return (
        f"The weights in '{weights}' are not those of the model in {description} ({count}):\n"
        + "\n".join(problems)
        + "\nDownload or convert the checkpoint again, or correct the configuration."
    )
