"""Small valid checkpoints of every kind, which tests then damage."""

import json
from pathlib import Path

import torch
import yaml

from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora, save_lora
from litgpt.checkpoint import HYPERPARAMETERS, copy_companion_files
from litgpt.export.gguf_writer import export_gguf
from litgpt.export.hf_writer import export_hf
from litgpt.export.peft_writer import export_peft
from litgpt.model import GPT
from litgpt.prompts import save_prompt_style
from litgpt.sources.checkpoint import open_checkpoint
from tests import checkpoint_files, tokenizer_files


def make(folder: Path) -> dict[str, Path]:
    """Every kind by its name, below `folder`."""
    kinds = {name: folder / name for name in ("lit", "hf", "bin", "lora", "peft")}
    lit(kinds["lit"])
    base = open_checkpoint(kinds["lit"])
    export_hf(base, kinds["hf"], shard_size=150_000)
    pytorch_bin(kinds["bin"], kinds["lit"])
    adapters(kinds["lora"], kinds["peft"], kinds["lit"])
    kinds["gguf"] = folder / "tiny.gguf"
    export_gguf(base, kinds["gguf"])
    kinds["sentencepiece"] = tokenizer_files.sentencepiece_model(folder / "sentencepiece", {"bos_token": "<s>"})
    kinds["fallback"] = tokenizer_files.byte_fallback(folder / "fallback")
    kinds["metaspace"] = tokenizer_files.metaspace(folder / "metaspace")
    kinds["vocabulary"] = vocabulary(folder / "vocabulary", kinds["hf"])
    kinds["chunks"] = folder / "chunks"
    kinds["chunks"].mkdir()
    return kinds


def lit(directory: Path) -> Path:
    """A directory of litgpt's own."""
    checkpoint_files.chat_model(directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [0, 2], "temperature": 0.6}')
    (directory / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|im_end|>", "lstrip": false}}')
    save_prompt_style("alpaca", directory)
    return directory


def vocabulary(directory: Path, base: Path) -> Path:
    """A byte-level tokenizer as GPT-2 has it, without a tokenizer.json."""
    directory.mkdir()
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    (directory / "added_tokens.json").write_text(json.dumps({"<x>": len(model["vocab"])}))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": true}')
    return directory


def pytorch_bin(directory: Path, base: Path) -> Path:
    """A directory of Hugging Face's with its weights in a pickle."""
    export_hf(base, directory, safetensors=False, pth=True)
    (directory / "model.pth").rename(directory / "pytorch_model.bin")
    return directory


def adapters(lora: Path, peft: Path, base: Path) -> None:
    """What was learned by LoRA alone: as finetune_lora of an older version writes it, and as PEFT does."""
    source, settings = open_checkpoint(base), LoRASettings(r=4)
    torch.manual_seed(0)
    model = GPT(source.config)
    apply_lora(model, settings)
    weights = {name: tensor for name, tensor in model.state_dict().items() if is_lora(name)}
    for directory in (lora, peft):
        directory.mkdir()
        copy_companion_files(base, directory)
    save_lora(lora, weights, settings, str(base))
    recorded = {"checkpoint_dir": str(base), **{f"lora_{name}": value for name, value in settings.to_dict().items()}}
    (lora / HYPERPARAMETERS).write_text(yaml.safe_dump(recorded))
    export_peft(weights, settings, source.config, "LlamaForCausalLM", str(base), peft)
