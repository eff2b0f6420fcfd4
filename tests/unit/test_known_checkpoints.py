import csv
from pathlib import Path

import pytest
import torch
import yaml

from litgpt import catalog as models
from litgpt.catalog import find_known, known_checkpoints
from litgpt.config import Config
from litgpt.formats.architectures import ARCHITECTURES
from litgpt.formats.hf_config import config_from_hf, config_to_hf, differences
from litgpt.model import GPT

PUBLISHED = Path(__file__).with_name("published_figures.csv")
KNOWN = list(known_checkpoints())


@pytest.fixture(autouse=True)
def nothing_to_fill(monkeypatch):
    """Building a model on the meta device is quicker without initialising its linear layers, which are thousands."""
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)


@pytest.fixture(scope="module")
def counts():
    """Numbers of parameters by shape: most shapes are those of several checkpoints."""
    return {}


def count(config: Config) -> int:
    with torch.device("meta"):
        return GPT(config).num_parameters()


def count_by_layers(config: Config) -> int:
    """The same from models with one and two of the layers that repeat."""
    dense = config.first_k_dense_replace or 0
    one, two = (count(Config(**{**vars(config), "n_layer": dense + more})) for more in (1, 2))
    return one + (two - one) * (config.n_layer - dense - 1)


@pytest.mark.parametrize("repo_id", KNOWN)
def test_number_of_parameters(repo_id, counts):
    """Each entry has the published number: a tied head counts once, the embedding has the rows of config.json."""
    config = Config.from_name(repo_id)
    labels = {"name", "hf_config", "block_size", "vocab_size", "rope_base", "rope_adjustments", "sliding_window_size"}
    shape = str({key: value for key, value in vars(config).items() if key not in labels})
    if shape not in counts:
        counts[shape] = count_by_layers(config)
    assert counts[shape] == known_checkpoints()[repo_id].parameters


@pytest.mark.parametrize("name", ["pythia-14m", "SmolLM2-135M", "Qwen3-0.6B", "DeepSeek-V2-Lite"])
def test_counting_by_layers_equals_counting_all(name):
    config = Config.from_name(name)
    assert count_by_layers(config) == count(config)


def test_figures_are_the_published_ones():
    """Against the config.json files of the checkpoints, where these were read."""
    with PUBLISHED.open(newline="") as file:
        rows = [{key: yaml.safe_load(value) for key, value in row.items()} for row in csv.DictReader(file)]
    wrong = []
    for row in rows:
        repo_id = row.pop("repo_id")
        parameters = row.pop("parameters")
        config = Config.from_name(repo_id)
        wrong += [
            (repo_id, key, getattr(config, key), value) for key, value in row.items() if getattr(config, key) != value
        ]
        wrong += [(repo_id, parameters)] * (known_checkpoints()[repo_id].parameters != parameters)
    assert not wrong
    assert len(rows) == 70


def test_all_of_them_are_there():
    known = known_checkpoints()
    assert len(known) == len({entry.name.lower() for entry in known.values()}) == 236
    assert {entry.family for entry in known.values()} >= {"llama_2", "pythia", "gemma", "qwen3", "mistral"}


@pytest.mark.parametrize("repo_id", KNOWN)
def test_a_config_json_says_it_all(repo_id):
    """Each entry can be written for its architecture, or for any that fits, and reads back as what it was."""
    known, config = known_checkpoints()[repo_id], Config.from_name(repo_id)
    assert known.architecture in ARCHITECTURES
    for config_json in (config_to_hf(config, known.architecture), config_to_hf(config)):
        again = config_from_hf(config_json, repo_id)
        assert not differences(again, config)
        labels = [(each.name, each.block_size, each.vocab_size) for each in (again, config)]
        assert labels[0] == labels[1]


