import ast
import inspect
import itertools
import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

from litgpt import config as config_module
from litgpt.cli.suggest import did_you_mean
from litgpt.config import Config, check_field_names

# The fields of model_config.yaml in LitGPT 0.5.13, in its order, with its values for a model whose figures are given.
CLASSIC = {
    "name": "",
    "hf_config": {},
    "block_size": 4096,
    "n_layer": 16,
    "n_embd": 4096,
    "vocab_size": 50254,
    "padding_multiple": 512,
    "padded_vocab_size": 50688,
    "norm_class_name": "LayerNorm",
    "norm_eps": 1e-5,
    "norm_qk": False,
    "norm_qk_type": "default",
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "parallel_residual": True,
    "shared_attention_norm": False,
    "n_head": 32,
    "head_size": 128,
    "n_query_groups": 32,
    "attn_bias": False,
    "attention_scores_scalar": None,
    "sliding_window_size": None,
    "sliding_window_indices": None,
    "attention_logit_softcapping": None,
    "rope_base": 10000,
    "rotary_percentage": 0.25,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "rope_interleave": False,
    "intermediate_size": 16384,
    "moe_intermediate_size": None,
    "bias": True,
    "mlp_class_name": "GptNeoxMLP",
    "gelu_approximate": "none",
    "n_expert": 0,
    "n_shared_expert": None,
    "n_expert_groups": None,
    "n_topk_groups": None,
    "n_topk_scores_per_group": None,
    "n_expert_per_token": 0,
    "first_k_dense_replace": None,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "scale_embeddings": False,
    "lm_head_bias": False,
    "final_logit_softcapping": None,
    "norm_1": True,
    "norm_2": True,
    "latent_attention": None,
    "rope_local_base_freq": None,
    "rope_indices": None,
}

SMALL = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 100, "padding_multiple": 64}


def test_written_fields_are_the_classic_ones_in_their_order():
    written = Config().to_dict()
    assert list(written.items()) == list(CLASSIC.items())


def test_derived_values():
    config = Config(**SMALL)
    assert (config.padded_vocab_size, config.head_size, config.n_query_groups) == (128, 16, 4)
    assert (config.intermediate_size, config.rope_n_elem) == (256, 4)
    # Fewer rows than tokens: the tokens beyond them cannot be used.
    assert Config(vocab_size=1000, padded_vocab_size=900).vocab_size == 900


def test_patterns_repeat_up_to_the_number_of_layers():
    assert Config(**SMALL, sliding_window_size=8, sliding_window_indices=[1, 0, 1]).sliding_window_indices == [
        1,
        0,
        1,
        1,
    ]
    assert Config(**SMALL, sliding_window_size=8, sliding_window_indices=[1] * 9).sliding_window_indices == [1] * 4
    assert Config(**SMALL, sliding_window_size=8).sliding_window_indices == [1] * 4
    assert Config(**SMALL, rope_local_base_freq=10).rope_indices == [1] * 4


def test_a_field_that_is_derived_holds_what_its_type_says_even_where_null_was_given():
    derived = [field for field in fields(Config) if field.default is None and isinstance(field.type, type)]
    assert {"head_size", "n_query_groups", "padded_vocab_size", "norm_affine", "router_scores"} <= {
        f.name for f in derived
    }
    config = Config(**{**SMALL, **dict.fromkeys((field.name for field in derived), None)})
    assert {field.name: type(getattr(config, field.name)) for field in derived} == {f.name: f.type for f in derived}


def test_latent_attention_decides_what_is_rotated():
    latent = {"kv_lora_rank": 8, "qk_rope_head_dim": 6, "qk_nope_head_dim": 4, "v_head_dim": 5}
    assert Config(**SMALL, latent_attention=latent).rope_n_elem == 6


