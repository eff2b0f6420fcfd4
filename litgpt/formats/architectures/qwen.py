"""Qwen2 (https://arxiv.org/abs/2407.10671, also Qwen2.5 and QwQ) and Qwen3 (https://arxiv.org/abs/2505.09388)."""

from typing import Any

from litgpt.config import Config
from litgpt.formats.architectures.llama import OURS, THEIRS, attention_bias, biases, llama_like
from litgpt.formats.fields import Choice, Field, HFConfig, Implied, SlidingWindow, Unsupported
from litgpt.formats.rules import Rule

_CONTEXT = Field("block_size", "max_position_embeddings", 32768)
_GROUPS = Field("n_query_groups", "num_key_value_heads", 32)
_WINDOW = SlidingWindow(
    4096,
    usual=lambda theirs, layer: (
        layer >= (28 if theirs.get("max_window_layers") is None else theirs["max_window_layers"])
    ),
    switch="use_sliding_window",
)
_SIZES = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}

QWEN2 = llama_like(
    "Qwen2ForCausalLM",
    "qwen2",
    biases=Implied(biases(qkv=True)),
    groups=_GROUPS,
    context=_CONTEXT,
    extra=(_WINDOW,),
    defaults=_SIZES,
)

QWEN3 = llama_like(
    "Qwen3ForCausalLM",
    "qwen3",
    implied={"norm_qk": True, "norm_qk_type": "default"},
    biases=attention_bias(),
    groups=_GROUPS,
    head_size=Field("head_size", "head_dim", 128),
    context=_CONTEXT,
    extra=(_WINDOW,),
    defaults=_SIZES,
)

EXPERTS = (
    Rule(OURS + ".mlp.gate.weight", THEIRS + ".mlp.gate.weight"),
    Rule(OURS + ".mlp.experts.{expert}.fc_1.weight", THEIRS + ".mlp.experts.{expert}.gate_proj.weight"),
    Rule(OURS + ".mlp.experts.{expert}.fc_2.weight", THEIRS + ".mlp.experts.{expert}.up_proj.weight"),
    Rule(OURS + ".mlp.experts.{expert}.proj.weight", THEIRS + ".mlp.experts.{expert}.down_proj.weight"),
)


class DenseLayers:
    """`mlp_only_layers`: the layers without experts, which must be the first ones."""

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        dense = sorted(theirs.get("mlp_only_layers") or [])
        if dense != list(range(len(dense))):
            raise ValueError(f"mlp_only_layers={dense} is not supported (only the first layers)")
        return {"first_k_dense_replace": len(dense) or None}

    def write(self, config: Config) -> HFConfig:
        return {"mlp_only_layers": list(range(config.first_k_dense_replace or 0))}


QWEN3_MOE = llama_like(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    implied={
        "norm_qk": True,
        "norm_qk_type": "default",
        "mlp_class_name": "LLaMAMoE",
        "router_scores": "softmax",
        "n_expert_groups": None,
    },
    biases=attention_bias(),
    groups=Field("n_query_groups", "num_key_value_heads", 4),
    context=_CONTEXT,
    extra=(
        SlidingWindow(4096, types=False, switch="use_sliding_window"),
        DenseLayers(),
        Unsupported({"decoder_sparse_step": (1,)}),
        Field("moe_intermediate_size", "moe_intermediate_size", 768),
        Field("n_expert", "num_experts", lambda theirs: theirs.get("num_local_experts") or 128),
        Field("n_expert_per_token", "num_experts_per_tok", 8),
        Choice(
            {"norm_topk_prob": False},
            {(True,): {"softmax_after_topk": True}, (False,): {"softmax_after_topk": False}},
        ),
    ),
    rules=EXPERTS,
)