@pytest.mark.parametrize("repo_id", KNOWN)
def test_both_names_lead_to_it(repo_id):
    entry = known_checkpoints()[repo_id]
    assert find_known(repo_id) is find_known(entry.name) is find_known(entry.name.upper()) is entry
    assert Config.from_name(entry.name).name == entry.name
    assert "/".join(Config.from_name(repo_id).hf_config[key] for key in ("org", "name")) == repo_id


def test_listing_parses_each_file_once_and_in_c(monkeypatch):
    """What makes it quick (0.03 s): Python's own parser of YAML takes ten times as long, a Config for each more yet."""
    loaders, real = [], yaml.load
    monkeypatch.setattr(yaml, "load", lambda file, Loader: loaders.append(Loader) or real(file, Loader=Loader))
    monkeypatch.setattr(Config, "__post_init__", lambda self: pytest.fail("a Config was made"))
    models.known_checkpoints.cache_clear()
    assert known_checkpoints() is known_checkpoints()
    assert len(loaders) == len(list(models.MODELS_DIR.glob("*.yaml")))
    assert set(loaders) == {yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader}


@pytest.mark.parametrize("version", ["v0.2", "v0.3"])
@pytest.mark.parametrize("kind", ["", "-Instruct"])
def test_mistral_has_the_base_of_its_release(version, kind):
    assert Config.from_name(f"Mistral-7B{kind}-{version}").rope_base == 1000000


def test_some_figures_by_hand():
    gemma = Config.from_name("google/gemma-3-1b-it")
    assert gemma.sliding_window_indices == ([1, 1, 1, 1, 1, 0] * 5)[:26] == gemma.rope_indices
    assert (gemma.norm_unit_offset, gemma.scale_embeddings, gemma.attention_scores_scalar) == (True, True, 256)
    olmo = Config.from_name("OLMo-1B-hf")
    assert (olmo.norm_affine, olmo.norm_class_name) == (False, "LayerNorm")
    assert find_known("Llama-2-7b-chat-hf").prompt_style == "Llama2"
    assert find_known("Mixtral-8x7B-v0.1").parameters == 46702792704
    assert Config.from_name("Qwen2.5-14B-Instruct").norm_eps == 1e-6
    granite = Config.from_name("granite-3.3-8b-instruct")
    assert granite.attention_scores_scalar**-0.5 == 0.0078125
    assert granite.to_dict()["logits_scaling"] == 16
    assert Config.from_name("SmolLM3-3B").nope_indices == [0, 0, 0, 1] * 9
    assert Config.from_name("gpt-oss-20b").sliding_window_indices == [1, 0] * 12
    olmo_3 = Config.from_name("Olmo-3-1025-7B")
    assert olmo_3.rope_indices == olmo_3.sliding_window_indices == [1, 1, 1, 0] * 8
    assert len(Config.from_name("Phi-3.5-mini-instruct").rope_adjustments["long_factor"]) == 48


@pytest.mark.parametrize(
    ("name", "license"),
    [
        ("Llama-3.1-8B", "llama3.1"),
        ("Llama-3.3-70B-Instruct", "llama3.3"),
        ("R1-Distill-Llama-8B", "mit"),
        ("Qwen2.5-3B", "qwen-research"),
        ("Qwen2.5-7B", "apache-2.0"),
        ("Qwen2.5-72B", "qwen"),
        ("falcon-40b", "apache-2.0"),
        ("falcon-180B", None),
    ],
)
def test_licences(name, license):
    assert find_known(name).license == license


