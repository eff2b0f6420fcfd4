"""Falcon (https://arxiv.org/abs/2311.16867), 7B, 40B and 180B."""

from typing import Any

from litgpt.config import Config
from litgpt.formats.architecture import Architecture
from litgpt.formats.fields import Choice, Field, HFConfig, Implied, Rope, Unsupported, Vocabulary
from litgpt.formats.rules import InterleavedQKV, Rule, RuleTable

_OURS, _THEIRS = "transformer.h.{layer}", "transformer.h.{layer}"


def _two_norms_in_parallel(config: Config) -> bool:
    return config.parallel_residual and not config.shared_attention_norm


def _norms_in_sequence_or_shared(config: Config) -> bool:
    return not _two_norms_in_parallel(config)


class Decoder:
    """How many key/value heads there are, and which norms: three generations of the architecture under one name.

    `new_decoder_architecture` has groups and, unless told otherwise, two norms side by side. Without it there is one
    key/value head (`multi_query`) or as many as query heads, and the norms are shared (`parallel_attn`) or in sequence.
    """

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        heads = theirs.get("num_attention_heads")
        new = bool(theirs.get("new_decoder_architecture"))
        parallel = theirs.get("parallel_attn") is not False
        norms = theirs.get("num_ln_in_parallel_attn") or (2 if new else 1)
        if new:
            groups = theirs.get("num_kv_heads") or heads
        else:
            groups = heads if theirs.get("multi_query") is False else 1
        if new and not parallel:
            raise ValueError("new_decoder_architecture without parallel_attn is not supported")
        shared = parallel and norms == 1
        return {"n_query_groups": groups, "parallel_residual": parallel, "shared_attention_norm": shared}

    def write(self, config: Config) -> HFConfig:
        one_or_all = config.n_query_groups in (1, config.n_head)
        new = not one_or_all or _two_norms_in_parallel(config)
        if new and not config.parallel_residual:
            raise ValueError(f"it has no n_query_groups={config.n_query_groups} with parallel_residual=False")
        return {
            "new_decoder_architecture": new,
            "num_kv_heads": config.n_query_groups,
            "multi_query": config.n_query_groups == 1,
            "parallel_attn": config.parallel_residual,
            "num_ln_in_parallel_attn": (1 if config.shared_attention_norm else 2) if new else None,
        }


FALCON = Architecture(
    name="FalconForCausalLM",
    model_type="falcon",
    config=(
        Implied(
            {"norm_class_name": "LayerNorm", "norm_affine": True, "mlp_class_name": "GptNeoxMLP", "lm_head_bias": False}
        ),
        Vocabulary(),
        Field("block_size", "max_position_embeddings", 2048),
        Field("n_embd", "hidden_size"),
        Field("n_layer", "num_hidden_layers"),
        Field("n_head", "num_attention_heads"),
        Field("intermediate_size", "ffn_hidden_size", lambda theirs: 4 * theirs["hidden_size"]),
        Field("norm_eps", "layer_norm_epsilon", 1e-5),
        Field("tie_embeddings", "tie_word_embeddings", True),
        Choice({"activation": "gelu"}, {("gelu",): {"gelu_approximate": "none"}}),
        Choice({"bias": False}, {(False,): {"bias": False}, (True,): {"bias": True}}),
        Decoder(),
        Unsupported({"alibi": (False,)}),
        Rope(),
    ),
    weights=RuleTable(
        rules=(
            Rule("transformer.wte.weight", "transformer.word_embeddings.weight"),
            Rule("lm_head.weight", "lm_head.weight"),
            Rule("transformer.ln_f.{p}", "transformer.ln_f.{p}"),
            Rule(_OURS + ".norm_1.{p}", _THEIRS + ".input_layernorm.{p}", when=_norms_in_sequence_or_shared),
            Rule(_OURS + ".norm_2.{p}", _THEIRS + ".post_attention_layernorm.{p}", when=_norms_in_sequence_or_shared),
            Rule(_OURS + ".norm_1.{p}", _THEIRS + ".ln_attn.{p}", when=_two_norms_in_parallel),
            Rule(_OURS + ".norm_2.{p}", _THEIRS + ".ln_mlp.{p}", when=_two_norms_in_parallel),
            Rule(_OURS + ".attn.qkv.{p}", _THEIRS + ".self_attention.query_key_value.{p}", InterleavedQKV()),
            Rule(_OURS + ".attn.proj.{p}", _THEIRS + ".self_attention.dense.{p}"),
            Rule(_OURS + ".mlp.fc.{p}", _THEIRS + ".mlp.dense_h_to_4h.{p}"),
            Rule(_OURS + ".mlp.proj.{p}", _THEIRS + ".mlp.dense_4h_to_h.{p}"),
        ),
        ignored=(r".*\.rotary(_emb)?\.inv_freq",),
    ),
)
