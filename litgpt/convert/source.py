"""An opened checkpoint of any kind, and a model from it."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from litgpt.checkpoint import (
    CONFIG,
    WEIGHTS,
    MappedTensors,
    Release,
    hf_weight_files,
    missing_files,
    plain_names,
    read_state_dict,
)
from litgpt.config import Config
from litgpt.convert.architecture import Architecture
from litgpt.convert.config_json import read_config_json
from litgpt.convert.hf_config import config_from_hf, config_to_hf, ignored_entries
from litgpt.convert.quantised_parts import (
    Parts,
    compare_types,
    dequantised,
    fill,
    parts_in,
    saved_shapes,
    take_kind,
    weight_name,
)
from litgpt.convert.quantised_weights import Quantised, Weights, dequantised_type, is_stale, read_quantised, unscaled
from litgpt.convert.recognition import alias_in, architecture_of, class_names, text_model, text_name
from litgpt.convert.safetensors_file import read_safetensors
from litgpt.huge_pages import Pages
from litgpt.model import GPT, RotaryEmbedding
from litgpt.models import find_known
from litgpt.plural import counted
from litgpt.quantize import QuantizedLinear, is_quantized, kind_of, quantized_layers, replace_linears, same_form

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
_LEAST_TENSORS = 4  # of a layer, in any format: the weights of attention and MLP, going in and out
_FEW_MODULES = 500  # layers and experts, which take half a second
BLOCK = re.compile(r"transformer\.h\.(\d+)\.")
_LEARNED = re.compile(r"\.lora_|\.adapter_|\.gating_factor")  # what finetuning has put beside a model's own weights
Named = tuple[str, Tensor]
Place = torch.device | str | Callable[[str], torch.device]
Watch = Callable[[Iterator[tuple[str, Any]]], Iterator[tuple[str, Any]]]


class Source(ABC):
    """An opened checkpoint: a directory of ours, one of Hugging Face, or a GGUF file. See `open_checkpoint`.

    Attributes:
        config: The shape of the model, with `tie_embeddings` as the weights have it.
        files: A directory with the tokenizer's and the JSON files.
        dtype: The type of the weights (of the first one).
        note: What of the checkpoint is left out or changed by loading it, for the user to know; None if nothing.
        quantized: How its weights are quantised, if a model can have them so, such as bnb.nf4; None if it cannot.
    """

    config: Config
    files: Path
    dtype: torch.dtype
    note: str | None = None
    quantized: str | None = None

    @property
    def note_on_plain(self) -> str | None:
        """The note where plain weights are taken, though the checkpoint has them quantised."""
        if self.quantized is None:
            return self.note
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join(filter(None, (self.note, f"Its {self.quantized} weights are de-quantised to {dtype}.")))

    @abstractmethod
    def layout(self) -> dict[str, Tensor]:
        """Our names, in the order of `weights`, each with a tensor of that shape and type on the meta device."""

    @abstractmethod
    def weights(self) -> Iterator[Named]:
        """The weights under our names, one at a time.

        A tensor is a read-only view of the file where possible, and its memory is given back when the next one is
        asked for. Tied embeddings come right after one another, as one tensor under both names.
        """

    def forms(self, kind: str | None) -> Iterator[tuple[str, Tensor | Parts]]:
        """As `weights`, for a model quantised as `kind`: a weight that is here in that form comes as its parts."""
        return self.weights()

    def release(self, tensor: Tensor) -> None:  # noqa: B027 - not every source has mapped files
        """Gives back the memory of a tensor, or of a part of one, if it is a view of this checkpoint's files."""

    def load_into(self, model: GPT, watch: Watch = iter) -> None:
        """Copies the weights into a model, converting their type and moving them to its device.

        Quantised layers quantise theirs, in the type that the checkpoint has, or take them as they are quantised there.

        Args:
            model: The model.
            watch: Wraps the stream of weights, to show progress.

        Raises:
            ValueError: The model has other weights than this checkpoint; lists every missing and unexpected name and
                every wrong shape, and has changed nothing.
        """
        quantized = {f"{name}.weight": layer for name, layer in quantized_layers(model)}
        targets = {name: tensor for name, tensor in model.state_dict().items() if not is_quantized(name)}
        wanted = targets | {name: layer.weight_shape() for name, layer in quantized.items()}
        problems = compare_shapes(wanted, self.layout(), "this model", "the checkpoint")
        if model.config.tie_embeddings and not self.config.tie_embeddings:
            problems.append(f"  {HEAD} and {EMBEDDING} differ in the checkpoint; this model ties them (tie_embeddings)")
        if problems:
            raise ValueError(
                f"The checkpoint does not fit the model ({counted(len(problems), 'problem')}):\n"
                + "\n".join(problems)
                + "\nUse the configuration of the checkpoint, or another checkpoint."
            )
        filled: set[int] = set()
        with torch.no_grad():
            for name, tensor in watch(self.forms(kind_of(model))):
                if not isinstance(tensor, Tensor):
                    fill(quantized[name], tensor, self.release)
                elif name in quantized:
                    quantized[name].load_weight(tensor, self.release)
                # A tied weight of the model is one tensor under two names: fill it once.
                elif targets[name].data_ptr() not in filled:
                    self._copy(tensor, targets[name])
                    filled.add(targets[name].data_ptr())

    def _copy(self, tensor: Tensor, target: Tensor) -> None:
        rows = rows_at_once(tensor)
        for part, place in (
            zip(tensor.split(rows), target.split(rows), strict=True) if tensor.dim() else [(tensor, target)]
        ):
            place.copy_(part)
            self.release(part)