NORMS, BIASED_NORMS = "norm_1.weight norm_2.weight", "norm_1.weight norm_1.bias norm_2.weight norm_2.bias"
GATED, PLAIN = "mlp.fc_1.weight mlp.fc_2.weight mlp.proj.weight", "mlp.fc.weight mlp.proj.weight"
BLOCK_NAMES = {  # of one layer, as in LitGPT 0.5.13
    "pythia-14m": f"{BIASED_NORMS} attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias {PLAIN} mlp.fc.bias mlp.proj.bias",
    "phi-2": f"norm_1.weight norm_1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias {PLAIN} mlp.fc.bias mlp.proj.bias",
    "falcon-7b": f"norm_1.weight norm_1.bias attn.qkv.weight attn.proj.weight {PLAIN}",
    "Llama-3.2-1B": f"{NORMS} attn.qkv.weight attn.proj.weight {GATED}",
    "Qwen2.5-0.5B": f"{NORMS} attn.qkv.weight attn.qkv.bias attn.proj.weight {GATED}",
    "Qwen3-0.6B": f"{NORMS} attn.qkv.weight attn.proj.weight attn.norm_q.weight attn.norm_k.weight {GATED}",
    "OLMo-1B-hf": f"attn.qkv.weight attn.proj.weight {GATED}",
    "OLMo-2-1124-7B": (
        f"attn.qkv.weight attn.proj.weight attn.norm_q.weight attn.norm_k.weight {GATED} "
        "post_attention_norm.weight post_mlp_norm.weight"
    ),
    "Gemma-2-2b": f"{NORMS} attn.qkv.weight attn.proj.weight {GATED} post_attention_norm.weight post_mlp_norm.weight",
    "Mixtral-8x7B-v0.1": f"{NORMS} attn.qkv.weight attn.proj.weight mlp.gate.weight "
    + " ".join(f"mlp.experts.{e}.{layer}.weight" for e in range(8) for layer in ("fc_1", "fc_2", "proj")),
}
OUTER_NAMES = {
    "pythia-14m": "lm_head.weight transformer.wte.weight transformer.ln_f.weight transformer.ln_f.bias",
    "phi-2": "lm_head.weight lm_head.bias transformer.wte.weight transformer.ln_f.weight transformer.ln_f.bias",
    "falcon-7b": "lm_head.weight transformer.wte.weight transformer.ln_f.weight transformer.ln_f.bias",
    "OLMo-1B-hf": "lm_head.weight transformer.wte.weight",
}


@pytest.mark.parametrize("name", BLOCK_NAMES)
def test_names_of_the_weights(name):
    with torch.device("meta"):
        names = set(GPT(Config.from_name(name, n_layer=1)).state_dict())
    outer = OUTER_NAMES.get(name, "lm_head.weight transformer.wte.weight transformer.ln_f.weight")
    assert names == {*outer.split(), *(f"transformer.h.0.{part}" for part in BLOCK_NAMES[name].split())}


def test_inner_levels_of_a_family_file_win():
    group = {
        "license": "mit",
        "config": {"n_layer": 2, "n_embd": 2, "n_head": 2},
        "sizes": {"1B": {"parameters": 5, "n_embd": 3, "n_head": 3}, "2B": {"parameters": 6, "license": "gemma"}},
        "checkpoints": {
            "org/a": "1B",
            "org/b": {"size": "1B", "name": "c", "license": "llama2", "prompt_style": "Phi1", "n_head": 4},
            "org/d": "2B",
        },
    }
    file = {
        "architecture": "Llama",
        "license": "apache-2.0",
        "config": {"n_layer": 1, "bias": False},
        "groups": [group],
    }
    a, b, d = models._read_family("family", file)
    assert (a.repo_id, a.name, a.family, a.series) == ("org/a", "a", "family", "family")
    assert (a.architecture, a.license, a.parameters, a.prompt_style) == ("Llama", "mit", 5, "Default")
    figures = {"bias": False, "n_layer": 2, "n_embd": 3, "n_head": 3}
    assert a.config == {"name": "a", "hf_config": {"org": "org", "name": "a"}, **figures}
    assert (b.name, b.license, b.prompt_style) == ("c", "llama2", "Phi1")
    assert b.config == {"name": "c", "hf_config": {"org": "org", "name": "b"}, **figures, "n_head": 4}
    assert (d.license, d.parameters, d.config["n_embd"]) == ("gemma", 6, 2)
