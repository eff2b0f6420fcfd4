"""Phi 1, 1.5 and 2 (https://arxiv.org/abs/2306.11644) and Phi 3 and 4 (https://arxiv.org/abs/2404.14219)."""

from litgpt.formats.architectures.llama import NO_BIASES, OURS, THEIRS, biases, llama_like
from litgpt.formats.fields import Choice, Field, Implied, Rope, SlidingWindow, Unsupported
from litgpt.formats.rules import Concat, Reverse, Rule, gate_sizes

_TANH = {"gelu_approximate": "tanh"}

PHI = llama_like(
    "PhiForCausalLM",
    "phi",
    implied={
        "norm_class_name": "LayerNorm",
        "norm_affine": True,
        "mlp_class_name": "GptNeoxMLP",
        "parallel_residual": True,
        "shared_attention_norm": True,
        "lm_head_bias": True,
    },
    activation=Choice(
        {"hidden_act": "gelu_new"},
        {
            ("gelu_new",): _TANH,
            ("gelu_pytorch_tanh",): _TANH,
            ("gelu_fast",): _TANH,
            ("gelu",): {"gelu_approximate": "none"},
        },
    ),
    eps=Field("norm_eps", "layer_norm_eps", 1e-5),
    biases=Implied(biases(qkv=True, proj=True, mlp=True)),
    rope=Rope(share=0.5, share_keys=("partial_rotary_factor",)),
    extra=(Unsupported({"qk_layernorm": (False,)}),),
    rules=(
        Rule("transformer.ln_f.{p}", "model.final_layernorm.{p}"),
        Rule(OURS + ".attn.proj.{p}", THEIRS + ".self_attn.dense.{p}"),
        Rule(OURS + ".mlp.fc.{p}", THEIRS + ".mlp.fc1.{p}"),
        Rule(OURS + ".mlp.proj.{p}", THEIRS + ".mlp.fc2.{p}"),
    ),
)

PHI_3 = llama_like(
    "Phi3ForCausalLM",
    "phi3",
    biases=NO_BIASES,
    context=Field("block_size", "max_position_embeddings", 4096),
    eps=Field("norm_eps", "rms_norm_eps", 1e-5),
    rope=Rope(share_keys=("partial_rotary_factor",), renamed={"su": "longrope", "yarn": "longrope"}),
    extra=(SlidingWindow(types=False),),
    rules=(
        Rule(OURS + ".attn.qkv.weight", THEIRS + ".self_attn.qkv_proj.weight"),
        Rule(
            (OURS + ".mlp.fc_1.weight", OURS + ".mlp.fc_2.weight"),
            THEIRS + ".mlp.gate_up_proj.weight",
            Reverse(Concat(gate_sizes)),
        ),
    ),
    defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
)
