"""Mistral (https://arxiv.org/abs/2310.06825), Mixtral (https://arxiv.org/abs/2401.04088) and Ministral 3."""

from litgpt.formats.architectures.llama import NO_BIASES, OURS, THEIRS, llama_like
from litgpt.formats.fields import Field, Rope, SlidingWindow
from litgpt.formats.rules import Rule

_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
_GROUPS = Field("n_query_groups", "num_key_value_heads", 8)

MISTRAL = llama_like(
    "MistralForCausalLM",
    "mistral",
    biases=NO_BIASES,
    groups=_GROUPS,
    context=Field("block_size", "max_position_embeddings", 131072),
    extra=(SlidingWindow(4096, types=False),),
    defaults=_SIZES,
)

MINISTRAL_3 = llama_like(
    "Ministral3ForCausalLM",
    "ministral3",
    biases=NO_BIASES,
    groups=_GROUPS,
    head_size=Field("head_size", "head_dim", 128),
    context=Field("block_size", "max_position_embeddings", 262144),
    eps=Field("norm_eps", "rms_norm_eps", 1e-5),
    rope=Rope(
        usual={
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    ),
    extra=(SlidingWindow(types=False),),
    defaults=_SIZES | {"vocab_size": 131072, "num_hidden_layers": 34},
)

_MOE = THEIRS + ".block_sparse_moe"

MIXTRAL = llama_like(
    "MixtralForCausalLM",
    "mixtral",
    implied={"mlp_class_name": "LLaMAMoE", "softmax_after_topk": True, "router_scores": "softmax"},
    biases=NO_BIASES,
    groups=_GROUPS,
    context=Field("block_size", "max_position_embeddings", 131072),
    eps=Field("norm_eps", "rms_norm_eps", 1e-5),
    rope=Rope(theta=1000000),
    extra=(
        SlidingWindow(types=False),
        Field("n_expert", "num_local_experts", 8),
        Field("n_expert_per_token", "num_experts_per_tok", 2),
    ),
    rules=(
        Rule(OURS + ".mlp.gate.weight", _MOE + ".gate.weight"),
        Rule(OURS + ".mlp.experts.{expert}.fc_1.weight", _MOE + ".experts.{expert}.w1.weight"),
        Rule(OURS + ".mlp.experts.{expert}.fc_2.weight", _MOE + ".experts.{expert}.w3.weight"),
        Rule(OURS + ".mlp.experts.{expert}.proj.weight", _MOE + ".experts.{expert}.w2.weight"),
    ),
)
