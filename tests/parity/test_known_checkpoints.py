"""The known checkpoints are the models that transformers makes of their config.json."""

import pytest
import torch
import transformers

from litgpt.config import Config
from litgpt.convert.hf_config import config_to_hf
from litgpt.model import GPT
from litgpt.models import known_checkpoints

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
