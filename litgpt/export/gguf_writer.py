"""A checkpoint as a GGUF file, for llama.cpp and what is built on it: the way back of `litgpt.sources.gguf`."""

from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from litgpt.cli.suggest import did_you_mean
from litgpt.config import Config
from litgpt.export.gguf_kinds import KINDS, Kind
from litgpt.formats.architectures import ARCHITECTURES
from litgpt.formats.gguf.gguf_architectures import GGUF_ARCHITECTURES, GGUFArchitecture, HFConfig, Metadata
from litgpt.formats.gguf.vocabulary import vocabulary
from litgpt.formats.hf_config import config_from_hf, config_to_hf, differences
from litgpt.formats.written_config import original_config
from litgpt.model import rope_frequencies
from litgpt.quantization.block_search import quantised
from litgpt.quantization.blocks import FORMATS
from litgpt.sources.gguf import ROPE_FACTORS
from litgpt.sources.meta import shapes_of
from litgpt.sources.source import EMBEDDING, HEAD, Named, Source, Watch

_AT_ONCE = 2**24  # values that are converted at a time


def export_gguf(
    source: Source,
    path: Path,
    kind: str | None = None,
    name: str | None = None,
    watch: Watch = iter,
    importance: dict[str, Tensor] | None = None,
) -> str:
    """Writes a checkpoint as a GGUF file, tokenizer and chat template included.

    Args:
        source: An opened checkpoint.
        path: The file to write. Use `checkpoint.atomic_file` to have it whole or not at all.
        kind: The type of matrices, a key of `KINDS`; None is that of the checkpoint. Vectors are float32.
        name: What the file calls the model; None is its own name.
        watch: Wraps the stream of weights, to show progress.
        importance: What an error in each column of a weight costs, by our name of it (`litgpt.export.calibration`).

    Returns:
        The kind.

    Raises:
        ValueError: GGUF cannot say everything about the model or its tokenizer, or there is no such kind.
    """
    config = source.config
    kind = kind or str(source.dtype).removeprefix("torch.")
    if kind not in KINDS:
        hint = did_you_mean(kind, KINDS)
        raise ValueError(f"'{kind}' is not a type of weights in a GGUF file.{hint} Choose {', '.join(KINDS)}.")
    usual = (original_config(source.files).get("architectures") or [None])[0]
    form, config_json, metadata = describe_in_gguf(config, usual)
    metadata |= vocabulary(source.files, config.padded_vocab_size)
    exporter = _Exporter(source, form, config_json, KINDS[kind], importance or {})
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[form.tensors])
    writer.add_name(name or config.name)
    writer.add_file_type(KINDS[kind].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.items():
        _add(writer, key, value)
    for tensor, shape, stored in exporter.layout():
        block, size = gguf.GGML_QUANT_SIZES[stored]
        count = int(np.prod(shape))
        writer.add_tensor_info(tensor, shape, np.dtype(np.float32), count // block * size, raw_dtype=stored)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for array in exporter.arrays(watch):
        writer.write_tensor_data(array)
    writer.close()
    return kind


def describe_in_gguf(config: Config, usual: str | None = None) -> tuple[GGUFArchitecture, HFConfig, dict[str, Any]]:
    """The architecture that a model has in GGUF, its `config.json` and its metadata.

    Args:
        config: The model.
        usual: Its Hugging Face architecture, which comes first where several can say the same.

    Raises:
        ValueError: No architecture can say everything in `config`; says what the model's own lacks.
    """
    reasons: dict[str, str] = {}
    wanted = _in_32_bits(config)
    for form in sorted(GGUF_ARCHITECTURES.values(), key=lambda form: form.architecture != usual):
        name = gguf.MODEL_ARCH_NAMES[form.tensors]
        try:
            config_json = config_to_hf(config, form.architecture)
            metadata = {"general.architecture": name, **form.write(config_json)}
            names = form.names(_theirs(shapes_of(config).items(), form, config), config.n_layer)
            again = {**config_json, **form.read(Metadata(metadata, names.values()))}
            if (config_json.get("rope_scaling") or {}).get("rope_type") == "llama3":
                again["rope_scaling"] = config_json["rope_scaling"]  # a tensor says it
            lost = differences(_in_32_bits(config_from_hf(again, config.name)), wanted)
        except ValueError as error:
            reasons[form.architecture] = f"as {name}, {str(error).splitlines()[-1].strip()}"
            continue
        if not lost:
            return form, config_json, metadata
        values = ", ".join(f"{n}={getattr(config, n)!r}" for n in lost)
        reasons[form.architecture] = f"as {name}, it cannot express {values}"
    own = usual if usual in ARCHITECTURES else config_to_hf(config)["architectures"][0]
    forms = ", ".join(GGUF_ARCHITECTURES)
    reason = reasons.get(own, f"there is none of its kind here (only {forms})").rstrip(".")
    raise ValueError(
        f"This model ({own}) cannot be written as a GGUF file: {reason}. Write it with `litgpt convert --to hf`, which "
        "llama.cpp's convert_hf_to_gguf.py reads."
    )


def _in_32_bits(config: Config) -> Config:
    """A configuration with its fractions as GGUF has them. Whoever read them from there may have written them with all
    their digits, such as 9.999999747378752e-06."""
    rounded = copy(config)
    for name, value in vars(config).items():
        setattr(rounded, name, _rounded(value))
    return rounded


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if key == "general.architecture":  # the writer has written it
        return
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


class _Exporter:
    """The tensors of a GGUF file, one at a time.

    Args:
        source: The checkpoint.
        form: Its architecture in GGUF.
        config_json: What it is, as Hugging Face has it.
        kind: The types of its matrices.
        importance: As for `export_gguf`.
    """

    def __init__(
        self,
        source: Source,
        form: GGUFArchitecture,
        config_json: HFConfig,
        kind: Kind,
        importance: dict[str, Tensor],
    ) -> None:
        self.source, self.form, self.config_json, self.kind = source, form, config_json, kind
        self.importance = importance
        self.factors = _rope_factors(source.config)
        self.shapes = _theirs(source.layout().items(), form, source.config)
        self.names = form.names(self.shapes, source.config.n_layer)

    def layout(self) -> Iterator[tuple[str, tuple[int, ...], Type]]:
        """Name, shape and type of each."""
        if self.factors is not None:
            yield ROPE_FACTORS, tuple(self.factors.shape), Type.F32
        for name, shape in self.shapes.items():
            yield self.names[name], shape, self.stored(name)

    def arrays(self, watch: Watch) -> Iterator[np.ndarray]:
        """The values of each in the same order."""
        if self.factors is not None:
            yield self.factors.numpy()
        for name, tensor in _translated(watch(self.source.weights()), self.form, self.source.config):
            change = self.form.change(name)
            tensor = tensor if change is None else change.to_gguf(tensor, self.config_json)
            yield _values(tensor, self.stored(name), self._importance_of(name))

    def stored(self, name: str) -> Type:
        """The type in which a tensor is stored."""
        config = self.source.config
        return self.kind.stored(self.names[name], self.shapes[name], config.n_layer, config.tie_embeddings)

    def _importance_of(self, name: str) -> Tensor | None:
        """That of a weight of theirs: what is done to it moves rows, and leaves columns where they are."""
        family = ARCHITECTURES[self.form.architecture].weights.family(name, self.source.config, ours=False)
        ours = family.ours[0] if family is not None else name
        tied = ours == EMBEDDING and self.source.config.tie_embeddings
        return self.importance.get(HEAD if tied else ours)


def _translated(ours: Iterable[Named], form: GGUFArchitecture, config: Config) -> Iterator[Named]:
    """Tensors under Hugging Face's names; a tied head is left out."""
    table = ARCHITECTURES[form.architecture].weights
    return table.to_theirs((pair for pair in ours if not (config.tie_embeddings and pair[0] == HEAD)), config)


def _theirs(ours: Iterable[Named], form: GGUFArchitecture, config: Config) -> dict[str, tuple[int, ...]]:
    """The same, their shapes alone."""
    return {name: tuple(tensor.shape) for name, tensor in _translated(ours, form, config)}


def _values(tensor: Tensor, kind: Type, importance: Tensor | None) -> np.ndarray:
    """A tensor as a file has it, converted some rows at a time."""
    if tensor.dim() < 2:
        return tensor.float().numpy()
    if kind.name.lower() in FORMATS:
        return quantised(tensor, kind.name.lower(), importance).numpy()
    rows = max(1, _AT_ONCE // tensor.size(1))
    return np.concatenate([gguf.quantize(part.float().numpy(), kind) for part in tensor.split(rows)])


def _rope_factors(config: Config) -> Tensor | None:
    """By what the rotary frequencies of Llama 3.1 are divided; (P,)."""
    if config.rope_kind != "llama3":
        return None
    plain = replace(config, rope_adjustments=None)
    return (rope_frequencies(plain)[0] / rope_frequencies(config)[0])[0].to(torch.float32)
