"""How architectures look in GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), in both directions.

A GGUF file's metadata and a Hugging Face `config.json` say the same under other names; a `GGUFArchitecture` ties them
to each other, entry by entry, as the rule tables tie weights. The names of the tensors are in the `gguf` package; what
llama.cpp does to their values is a `Change`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import gguf
import numpy as np
from torch import Tensor

from litgpt.cli.untrusted import shown
from litgpt.formats.fields import HFConfig

ABSENT = object()


class Metadata:
    """The key-value pairs of a GGUF file. Keys of its own architecture go without their prefix.

    Args:
        values: The pairs, as the file has them.
        tensors: The names of its tensors, which say what the pairs do not.

    Raises:
        ValueError: A value is of another kind than its key has; names it.
    """

    def __init__(self, values: dict[str, Any], tensors: Iterable[str] = ()) -> None:
        _check_kinds(values)
        self.values = values
        self.tensors = frozenset(tensors)
        self.architecture: str = self.get("general.architecture", "")

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def own(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`; 32-bit fractions become the shortest decimal number that they are."""
        value = self.get(f"{self.architecture}.{key}", default)
        with np.errstate(over="ignore"):
            return float(str(np.float32(value))) if isinstance(value, float) else value

    def need(self, key: str) -> Any:
        """As `own`. Raises `ValueError` where there is no such key."""
        value = self.own(key)
        if value is None:
            raise ValueError(f"its metadata lack '{self.architecture}.{key}'")
        return value


# What is read elsewhere than in the entries below, which `GGUFArchitecture.read` answers for.
_KINDS: dict[str, type] = {
    "general.architecture": str,
    "split.count": int,
    "tokenizer.ggml.model": str,
    "tokenizer.ggml.pre": str,
    "tokenizer.chat_template": str,
    "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool,
    "tokenizer.ggml.add_space_prefix": bool,
}
_LISTS: dict[str, type] = {
    "tokenizer.ggml.tokens": str,
    "tokenizer.ggml.merges": str,
    "tokenizer.ggml.scores": float,
    "tokenizer.ggml.token_type": int,
    "tokenizer.chat_templates": str,
}


def _check_kinds(values: dict[str, Any]) -> None:
    for key, value in values.items():
        kind = _KINDS.get(key)
        if key.startswith("tokenizer.chat_template."):
            kind = str
        elif key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            kind = int
        item = _LISTS.get(key)
        is_list = isinstance(value, list) and (not value or isinstance(value[0], item or object))
        fits = is_list if item else kind is None or type(value) in ((bool, int) if kind is bool else (kind,))
        if not fits:
            raise ValueError(f"in its metadata, {key} is {shown(value)}, which is of the wrong kind")


class Entry(Protocol):
    """One part of what metadata and `config.json` both say."""

    def read(self, metadata: Metadata) -> HFConfig:
        """Entries of `config.json`. Raises `ValueError` naming what is missing or not supported."""

    def write(self, config_json: HFConfig) -> dict[str, Any]:
        """Metadata, without the architecture's prefix. Raises `ValueError` naming what cannot be said there."""


@dataclass(frozen=True)
class Value:
    """One value under two names. Where a file may be without it, `default` is what that means."""

    gguf: str
    hf: str
    default: Any = ABSENT

    def read(self, metadata: Metadata) -> HFConfig:
        return {self.hf: metadata.need(self.gguf) if self.default is ABSENT else metadata.own(self.gguf, self.default)}

    def write(self, config_json: HFConfig) -> dict[str, Any]:
        value = config_json[self.hf]
        return {} if value is None else {self.gguf: value}


@dataclass(frozen=True)
class Fixed:
    """What llama.cpp takes for granted, as `config.json` says it."""

    hf: HFConfig

    def read(self, metadata: Metadata) -> HFConfig:
        return dict(self.hf)

    def write(self, config_json: HFConfig) -> dict[str, Any]:
        wrong = [f"{key}={config_json[key]!r}" for key in self.hf if config_json.get(key, self.hf[key]) != self.hf[key]]
        if wrong:
            raise ValueError(f"it has no {', '.join(wrong)}")
        return {}


