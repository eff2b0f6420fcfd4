"""What a model is: every figure and switch of the architecture.

Nothing here imports torch, so that settings can be checked before anything heavy is loaded.
"""

import copy
from collections.abc import Iterable
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml

from litgpt.catalog import find_known, unknown_name_message
from litgpt.cli.suggest import did_you_mean
from litgpt.cli.untrusted import is_finite, number_of, read_yaml_mapping, shown

MODEL_CONFIG_FILE = "model_config.yaml"

NORM_CLASSES = ("LayerNorm", "RMSNorm")
MLP_CLASSES = ("GptNeoxMLP", "LLaMAMLP", "GemmaMLP", "LLaMAMoE")
# More than any model has, and so little that modules can be made for each and no product of sizes overflows.
MAX_LAYERS = 10_000
MAX_SIZES = {"n_layer": MAX_LAYERS, "n_expert": 10_000, "n_shared_expert": 10_000, "n_embd": 2**22}
MAX_SIZES |= {"n_head": 2**16, "head_size": 2**16}
MAX_SIZE = 2**31
LATENT_ATTENTION_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
ROPE_ADJUSTMENTS = {
    # kind: (keys it must have, keys it may have)
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"}, set()),
    "yarn": (
        {"factor", "original_max_seq_len", "beta_fast", "beta_slow"},
        {"mscale", "mscale_all_dim", "attention_factor", "truncate", "llama_4_scaling_beta"},
    ),
    "longrope": ({"short_factor", "long_factor", "original_max_seq_len", "attention_factor"}, set()),
}
_MAY_BE_ZERO = ("mscale", "mscale_all_dim", "llama_4_scaling_beta", "truncate")

# The default of a field that Config computes where it is left at None: afterwards it holds what its type says.
DERIVED: Any = None
_NEWER = {"newer": True}


def _newer(default: Any) -> Any:
    return field(default=default, metadata=_NEWER)