def rows_at_once(tensor: Tensor) -> int:
    """How many rows of a large tensor to have in memory at a time: a few megabytes."""
    return max(1, 2**20 // max(1, tensor[:1].numel())) if tensor.dim() else 1


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type, without memory."""
    return torch.empty_like(tensor, device="meta")


def shapes_of(config: Config, quantize: str | None = None) -> dict[str, Tensor]:
    """Our names of all weights of such a model, with tensors on the meta device."""
    return meta_model(config, quantize).state_dict()


def meta_model(config: Config, quantize: str | None = None, dtype: torch.dtype = torch.float32) -> GPT:
    """A model with shapes and no memory; where it is quantised, in a type."""
    with torch.device("meta"), _NoInitialisation():
        model = GPT(config)
    if quantize is not None:
        replace_linears(model, quantize, dtype)
        model.to(dtype)
    return model


def give_memory(model: GPT, dtype: torch.dtype, device: Place) -> None:
    """Uninitialised weights for a model that was built on the meta device, on one device or each on its own.

    (`Module.to_empty` would do, but asks the meta device for it, which imports sympy: a second and 32 MB.)
    """
    model.to(dtype)  # what keeps its own type, whatever that of the model is, knows it
    shapes = model.state_dict().items()
    place = device if callable(device) else lambda name: device
    pages = Pages(like.nbytes for name, like in shapes if torch.device(place(name)).type == "cpu")
    empty = {name: pages.empty(like.shape, like.dtype, place(name)) for name, like in shapes}
    model.load_state_dict(empty, assign=True)
    model.rope = RotaryEmbedding(model.config).to(place(EMBEDDING))  # its tables are no weights
    model.tie_weights()


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
        sparse = 3 * config.n_expert * (config.moe_intermediate_size or config.intermediate_size) * width
        layers = max(0, config.n_layer - (config.first_k_dense_replace or 0))
    mlps = layers * sparse + (config.n_layer - layers) * dense
    return config.padded_vocab_size * width + config.n_layer * attention + mlps


class _NoInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init`: on the meta device there is nothing to fill, and trying imports torch's compiler (3 s)."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


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


class LitSource(Source):
    """A directory with `lit_model.pth`, ours or LitGPT's.

    Args:
        path: The directory.
        base: The checkpoint that such weights were finetuned from: its configuration and files are taken.
        weights: The file of the weights, where it is another.
    """

    def __init__(self, path: Path, base: Source | None = None, weights: Path | None = None) -> None:
        weights = weights or path / WEIGHTS
        self.files = path if base is None else base.files
        stored = read_state_dict(weights, check=False)
        self.tensors = stored.renamed(plain_names(stored, EMBEDDING))
        self.quantized = take_kind(self.tensors, weights)
        self.config = Config.from_checkpoint(path) if base is None else copy(base.config)
        self.config.tie_embeddings = self._is_tied()
        self.dtype = _first_dtype(self.tensors)
        self.layers: dict[str, QuantizedLinear] = {}
        problems = excess(self.config, self.tensors.values())
        if problems:
            raise ValueError(misfit(weights, f"'{self.files if base else path / CONFIG}'", problems))
        model = meta_model(self.config, self.quantized, self.dtype)
        wanted = saved_shapes(model) if self.quantized else model.state_dict()
        problems = compare_shapes(wanted, self.tensors, CONFIG, weights.name)
        surplus = [name for name in self.tensors if name not in wanted]
        if len(problems) == len(surplus) and not any(map(_of_a_model_of_ours, surplus)):
            self.note, problems = left_out(surplus, "the model"), []
            for name in surplus:
                del self.tensors[name]
        if self.quantized is not None:
            problems += compare_types(wanted, self.tensors, weights.name)
            self.layers = {f"{name}.weight": layer for name, layer in quantized_layers(model)}
        if problems:
            raise ValueError(misfit(weights, f"'{self.files if base else path / CONFIG}'", problems))

    def layout(self) -> dict[str, Tensor]:
        layers = self.layers
        return {n: layers[n].weight_shape() if n in layers else on_meta(self.tensors[n]) for n in self._order()}

    def weights(self) -> Iterator[Named]:
        for name, weight in self.forms(self.quantized):
            whole = isinstance(weight, Tensor)
            yield name, weight if whole else dequantised(self.layers[name], weight, self.release)

    def forms(self, kind: str | None) -> Iterator[tuple[str, Tensor | Parts]]:
        if self.quantized is not None and not (kind and same_form(kind, self.quantized)):
            yield from self.weights()
            return
        self.tensors.check()
        for name in self._order():
            if name in self.layers:
                yield name, parts_in(self.tensors, self.layers[name], name)
                continue
            tensor = self.tensors[EMBEDDING if name == HEAD and self.config.tie_embeddings else name]
            yield name, tensor
            self.release(tensor)

    def release(self, tensor: Tensor) -> None:
        self.tensors.release(tensor)

    def _order(self) -> list[str]:
        """Embedding and head first, one after the other, as they may be one."""
        return list(dict.fromkeys((EMBEDDING, HEAD, *map(weight_name, self.tensors))))

    def _is_tied(self) -> bool:
        head, embedding = self.tensors.get(HEAD), self.tensors.get(EMBEDDING)
        if head is None or embedding is None:
            return False
        if head.data_ptr() == embedding.data_ptr():
            return True
        # Other programs may have stored both; then they are tied if they were meant to be and still are the same.
        return _says_tied(self.files) and same_values(head, embedding, self.release)


def _of_a_model_of_ours(name: str) -> bool:
    """Whether some model of ours computes with a tensor of this name, or something was learned in it beside a model."""
    return name.startswith(("transformer.", "lm_head.")) or _LEARNED.search(name) is not None


def left_out(names: Sequence[str], model: str) -> str | None:
    """The note about tensors that a model has no place for, by kind, as one of each layer is there."""
    if not names:
        return None
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    shown = ", ".join(kinds[:4]) + (f" and {len(kinds) - 4} other kinds" if len(kinds) > 4 else "")
    one = len(names) == 1
    what = f"{len(names)} tensor{'' if one else 's'} that {model} does not have {'is' if one else 'are'} left out"
    return f"{what} ({shown})."


def _says_tied(path: Path) -> bool:
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


class PartSource(Source):
    """A part of each weight of another checkpoint.

    Args:
        whole: That checkpoint.
        take: Takes the part of a weight, by its name.
    """

    def __init__(self, whole: Source, take: Callable[[str, Tensor], Tensor]) -> None:
        self.whole, self.take = whole, take
        self.config, self.files, self.dtype, self.note = whole.config, whole.files, whole.dtype, whole.note

    def layout(self) -> dict[str, Tensor]:
        return {name: self.take(name, tensor) for name, tensor in self.whole.layout().items()}

    def weights(self) -> Iterator[Named]:
        return ((name, self.take(name, tensor)) for name, tensor in self.whole.weights())

    def release(self, tensor: Tensor) -> None:
        self.whole.release(tensor)


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
            self._check(str(error).splitlines())
        self.dtype = _first_dtype(tensors)
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
            dtype = str(_first_dtype(tensors)).removeprefix("torch.")
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
        return bool(_LEARNED.search(name)) or (family is not None and max(layers, default=0) < self.config.n_layer)

    def _check(self, problems: list[str]) -> None:
        if problems:
            alias = self._alias()
            told = f"'{self.files}/config.json'" + (f" ({alias})" if alias else "")
            raise ValueError(misfit(self.files, told, problems))

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
    return config_to_hf(config, find_known(config.name).architecture) | {"tie_word_embeddings": True}


def _label(path: Path) -> str:
    """`org/name` from the end of a path; what else stands before is the user's own ordering."""
    path = path.resolve()
    if path.parent.name == "snapshots":  # the Hub's cache: models--org--name/snapshots/<commit>
        return path.parent.parent.name.removeprefix("models--").replace("--", "/")
    return f"{path.parent.name}/{path.name}"


def _first_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    return next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)


