"""A real model learns to answer in JSON, and still does after merging, resuming and exporting."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from litgpt.__main__ import main
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.prompts import choose_prompt_style
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.metrics import read_metrics
from litgpt.training.run_directory import RunDirectory

RECORDS = Path(__file__).parents[1] / "data_files/answers_in_json.jsonl"
UNSEEN = ["What is the capital of Norway?", "How many wheels does a bicycle have?", "Which animal barks?"]


def is_json(reply: str) -> bool:
    try:
        return isinstance(json.loads(reply), dict)
    except ValueError:
        return False


def prompts(directory: Path) -> list[list[int]]:
    tokenizer = Tokenizer(open_checkpoint(directory).files)
    style = choose_prompt_style(tokenizer.dir, tokenizer=tokenizer)
    return [style.encode(tokenizer, [{"role": "user", "content": question}]) for question in UNSEEN]


def replies(directory: Path) -> list[str]:
    """What the model in a directory (or file) answers to questions that it has not seen."""
    source = open_checkpoint(directory)
    tokenizer = Tokenizer(source.files)
    style = choose_prompt_style(source.files, tokenizer=tokenizer)
    engine = Engine(load_model(source, dtype=torch.float32))
    requests = [Request(p, 24, Sampling(0), style.stop_sequences(tokenizer)) for p in prompts(directory)]
    return [tokenizer.decode(ids) for ids in engine.complete(requests)]


def generated(model: torch.nn.Module, directory: Path) -> list[str]:
    """The same by transformers."""
    tokenizer, made = Tokenizer(directory), []
    for prompt in prompts(directory):
        ids = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample=False)
        made.append(tokenizer.decode(ids[0, len(prompt) :]))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [None, "bnb.nf4"])
def test_a_behaviour_is_learned(smollm2_gguf, tmp_path, quantize):
    assert not any(is_json(reply) for reply in replies(smollm2_gguf))
    out = tmp_path / "out"
    command = [
        *("finetune_lora", smollm2_gguf, "--data", "JSON", "--data.json_path", RECORDS, "--out_dir", out),
        *("--data.val_split_fraction", 0.1, "--lora_key", "true", "--lora_projection", "true", "--lora_mlp", "true"),
        *("--train.global_batch_size", 8, "--train.micro_batch_size", 8, "--train.lr_warmup_steps", 3),
        *("--train.max_norm", 1, "--optimizer.lr", 0.002, "--eval.interval", 8, "--eval.initial_validation", "true"),
        *(
            "--train.save_interval",
            8,
            "--eval.metrics",
            "[exact_match, rouge]",
            "--eval.best_by",
            "exact_match",
            *(("--quantize", quantize) if quantize else ()),
        ),
    ]
    assert main([str(word) for word in [*command, "--train.max_steps", 8]]) == 0
    assert main([str(word) for word in [*command, "--train.max_steps", 14, "--resume", "auto"]]) == 0

    validations = [row for row in read_metrics(out / "metrics.csv") if row["val_loss"]]
    assert float(validations[-1]["val_loss"]) < 0.2 * float(validations[0]["val_loss"])
    first, *_, last = (float(row["val_exact_match"]) for row in validations)
    assert first == 0
    assert last > 0.1  # what is in JSON need not be true
    assert float(validations[-1]["val_rougeL"]) > 2 * float(validations[0]["val_rougeL"])
    assert RunDirectory(out).best.is_dir()
    merged = replies(out / "final")
    assert all(is_json(reply) for reply in merged), merged

    assert main(["convert_from_litgpt", str(out / "final"), str(tmp_path / "hf"), "--format", "safetensors"]) == 0
    assert replies(tmp_path / "hf") == merged
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert generated(reference, tmp_path / "hf") == merged

    assert main(["convert_from_litgpt", str(smollm2_gguf), str(tmp_path / "base"), "--format", "safetensors"]) == 0
    assert main(["convert_from_litgpt", str(out / "final"), str(tmp_path / "adapter"), "--format", "peft"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert all(is_json(reply) for reply in generated(adapted, tmp_path / "base"))
    with adapted.disable_adapter():
        assert not any(is_json(reply) for reply in generated(adapted, tmp_path / "base"))
