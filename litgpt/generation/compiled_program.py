"""Compiled code on disk: what it was made for, and running it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

import litgpt
from litgpt.cli.resources import cache_directory
from litgpt.generation import skinny_gemm
from litgpt.kv_cache import KVCache, layer_cache_of
from litgpt.model import GPT, LLaMAMoE
from litgpt.quantization.block_weight import BlockWeight
from litgpt.quantization.layers import QuantizedLinear, quantized_layers
from litgpt.quantization.weight_only import GROUP, Int4Weight, WeightOnly


class Specification(TypedDict):
    """All that the compiled code of a step depends on, as JSON has it."""

    config: dict[str, Any]
    """The fields of `Config`."""
    quantize: str | None
    weights: dict[str, list[list[int] | str]]
    """The shape and the type of each, by name."""
    dtype: str
    cache_dtype: str
    kv_cache: str | None
    """Which `LayerCache`."""
    rows: int
    """How many rows the step has; 0 is the code that reads prompts."""
    threads: int
    torch: str
    cpu: list[str | dict[str, str]]
    code: str
    """`code_version`."""


class Program:
    """Compiled code from a file, with the weights of a model.

    Raises:
        OSError, RuntimeError, ValueError: The file is damaged, or is of another model.
    """

    def __init__(self, path: str | Path, model: GPT) -> None:
        if (damaged := _damaged(path)) is not None:  # it would be loaded, and run
            raise ValueError(f"'{path}' is damaged: {damaged}")
        skinny_gemm.has_tiles()  # the system lets a process use them that has asked
        self._run = torch._inductor.aoti_load_package(str(path))
        self._flat = getattr(self._run.loader, "boxed_run", self._run.loader.run)
        held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        held = {f"model.{name}": tensor.detach() for name, tensor in held.items()}
        names = self._run.get_constant_fqns()
        unknown = [name for name in names if name not in held]
        if len(unknown) == sum(isinstance(module, Int4Weight) for module in model.modules()):
            # inductor hands the kernel the size of the groups as a tensor, and counts each among the weights
            held |= dict.fromkeys(unknown, torch.tensor(GROUP))
        elif unknown:
            raise ValueError(f"the compiled code asks for {unknown[0]}, which the model does not have")
        self._weights = {name: held[name] for name in names}  # the library has their addresses only
        self._run.load_constants(self._weights, check_full_update=True, user_managed=True)

    def __call__(self, tokens: Tensor, positions: Tensor, state: list[Tensor], length: int) -> Tensor:
        # `self._run(...)` would read the description of its arguments anew at every call: 1.7 ms, a tenth of a step.
        return self._flat([tokens, positions, *state, torch.empty(length, dtype=torch.int8)])[0]


def _damaged(path: str | Path) -> str | None:
    """Which part of a package is not as it was written; None if all are."""
    try:
        with zipfile.ZipFile(path) as package:
            return package.testzip()
    except zipfile.BadZipFile as error:
        return str(error)


def read_length(cache: KVCache) -> int:
    """How many slots of the layers without a window are read."""
    ring = cache.rings.get(None)
    if ring is None:
        return 2  # nobody asks
    return ring.table.size(1) if ring.read_length is None else ring.read_length


def why_not(model: GPT) -> str | None:
    """Why the step of such a model cannot be compiled; None if it can."""
    if model.layer_cache is not layer_cache_of(model.layer_cache.kind):
        return f"keys and values are kept in a {model.layer_cache.__name__}"
    layers = {type(layer.quantized) for _, layer in quantized_layers(model)}
    if BlockWeight in layers:
        return "the weights are the blocks of a GGUF file, which inductor does not know"
    if any(not issubclass(layer, WeightOnly) for layer in layers):
        return "the weights are quantised by bitsandbytes, whose kernels inductor does not know"
    for module in model.transformer.h.modules():
        if module._forward_hooks or module._forward_pre_hooks:  # the code would do without what they do
            return "the model is spread over several devices"
    for module in model.modules():
        if isinstance(module, LLaMAMoE):
            return "how many tokens an expert gets is known only while the model runs"
        known = type(module).__module__.startswith(("torch.nn.", "litgpt.model", "litgpt.quantization.weight_only"))
        if not known and not isinstance(module, QuantizedLinear):
            return f"the model holds {type(module).__name__} modules. Merge them into the weights first"
    return None


def reads_compiled(model: GPT) -> bool:
    """Whether the code that reads prompts can be compiled, and is worth it, where that of the step can.

    Attention that is written out takes the tokens in blocks, latents are better made to heads for many tokens, and
    quantised weights are multiplied in another way.
    """
    config = model.config
    written_out = config.attention_logit_softcapping is not None or config.attention_sinks
    return not written_out and config.latent_attention is None and not any(quantized_layers(model))


def specification(model: GPT, rows: int, dtype: torch.dtype) -> Specification:
    """What the compiled code of a step depends on.

    Args:
        model: The model.
        rows: How many rows the step has, or READING.
        dtype: The type of keys and values.
    """
    weights = [layer.quantized for _, layer in quantized_layers(model)]
    kind = "int4" if any(isinstance(weight, Int4Weight) for weight in weights) else "int8"  # int4's head is in int8
    abilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "config": dataclasses.asdict(model.config),
        "quantize": kind if weights else None,
        "weights": described_weights(model),
        "dtype": dtype_name(model.transformer.wte.weight.dtype),
        "cache_dtype": dtype_name(dtype),
        "kv_cache": model.layer_cache.kind,
        "rows": rows,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": [torch.backends.cpu.get_cpu_capability(), {name: str(value) for name, value in abilities.items()}],
        "code": code_version(),
    }


def path_of(specification: Specification) -> Path:
    """Where the code of a step is kept."""
    digest = hashlib.sha256(json.dumps(specification, sort_keys=True, default=str).encode()).hexdigest()
    return cache_directory() / "compiled" / f"{digest[:32]}.pt2"


def described_weights(model: GPT) -> dict[str, list[list[int] | str]]:
    """The shape and the type of each weight, by name."""
    return {name: [list(t.shape), dtype_name(t.dtype)] for name, t in model.state_dict().items()}


@cache
def code_version() -> str:
    """A digest of the sources that the step is made from."""
    folder = Path(litgpt.__file__).parent
    sources = ("model.py", "kv_cache.py", "quantization/layers.py", "quantization/weight_only.py", "config.py")
    sources = (*sources, "generation/compile_step.py", "generation/skinny_gemm.py", "generation/skinny_gemm.h")
    return hashlib.sha256(b"".join((folder / source).read_bytes() for source in sources)).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
