"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), their weights de-quantised or as they lie.

A GGUF file is turned into what a Hugging Face directory would hold, and then goes the same way: its metadata become a
`config.json`, its tensors get Hugging Face names by the name table of the `gguf` package, and the architecture's rule
table does the rest. What is peculiar to an architecture's GGUF form is an entry of `GGUF_ARCHITECTURES`; the way back
is in `litgpt.export.gguf_writer`.
"""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from litgpt.catalog import find_known
from litgpt.formats.architectures import ARCHITECTURES
from litgpt.formats.gguf.file import GGUFFile, GGUFTensor
from litgpt.formats.gguf.gguf_architectures import GGUF_ARCHITECTURES, GGUFArchitecture, Metadata
from litgpt.formats.gguf.row_places import RowNumbers, composed
from litgpt.formats.gguf.tokenizer_files import write_tokenizer
from litgpt.formats.hf_config import config_from_hf
from litgpt.formats.rules import Named
from litgpt.model import stretch_by_parts
from litgpt.quantization.block_weight import KIND as BLOCKS
from litgpt.quantization.block_weight import BlockMatrix
from litgpt.quantization.layers import quantized_layers
from litgpt.sources.fit import compare_shapes, excess, left_out, misfit
from litgpt.sources.kept import kept_directory
from litgpt.sources.meta import meta_model, shapes_of
from litgpt.sources.source import EMBEDDING, HEAD, Source

ROPE_FACTORS = "rope_freqs.weight"
# What GGUF has names for and no text model here computes with: other parts of a model, several tokens at once, and
# rotary tables, which follow from the metadata.
_OTHER_PARTS = re.compile(r"(v|mm|a|cls|dec|enc)\.|cls$|.*(nextn|rope_freqs|rot_embd)")


class GGUFSource(Source):
    """A `.gguf` file. Quantised weights come as they lie, or in float32, exactly as they are de-quantised."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.file = file = GGUFFile(path)
        try:
            self.metadata = Metadata(file.metadata, file.tensors)
        except ValueError as error:
            raise ValueError(f"'{path}' cannot be used: {error}.") from None
        self.tensors = file.tensors
        self.form = self._form()
        self.table = ARCHITECTURES[self.form.architecture].weights
        self.config_json = self._config_json()
        try:
            self.config = config_from_hf(self.config_json, name or model_name(path))
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from None
        self.note: str | None = None
        self.names = self._names()
        used = [self.tensors[name] for name in self.names.values()]
        types = {tensor.dtype for tensor in used if len(tensor.shape) > 1}
        self.dtype = types.pop() if len(types) == 1 else torch.float32
        self.has_blocks = any(tensor.form is not None for tensor in used)

    @cached_property
    def files(self) -> Path:
        """A directory with the tokenizer and JSON files, made from the metadata; it lives as long as the process."""
        directory = kept_directory("litgpt-gguf-")
        tokens = write_tokenizer(self.metadata.get, directory, self.path, self.config.block_size)
        config_json = self.config_json | tokens
        (directory / "config.json").write_text(json.dumps(config_json, indent=2) + "\n", encoding="utf-8")
        return directory

    def layout(self) -> dict[str, Tensor]:
        return dict(self._translated(self._described()))

    def weights(self) -> Iterator[Named]:
        return self._translated((name, self._value(name)) for name in self.names)

    def forms(self, kind: str | None) -> Iterator[tuple[str, Tensor | BlockMatrix]]:
        return self.weights() if kind != BLOCKS else self._as_they_lie()

    def _as_they_lie(self) -> Iterator[tuple[str, Tensor | BlockMatrix]]:
        """The matrices that a model can have in blocks as these, all else as by `weights`.

        What is done to a matrix on its way to ours only moves rows. So numbers are sent that way in place of rows, and
        say where each one of ours is in the file.
        """
        layers = {f"{name}.weight" for name, _ in quantized_layers(meta_model(self.config, BLOCKS))}
        numbers, content = RowNumbers(self._matrices()), self.file.mapped()
        theirs = ((name, numbers.of(name) if name in numbers.starts else self._value(name)) for name in self.names)
        changed = ((name, self._changed(name, t) if name in numbers.starts else t) for name, t in theirs)
        for name, tensor in self._translated(changed):
            if tensor.dtype != torch.int64:
                yield name, tensor
                continue
            places = numbers.places(tensor[:, 0])
            parts = [(self.tensors[self.names[theirs]].rows_in(content), rows) for theirs, rows in places]
            matrix = composed(parts)
            yield name, matrix if name in layers else matrix.dequantised(self.dtype)

    def _matrices(self) -> dict[str, int]:
        """Hugging Face name -> number of rows, of every matrix."""
        shapes = {name: self.tensors[gguf_name].shape for name, gguf_name in self.names.items()}
        return {name: shape[0] for name, shape in shapes.items() if len(shape) == 2}

    def _translated(self, theirs: Iterator[Named]) -> Iterator[Named]:
        for name, tensor in self.table.to_ours(theirs, self.config):
            yield name, tensor
            if name == EMBEDDING and self.config.tie_embeddings:
                yield HEAD, tensor

    def _form(self) -> GGUFArchitecture:
        form = GGUF_ARCHITECTURES.get(self.metadata.architecture)
        if form is None:
            raise ValueError(
                f"'{self.path}' holds a model of architecture '{self.metadata.architecture}', which is not supported "
                f"as GGUF (only {', '.join(GGUF_ARCHITECTURES)}). Use its Hugging Face checkpoint instead."
            )
        if self.metadata.get("split.count", 0) > 1:
            raise ValueError(
                f"'{self.path}' is one of several parts. Merge them with `llama-gguf-split --merge` first."
            )
        return form

    def _config_json(self) -> dict[str, Any]:
        embedding = self.tensors.get("token_embd.weight")
        try:
            if embedding is None:
                raise ValueError("it has no tensor 'token_embd.weight'")
            specific = self.form.read(self.metadata)
            if ROPE_FACTORS in self.tensors:
                factors = self.tensors[ROPE_FACTORS].read()
                specific["rope_scaling"] = _llama3_scaling(factors, specific.get("rope_theta", 10000.0))
        except ValueError as error:
            raise ValueError(f"'{self.path}' cannot be used: {error}.") from error
        architecture = ARCHITECTURES[self.form.architecture]
        return {
            "architectures": [architecture.name],
            "model_type": architecture.model_type,
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "torch_dtype": "float32",
            **specific,
        }

    def _names(self) -> dict[str, str]:
        """Hugging Face name -> GGUF name, of every weight, in the file's order; checks names and shapes, and notes what
        the model has no place for."""
        found = {name: _empty(tensor) for name, tensor in self.tensors.items() if name != ROPE_FACTORS}
        problems = excess(self.config, found.values())
        if problems:
            raise ValueError(misfit(self.path, "its metadata", problems))
        ours = shapes_of(self.config).items()
        tied = self.config.tie_embeddings
        wanted = dict(self.table.to_theirs([pair for pair in ours if not (tied and pair[0] == HEAD)], self.config))
        theirs = self.form.names(wanted, self.config.n_layer)
        used = {theirs[name]: tensor for name, tensor in wanted.items()}
        problems = compare_shapes(used, found, "the metadata", "the file")
        surplus = [name for name in found if name not in used]
        if len(problems) == len(surplus) and not any(map(self._belongs, surplus)):
            self.note, problems = left_out(surplus, self.form.architecture), []
        if problems:
            raise ValueError(misfit(self.path, "its metadata", problems))
        order = {name: place for place, name in enumerate(self.tensors)}
        return dict(sorted(theirs.items(), key=lambda pair: order[pair[1]]))

    def _belongs(self, name: str) -> bool:
        """Whether a surplus tensor is one that GGUF has a name for in the layers of text models: it would be missed."""
        block = re.match(r"blk\.(\d+)\.", name)
        if block is not None and int(block[1]) >= self.config.n_layer:
            return False
        plain = re.sub(r"^blk\.\d+\.", "blk.{bid}.", name)
        return not _OTHER_PARTS.match(plain) and any(
            plain == known or plain.startswith(f"{known}.") for known in gguf.TENSOR_NAMES.values()
        )

    def _described(self) -> Iterator[Named]:
        for name, gguf_name in self.names.items():
            yield name, _empty(self.tensors[gguf_name])

    def _value(self, name: str) -> Tensor:
        return self._changed(name, self.tensors[self.names[name]].read())

    def _changed(self, name: str, value: Tensor) -> Tensor:
        change = self.form.change(name)
        return value if change is None else change.to_hf(value, self.config_json)


