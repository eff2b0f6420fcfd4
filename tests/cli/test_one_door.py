"""Whatever a user may name as a model, every command opens it by the same door, or says why that has no meaning."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from litgpt.__main__ import main
from litgpt.adaptation.adapter import apply_adapter, is_adapter, save_adapter
from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora, save_lora
from litgpt.sources.door import open_model
from litgpt.sources.load import load_model
from tests import checkpoint_files
from tests.hub_server import Hub, connect, serve_hub

KINDS = {
    "a directory": "models/plain",
    "below checkpoints": "org/plain",
    "a known name": "pythia-14m",
    "a Hub id": "org/remote",
    "a Hugging Face directory": "models/hf",
    "a GGUF file": "models/plain.gguf",
    "LoRA": "tuned/lora",
    "PEFT": "tuned/peft",
    "an adapter": "tuned/adapter",
}
GREEDY = ("--prompt", "Hello", "--top_k", "1", "--precision", "32-true", "--max_new_tokens", "5")


def quietly(*argv):
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        assert main([str(word) for word in argv]) == 0


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model in all kinds, and what LoRA, in our format and PEFT's, and LLaMA-Adapter have learned on it."""
    root = tmp_path_factory.mktemp("models")
    with contextlib.chdir(root):
        plain = checkpoint_files.chat_model(Path("models/plain"))
        quietly("convert", plain, "models/hf", "--to", "hf")
        quietly("convert", plain, "models/plain.gguf", "--to", "gguf")
        for name in ("org/plain", "EleutherAI/pythia-14m"):
            shutil.copytree(plain, Path("checkpoints") / name)
        torch.manual_seed(0)
        for name, save in (("lora", lora_on), ("adapter", adapter_on)):
            directory = Path("tuned") / name
            shutil.copytree(plain, directory)
            (directory / "lit_model.pth").unlink()
            save(load_model(plain), directory)
        quietly("convert", "tuned/lora", "tuned/peft", "--to", "peft")
        Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
        records = [{"instruction": "Say it.", "output": f"It is {n}."} for n in range(8)]
        Path("records.json").write_text(json.dumps(records))
        pairs = [{"prompt": "Say it.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(8)]
        Path("pairs.json").write_text(json.dumps(pairs))
    return root


def lora_on(gpt, directory):
    settings = LoRASettings(r=2, projection=True)
    apply_lora(gpt, settings)
    weights = {name: torch.randn_like(p) * 0.3 for name, p in gpt.named_parameters() if is_lora(name)}
    save_lora(directory, weights, settings, "models/plain")


def adapter_on(gpt, directory):
    apply_adapter(gpt, start_layer=1)
    weights = {name: torch.randn_like(p) for name, p in gpt.named_parameters() if is_adapter(name)}
    save_adapter(directory, weights, "models/plain")
