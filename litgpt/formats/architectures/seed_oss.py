"""Seed-OSS (https://github.com/ByteDance-Seed/seed-oss): Llama, with a switch of its own for every kind of bias."""

from itertools import product

from litgpt.formats.architectures.llama import biases, llama_like
from litgpt.formats.fields import Choice, Field

SEED_OSS = llama_like(
    "SeedOssForCausalLM",
    "seed_oss",
    context=Field("block_size", "max_position_embeddings", 524288),
    groups=Field("n_query_groups", "num_key_value_heads", 8),
    head_size=Field("head_size", "head_dim", 128),
    biases=Choice(
        {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
        {each: biases(*each) for each in product((True, False), repeat=3)},
    ),
)
