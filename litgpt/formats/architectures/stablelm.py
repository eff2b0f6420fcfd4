"""StableLM 3B and StableCode (https://huggingface.co/stabilityai/stablelm-3b-4e1t)."""

from litgpt.formats.architectures.llama import biases, llama_like
from litgpt.formats.fields import Choice, Field, Rope, Unsupported

STABLELM = llama_like(
    "StableLmForCausalLM",
    "stablelm",
    implied={"norm_class_name": "LayerNorm", "norm_affine": True},
    context=Field("block_size", "max_position_embeddings", 4096),
    groups=Field("n_query_groups", "num_key_value_heads", 32),
    eps=Field("norm_eps", "layer_norm_eps", 1e-5),
    biases=Choice({"use_qkv_bias": False}, {(x,): biases(qkv=x) for x in (False, True)}),
    rope=Rope(share=0.25, share_keys=("partial_rotary_factor",)),
    extra=(Unsupported({"qk_layernorm": (False,), "use_parallel_residual": (False,)}),),
)
