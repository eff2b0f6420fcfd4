"""Rule tables and the map of config.json: one definition, both directions."""

import pytest
import torch

from litgpt.config import Config
from litgpt.formats.architectures import ARCHITECTURES
from litgpt.formats.hf_config import config_from_hf, config_to_hf
from litgpt.formats.rules import Concat, InterleavedQKV, Rule, RuleTable, qkv_sizes
from litgpt.sources.fit import compare_shapes
from litgpt.sources.meta import shapes_of

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "hidden_act": "gelu",
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
}
GQA = Config(n_embd=12, n_head=4, n_query_groups=2, head_size=3, n_layer=1)


# --- transforms


def test_queries_keys_and_values_are_stacked():
    q, k, v = torch.randn(12, 5), torch.randn(6, 5), torch.randn(6, 5)
    (qkv,) = Concat(qkv_sizes).to_ours([q, k, v], GQA)
    assert torch.equal(qkv, torch.cat([q, k, v]))
    assert all(map(torch.equal, Concat(qkv_sizes).to_theirs([qkv], GQA), [q, k, v]))


def test_interleaved_groups_are_sorted_into_queries_keys_and_values():
    # Two groups, each of two query heads, a key and a value; the number says which row it is.
    rows = [f"g{g} {part} {i}" for g in range(2) for part in ("q0", "q1", "k", "v") for i in range(3)]
    theirs = torch.arange(len(rows))[:, None]
    (ours,) = InterleavedQKV().to_ours([theirs], GQA)
    order = [rows[i] for i in ours.flatten()]
    assert order[:6] == ["g0 q0 0", "g0 q0 1", "g0 q0 2", "g0 q1 0", "g0 q1 1", "g0 q1 2"]
    assert order[12:15] == ["g0 k 0", "g0 k 1", "g0 k 2"]
    assert order[18:] == ["g0 v 0", "g0 v 1", "g0 v 2", "g1 v 0", "g1 v 1", "g1 v 2"]
    assert torch.equal(InterleavedQKV().to_theirs([ours], GQA)[0], theirs)


@pytest.mark.parametrize("given", [LLAMA, NEOX, LLAMA | {"attention_bias": True, "mlp_bias": True}])
def test_every_weight_goes_there_and_back(given):
    table = ARCHITECTURES[given["architectures"][0]].weights
    config = config_from_hf(given)
    ours = {name: torch.randn(like.shape) for name, like in shapes_of(config).items()}
    theirs = dict(table.to_theirs(ours.items(), config))
    again = dict(table.to_ours(theirs.items(), config))
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_pieces_are_put_together_in_any_order():
    table = ARCHITECTURES["LlamaForCausalLM"].weights
    config = config_from_hf(LLAMA)
    ours = {name: torch.randn(like.shape) for name, like in shapes_of(config).items()}
    theirs = list(table.to_theirs(ours.items(), config))
    again = dict(table.to_ours(sorted(theirs, key=lambda pair: pair[0][::-1]), config))
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_input_is_handed_back_when_its_result_was_consumed():
    table = ARCHITECTURES["LlamaForCausalLM"].weights
    config = config_from_hf(LLAMA)
    theirs = dict(table.to_theirs(shapes_of(config).items(), config))
    done = []
    consumed = 0
    for name, _ in table.to_ours(theirs.items(), config, done.append):
        assert len(done) == consumed, name
        consumed += 3 if "qkv" in name else 1
    assert len(done) == len(theirs)


def test_what_no_rule_knows_and_what_never_came_is_listed_together():
    table = RuleTable((Rule("a.{layer}.qkv", ("b.{layer}.q", "b.{layer}.k"), Concat(qkv_sizes)),))
    with pytest.raises(ValueError, match=r"(?s)no rule for other.*no rule for b\.x\.q.*a\.0\.qkv") as info:
        list(table.to_ours([("other", torch.ones(1)), ("b.x.q", torch.ones(1)), ("b.0.q", torch.ones(1))], GQA))
    assert "b.0" not in str(info.value)


def test_shapes_are_compared_all_at_once():
    wanted = {"a": torch.empty(2, 3), "b": torch.empty(4), "c": torch.empty(1)}
    found = {"a": torch.empty(3, 2), "c": torch.empty(1), "d": torch.empty(5)}
    lines = compare_shapes(wanted, found, "config.json", "the files")
    assert len(lines) == 3
    text = "\n".join(lines)
    assert "missing: b [4]" in text
    assert "unexpected: d [5]" in text
    assert "wrong shape: a is [3, 2] in the files, [2, 3] in config.json" in text


# --- config.json