@dataclass
class Config:
    """The architecture of a GPT. The fields, in this order, are what `model_config.yaml` holds.

    Values left at `None` are derived where a rule exists (see each field). A wrong value raises `ValueError` with the
    field, the value and the remedy.
    """

    name: str = ""
    """Short name of the model."""
    hf_config: dict = field(default_factory=dict)
    """Where the weights live on the Hugging Face Hub: `org` and `name`."""

    block_size: int = 4096
    """Longest sequence, in tokens."""
    n_layer: int = 16
    """Number of transformer blocks."""
    n_embd: int = 4096
    """Width of the residual stream (C)."""
    vocab_size: int = 50254
    """Number of tokens the tokenizer knows."""
    padding_multiple: int = 512
    """Without `padded_vocab_size`, the embedding has `vocab_size` rows, rounded up to a multiple of this."""
    padded_vocab_size: int = DERIVED
    """Rows of the embedding and of the language-model head (V)."""

    norm_class_name: str = "LayerNorm"
    """Normalisation: LayerNorm or RMSNorm."""
    norm_eps: float = 1e-5
    """Epsilon of every normalisation."""
    norm_qk: bool = False
    """Normalise queries and keys before the rotary embedding."""
    norm_qk_type: str = "default"
    """`default`: each head on its own, D values; `olmo2`: all heads together, before they are split."""
    post_attention_norm: bool = False
    """Normalise the output of the attention before it is added to the residual stream."""
    post_mlp_norm: bool = False
    """Normalise the output of the MLP before it is added to the residual stream."""
    parallel_residual: bool = True
    """Attention and MLP both read the block's input and are added together; otherwise one after the other."""
    shared_attention_norm: bool = False
    """With `parallel_residual`: the MLP reads the attention's normalised input instead of a norm of its own."""

    n_head: int = 32
    """Query heads (H)."""
    head_size: int = DERIVED
    """Width of one head (D). Default: n_embd / n_head."""
    n_query_groups: int = DERIVED
    """Key/value heads (G): 1 is multi-query, between that and n_head grouped-query attention. Default: n_head."""
    attn_bias: bool = False
    """Bias on the query, key and value projection even where `bias` is false."""
    attention_scores_scalar: int | float | None = None
    """Attention scores are divided by the square root of this. Default: head_size."""
    sliding_window_size: int | None = None
    """A token of a sliding-window layer attends to itself and the `sliding_window_size - 1` tokens before it."""
    sliding_window_indices: list[int] | None = None
    """One entry per layer, 1 = sliding window, 0 = all tokens; a shorter pattern repeats. Default: every layer."""
    attention_logit_softcapping: float | None = None
    """Attention scores s become cap * tanh(s / cap)."""

    rope_base: int | float = 10000
    """Base of the rotary embedding's frequencies."""
    rotary_percentage: float = 0.25
    """Share of each head that is rotated."""
    rope_condense_ratio: int | float = 1
    """Positions are divided by this (linear scaling)."""
    rope_adjustments: dict | None = None
    """Stretching of the context, by its keys: {factor} is linear, with low_freq_factor, high_freq_factor and
    original_max_seq_len Llama 3's by-parts rule, with beta_fast, beta_slow and original_max_seq_len YaRN (optional:
    mscale, mscale_all_dim, attention_factor, truncate; llama_4_scaling_beta also scales the queries by
    1 + beta * log(1 + floor(position / original_max_seq_len))), and with short_factor, long_factor (a divisor for each
    frequency, up to and beyond original_max_seq_len) and attention_factor LongRoPE."""
    rope_interleave: bool = False
    """Rotate neighbouring pairs (0, 1), (2, 3), ... instead of pairing the first half of a head with the second."""

    intermediate_size: int = DERIVED
    """Inner width of the MLP. Default for GptNeoxMLP: 4 * n_embd; the other MLPs need it."""
    moe_intermediate_size: int | None = None
    """Inner width of one expert. Default: intermediate_size."""
    bias: bool = True
    """Bias on the linear layers of attention and MLP."""
    mlp_class_name: str = "GptNeoxMLP"
    """GptNeoxMLP, LLaMAMLP, GemmaMLP or LLaMAMoE (a mixture of experts)."""
    gelu_approximate: str = "none"
    """GELU of GptNeoxMLP and GemmaMLP: none (exact) or tanh."""
    n_expert: int = 0
    """Number of routed experts (E)."""
    n_shared_expert: int | None = None
    """Experts that see every token, held as one MLP of n_shared_expert * moe_intermediate_size."""
    n_expert_groups: int | None = None
    """Number of expert groups; if set, each token chooses among the experts of its best groups only (DeepSeek)."""
    n_topk_groups: int | None = None
    """Groups of experts a token may choose from."""
    n_topk_scores_per_group: int | None = None
    """A group's score is the sum of this many of its best experts' scores."""
    n_expert_per_token: int = 0
    """Routed experts each token goes through."""
    first_k_dense_replace: int | None = None
    """The first k layers have a dense LLaMAMLP instead of experts."""
    routed_scaling_factor: float = 1.0
    """The routed experts' output is multiplied by this."""
    norm_topk_prob: bool = False
    """Sigmoid routing: divide the weights of a token's chosen experts by their sum. (softmax: softmax_after_topk.)"""

    scale_embeddings: bool = False
    """Multiply the token embeddings by sqrt(n_embd)."""
    lm_head_bias: bool = False
    """Bias on the language-model head."""
    final_logit_softcapping: float | None = None
    """Logits z become cap * tanh(z / cap)."""
    norm_1: bool = True
    """Normalise the input of the attention."""
    norm_2: bool = True
    """Normalise the input of the MLP."""
    latent_attention: dict | None = None
    """Multi-head latent attention (DeepSeek V2): q_lora_rank (may be null), kv_lora_rank, qk_rope_head_dim,
    qk_nope_head_dim, v_head_dim."""
    rope_local_base_freq: float | None = None
    """Rotary base of the layers marked 1 in `rope_indices`; the others have rope_base and rope_adjustments."""
    rope_indices: list[int] | None = None
    """One entry per layer, 1 = rope_local_base_freq, 0 = rope_base; a shorter pattern repeats. Default: all 1."""

    # Newer fields: in model_config.yaml only where they differ from what a reader that does not know them assumes.
    norm_unit_offset: bool = _newer(DERIVED)
    """RMSNorm multiplies by 1 + weight. Default: by the name, true for Gemma."""
    norm_affine: bool = _newer(DERIVED)
    """LayerNorm has a weight and a bias. Default: by the name, false for OLMo."""
    softmax_after_topk: bool = _newer(True)
    """Softmax routing: the weights of a token's chosen experts come from a softmax over these alone, so that they sum
    to 1; otherwise from a softmax over all experts."""
    attn_proj_bias: bool = _newer(DERIVED)
    """Bias on the attention's output projection. Default: as `bias`."""
    mlp_bias: bool = _newer(DERIVED)
    """Bias on the linear layers of the MLP. Default: as `bias`."""
    clip_qkv: float | None = _newer(None)
    """Queries, keys and values are clamped to this range around 0 before anything else is done with them."""
    attention_sinks: bool = _newer(False)
    """Each head has one learned score for a key without a value, to which attention may go (gpt-oss)."""
    nope_indices: list[int] | None = field(default=None, metadata=_NEWER)
    """One entry per layer, 1 = no rotary embedding; a shorter pattern repeats. Default: every layer has one."""
    swiglu_limit: float | None = _newer(None)
    """LLaMAMLP clamps its gate and its linear half to this, with a steeper sigmoid (gpt-oss)."""
    router_scores: str = _newer(DERIVED)
    """Scores of the experts: softmax or sigmoid. Default: sigmoid where n_expert_groups is set."""
    router_bias: bool = _newer(False)
    """Bias on the router."""
    embedding_multiplier: float = _newer(1.0)
    """Multiply the token embeddings by this."""
    residual_multiplier: float = _newer(1.0)
    """Multiply the outputs of attention and MLP by this before they are added to the residual stream."""
    logits_scaling: float = _newer(1.0)
    """Divide the logits by this."""

    # Never written: the weights file and config.json say it themselves.
    tie_embeddings: bool = False
    """The language-model head shares the storage of the token embedding."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            setattr(self, spec.name, _checked(spec, getattr(self, spec.name)))
        for name, implied in _implied(vars(self)).items():
            self._derive(name, implied)
        self._derive_vocabulary()
        self._derive_attention()
        self._derive_mlp()
        self._check_norms()

    @property
    def rope_n_elem(self) -> int:
        """Rotated values of each head."""
        if self.latent_attention is not None:
            return self.latent_attention["qk_rope_head_dim"]
        return int(self.rotary_percentage * self.head_size)

    @property
    def expert_size(self) -> int:
        """Inner width of one expert."""
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def rope_kind(self) -> str | None:
        """`linear`, `llama3`, `yarn`, `longrope`, or None where rope_adjustments is not set."""
        return _rope_kind(self.rope_adjustments) if self.rope_adjustments else None

    # --- reading and writing -------------------------------------------------------------------------------------

    @classmethod
    def from_name(cls, name: str, /, **overrides: Any) -> "Config":
        """The configuration of a known checkpoint, by `org/name` or short name, with some fields replaced.

        Raises:
            ValueError: nothing of that name is known, or an override is no field or has a wrong value.
        """
        known = find_known(name)
        if known is None:
            raise ValueError(unknown_name_message(name))
        return cls(**_merged(copy.deepcopy(known.config), overrides, f"model {known.name}"))

    @classmethod
    def from_file(cls, path: str | Path, /, **overrides: Any) -> "Config":
        """The configuration in a `model_config.yaml`, with some fields replaced.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it does not hold a mapping of known fields, or a value is wrong.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no model configuration at {path}. Check the path.")
        merged = _merged(read_yaml_mapping(path), overrides, str(path))
        try:
            return cls(**merged)
        except ValueError as error:
            raise error if overrides else ValueError(f"{path}: {error}") from None

    @classmethod
    def from_checkpoint(cls, path: str | Path, /, **overrides: Any) -> "Config":
        """The configuration of a checkpoint directory (its `model_config.yaml`), with some fields replaced."""
        file = Path(path) / MODEL_CONFIG_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{path} has no {MODEL_CONFIG_FILE}. Is it a checkpoint directory? A Hugging Face directory is "
                f"converted with `litgpt convert_to_litgpt {path}`."
            )
        return cls.from_file(file, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """What goes into `model_config.yaml`: the classic fields always, newer ones only where they differ."""
        values = asdict(self)
        values.pop("tie_embeddings")
        implied = _implied(values)
        for spec in fields(self):
            if spec.metadata.get("newer") and values[spec.name] == implied.get(spec.name, spec.default):
                values.pop(spec.name)
        return values

    def save(self, directory: str | Path) -> None:
        """Writes `model_config.yaml` into a directory."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        (Path(directory) / MODEL_CONFIG_FILE).write_text(text, encoding="utf-8")

    # --- derived values, each with its checks --------------------------------------------------------------------

    def _derive_vocabulary(self) -> None:
        for name in ("block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple"):
            self._require(name, getattr(self, name) > 0, "a positive number")
        self._derive("padded_vocab_size", -(-self.vocab_size // self.padding_multiple) * self.padding_multiple)
        self._require("padded_vocab_size", self.padded_vocab_size > 0, "a positive number")
        # Some known checkpoints give only the number of rows; tokens without a row cannot be used.
        self.vocab_size = min(self.vocab_size, self.padded_vocab_size)

    def _derive_attention(self) -> None:
        self._require("n_head", self.n_head > 0, "a positive number")
        divides = self.head_size is not None or self.n_embd % self.n_head == 0
        self._require("n_head", divides, f"a divisor of n_embd={self.n_embd}; or set head_size")
        self._derive("head_size", self.n_embd // self.n_head)
        self._derive("n_query_groups", self.n_head)
        groups_fit = self.n_query_groups > 0 and self.n_head % self.n_query_groups == 0
        self._require("n_query_groups", groups_fit, f"a divisor of n_head={self.n_head}")
        self._require_one_of("norm_qk_type", ("default", "olmo2"))
        self._require_positive("head_size", "attention_scores_scalar", "attention_logit_softcapping", "clip_qkv")
        self._require_positive("final_logit_softcapping", "logits_scaling")
        self._derive_windows()
        self._check_latent_attention()
        self._derive_rope()

    def _derive_windows(self) -> None:
        size = self.sliding_window_size
        self._require("sliding_window_size", size is None or size > 0, "a positive number of tokens, or null")
        if size is not None and self.sliding_window_indices is None:
            self.sliding_window_indices = [1]
        self._fill_pattern("sliding_window_indices")
        wants_window = any(self.sliding_window_indices or ())
        self._require("sliding_window_size", size is not None or not wants_window, "set, as sliding_window_indices is")

    def _check_latent_attention(self) -> None:
        latent = self.latent_attention
        if latent is None:
            return
        for key in latent:
            if key not in LATENT_ATTENTION_KEYS:
                raise ValueError(f"latent_attention has no key {key!r}.{did_you_mean(key, LATENT_ATTENTION_KEYS)}")
        for key in LATENT_ATTENTION_KEYS:
            value = latent.get(key)
            fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZES["head_size"]
            if not fits and not (key == "q_lora_rank" and value is None):
                raise ValueError(f"latent_attention.{key}={shown(value)}: must be a positive integer.")

    def _derive_rope(self) -> None:
        self._require("rotary_percentage", 0 <= self.rotary_percentage <= 1, "between 0 and 1")
        remedy = f"such that the rotated part of a head is even (it is {self.rope_n_elem} of {self.head_size})"
        self._require("rotary_percentage", self.rope_n_elem % 2 == 0, remedy)
        self._require_positive("rope_base", "rope_condense_ratio", "rope_local_base_freq")
        if self.rope_local_base_freq is not None and self.rope_indices is None:
            self.rope_indices = [1]
        self._fill_pattern("rope_indices")
        has_local = self.rope_local_base_freq is not None
        self._require("rope_local_base_freq", has_local or not any(self.rope_indices or ()), "set, as rope_indices is")
        self._fill_pattern("nope_indices")
        if not any(self.nope_indices or ()):
            self.nope_indices = None
        self._check_adjustments()
        if self.rope_adjustments is not None and _rope_kind(self.rope_adjustments) == "longrope":
            self._require("rope_local_base_freq", not has_local, "null, as rope_adjustments is that of LongRoPE")
            for name in ("short_factor", "long_factor"):
                factors = self.rope_adjustments[name]
                if len(factors) != self.rope_n_elem // 2:
                    wanted = f"one number for each of the {self.rope_n_elem // 2} frequencies"
                    raise ValueError(f"Config field rope_adjustments.{name}={shown(factors)}: it must be {wanted}.")

    def _check_adjustments(self) -> None:
        adjustments, kind = self.rope_adjustments or {}, self.rope_kind
        for key, value in adjustments.items():
            is_list = key in ("short_factor", "long_factor")
            numbers = value if is_list and isinstance(value, list) else [value]
            minimum = 0 if key in _MAY_BE_ZERO else 1e-300
            optional = value is None and kind is not None and key in ROPE_ADJUSTMENTS[kind][1]
            fits = isinstance(value, list) == is_list and all(is_finite(x) and x >= minimum for x in numbers)
            if not (fits or optional or (key == "truncate" and isinstance(value, bool))):
                wanted = "one positive number for each frequency" if is_list else "a positive number"
                raise ValueError(f"Config field rope_adjustments.{key}={shown(value)}: it must be {wanted}.")
        if kind == "yarn":
            self._require("rope_base", self.rope_base > 1, "more than 1, as rope_adjustments is that of YaRN")
        if kind == "llama3" and adjustments["low_freq_factor"] >= adjustments["high_freq_factor"]:
            raise ValueError("Config field rope_adjustments: low_freq_factor must be less than high_freq_factor.")

    def _derive_mlp(self) -> None:
        self._require_one_of("mlp_class_name", MLP_CLASSES)
        self._require_one_of("gelu_approximate", ("none", "tanh"))
        has_size = self.intermediate_size is not None or self.mlp_class_name == "GptNeoxMLP"
        self._require("intermediate_size", has_size, f"set: {self.mlp_class_name} has no default for it")
        self._derive("intermediate_size", 4 * self.n_embd)
        self._require_positive("intermediate_size", "swiglu_limit")
        if self.mlp_class_name == "LLaMAMoE":
            self._check_experts()

    def _check_experts(self) -> None:
        self._require("n_expert", self.n_expert > 0, "a positive number for LLaMAMoE")
        in_range = 0 < self.n_expert_per_token <= self.n_expert
        self._require("n_expert_per_token", in_range, f"1 to n_expert={self.n_expert}")
        size, shared, dense = self.moe_intermediate_size, self.n_shared_expert, self.first_k_dense_replace
        self._require("moe_intermediate_size", size is None or size > 0, "a positive number, or null")
        self._require("n_shared_expert", shared is None or shared >= 0, "0 or more, or null")
        self._require("first_k_dense_replace", dense is None or dense >= 0, "0 or more, or null")
        self._require_one_of("router_scores", ("softmax", "sigmoid"))
        groups = self.n_expert_groups
        if groups is None:
            return
        divides = groups > 0 and self.n_expert % groups == 0
        self._require("n_expert_groups", divides, f"a divisor of n_expert={self.n_expert}")
        top, scores, group_size = self.n_topk_groups or 0, self.n_topk_scores_per_group or 0, self.n_expert // groups
        self._require("n_topk_groups", 0 < top <= groups, f"1 to n_expert_groups={groups}")
        self._require("n_topk_scores_per_group", 0 < scores <= group_size, f"1 to {group_size}")
        enough = self.n_expert_per_token <= top * group_size
        self._require("n_expert_per_token", enough, f"at most the {top * group_size} experts of n_topk_groups={top}")

    def _check_norms(self) -> None:
        self._require_one_of("norm_class_name", NORM_CLASSES)
        only_rms = not self.norm_unit_offset or self.norm_class_name == "RMSNorm"
        self._require("norm_unit_offset", only_rms, "false, as norm_class_name is LayerNorm")
        lone_norm = not self.shared_attention_norm or self.parallel_residual
        self._require("shared_attention_norm", lone_norm, "false, as parallel_residual is false")

    def _derive(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            setattr(self, name, value)

    def _fill_pattern(self, name: str) -> None:
        """Repeats a per-layer pattern of 0 and 1 up to n_layer; a longer one is cut, so that n_layer can be lowered."""
        pattern = getattr(self, name)
        if pattern is None:
            return
        self._require(name, bool(pattern) and all(x in (0, 1) for x in pattern), "a list of 0 and 1")
        repeated = list(pattern) * -(-self.n_layer // len(pattern))
        setattr(self, name, [int(x) for x in repeated[: self.n_layer]])

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(name, value is None or value > 0, "a positive number")

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise ValueError(f"Config field {name}={shown(getattr(self, name))} is not valid: it must be {remedy}.")

    def _require_one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            hint = did_you_mean(value[:100], allowed)
            raise ValueError(f"Config field {name}={shown(value)} is not valid: choose {', '.join(allowed)}.{hint}")


def check_field_names(names: Iterable[object], where: str = "the model configuration") -> None:
    """Raises `ValueError`, with near matches, for the first name that is no field of `Config`."""
    known = Config.__dataclass_fields__
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: there is no model field {shown(name)}.{did_you_mean(str(name)[:100], known)}")


def _merged(values: dict[str, Any], overrides: dict[str, Any], where: str) -> dict[str, Any]:
    check_field_names(values, where)
    check_field_names(overrides, "overrides")
    # By the name in the file: a new name must not change the mathematics.
    return {**_implied_by_name(values), **values, **overrides}


def _implied_by_name(values: dict[str, Any]) -> dict[str, bool]:
    """What the name says about the norms; `model_config.yaml` has no classic field for these two switches."""
    name, norm = str(values.get("name", "")), values.get("norm_class_name", "LayerNorm")
    return {
        "norm_unit_offset": norm == "RMSNorm" and "Gemma" in name,
        "norm_affine": not (norm == "LayerNorm" and "OLMo" in name),
    }


def _implied(values: dict[str, Any]) -> dict[str, Any]:
    """What the other fields say about those that were left at None."""
    bias = values.get("bias", True)
    scores = "softmax" if values.get("n_expert_groups") is None else "sigmoid"
    return {**_implied_by_name(values), "attn_proj_bias": bias, "mlp_bias": bias, "router_scores": scores}


def _rope_kind(adjustments: dict[str, Any]) -> str:
    keys = set(adjustments)
    for kind, (required, optional) in ROPE_ADJUSTMENTS.items():
        if required <= keys <= required | optional:
            return kind
    forms = "; ".join(f"{kind}: {', '.join(sorted(required))}" for kind, (required, _) in ROPE_ADJUSTMENTS.items())
    every = set().union(*(required | optional for required, optional in ROPE_ADJUSTMENTS.values()))
    hints = "".join(did_you_mean(key, every) for key in sorted(keys - every))
    raise ValueError(f"Config field rope_adjustments has the keys {', '.join(sorted(keys))}; expected {forms}.{hints}")


def _checked(spec: Field, value: Any) -> Any:
    """The value if it fits the field's type; numbers that YAML reads as text (`1e-5`) or as 2048.0 become numbers."""
    name, original = spec.name, value
    kind: Any = spec.type
    if spec.default is None:  # also one that is DERIVED may be given as None
        kind = kind | None
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    number = value is not None and (int in kinds or float in kinds)
    if number:
        value = number_of(value, float in kinds)
    fits = value is not None if number else isinstance(value, tuple(get_origin(each) or each for each in kinds))
    if not fits or (isinstance(value, dict) and not all(isinstance(key, str) for key in value)):
        wanted = " or ".join("null" if each is NoneType else str(getattr(each, "__name__", each)) for each in kinds)
        raise ValueError(f"Config field {name}={shown(original)} has the wrong type: expected {wanted}.")
    if isinstance(value, int) and float not in kinds and value > (limit := MAX_SIZES.get(name, MAX_SIZE)):
        raise ValueError(f"Config field {name}={shown(original)} is not valid: it must be {limit:,} at most.")
    return value
