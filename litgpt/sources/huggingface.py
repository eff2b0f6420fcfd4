"""A Hugging Face directory, opened."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt.catalog import find_known
from litgpt.checkpoint import (
    MappedTensors,
    Release,
    hf_weight_files,
    plain_names,
    read_state_dict,
)
from litgpt.config import Config
from litgpt.formats.architecture import Architecture
from litgpt.formats.config_json import read_config_json
from litgpt.formats.hf_config import config_from_hf, config_to_hf, ignored_entries
from litgpt.formats.quantised_weights import Quantised, Weights, dequantised_type, is_stale, read_quantised, unscaled
from litgpt.formats.recognition import alias_in, architecture_of, class_names, text_model, text_name
from litgpt.formats.rules import Named
from litgpt.formats.safetensors_file import read_safetensors
from litgpt.sources.fit import BLOCK, LEARNED, compare_shapes, excess, first_dtype, left_out, misfit, same_values
from litgpt.sources.meta import on_meta, shapes_of
from litgpt.sources.source import EMBEDDING, HEAD, Source


class HFSource(Source):
    """A directory of a supported Hugging Face architecture, in `.safetensors` or `.bin` files.

    Of a multimodal checkpoint, the text model; quantised weights come de-quantised.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.files = path
        given = read_config_json(path / "config.json") if (path / "config.json").is_file() else _usual_json(name)
        self.config_json = text_model(given)
        self.architecture: Architecture = architecture_of(self.config_json)
        self.shards = [_read_shard(file) for file in hf_weight_files(path)]
        notes: list[str] = []
        tensors = _renamed({name: tensor for shard in self.shards for name, tensor in shard.items()})
        if self.config_json is not given:
            tensors = self._text_alone(tensors, given, notes)
        ignored = self.architecture.weights.is_ignored
        tensors = {name: tensor for name, tensor in tensors.items() if not ignored(name)}
        self._note_on_config(tensors, notes)
        try:
            self.config = config_from_hf(self.config_json, name or _label(path))
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from None
        self._check(excess(self.config, tensors.values()))
        tensors = self._without_predictors(_renamed(tensors, self._their_name(EMBEDDING)), notes)
        self.found = self._dequantised(tensors, notes)
        self._untie_if_different()
        named = shapes_of(self.config).items()
        if self.config.tie_embeddings:
            named = [(name, tensor) for name, tensor in named if name != HEAD]
        wanted = dict(self.architecture.weights.to_theirs(named, self.config))
        problems = compare_shapes(wanted, self._shapes(), "config.json", "the files")
        surplus = [name for name in self.found if name not in wanted]
        if len(problems) == len(surplus) and not any(map(self._belongs, surplus)):
            notes += filter(None, [left_out(surplus, self.architecture.name)])
            self.found = {name: self.found[name] for name in self.found if name in wanted}
            problems = unscaled(self.found)
        self._check(problems)
        self.note = " ".join(notes) or None

    def layout(self) -> dict[str, Tensor]:
        return dict(self._translated(self._shapes().items()))

    def weights(self) -> Iterator[Named]:
        for shard in self.shards:
            shard.check()
        yield from self._translated(((name, self._value(name)) for name in self.found), self.release)

    def release(self, tensor: Tensor) -> None:
        for shard in self.shards:
            shard.release(tensor)

    def _shapes(self) -> dict[str, Tensor]:
        return {name: on_meta(w) if isinstance(w, Tensor) else w.like for name, w in self.found.items()}

    def _value(self, name: str) -> Tensor:
        weight = self.found[name]
        return weight.read(self.release) if isinstance(weight, Quantised) else weight

    def _translated(self, theirs: Iterable[Named], done: Release = lambda tensor: None) -> Iterator[Named]:
        for name, tensor in self.architecture.weights.to_ours(theirs, self.config, done):
            yield name, tensor
            if name == EMBEDDING and self.config.tie_embeddings:
                yield HEAD, tensor

    def _text_alone(self, tensors: dict[str, Tensor], whole: dict[str, Any], notes: list[str]) -> dict[str, Tensor]:
        named = [(text_name(name), tensor) for name, tensor in tensors.items()]
        text = {name: tensor for name, tensor in named if name is not None}
        of = (class_names(whole) or [whole.get("model_type")])[0]
        notes.append(
            f"Of {of}, only the text model is used ({self.architecture.name}); "
            f"{len(tensors) - len(text)} tensors of its other parts are left out."
        )
        return text

    def _without_predictors(self, tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
        """Leaves out the layers after the last, which DeepSeek-V3 and GLM-4.5 have for predicting tokens further on."""
        count, layers = self.config_json.get("num_nextn_predict_layers") or 0, self.config.n_layer
        prefixes = tuple(f"model.layers.{layer}." for layer in range(layers, layers + count))
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
        if len(kept) < len(tensors):
            left_out = f"{len(tensors) - len(kept)} tensors for predicting several tokens at once"
            notes.append(f"{left_out} (num_nextn_predict_layers: {count}) are left out.")
        return kept

    def _dequantised(self, tensors: dict[str, Tensor], notes: list[str]) -> Weights:
        try:
            weights = read_quantised(tensors, self.config_json)
        except ValueError as error:
            raise self._misfit(str(error).splitlines()) from None
        self.dtype = first_dtype(tensors)
        if any(isinstance(weight, Quantised) for weight in weights.values()):
            self.dtype = dequantised_type(self.config_json)
            method = self.config_json["quantization_config"]["quant_method"]
            notes.append(f"Its {method} weights are de-quantised to {str(self.dtype).removeprefix('torch.')}.")
        return weights

    def _note_on_config(self, tensors: dict[str, Tensor], notes: list[str]) -> None:
        """What in `config.json` does not count, and an entry that the weights show to be wrong."""
        alias, ignored = self._alias(), [f"'{name}'" for name in ignored_entries(self.config_json)]
        if alias:
            notes.append(f"{alias}.")
        if ignored:
            few = len(ignored) == 1
            notes.append(f"Rope parameter{'' if few else 's'} {', '.join(ignored)} {'is' if few else 'are'} ignored.")
        if is_stale(self.config_json, tensors):
            method = self.config_json["quantization_config"].get("quant_method")
            self.config_json = {k: v for k, v in self.config_json.items() if k != "quantization_config"}
            dtype = str(first_dtype(tensors)).removeprefix("torch.")
            notes.append(
                f"The quantization_config in config.json (quant_method: {method}) is ignored: the weights are plain "
                f"{dtype}."
            )

    def _alias(self) -> str | None:
        alias, model_type = alias_in(self.config_json), self.config_json.get("model_type")
        return alias and f"{alias} is read as {self.architecture.name} (model_type '{model_type}')"

    def _their_name(self, name: str) -> str:
        """Of a tensor that is one in both formats."""
        family = self.architecture.weights.family(name, self.config, ours=True)
        assert family is not None, f"{self.architecture.name} has no rule for {name}"
        return family.theirs[0]

    def _belongs(self, name: str) -> bool:
        """Whether a surplus tensor is no stranger to the model: left out, it would be missed."""
        family = self.architecture.weights.family(name, self.config, ours=False)
        layers = [int(match[1]) for match in map(BLOCK.match, family.ours) if match] if family else []
        return bool(LEARNED.search(name)) or (family is not None and max(layers, default=0) < self.config.n_layer)

    def _check(self, problems: list[str]) -> None:
        if problems:
            raise self._misfit(problems)

    def _misfit(self, problems: list[str]) -> ValueError:
        alias = self._alias()
        told = f"'{self.files}/config.json'" + (f" ({alias})" if alias else "")
        return ValueError(misfit(self.files, told, problems))

    def _untie_if_different(self) -> None:
        """Files may hold a head that the config ties: a copy is dropped; other values mean that it is not tied."""
        if not self.config.tie_embeddings:
            return
        embedding, head = self._their_name(EMBEDDING), self._their_name(HEAD)
        if head not in self.found:
            return
        if embedding not in self.found or same_values(self._value(head), self._value(embedding), self.release):
            del self.found[head]
        else:
            self.config.tie_embeddings = False


def _renamed(tensors: dict[str, Tensor], known: str | None = None) -> dict[str, Tensor]:
    """Tensors under their plain names; see `plain_names`."""
    return {name: tensors[key] for key, name in plain_names(tensors, known).items()}


def _read_shard(file: Path) -> MappedTensors:
    return read_safetensors(file, check=False) if file.suffix == ".safetensors" else read_state_dict(file, check=False)


def _usual_json(name: str | None) -> dict[str, Any]:
    """The `config.json` of a known model; with a tied head, unless the files turn out to hold one."""
    config = Config.from_name(name or "")
    known = find_known(config.name)
    assert known is not None, config.name
    return config_to_hf(config, known.architecture) | {"tie_word_embeddings": True}


def _label(path: Path) -> str:
    """`org/name` from the end of a path; what else stands before is the user's own ordering."""
    path = path.resolve()
    if path.parent.name == "snapshots":  # the Hub's cache: models--org--name/snapshots/<commit>
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return f"{path.parent.name}/{path.name}"