def test_numbers_that_yaml_reads_as_text_or_fraction():
    config = Config(**{**SMALL, "norm_eps": "1e-6", "n_layer": 4.0, "rope_base": "1e6"})
    assert (config.norm_eps, config.n_layer, config.rope_base) == (1e-6, 4, 1e6)
    assert isinstance(config.n_layer, int)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"n_embd": 100, "n_head": 32}, ["n_head=32", "100", "head_size"]),
        ({"n_query_groups": 5}, ["n_query_groups=5", "n_head=32"]),
        ({"n_layer": 2.5}, ["n_layer=2.5", "int"]),
        ({"n_layer": 0}, ["n_layer=0", "positive"]),
        ({"bias": "no"}, ["bias='no'", "bool"]),
        ({"name": 3}, ["name=3", "str"]),
        ({"norm_eps": "small"}, ["norm_eps='small'"]),
        ({"norm_class_name": "RMSnorm"}, ["norm_class_name='RMSnorm'", "'RMSNorm'"]),
        ({"mlp_class_name": "LlamaMLP"}, ["mlp_class_name='LlamaMLP'", "Did you mean 'LLaMAMLP'"]),
        ({"mlp_class_name": "LLaMAMLP"}, ["intermediate_size=None", "LLaMAMLP"]),
        ({"gelu_approximate": "tan"}, ["gelu_approximate='tan'", "tanh"]),
        ({"norm_qk_type": "full"}, ["norm_qk_type='full'", "olmo2"]),
        ({"rotary_percentage": 1.5}, ["rotary_percentage=1.5", "between 0 and 1"]),
        ({"rotary_percentage": 0.01}, ["rotary_percentage=0.01", "even"]),
        ({"sliding_window_indices": [1]}, ["sliding_window_size=None"]),
        ({"sliding_window_size": 4, "sliding_window_indices": [2]}, ["sliding_window_indices=[2]", "0 and 1"]),
        ({"rope_indices": [1, 0]}, ["rope_local_base_freq=None"]),
        (
            {"rope_adjustments": {"factor": 8, "low_freq_facto": 1}},
            ["low_freq_facto", "Did you mean 'low_freq_factor'"],
        ),
        ({"latent_attention": {"kv_lora": 3}}, ["kv_lora", "Did you mean 'kv_lora_rank'"]),
        ({"latent_attention": {"q_lora_rank": 3}}, ["kv_lora_rank=None"]),
        ({"shared_attention_norm": True, "parallel_residual": False}, ["shared_attention_norm=True"]),
        ({"norm_unit_offset": True}, ["norm_unit_offset=True", "LayerNorm"]),
        ({"mlp_class_name": "LLaMAMoE", "intermediate_size": 8}, ["n_expert=0"]),
        (
            {"mlp_class_name": "LLaMAMoE", "intermediate_size": 8, "n_expert": 4, "n_expert_per_token": 5},
            ["n_expert_per_token=5", "4"],
        ),
        (
            {
                "mlp_class_name": "LLaMAMoE",
                "intermediate_size": 8,
                "n_expert": 8,
                "n_expert_per_token": 2,
                "n_expert_groups": 3,
            },
            ["n_expert_groups=3", "n_expert=8"],
        ),
        (
            {
                "mlp_class_name": "LLaMAMoE",
                "intermediate_size": 8,
                "n_expert": 8,
                "n_expert_per_token": 2,
                "n_expert_groups": 4,
            },
            ["n_topk_groups=None"],
        ),
    ],
)
def test_a_wrong_value_names_field_value_and_remedy(values, parts):
    with pytest.raises(ValueError) as error:
        Config(**values)
    for part in parts:
        assert part in str(error.value)


def test_names_resolve_in_every_form_and_case():
    for name in ("meta-llama/Meta-Llama-3-8B", "Llama-3-8B", "llama-3-8b", "Meta-Llama-3-8B"):
        config = Config.from_name(name)
        assert (config.name, config.n_query_groups, config.rope_base) == ("Llama-3-8B", 8, 500000)
        assert config.hf_config == {"org": "meta-llama", "name": "Meta-Llama-3-8B"}


def test_overrides_replace_fields_and_leave_the_known_ones_alone():
    small = Config.from_name("Gemma-2-2b", n_layer=3, name="mine")
    assert (small.n_layer, small.sliding_window_indices, small.name) == (3, [1, 0, 1], "mine")
    assert small.norm_unit_offset, "the new name must not change the mathematics"
    adjusted = Config.from_name("Llama-3.2-1B")
    adjusted.rope_adjustments["factor"] = 1.0
    assert Config.from_name("Llama-3.2-1B").rope_adjustments["factor"] == 32.0


