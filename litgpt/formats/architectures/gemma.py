"""Gemma 1, 2 and 3 (https://arxiv.org/abs/2403.08295, https://arxiv.org/abs/2408.00118, https://arxiv.org/abs/2503.19786)."""

from litgpt.formats.architectures.llama import OURS, THEIRS, attention_bias, llama_like
from litgpt.formats.fields import Choice, Field, Rope, RopeByLayer, SlidingWindow, Unsupported
from litgpt.formats.rules import Rule

_IMPLIED = {"norm_unit_offset": True, "mlp_class_name": "GemmaMLP", "scale_embeddings": True}
_TANH = {"gelu_approximate": "tanh"}
_TIED = Field("tie_embeddings", "tie_word_embeddings", True)
_HEAD_SIZE = Field("head_size", "head_dim", 256)
_CAUSAL = Unsupported({"use_bidirectional_attention": (False,)})
_SIZES = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
}

GEMMA = llama_like(
    "GemmaForCausalLM",
    "gemma",
    implied=_IMPLIED,
    # The first release says `gelu` and means this.
    activation=Choice({"hidden_act": "gelu_pytorch_tanh"}, {("gelu_pytorch_tanh",): _TANH, ("gelu",): _TANH}),
    biases=attention_bias(),
    context=Field("block_size", "max_position_embeddings", 8192),
    groups=Field("n_query_groups", "num_key_value_heads", 16),
    head_size=_HEAD_SIZE,
    tied=_TIED,
    extra=(_CAUSAL, Unsupported({"hidden_activation": ("gelu_pytorch_tanh",)})),
    defaults=_SIZES
    | {"hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16},
)

_LATER = {
    "activation": Choice({"hidden_activation": "gelu_pytorch_tanh"}, {("gelu_pytorch_tanh",): _TANH}),
    "biases": attention_bias(),
    "groups": Field("n_query_groups", "num_key_value_heads", 4),
    "head_size": _HEAD_SIZE,
    "tied": _TIED,
}
_NORMS = (
    Rule(OURS + ".post_attention_norm.weight", THEIRS + ".post_attention_layernorm.weight"),
    Rule(OURS + ".norm_2.{p}", THEIRS + ".pre_feedforward_layernorm.{p}"),
    Rule(OURS + ".post_mlp_norm.weight", THEIRS + ".post_feedforward_layernorm.weight"),
)
_SCALAR = Field("attention_scores_scalar", "query_pre_attn_scalar", 256)

GEMMA_2 = llama_like(
    "Gemma2ForCausalLM",
    "gemma2",
    implied=_IMPLIED | {"post_attention_norm": True, "post_mlp_norm": True},
    context=Field("block_size", "max_position_embeddings", 8192),
    extra=(
        _CAUSAL,
        _SCALAR,
        SlidingWindow(4096, usual=lambda theirs, layer: layer % 2 == 0),
        Field("attention_logit_softcapping", "attn_logit_softcapping", 50.0),
        Field("final_logit_softcapping", "final_logit_softcapping", 30.0),
    ),
    rules=_NORMS,
    defaults=_SIZES,
    **_LATER,
)

_WINDOW = SlidingWindow(
    4096, usual=lambda theirs, layer: (layer + 1) % (theirs.get("sliding_window_pattern") or 6) != 0
)

GEMMA_3 = llama_like(
    "Gemma3ForCausalLM",
    "gemma3_text",
    implied=_IMPLIED | {"post_attention_norm": True, "post_mlp_norm": True, "norm_qk": True, "norm_qk_type": "default"},
    context=Field("block_size", "max_position_embeddings", 131072),
    rope=RopeByLayer(Rope(theta=1000000), _WINDOW, theta_key="rope_local_base_freq"),
    extra=(
        _CAUSAL,
        _SCALAR,
        _WINDOW,
        Field("attention_logit_softcapping", "attn_logit_softcapping", None),
        Field("final_logit_softcapping", "final_logit_softcapping", None),
    ),
    rules=_NORMS,
    defaults=_SIZES | {"vocab_size": 262208},
    **_LATER,
)
