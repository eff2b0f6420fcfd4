"""gpt-oss (https://arxiv.org/abs/2508.10925): attention sinks, a clamped SwiGLU, biased experts held in stacks."""

from collections.abc import Sequence

from torch import Tensor

from litgpt.config import Config
from litgpt.formats.architectures.llama import OURS, THEIRS, biases, llama_like
from litgpt.formats.fields import Choice, Field, Rope, SlidingWindow, Unsupported
from litgpt.formats.rules import Rule, stack


class StackedProjections:
    """Theirs (E, in, out) is one matrix (out, in) for each expert of ours; a bias (E, out) is one (out,)."""

    def to_ours(self, theirs: Sequence[Tensor], config: Config) -> list[Tensor]:
        return [_turned(each) for each in theirs[0].unbind()]

    def to_theirs(self, ours: Sequence[Tensor], config: Config) -> list[Tensor]:
        return [stack([_turned(each) for each in ours])]


class StackedGates(StackedProjections):
    """As `StackedProjections`, theirs with the gate in the even columns and the linear half in the odd ones."""

    def to_ours(self, theirs: Sequence[Tensor], config: Config) -> list[Tensor]:
        both = theirs[0].unbind()
        return [_turned(each[..., start::2]) for start in (0, 1) for each in both]

    def to_theirs(self, ours: Sequence[Tensor], config: Config) -> list[Tensor]:
        pairs = zip(ours[: config.n_expert], ours[config.n_expert :], strict=True)
        return [stack([stack([_turned(gate), _turned(x)], dim=-1).flatten(-2) for gate, x in pairs])]


def _turned(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.dim() == 2 else tensor


_EXPERTS = THEIRS + ".mlp.experts"

GPT_OSS = llama_like(
    "GptOssForCausalLM",
    "gpt_oss",
    implied={
        "mlp_class_name": "LLaMAMoE",
        "attention_sinks": True,
        "router_bias": True,
        "router_scores": "softmax",
        "softmax_after_topk": True,
    },
    context=Field("block_size", "max_position_embeddings", 131072),
    groups=Field("n_query_groups", "num_key_value_heads", 8),
    head_size=Field("head_size", "head_dim", 64),
    eps=Field("norm_eps", "rms_norm_eps", 1e-5),
    biases=Choice({"attention_bias": True}, {(x,): biases(qkv=x, proj=x, mlp=True) for x in (True, False)}),
    rope=Rope(
        theta=150000,
        usual={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    extra=(
        SlidingWindow(128, usual=lambda theirs, layer: layer % 2 == 0),
        Field("n_expert", "num_local_experts", 128),
        Field("n_expert_per_token", "num_experts_per_tok", 4),
        Field("swiglu_limit", "swiglu_limit", 7.0),
        Unsupported({"swiglu_alpha": (1.702,)}),
    ),
    rules=(
        Rule(OURS + ".attn.sinks", THEIRS + ".self_attn.sinks"),
        Rule(OURS + ".mlp.gate.{p}", THEIRS + ".mlp.router.{p}"),
        *(
            rule
            for kind, suffix in (("weight", ""), ("bias", "_bias"))
            for rule in (
                Rule(
                    tuple(OURS + ".mlp.experts.{expert}." + f"{part}.{kind}" for part in ("fc_1", "fc_2")),
                    f"{_EXPERTS}.gate_up_proj{suffix}",
                    StackedGates(),
                ),
                Rule(
                    OURS + ".mlp.experts.{expert}." + f"proj.{kind}",
                    f"{_EXPERTS}.down_proj{suffix}",
                    StackedProjections(),
                ),
            )
        ),
    ),
)
