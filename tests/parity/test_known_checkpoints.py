"""The known checkpoints are the models that transformers makes of their config.json."""

import pytest
import torch
import transformers

from litgpt import catalog as models
from litgpt.catalog import KnownCheckpoint, known_checkpoints
from litgpt.config import Config
from litgpt.formats.hf_config import config_from_hf, config_to_hf
from litgpt.model import GPT
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model

LABELS = {"name", "hf_config", "block_size", "vocab_size", "rope_base", "sliding_window_size"}


def shapes() -> list[str]:
    """The first checkpoint of each shape."""
    first = {}
    for repo_id, known in known_checkpoints().items():
        figures = {key: value for key, value in vars(Config.from_name(repo_id)).items() if key not in LABELS}
        first.setdefault(f"{known.architecture} {figures}", repo_id)
    return list(first.values())


@pytest.mark.parametrize("repo_id", shapes())
def test_same_number_of_unique_parameters(repo_id, monkeypatch):
    """With four of the layers that repeat, after the dense ones of a mixture of experts."""
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
    architecture = known_checkpoints()[repo_id].architecture
    usual = Config.from_name(repo_id)
    config = Config(**{**vars(usual), "n_layer": (usual.first_k_dense_replace or 0) + 4})
    config_json = config_to_hf(config, architecture)
    with torch.device("meta"):
        theirs = getattr(transformers, architecture)(transformers.AutoConfig.for_model(**config_json))
        ours = GPT(config)
    assert ours.num_parameters() == sum(p.numel() for p in theirs.parameters())
    assert config.tie_embeddings == (theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight)


def test_without_a_config_json_the_name_says_how_the_weights_are_held(tmp_path, monkeypatch):
    """Phi-4 computes what a Llama computes, from weights of other names and shapes."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    reference = transformers.Phi3ForCausalLM(
        transformers.Phi3Config(**sizes, vocab_size=64, pad_token_id=0, eos_token_id=1)
    ).eval()
    reference.save_pretrained(tmp_path)
    config = config_from_hf(reference.config.to_dict() | {"architectures": ["Phi3ForCausalLM"]}, "Tiny-Phi")
    assert config_to_hf(config)["architectures"] == ["LlamaForCausalLM"]
    entry = KnownCheckpoint("org/Tiny-Phi", "Tiny-Phi", "phi", "Phi", "Phi3ForCausalLM", None, 0, "Phi4", vars(config))
    monkeypatch.setattr(models, "known_checkpoints", lambda: {entry.repo_id: entry})
    (tmp_path / "config.json").unlink()
    model = load_model(open_checkpoint(tmp_path, "Tiny-Phi"), dtype=torch.float32)
    idx = torch.randint(64, (2, 9))
    with torch.inference_mode():
        assert (model(idx) - reference(idx).logits).abs().max() < 1e-5
