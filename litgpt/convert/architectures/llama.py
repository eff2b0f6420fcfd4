"""Llama (https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783) and what shares its class: TinyLlama,
SmolLM2, Vicuna, CodeLlama and many more."""

from litgpt.convert.architecture import Architecture
from litgpt.convert.fields import Choice, Field, Implied, Rope, Vocabulary
from litgpt.convert.rules import Concat, Rule, RuleTable, qkv_sizes

_OURS, _THEIRS = "transformer.h.{layer}", "model.layers.{layer}"

LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    config=(
        Implied(
            {
                "norm_class_name": "RMSNorm",
                "norm_unit_offset": False,
                "mlp_class_name": "LLaMAMLP",
                "parallel_residual": False,
                "shared_attention_norm": False,
                "lm_head_bias": False,
            }
        ),
        Vocabulary(),
        Field("block_size", "max_position_embeddings", 2048),
        Field("n_embd", "hidden_size"),
        Field("n_layer", "num_hidden_layers"),
        Field("n_head", "num_attention_heads"),
        Field("n_query_groups", "num_key_value_heads", lambda theirs: theirs["num_attention_heads"]),
        Field("head_size", "head_dim", lambda theirs: theirs["hidden_size"] // theirs["num_attention_heads"]),
        Field("intermediate_size", "intermediate_size"),
        Field("norm_eps", "rms_norm_eps", 1e-6),
        Field("tie_embeddings", "tie_word_embeddings", False),
        Choice({"hidden_act": "silu"}, {("silu",): {}, ("swish",): {}}),
        Choice(
            {"attention_bias": False, "mlp_bias": False},
            {(False, False): {"bias": False, "attn_bias": False}, (True, True): {"bias": True}},
        ),
        Rope(),
    ),
    weights=RuleTable(
        rules=(
            Rule("transformer.wte.weight", "model.embed_tokens.weight"),
            Rule("lm_head.weight", "lm_head.weight"),
            Rule("transformer.ln_f.weight", "model.norm.weight"),
            Rule(f"{_OURS}.norm_1.weight", f"{_THEIRS}.input_layernorm.weight"),
            Rule(
                _OURS + ".attn.qkv.{p}",
                tuple(_THEIRS + f".self_attn.{name}_proj" + ".{p}" for name in ("q", "k", "v")),
                Concat(qkv_sizes),
            ),
            Rule(_OURS + ".attn.proj.{p}", _THEIRS + ".self_attn.o_proj.{p}"),
            Rule(f"{_OURS}.norm_2.weight", f"{_THEIRS}.post_attention_layernorm.weight"),
            Rule(_OURS + ".mlp.fc_1.{p}", _THEIRS + ".mlp.gate_proj.{p}"),
            Rule(_OURS + ".mlp.fc_2.{p}", _THEIRS + ".mlp.up_proj.{p}"),
            Rule(_OURS + ".mlp.proj.{p}", _THEIRS + ".mlp.down_proj.{p}"),
        ),
        ignored=(r".*\.rotary_emb\.inv_freq",),
    ),
)
