"""GPT-NeoX (https://arxiv.org/abs/2204.06745): Pythia, StableLM alpha, Dolly, RedPajama-INCITE."""

from litgpt.formats.architecture import Architecture
from litgpt.formats.fields import Choice, Field, Implied, Rope, Vocabulary
from litgpt.formats.rules import InterleavedQKV, Rule, RuleTable

_OURS, _THEIRS = "transformer.h.{layer}", "gpt_neox.layers.{layer}"

GPT_NEOX = Architecture(
    name="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    config=(
        Implied(
            {
                "norm_class_name": "LayerNorm",
                "norm_affine": True,
                "mlp_class_name": "GptNeoxMLP",
                "shared_attention_norm": False,
                "lm_head_bias": False,
            }
        ),
        Vocabulary(),
        Field("block_size", "max_position_embeddings", 2048),
        Field("n_embd", "hidden_size"),
        Field("n_layer", "num_hidden_layers"),
        Field("n_head", "num_attention_heads"),
        Field("intermediate_size", "intermediate_size"),
        Field("norm_eps", "layer_norm_eps", 1e-5),
        Field("parallel_residual", "use_parallel_residual", True),
        Field("tie_embeddings", "tie_word_embeddings", False),
        Choice(
            {"hidden_act": "gelu"},
            {
                ("gelu",): {"gelu_approximate": "none"},
                ("gelu_new",): {"gelu_approximate": "tanh"},
                ("gelu_fast",): {"gelu_approximate": "tanh"},
                ("gelu_pytorch_tanh",): {"gelu_approximate": "tanh"},
            },
        ),
        Choice({"attention_bias": True}, {(True,): {"bias": True}}),
        Rope(theta_keys=("rotary_emb_base", "rope_theta"), share=0.25, share_keys=("rotary_pct",)),
    ),
    weights=RuleTable(
        rules=(
            Rule("transformer.wte.weight", "gpt_neox.embed_in.weight"),
            Rule("lm_head.weight", "embed_out.weight"),
            Rule("transformer.ln_f.{p}", "gpt_neox.final_layer_norm.{p}"),
            Rule(_OURS + ".norm_1.{p}", _THEIRS + ".input_layernorm.{p}"),
            Rule(_OURS + ".attn.qkv.{p}", _THEIRS + ".attention.query_key_value.{p}", InterleavedQKV()),
            Rule(_OURS + ".attn.proj.{p}", _THEIRS + ".attention.dense.{p}"),
            Rule(_OURS + ".norm_2.{p}", _THEIRS + ".post_attention_layernorm.{p}"),
            Rule(_OURS + ".mlp.fc.{p}", _THEIRS + ".mlp.dense_h_to_4h.{p}"),
            Rule(_OURS + ".mlp.proj.{p}", _THEIRS + ".mlp.dense_4h_to_h.{p}"),
        ),
        ignored=(r".*\.rotary_emb\.inv_freq", r".*\.attention\.(bias|masked_bias)"),
    ),
)