def _empty(tensor: GGUFTensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _llama3_scaling(factors: Tensor, theta: float) -> dict[str, Any]:
    """The rule behind the factors by which Llama 3.1 files divide their rotary frequencies; (P,) -> `rope_scaling`."""
    if factors.dim() != 1:
        raise ValueError(f"the rotary factors in '{ROPE_FACTORS}' are not a list")
    frequencies = theta ** -(torch.arange(factors.numel(), dtype=torch.float32) / factors.numel())
    rule = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": round(factors.max().item(), 4)}
    for original in (8192, 4096, 16384, 32768, 131072):
        expected = frequencies / stretch_by_parts(frequencies, {**rule, "original_max_seq_len": original})
        if torch.allclose(expected, factors, rtol=1e-3):
            return {"rope_type": "llama3", **rule, "original_max_position_embeddings": original}
    raise ValueError(f"the rotary factors in '{ROPE_FACTORS}' follow no known rule")


def model_name(path: Path) -> str:
    """The model's name from that of its file: without the type of quantisation, and as known where it is known."""
    kinds = r"(?:(?:UD|i1|imat)[-.])?(?:I?Q\d\w*|TQ\d\w*|F16|F32|BF16|FP16|FP32|MXFP4\w*)"
    name = re.sub(rf"[-._]{kinds}$", "", path.stem, flags=re.IGNORECASE)
    known = find_known(name)
    return known.repo_id if known else name
