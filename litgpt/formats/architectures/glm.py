"""GLM-4 (https://arxiv.org/abs/2406.12793) and GLM-4.5 (https://arxiv.org/abs/2508.06471)."""

from litgpt.formats.architectures.deepseek import CORRECTION, SHARED_EXPERTS, sigmoid_groups
from litgpt.formats.architectures.llama import OURS, THEIRS, attention_bias, llama_like
from litgpt.formats.architectures.qwen import EXPERTS
from litgpt.formats.fields import Choice, Field, Rope
from litgpt.formats.rules import Concat, Reverse, Rule, gate_sizes

_CONTEXT = Field("block_size", "max_position_embeddings", 131072)
_ROPE = Rope(share=0.5, share_keys=("partial_rotary_factor",))

GLM_4 = llama_like(
    "Glm4ForCausalLM",
    "glm4",
    implied={"rope_interleave": True, "post_attention_norm": True, "post_mlp_norm": True},
    context=_CONTEXT,
    groups=Field("n_query_groups", "num_key_value_heads", 2),
    head_size=Field("head_size", "head_dim", 128),
    eps=Field("norm_eps", "rms_norm_eps", 0.00000015625),
    biases=attention_bias(default=True, proj=False),
    rope=_ROPE,
    rules=(
        Rule(OURS + ".post_attention_norm.weight", THEIRS + ".post_self_attn_layernorm.weight"),
        Rule(OURS + ".post_mlp_norm.weight", THEIRS + ".post_mlp_layernorm.weight"),
        Rule(
            (OURS + ".mlp.fc_1.weight", OURS + ".mlp.fc_2.weight"),
            THEIRS + ".mlp.gate_up_proj.weight",
            Reverse(Concat(gate_sizes)),
        ),
    ),
)

GLM_4_MOE = llama_like(
    "Glm4MoeForCausalLM",
    "glm4_moe",
    implied={"rope_interleave": False, "mlp_class_name": "LLaMAMoE"},
    context=_CONTEXT,
    groups=Field("n_query_groups", "num_key_value_heads", 8),
    eps=Field("norm_eps", "rms_norm_eps", 1e-5),
    biases=attention_bias(proj=False),
    rope=_ROPE,
    extra=(
        Choice({"use_qk_norm": False}, {(x,): {"norm_qk": x, "norm_qk_type": "default"} for x in (False, True)}),
        *sigmoid_groups(experts=128, shared=1, width=1408, dense=1, groups=1, best_groups=1, factor=1.0),
    ),
    rules=(*EXPERTS, *SHARED_EXPERTS, CORRECTION),
)
