import time

import pytest
import torch

from litgpt import config as config_module
from litgpt.config import Config, find_known, known_checkpoints
from litgpt.model import GPT


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
    config_module.known_checkpoints.cache_clear()
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