def test_llama_figures():
    config = config_from_hf(LLAMA, "someone/My-Model")
    assert (config.name, config.padded_vocab_size, config.vocab_size, config.block_size) == ("My-Model", 64, 64, 128)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_query_groups, config.head_size) == (2, 32, 4, 2, 8)
    assert (config.norm_class_name, config.mlp_class_name, config.intermediate_size) == ("RMSNorm", "LLaMAMLP", 48)
    assert (config.rope_base, config.rotary_percentage, config.norm_eps) == (500000, 1.0, 1e-5)
    assert (config.bias, config.parallel_residual, config.tie_embeddings) == (False, False, False)
    assert config_from_hf(LLAMA | {"head_dim": 16}).head_size == 16
    assert config_from_hf({**LLAMA, "num_key_value_heads": None}).n_query_groups == 4
    assert config_from_hf(LLAMA | {"tie_word_embeddings": True}).tie_embeddings
    assert config_from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True}).bias


def test_neox_figures():
    config = config_from_hf(NEOX)
    assert (config.rotary_percentage, config.parallel_residual, config.bias) == (0.25, True, True)
    assert (config.norm_class_name, config.mlp_class_name, config.gelu_approximate) == (
        "LayerNorm",
        "GptNeoxMLP",
        "none",
    )
    assert config_from_hf(NEOX | {"hidden_act": "gelu_fast"}).gelu_approximate == "tanh"
    assert not config_from_hf(NEOX | {"use_parallel_residual": False}).parallel_residual


NEW = {"rope_theta": None, "rotary_pct": None, "rotary_emb_base": None}


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [
        (LLAMA, {"rope_theta": 1e6}, {"rope_theta": 1e6, "rope_type": "default"}),
        (
            LLAMA,
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
        ),
        (
            LLAMA,
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            {
                "rope_theta": 5e5,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            LLAMA,
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
            {"rope_theta": 5e5, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (
            NEOX,
            {"rotary_pct": 0.5, "rotary_emb_base": 5000},
            {"rope_theta": 5000, "partial_rotary_factor": 0.5, "rope_type": "default"},
        ),
    ],
    ids=["theta", "linear", "llama3", "yarn", "partial"],
)
def test_both_spellings_of_the_rotary_embedding_mean_the_same(base, old, new):
    one, other = config_from_hf(base | old), config_from_hf(base | NEW | {"rope_parameters": new})
    assert one == other
    assert one != config_from_hf(base)
    assert config_from_hf(config_to_hf(one), one.name) == one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2}}, "needs 'low_freq_factor'"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "full_attention, sliding_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match="cannot be used") as info:
        config_from_hf(LLAMA | change)
    assert message in str(info.value)


def test_all_refusals_come_at_once():
    with pytest.raises(ValueError, match=r"hidden_act='relu'.*attention_bias='yes'.*'dynamic'"):
        config_from_hf(
            LLAMA | {"hidden_act": "relu", "attention_bias": "yes", "rope_scaling": {"type": "dynamic", "factor": 2}}
        )


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*Supported: .*GPTNeoXForCausalLM.*LlamaForCausalLM"):
        config_from_hf({"architectures": ["MambaForCausalLM"]})
    with pytest.raises(ValueError, match="model_type 'mamba'"):
        config_from_hf({"model_type": "mamba"})
    with pytest.raises(ValueError, match=r"\(MambaForCausalLM\)"):
        config_from_hf({"architectures": "MambaForCausalLM", "model_type": "mamba"})
    assert config_from_hf({**LLAMA, "architectures": None}).n_layer == 2


def test_a_known_checkpoint_keeps_its_names_and_number_of_tokens():
    figures = {"vocab_size": 50304, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6}
    given = NEOX | figures | {"max_position_embeddings": 512}
    for name in ("EleutherAI/pythia-14m", "my-folder/pythia-14m"):
        config = config_from_hf(given, name)
        assert config == Config.from_name("pythia-14m")
        assert config.hf_config == {"org": "EleutherAI", "name": "pythia-14m"}
        assert (config.vocab_size, config.padded_vocab_size) == (50254, 50304)
    assert config_from_hf(given | {"num_hidden_layers": 3}, "EleutherAI/pythia-14m").n_layer == 3
    assert config_from_hf(given | {"vocab_size": 60000}, "EleutherAI/pythia-14m").vocab_size == 60000


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "pythia-160m", "SmolLM2-135M", "tiny-llama-1.1b", "LLaMA-2-7B-32K"])
def test_known_configurations_survive_the_way_to_hugging_face_and_back(name):
    config = Config.from_name(name)
    assert config_from_hf(config_to_hf(config), name) == config


def test_a_model_that_no_architecture_can_express_is_refused_with_reasons():
    with pytest.raises(
        ValueError, match=r"No class of transformers fits; the nearest is GPTNeoXForCausalLM:\n"
    ) as info:
        config_to_hf(Config(n_embd=32, n_head=4, n_layer=1, final_logit_softcapping=30.0))
    assert "final_logit_softcapping=30.0" in str(info.value)
    with pytest.raises(ValueError, match=r"rotary_percentage=0\.5"):
        config_to_hf(Config(**{**vars(config_from_hf(LLAMA)), "rotary_percentage": 0.5}), "LlamaForCausalLM")
