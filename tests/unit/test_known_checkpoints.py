import time

import pytest
import torch

from litgpt import models
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.models import find_known, known_checkpoints


def architecture(config: Config) -> str:
    """All that decides the number of parameters (and a little more)."""
    labels = {"name", "hf_config", "block_size", "rope_base", "vocab_size", "sliding_window_size"}
    return str({key: value for key, value in vars(config).items() if key not in labels})


@pytest.fixture(scope="module")
def counts():
    return {}


@pytest.mark.parametrize("repo_id", list(known_checkpoints()))
def test_number_of_parameters(repo_id, counts, monkeypatch):
    """Each entry, built on the meta device, has the parameters recorded for it (untied head, padded vocabulary)."""
    monkeypatch.setattr(
        torch.nn.Linear, "reset_parameters", lambda self: None
    )  # nothing to fill, and thousands of them
    known = known_checkpoints()[repo_id]
    config = Config.from_name(repo_id)
    key = architecture(config)
    if key not in counts:
        with torch.device("meta"):
            counts[key] = GPT(config).num_parameters()
    assert counts[key] == known.parameters


def test_all_of_them_are_there():
    known = known_checkpoints()
    assert len(known) == 210
    assert len({entry.name for entry in known.values()}) == 210
    assert {entry.family for entry in known.values()} >= {"llama_2", "pythia", "gemma", "qwen3", "mistral"}


@pytest.mark.parametrize("repo_id", list(known_checkpoints()))
def test_both_names_lead_to_it(repo_id):
    entry = known_checkpoints()[repo_id]
    assert find_known(repo_id) is find_known(entry.name) is find_known(entry.name.upper()) is entry
    assert Config.from_name(entry.name).name == entry.name
    assert "/".join(Config.from_name(repo_id).hf_config[key] for key in ("org", "name")) == repo_id


def test_listing_is_quick():
    models.known_checkpoints.cache_clear()
    start = time.perf_counter()
    known_checkpoints()
    assert time.perf_counter() - start < 0.5, "0.03 s on an idle machine"


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
        "prompt_style": "Default",
        "config": {"n_layer": 2, "n_embd": 2, "n_head": 2},
        "sizes": {"1B": {"parameters": 5, "n_embd": 3, "n_head": 3}},
        "checkpoints": {"org/a": "1B", "org/b": {"size": "1B", "name": "c", "prompt_style": "Phi1", "n_head": 4}},
    }
    content = {"config": {"n_layer": 1, "bias": False}, "groups": [group]}
    a, b = models._read_family("family", content)
    assert (a.repo_id, a.name, a.family, a.parameters, a.prompt_style) == ("org/a", "a", "family", 5, "Default")
    figures = {"bias": False, "n_layer": 2, "n_embd": 3, "n_head": 3}
    assert a.config == {"name": "a", "hf_config": {"org": "org", "name": "a"}, **figures}
    assert (b.name, b.prompt_style) == ("c", "Phi1")
    assert b.config == {"name": "c", "hf_config": {"org": "org", "name": "b"}, **figures, "n_head": 4}