def misfit(weights: Path, description: str, problems: list[str]) -> str:
    """The message about weights that are not those of the model that a configuration describes."""
    count = counted(len(problems), "problem")
    return (
        f"The weights in '{weights}' are not those of the model in {description} ({count}):\n"
        + "\n".join(problems)
        + "\nDownload or convert the checkpoint again, or correct the configuration."
    )


def open_checkpoint(path: str | Path, model_name: str | None = None, *, converted: bool = True) -> Source:
    """Opens a checkpoint directory of ours, a Hugging Face directory, or a `.gguf` file, without reading the weights.

    `lit_model.pth` wins over other weights beside it.

    Args:
        path: The directory or file; `checkpoint.resolve_checkpoint_dir` finds it from a name.
        model_name: What the model is called, where the path does not say it. Where a Hugging Face directory has no
            `config.json`, the figures are those of the known model of this name.
        converted: False looks past `lit_model.pth` for the weights it was made from.

    Raises:
        FileNotFoundError: It does not exist, or something in it is missing; says what.
        ValueError: A file is damaged, or architecture or weights are not supported or do not fit one another.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".gguf":
        from litgpt.convert.gguf_source import GGUFSource

        return GGUFSource(path, model_name)
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise FileNotFoundError(f"There is no checkpoint '{path}'. Give a checkpoint directory or a .gguf file.")
    if not converted and (path / WEIGHTS).is_file() and not hf_weight_files(path):
        raise FileNotFoundError(f"'{path}' holds nothing to convert: its {WEIGHTS} is in the right format already.")
    missing = missing_files(path, weights=True)
    if missing and not (model_name and hf_weight_files(path) and "config.json" in missing[0]):
        raise FileNotFoundError(
            f"The checkpoint directory '{path}' lacks {' and '.join(missing)}. "
            "Download or convert the checkpoint again, or give another directory."
        )
    return LitSource(path) if converted and (path / WEIGHTS).is_file() else HFSource(path, model_name)


def load_model(
    source: Source | str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: Place = "cpu",
    quantize: str | None = None,
    split: Callable[[GPT], Callable[[str, Tensor], Tensor]] | None = None,
    plain: bool = False,
    watch: Watch = iter,
) -> GPT:
    """A model with a checkpoint's weights, in evaluation mode.

    Memory stays at the size of the model, quantised if it is, plus the checkpoint's largest tensor.

    Args:
        source: An opened checkpoint or its path.
        dtype: The type of the weights; None keeps that of the checkpoint.
        device: Where the model goes, or where each weight does, by its name.
        quantize: How to quantise the linear layers of the blocks, such as bnb.nf4; see `litgpt.quantize`. None keeps
            them as the checkpoint has them.
        split: Leaves a model without memory a part of its weights, and returns what takes that part of a whole weight,
            by its name.
        plain: De-quantise weights that the checkpoint has quantised.
        watch: Wraps the stream of weights, to show progress.

    Raises:
        ValueError: The checkpoint is quantised in another way.
    """
    source = source if isinstance(source, Source) else open_checkpoint(source)
    dtype = dtype or source.dtype
    quantize = None if plain else kind_for(source, quantize)
    model = meta_model(source.config)
    if split is not None:
        check_whole(source)
        source = PartSource(source, split(model))
    if quantize is not None:
        replace_linears(model, quantize, dtype)
    give_memory(model, dtype, device)
    source.load_into(model, watch)
    return model.eval()


def kind_for(source: Source, quantize: str | None) -> str | None:
    """How a model is quantised that gets a checkpoint's weights: as is asked for, or else as the checkpoint is.

    Raises:
        ValueError: The checkpoint is quantised in another way.
    """
    own = source.quantized
    if own is None or quantize is None:
        return quantize or own
    if not same_form(quantize, own):
        raise ValueError(
            f"--quantize {quantize} cannot act: the weights in '{source.files}' are {own} already. Leave it out, or "
            "give the checkpoint that they were made from."
        )
    return quantize


def check_whole(source: Source) -> None:
    """Refuses weights that are to be split over devices, but are quantised already.

    Raises:
        ValueError: They are.
    """
    if source.quantized is not None:
        raise ValueError(
            f"'{source.files}' holds {source.quantized} weights, which cannot be split over processes "
            "(tensor_parallel). Give the checkpoint that they were made from, with --quantize, or take sequential."
        )