def test_unknown_names_and_fields_get_near_matches():
    with pytest.raises(ValueError, match="Did you mean 'pythia-14m'"):
        Config.from_name("pythia-14")
    with pytest.raises(ValueError, match="Did you mean 'EleutherAI/pythia-14m'"):
        Config.from_name("EleutherAI/pythia-14")
    with pytest.raises(ValueError, match=r"no model field 'n_layers'\. Did you mean 'n_layer'"):
        Config.from_name("pythia-14m", n_layers=3)
    with pytest.raises(ValueError, match="model_config: there is no model field 'n_emb'"):
        check_field_names(["n_layer", "n_emb"], "model_config")


def test_did_you_mean_says_nothing_where_nothing_is_near():
    assert did_you_mean("xyz", ["alpha", "beta"]) == ""
    assert did_you_mean("alpah", ["alpha", "beta"]) == " Did you mean 'alpha'?"


@pytest.mark.parametrize("name", ["pythia-14m", "Gemma-3-1b-it", "OLMo-1B-hf", "Llama-3.2-1B", "Qwen3-30B-A3B"])
def test_a_saved_file_has_only_classic_fields_and_reads_back(name, tmp_path):
    config = Config.from_name(name)
    config.save(tmp_path)
    written = yaml.safe_load((tmp_path / "model_config.yaml").read_text())
    assert list(written) == list(CLASSIC), "LitGPT 0.5.13 refuses fields it does not know"
    assert Config.from_checkpoint(tmp_path, tie_embeddings=config.tie_embeddings) == config


def test_newer_fields_are_written_only_where_they_differ(tmp_path):
    gemma = Config.from_name("Gemma-2b", name="my-model")
    assert gemma.to_dict()["norm_unit_offset"] is True, "the name no longer says it"
    gemma.save(tmp_path)
    assert Config.from_checkpoint(tmp_path, tie_embeddings=True) == gemma
    llama = Config.from_name("Llama-3.2-1B", name="Gemma-distilled-Llama")
    assert llama.norm_unit_offset is False
    assert llama.to_dict()["norm_unit_offset"] is False
    assert "tie_embeddings" not in Config(tie_embeddings=True).to_dict()


def test_the_name_stands_in_for_what_a_classic_file_cannot_say():
    assert Config(name="CodeGemma-x", norm_class_name="RMSNorm").norm_unit_offset
    assert not Config(name="mygemma", norm_class_name="RMSNorm").norm_unit_offset
    assert not Config(name="OLMo-x").norm_affine
    assert Config(name="OLMo-2", norm_class_name="RMSNorm").norm_affine


def test_bad_files_are_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model_config\.yaml"):
        Config.from_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.yaml"):
        Config.from_file(tmp_path / "nothing.yaml")
    file = tmp_path / "model_config.yaml"
    file.write_text("n_layer: 2\nn_emb: 4\n")
    with pytest.raises(ValueError, match=r"model_config\.yaml: there is no model field 'n_emb'. Did you mean 'n_embd'"):
        Config.from_checkpoint(tmp_path)
    file.write_text("- 1\n")
    with pytest.raises(ValueError, match=r"model_config\.yaml' is a list"):
        Config.from_file(file)
    file.write_text("a: [1\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        Config.from_file(file)


def test_every_field_has_a_help_text():
    """The string under a field is its help on the command line."""
    body = next(
        node.body
        for node in ast.parse(inspect.getsource(config_module)).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    )
    documented = {
        first.target.id
        for first, second in itertools.pairwise(body)
        if isinstance(first, ast.AnnAssign)
        and isinstance(second, ast.Expr)
        and isinstance(second.value, ast.Constant)
        and isinstance(second.value.value, str)
    }
    assert documented == {field.name for field in fields(Config)}


def test_importing_the_config_does_not_import_torch():
    code = "import sys, litgpt.config, litgpt.catalog as m; m.known_checkpoints(); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