@dataclass(frozen=True)
class Refused:
    """Metadata that ask for something that nothing here computes."""

    keys: dict[str, str]

    def read(self, metadata: Metadata) -> HFConfig:
        for key, what in self.keys.items():
            if metadata.own(key):
                raise ValueError(f"{what} is not supported in this form")
        return {}

    def write(self, config_json: HFConfig) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Bias:
    """Biases, which a file's tensors alone tell of."""

    hf: str
    tensor: str

    def read(self, metadata: Metadata) -> HFConfig:
        return {self.hf: self.tensor in metadata.tensors}

    def write(self, config_json: HFConfig) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Heads:
    """How many heads there are; where `config.json` says it (`of_keys`), also how many of keys, and their size."""

    of_keys: bool = True

    def read(self, metadata: Metadata) -> HFConfig:
        heads = metadata.need("attention.head_count")
        keys = metadata.own("attention.head_count_kv") or heads
        if isinstance(heads, list) or isinstance(keys, list):
            raise ValueError("another number of heads in every layer is not supported")
        if not self.of_keys:
            return {"num_attention_heads": heads}
        return {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": gguf_head_size(metadata)}

    def write(self, config_json: HFConfig) -> dict[str, Any]:
        heads = config_json["num_attention_heads"]
        keys = config_json.get("num_key_value_heads", heads)
        written = {"attention.head_count": heads, "attention.head_count_kv": keys}
        size = size_in(config_json)
        if size != config_json["hidden_size"] // heads:
            written |= {"attention.key_length": size, "attention.value_length": size}
        return written


def gguf_head_size(metadata: Metadata) -> int:
    """The size of a head that metadata mean."""
    given = metadata.own("attention.key_length")
    return given or metadata.need("embedding_length") // metadata.need("attention.head_count")


def size_in(config_json: HFConfig) -> int:
    """The size of a head that a `config.json` means."""
    return config_json.get("head_dim") or config_json["hidden_size"] // config_json["num_attention_heads"]


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding.

    Attributes:
        theta: The name of its base in `config.json`.
        share: The name of the share of a head that is rotated; None where all of it is.
    """

    theta: str = "rope_theta"
    share: str | None = None

    def read(self, metadata: Metadata) -> HFConfig:
        size = gguf_head_size(metadata)
        rotated = metadata.own("rope.dimension_count", size)
        if self.share is None and rotated != size:
            raise ValueError(f"rotating only {rotated} of {size} values is not supported")
        share = {} if self.share is None else {self.share: rotated / size}
        theta = metadata.own("rope.freq_base") or 10000.0
        return {self.theta: theta, **share, "rope_scaling": self._read_scaling(metadata)}

    def _read_scaling(self, metadata: Metadata) -> HFConfig | None:
        kind = metadata.own("rope.scaling.type") or "none"
        factor = metadata.own("rope.scaling.factor") or metadata.own("rope.scale_linear")
        if kind == "none" and (not factor or factor == 1):
            return None
        given = {"rope_type": "linear" if kind == "none" else kind, "factor": factor}
        if kind == "yarn":
            given |= {hf: metadata.own(f"rope.scaling.{key}") for key, hf in _YARN.items()}
        return {key: value for key, value in given.items() if value is not None}

    def write(self, config_json: HFConfig) -> dict[str, Any]:
        size, share = size_in(config_json), 1.0 if self.share is None else config_json[self.share]
        written = {"rope.freq_base": float(config_json[self.theta]), "rope.dimension_count": int(size * share)}
        scaling = config_json.get("rope_scaling") or {}
        kind = scaling.get("rope_type", "default")
        if kind in ("default", "llama3"):  # the latter as factors, in a tensor
            return written
        if kind not in ("linear", "yarn"):
            raise ValueError(f"it has no rope type '{kind}'")
        written |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
        if kind == "yarn":
            unknown = sorted(set(scaling) - {"rope_type", "type", "factor", *_YARN.values()})
            if unknown:
                raise ValueError(f"it has no {', '.join(unknown)} of rope type 'yarn'")
            written |= {f"rope.scaling.{key}": scaling[hf] for key, hf in _YARN.items() if hf in scaling}
        return written


_YARN = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


@dataclass(frozen=True)
class QueryScale:
    """By what queries are divided in Gemma 2 and 3: llama.cpp knows it from the number of layers.

    Attributes:
        large: The number of layers of the one model in which it is not the root of the head's size.
    """

    large: int

    def read(self, metadata: Metadata) -> HFConfig:
        if metadata.need("block_count") == self.large:
            scale = metadata.need("embedding_length") // metadata.need("attention.head_count")
        else:
            scale = gguf_head_size(metadata)
        return {"query_pre_attn_scalar": scale}

    def write(self, config_json: HFConfig) -> dict[str, Any]:
        size, given = size_in(config_json), config_json["query_pre_attn_scalar"]
        if config_json["num_hidden_layers"] == self.large:
            size = config_json["hidden_size"] // config_json["num_attention_heads"]
        if given != size:
            raise ValueError(f"it has no query_pre_attn_scalar={given} (only {size})")
        return {}


# --- what is done to tensors


@dataclass(frozen=True)
class Change:
    """What llama.cpp does to a tensor, and what undoes it: functions of the tensor and of `config.json`."""

    to_gguf: Callable[[Tensor, HFConfig], Tensor]
    to_hf: Callable[[Tensor, HFConfig], Tensor]


def _neighbours(heads_key: str) -> Change:
    """The row order that llama.cpp's rotary embedding wants: the halves of a head become neighbours."""

    def to_gguf(tensor: Tensor, config_json: HFConfig) -> Tensor:
        rows = tensor.unflatten(0, (config_json[heads_key], 2, -1))  # (heads, 2, D / 2, ...)
        return rows.transpose(1, 2).flatten(0, 2)

    def to_hf(tensor: Tensor, config_json: HFConfig) -> Tensor:
        rows = tensor.unflatten(0, (config_json[heads_key], -1, 2))  # (heads, D / 2, 2, ...)
        return rows.transpose(1, 2).flatten(0, 2)

    return Change(to_gguf, to_hf)


def _by_kind(tensor: Tensor, config_json: HFConfig) -> Tensor:
    """(heads of query, key and value) -> (all queries, all keys, all values)."""
    return tensor.unflatten(0, (config_json["num_attention_heads"], 3, -1)).transpose(0, 1).flatten(0, 2)


def _by_head(tensor: Tensor, config_json: HFConfig) -> Tensor:
    return tensor.unflatten(0, (3, config_json["num_attention_heads"], -1)).transpose(0, 1).flatten(0, 2)


# In float32, where one and 2^-24 are two numbers; types that cannot hold the sum are made that, too.
_PLUS_ONE = Change(
    lambda tensor, config_json: tensor.float() + 1,
    lambda tensor, config_json: tensor.float() - 1,
)


# --- the architectures


@dataclass(frozen=True)
class GGUFArchitecture:
    """How an architecture looks in a GGUF file.

    Attributes:
        architecture: Its Hugging Face name.
        tensors: Its name table in the `gguf` package.
        entries: What its metadata say.
        changes: By the end of a Hugging Face name, what llama.cpp does to such a tensor.
    """

    architecture: str
    tensors: gguf.MODEL_ARCH
    entries: tuple[Entry, ...]
    changes: dict[str, Change] = field(default_factory=dict)

    def read(self, metadata: Metadata) -> HFConfig:
        """The entries of `config.json` that have to do with the architecture. Raises `ValueError`."""
        found: HFConfig = {}
        for entry in self.entries:
            try:
                found |= entry.read(metadata)
            except (TypeError, AttributeError, ArithmeticError) as error:  # a value may be anything: a text, zero
                raise ValueError(f"a value in its metadata is of the wrong kind ({error})") from None
        return found

    def write(self, config_json: HFConfig) -> dict[str, Any]:
        """The metadata with their full names. Raises `ValueError` naming what cannot be said."""
        prefix = gguf.MODEL_ARCH_NAMES[self.tensors]
        return {f"{prefix}.{key}": value for entry in self.entries for key, value in entry.write(config_json).items()}

    def names(self, names: Iterable[str], layers: int) -> dict[str, str]:
        """Hugging Face names -> GGUF names; one that GGUF does not know stays as it is."""
        table = gguf.get_tensor_name_map(self.tensors, layers)
        return {name: table.get_name(name, try_suffixes=(".weight", ".bias")) or name for name in names}

    def change(self, name: str) -> Change | None:
        """What is done to a tensor of this Hugging Face name."""
        return next((change for end, change in self.changes.items() if name.endswith(end)), None)


_SIZES = (
    Value("context_length", "max_position_embeddings"),
    Value("embedding_length", "hidden_size"),
    Value("feed_forward_length", "intermediate_size"),
    Value("block_count", "num_hidden_layers"),
)
_RMS = Value("attention.layer_norm_rms_epsilon", "rms_norm_eps")
_LAYER_NORM = Value("attention.layer_norm_epsilon", "layer_norm_eps")
_SILU = Fixed({"hidden_act": "silu"})
_DENSE = Refused({"expert_count": "a mixture of experts"})
_GEMMA = {"norm.weight": _PLUS_ONE}

GGUF_ARCHITECTURES = {
    "llama": GGUFArchitecture(
        "LlamaForCausalLM",
        gguf.MODEL_ARCH.LLAMA,
        (
            _DENSE,
            *_SIZES,
            Heads(),
            _RMS,
            Rotary(),
            _SILU,
            Bias("attention_bias", "blk.0.attn_output.bias"),
            Bias("mlp_bias", "blk.0.ffn_down.bias"),
        ),
        {
            f"self_attn.{name}.{kind}": _neighbours(heads)
            for name, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads"))
            for kind in ("weight", "bias")
        },
    ),
    "qwen2": GGUFArchitecture(
        "Qwen2ForCausalLM",
        gguf.MODEL_ARCH.QWEN2,
        (*_SIZES, Heads(), _RMS, Rotary(), _SILU, Fixed({"use_sliding_window": False})),
    ),
    "qwen3": GGUFArchitecture(
        "Qwen3ForCausalLM",
        gguf.MODEL_ARCH.QWEN3,
        (*_SIZES, Heads(), _RMS, Rotary(), _SILU, Fixed({"use_sliding_window": False, "attention_bias": False})),
    ),
    "phi2": GGUFArchitecture(
        "PhiForCausalLM",
        gguf.MODEL_ARCH.PHI2,
        (*_SIZES, Heads(), _LAYER_NORM, Rotary(share="partial_rotary_factor"), Fixed({"hidden_act": "gelu_new"})),
    ),
    "phi3": GGUFArchitecture(
        "Phi3ForCausalLM",
        gguf.MODEL_ARCH.PHI3,
        (
            _DENSE,
            *_SIZES,
            Heads(),
            _RMS,
            Rotary(share="partial_rotary_factor"),
            _SILU,
            Value("attention.sliding_window", "sliding_window", None),
        ),
    ),
    "gemma": GGUFArchitecture(
        "GemmaForCausalLM",
        gguf.MODEL_ARCH.GEMMA,
        (*_SIZES, Heads(), _RMS, Rotary(), Fixed({"hidden_act": "gelu_pytorch_tanh", "attention_bias": False})),
        _GEMMA,
    ),
    "gemma2": GGUFArchitecture(
        "Gemma2ForCausalLM",
        gguf.MODEL_ARCH.GEMMA2,
        (
            *_SIZES,
            Heads(),
            _RMS,
            Rotary(),
            Fixed({"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}),
            Value("attention.sliding_window", "sliding_window"),
            Value("attn_logit_softcapping", "attn_logit_softcapping"),
            Value("final_logit_softcapping", "final_logit_softcapping"),
            QueryScale(large=46),
        ),
        _GEMMA,
    ),
    "gemma3": GGUFArchitecture(
        "Gemma3ForCausalLM",
        gguf.MODEL_ARCH.GEMMA3,
        (
            *_SIZES,
            Heads(),
            _RMS,
            Rotary(),
            Fixed({"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "rope_local_base_freq": 10000.0}),
            Value("attention.sliding_window", "sliding_window"),
            QueryScale(large=62),
        ),
        _GEMMA,
    ),
    "gptneox": GGUFArchitecture(
        "GPTNeoXForCausalLM",
        gguf.MODEL_ARCH.GPTNEOX,
        (
            *_SIZES,
            Heads(of_keys=False),
            _LAYER_NORM,
            Rotary("rotary_emb_base", "rotary_pct"),
            Value("use_parallel_residual", "use_parallel_residual", True),
            Fixed({"hidden_act": "gelu", "attention_bias": True}),
        ),
        {f"query_key_value.{kind}": Change(_by_kind, _by_head) for kind in ("weight", "bias")},
    ),
    "olmo2": GGUFArchitecture(
        "Olmo2ForCausalLM",
        gguf.MODEL_ARCH.OLMO2,
        (*_SIZES, Heads(), _RMS, Rotary(), _SILU, Fixed({"attention_bias": False})),
    ),
}
