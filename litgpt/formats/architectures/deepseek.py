"""DeepSeek V2 (https://arxiv.org/abs/2405.04434) and V3 (https://arxiv.org/abs/2412.19437, also R1 and Kimi K2)."""

from typing import Any

from litgpt.config import LATENT_ATTENTION_KEYS, Config
from litgpt.formats.architectures.llama import OURS, THEIRS, attention_bias, llama_like
from litgpt.formats.architectures.qwen import EXPERTS
from litgpt.formats.fields import ConfigField, Field, HFConfig, Implied, Unsupported
from litgpt.formats.rules import Rule

_USUAL_LATENT = dict(zip(LATENT_ATTENTION_KEYS, (1536, 512, 64, 128, 128), strict=True))
_PER_TOKEN = Field("n_expert_per_token", "num_experts_per_tok", 8)


def _experts(experts: int, shared: int, width: int, dense: int, factor: float) -> tuple[ConfigField, ...]:
    """What all mixtures here have in common, with the values of absent entries."""
    return (
        Field("n_expert", "n_routed_experts", experts),
        Field("n_shared_expert", "n_shared_experts", shared),
        Field("moe_intermediate_size", "moe_intermediate_size", width),
        Field("first_k_dense_replace", "first_k_dense_replace", dense),
        Field("routed_scaling_factor", "routed_scaling_factor", factor),
        Unsupported({"moe_layer_freq": (1,), "ep_size": (1,)}),
    )


def sigmoid_groups(
    *, experts: int, shared: int, width: int, dense: int, groups: int, best_groups: int, factor: float
) -> tuple[ConfigField, ...]:
    """Sigmoid routing by groups, with the values of absent entries."""
    return (
        *_experts(experts, shared, width, dense, factor),
        _PER_TOKEN,
        Implied({"router_scores": "sigmoid", "n_topk_scores_per_group": 2}),
        Field("n_expert_groups", "n_group", groups),
        Field("n_topk_groups", "topk_group", best_groups),
        Field("norm_topk_prob", "norm_topk_prob", True),
        Unsupported({"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}),
    )


class LatentSizes:
    """The ranks and sizes of multi-head latent attention; `q_lora_rank` may be null."""

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        sizes = {key: theirs.get(key, usual) for key, usual in _USUAL_LATENT.items()}
        # The width of a head's queries and keys; config.json has no entry for it.
        return {"latent_attention": sizes, "head_size": sizes["qk_nope_head_dim"] + sizes["qk_rope_head_dim"]}

    def write(self, config: Config) -> HFConfig:
        if config.latent_attention is None:
            raise ValueError("it has no latent_attention=None")
        return {key: config.latent_attention.get(key) for key in LATENT_ATTENTION_KEYS}


class SoftmaxRouting:
    """`topk_method`: the best experts of all, or those of the best groups, each counting by its best expert."""

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        method = theirs.get("topk_method") or "greedy"
        if method == "greedy":
            return {"n_expert_groups": None, "n_topk_groups": None, "n_topk_scores_per_group": None}
        if method != "group_limited_greedy":
            raise ValueError(f"topk_method={method!r} is not supported (only 'greedy', 'group_limited_greedy')")
        groups = {"n_expert_groups": theirs.get("n_group"), "n_topk_groups": theirs.get("topk_group")}
        return groups | {"n_topk_scores_per_group": 1}

    def write(self, config: Config) -> HFConfig:
        if config.n_expert_groups is None:
            return {"topk_method": "greedy", "n_group": None, "topk_group": None}
        if config.n_topk_scores_per_group != 1:
            raise ValueError(f"it has no n_topk_scores_per_group={config.n_topk_scores_per_group}")
        groups = {"n_group": config.n_expert_groups, "topk_group": config.n_topk_groups}
        return {"topk_method": "group_limited_greedy", **groups}


CORRECTION = Rule(OURS + ".mlp.gate.e_score_correction_bias", THEIRS + ".mlp.gate.e_score_correction_bias")
SHARED_EXPERTS = tuple(
    Rule(f"{OURS}.mlp.shared_experts.{ours}.weight", f"{THEIRS}.mlp.shared_experts.{theirs}.weight")
    for ours, theirs in (("fc_1", "gate_proj"), ("fc_2", "up_proj"), ("proj", "down_proj"))
)
_LATENT = tuple(
    Rule(OURS + f".attn.{ours}" + ".{p}", THEIRS + f".self_attn.{theirs}" + ".{p}")
    for ours, theirs in (
        ("q_proj", "q_proj"),
        ("q_a_proj", "q_a_proj"),
        ("q_a_norm", "q_a_layernorm"),
        ("q_b_proj", "q_b_proj"),
        ("kv_a_proj_with_mqa", "kv_a_proj_with_mqa"),
        ("kv_a_norm", "kv_a_layernorm"),
        ("kv_b_proj", "kv_b_proj"),
    )
)

DEEPSEEK_V2 = llama_like(
    "DeepseekV2ForCausalLM",
    "deepseek_v2",
    implied={
        "mlp_class_name": "LLaMAMoE",
        "rope_interleave": True,
        "router_scores": "softmax",
        "softmax_after_topk": False,  # whatever norm_topk_prob says: neither the original nor transformers reads it
    },
    head_size=LatentSizes(),
    biases=attention_bias(),
    extra=(
        *_experts(experts=64, shared=2, width=1407, dense=0, factor=1.0),
        Field("n_expert_per_token", "num_experts_per_tok"),
        SoftmaxRouting(),
        Unsupported({"scoring_func": ("softmax",), "mlp_bias": (False,)}),
    ),
    rules=(*_LATENT, *EXPERTS, *SHARED_EXPERTS),
)

DEEPSEEK_V3 = llama_like(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    implied={"mlp_class_name": "LLaMAMoE"},
    context=Field("block_size", "max_position_embeddings", 4096),
    head_size=LatentSizes(),
    biases=attention_bias(),
    extra=(
        Field("rope_interleave", "rope_interleave", True),
        *sigmoid_groups(experts=256, shared=1, width=2048, dense=3, groups=8, best_groups=4, factor=2.5),
    ),
    rules=(*_LATENT, *EXPERTS, *SHARED_EXPERTS, CORRECTION),
)
