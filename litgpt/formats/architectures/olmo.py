"""OLMo (https://arxiv.org/abs/2402.00838), OLMo 2 (https://arxiv.org/abs/2501.00656) and OLMo 3."""

from litgpt.formats.architectures.llama import OURS, THEIRS, attention_bias, llama_like
from litgpt.formats.fields import Field, Implied, Rope, RopeByLayer, SlidingWindow
from litgpt.formats.rules import Rule

OLMO = llama_like(
    "OlmoForCausalLM",
    "olmo",
    implied={"norm_class_name": "LayerNorm", "norm_affine": False},
    eps=Implied({"norm_eps": 1e-5}),
    biases=attention_bias(),
    extra=(Field("clip_qkv", "clip_qkv", None),),
)

_POST_NORMS = {
    "norm_1": False,
    "norm_2": False,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "norm_qk": True,
    "norm_qk_type": "olmo2",
}
_RULES = (
    Rule(OURS + ".post_attention_norm.weight", THEIRS + ".post_attention_layernorm.weight"),
    Rule(OURS + ".post_mlp_norm.weight", THEIRS + ".post_feedforward_layernorm.weight"),
)
_EPS = Field("norm_eps", "rms_norm_eps", 1e-5)

OLMO_2 = llama_like("Olmo2ForCausalLM", "olmo2", implied=_POST_NORMS, eps=_EPS, biases=attention_bias(), rules=_RULES)

_WINDOW = SlidingWindow(4096, usual=lambda theirs, layer: (layer + 1) % 4 != 0)

OLMO_3 = llama_like(
    "Olmo3ForCausalLM",
    "olmo3",
    implied=_POST_NORMS,
    eps=_EPS,
    biases=attention_bias(),
    rope=RopeByLayer(Rope(theta=500000), _WINDOW),
    extra=(_WINDOW,),
    rules=_RULES,
)
