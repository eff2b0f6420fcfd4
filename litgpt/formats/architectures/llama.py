"""Llama (https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783) and what shares its class: TinyLlama,
SmolLM2, Vicuna, CodeLlama and many more; and `llama_like`, for the many architectures that differ from it in little."""

from collections.abc import Sequence
from typing import Any

from litgpt.formats.architecture import Architecture
from litgpt.formats.fields import Choice, ConfigField, Field, HFConfig, Implied, Rope, Vocabulary
from litgpt.formats.rules import Concat, Rule, RuleTable, qkv_sizes

OURS, THEIRS = "transformer.h.{layer}", "model.layers.{layer}"

NO_BIASES = Implied({"bias": False, "attn_bias": False, "attn_proj_bias": False, "mlp_bias": False})


def head_size(theirs: HFConfig) -> int:
    """The width of a head where `config.json` does not say it."""
    return theirs["hidden_size"] // theirs["num_attention_heads"]


def biases(qkv: bool = False, proj: bool = False, mlp: bool = False) -> dict[str, bool]:
    """Which linear layers have a bias, as fields of `Config`."""
    every = qkv and proj and mlp
    return {"bias": every, "attn_bias": qkv and not every, "attn_proj_bias": proj, "mlp_bias": mlp}


def attention_bias(default: bool = False, proj: bool = True) -> Choice:
    """An `attention_bias` that means queries, keys and values, and with `proj` the output projection, too."""
    return Choice({"attention_bias": default}, {(x,): biases(qkv=x, proj=x and proj) for x in (default, not default)})


PARTS: dict[str, ConfigField] = {
    "vocabulary": Vocabulary(),
    "context": Field("block_size", "max_position_embeddings", 2048),
    "width": Field("n_embd", "hidden_size"),
    "layers": Field("n_layer", "num_hidden_layers"),
    "heads": Field("n_head", "num_attention_heads"),
    "groups": Field("n_query_groups", "num_key_value_heads", lambda theirs: theirs["num_attention_heads"]),
    "head_size": Field("head_size", "head_dim", head_size),
    "inner": Field("intermediate_size", "intermediate_size"),
    "eps": Field("norm_eps", "rms_norm_eps", 1e-6),
    "tied": Field("tie_embeddings", "tie_word_embeddings", False),
    "activation": Choice({"hidden_act": "silu"}, {("silu",): {}, ("swish",): {}}),
    "biases": Choice(
        {"attention_bias": False, "mlp_bias": False},
        {(qkv, mlp): biases(qkv, qkv, mlp) for qkv in (False, True) for mlp in (False, True)},
    ),
    "rope": Rope(),
}
"""The entries of Llama's `config.json`."""

IMPLIED = {
    "norm_class_name": "RMSNorm",
    "norm_unit_offset": False,
    "mlp_class_name": "LLaMAMLP",
    "parallel_residual": False,
    "shared_attention_norm": False,
    "lm_head_bias": False,
}

RULES = (
    Rule("transformer.wte.weight", "model.embed_tokens.weight"),
    Rule("lm_head.{p}", "lm_head.{p}"),
    Rule("transformer.ln_f.{p}", "model.norm.{p}"),
    Rule(OURS + ".norm_1.{p}", THEIRS + ".input_layernorm.{p}"),
    Rule(
        OURS + ".attn.qkv.{p}",
        tuple(THEIRS + f".self_attn.{name}_proj" + ".{p}" for name in ("q", "k", "v")),
        Concat(qkv_sizes),
    ),
    Rule(OURS + ".attn.norm_q.weight", THEIRS + ".self_attn.q_norm.weight"),
    Rule(OURS + ".attn.norm_k.weight", THEIRS + ".self_attn.k_norm.weight"),
    Rule(OURS + ".attn.proj.{p}", THEIRS + ".self_attn.o_proj.{p}"),
    Rule(OURS + ".norm_2.{p}", THEIRS + ".post_attention_layernorm.{p}"),
    Rule(OURS + ".mlp.fc_1.{p}", THEIRS + ".mlp.gate_proj.{p}"),
    Rule(OURS + ".mlp.fc_2.{p}", THEIRS + ".mlp.up_proj.{p}"),
    Rule(OURS + ".mlp.proj.{p}", THEIRS + ".mlp.down_proj.{p}"),
)


def llama_like(
    name: str,
    model_type: str,
    *,
    implied: dict[str, Any] | None = None,
    extra: Sequence[ConfigField] = (),
    rules: Sequence[Rule] = (),
    ignored: Sequence[str] = (),
    defaults: dict[str, Any] | None = None,
    **changed: ConfigField,
) -> Architecture:
    """An architecture that is Llama but for what is given.

    Args:
        name: As in `architectures` of `config.json`.
        model_type: As in `model_type` there.
        implied: Fields of `Config` that the architecture itself says, besides and instead of Llama's.
        extra: Further entries of `config.json`.
        rules: Further rules; one for a tensor of ours, or of theirs, takes the place of Llama's.
        ignored: Further patterns of names that hold no weights.
        defaults: See `Architecture`.
        changed: Entries that take the place of those of `PARTS`.
    """
    unknown = set(changed) - set(PARTS)
    if unknown:
        raise TypeError(f"{name}: no such parts: {', '.join(sorted(unknown))}")
    taken = {side for rule in rules for ours in (True, False) for side in rule.side(ours)}
    kept = [rule for rule in RULES if taken.isdisjoint(rule.side(True) + rule.side(False))]
    return Architecture(
        name=name,
        model_type=model_type,
        config=(Implied(IMPLIED | (implied or {})), *(PARTS | changed).values(), *extra),
        weights=RuleTable(rules=(*kept, *rules), ignored=(r".*\.rotary_emb\.inv_freq", *ignored)),
        defaults=defaults or {},
    )


LLAMA = llama_like(
    "LlamaForCausalLM",
    "llama",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
)
