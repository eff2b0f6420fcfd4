"""What is written here, read by LitGPT 0.5.13: `LITGPT_PEER` is its command in an environment of its own."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from litgpt.checkpoint import CONFIG, save_model
from litgpt.config import Config
from litgpt.sources.checkpoint import open_checkpoint

from . import test_architectures as architectures

# By these parts of a name it tells how the norms of a family work.
NAMES = {"Gemma": "Gemma", "Gemma2": "Gemma-2", "Gemma3": "Gemma-3", "Olmo": "OLMo"}
# It blends YaRN's frequencies the other way round, and passes over what it does not know in rope_adjustments.
OTHER_ROPE = ("beta_fast", "short_factor")
SCRIPT = """
import json, sys, torch
from pathlib import Path
from litgpt.config import Config
from litgpt.model import GPT
root = Path(sys.argv[1])
for directory in json.loads(sys.argv[2]):
    model = GPT(Config.from_file(root / directory / "model_config.yaml")).eval()
    model.load_state_dict(torch.load(root / directory / "lit_model.pth", weights_only=True))
    with torch.inference_mode():
        torch.save(model(torch.load(root / "tokens.pt")), root / directory / "peer.pt")
"""


@pytest.mark.slow
def test_litgpt_computes_the_same_from_what_we_write(tmp_path):
    peer = os.environ.get("LITGPT_PEER")
    if not peer:
        pytest.skip("LITGPT_PEER does not name LitGPT's own command")
    idx = architectures.tokens(2, 40)
    torch.save(idx, tmp_path / "tokens.pt")
    models = {}
    for number, (row, (family, _)) in enumerate(architectures.ROWS.items()):
        directory = Path(str(number), NAMES.get(family, "model"))
        pair = architectures.build(row, tmp_path / directory)
        source = open_checkpoint(pair.path, converted=False)
        save_model(pair.path, source.weights(), source.config, source.release)
        if it_knows(yaml.safe_load((pair.path / CONFIG).read_text())):
            models[row] = (str(directory), pair.ours)
    assert len(models) >= 25
    directories = json.dumps([directory for directory, _ in models.values()])
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [Path(peer).with_name("python"), "-c", SCRIPT, tmp_path, directories]
    subprocess.run(command, check=True, env=clean, cwd=tmp_path)
    with torch.inference_mode():
        for row, (directory, model) in models.items():
            assert (torch.load(tmp_path / directory / "peer.pt") - model(idx)).abs().max() < 1e-4, row


def it_knows(config: dict) -> bool:
    """Whether all that a `model_config.yaml` says has the same meaning there."""
    newer = [name for name, spec in Config.__dataclass_fields__.items() if spec.metadata.get("newer")]
    stretched = any(key in (config["rope_adjustments"] or {}) for key in OTHER_ROPE)
    # One group of experts is nothing there to choose from, and refused.
    return not stretched and not any(name in config for name in newer) and config["n_expert_groups"] != 1
