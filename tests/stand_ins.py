"""Small random models on a Hub of our own, under the names of published ones: what documents download."""

import functools
import json
import tempfile
from pathlib import Path

import torch

from litgpt.checkpoint import save_model
from litgpt.commands import convert_from_litgpt
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.models import known_checkpoints
from tests import checkpoint_files, tokenizer_files
from tests.hub_server import Hub

# A model of any architecture, made small. The names are those of litgpt.Config, for `--model_config.NAME` as well.
SMALL = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_query_groups": 2, "intermediate_size": 64}

# Ask the same things as the real one, in the same form.
QUESTIONS = [
    {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n + 1)))} for n in range(2, 42)
]


class StandIns(dict):
    """The repositories of a Hub: every known checkpoint is there, made when it is asked for, and two data sets."""

    def __init__(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in QUESTIONS).encode()
        super().__init__({"datasets/mhenrichsen/alpaca_2k_test": {"alpaca_2000.jsonl": lines}})

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in known_checkpoints()

    def __missing__(self, name: str) -> dict[str, bytes]:
        self[name] = files = repository("pythia" if "pythia" in name else "chat", name)
        return files


def hub() -> Hub:
    """A Hub with all of them, for `tests.hub_server.serve_hub`."""
    return Hub(repositories=StandIns())


def repository(kind: str, name: str) -> dict[str, bytes]:
    """The files of a repository: `chat`, a Llama with ChatML, or `pythia`, one that was only pretrained."""
    return chat_files() if kind == "chat" else pythia_files(name)


@functools.cache
def chat_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        return exported(checkpoint_files.chat_model(Path(place) / "model", block_size=2048))


@functools.cache
def pythia_files(name: str) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        directory = tokenizer_files.byte_level(Path(place) / "model")
        config = Config.from_name(name, **SMALL)
        torch.manual_seed(0)
        model = GPT(config)
        model.init_weights()
        save_model(directory, model, config)
        return exported(directory)


def exported(directory: Path) -> dict[str, bytes]:
    """The files of a checkpoint in Hugging Face's form."""
    out = directory.with_name("exported")
    convert_from_litgpt.setup(directory, out, format="safetensors")
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
