"""How a model is spoken to, from the checkpoint over training to every export: named templates, and what ends a reply."""

import json
import re
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from litgpt.checkpoint import save_model
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.prompts import NamedTemplate, PromptStyle, choose_prompt_style, find_chat_templates
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import checkpoint_files, tokenizer_files
from tests.serving.conftest import running

RAG = tokenizer_files.CHATML.replace("<|im_start|>{{ message['role'] }}", "<|im_start|>RAG {{ message['role'] }}")
TOOLS = "{{ tools | tojson }}" + tokenizer_files.CHATML
NAMED = {"default": tokenizer_files.CHATML, "rag": RAG, "tool_use": TOOLS}
CALL = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
FEW_STEPS = [
    "--train.max_steps",
    1,
    "--train.lr_warmup_steps",
    0,
    "--data.num_workers",
    0,
    "--data.val_split_fraction",
    0,
]


def named_model(directory: Path, form: str) -> Path:
    """A tiny Llama with several templates: in files, or as a list in tokenizer_config.json."""
    checkpoint_files.chat_model(directory, template=None)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    if form == "list":
        config["chat_template"] = [{"name": name, "template": template} for name, template in NAMED.items()]
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return directory
    (directory / "chat_template.jinja").write_text(NAMED["default"])
    (directory / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        (directory / f"additional_chat_templates/{name}.jinja").write_text(NAMED[name])
    return directory


@pytest.fixture
def run(litgpt, tmp_path, monkeypatch):
    """Runs a command in a directory of its own, which must end well, and gives what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))

    def words(*argv: object) -> str:
        result = litgpt(*argv)
        assert result.code == 0, result.err
        return result.out + result.err

    return words


@pytest.mark.parametrize("form", ["files", "list"])
def test_named_templates_survive_training_conversion_and_gguf(run, form, tmp_path):
    named_model(tmp_path / "base", form)
    record = {"messages": [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n" + json.dumps(record | {"tools": CALL}))
    run("finetune_lora", "base", "--data", "JSON", "--data.json_path", "data.jsonl", *FEW_STEPS, "--out_dir", "out")
    run("convert", "out/final", "hf", "--to", "hf")
    run("convert", "out/final", "model.gguf", "--to", "gguf")
    run("convert", "model.gguf", "lit", "--to", "litgpt")
    for place in ("out/final", "hf", open_checkpoint(Path("model.gguf")).files, "lit"):
        assert find_chat_templates(Path(place)) == NAMED, place
    assert AutoTokenizer.from_pretrained("hf").chat_template == NAMED
    (tmp_path / "data.jsonl").write_text(json.dumps(record))
    samples = run(
        "finetune_lora", "base", "--data", "JSON", "--data.json_path", "data.jsonl", *FEW_STEPS, "--out_dir", "again",
        "--chat_template", "rag", "--dry_run", "true",
    )  # fmt: skip
    assert "<|im_start|>RAG user" in samples
    assert "Prompt style: the checkpoint's chat template 'rag'." in samples


def test_a_template_is_chosen_by_its_name(litgpt, run, tmp_path):
    named_model(tmp_path / "base", "files")
    few = ["--max_new_tokens", 1, "--include_prompt", "true", "--prompt", "Hi"]
    assert run("generate", "base", *few).startswith("user\nHi")
    assert "RAG user\nHi" in run("generate", "base", *few, "--chat_template", "rag")
    wrong = litgpt("generate", "base", *few, "--chat_template", "rags")
    assert "--chat_template rags: The checkpoint has no chat template 'rags'. Did you mean 'rag'" in wrong.err
    both = litgpt("chat", "base", "--chat_template", "rag", "--prompt_style", "alpaca")
    assert "--prompt_style alpaca and --chat_template rag both say" in both.err
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 4))
    words = [
        "finetune_lora",
        "base",
        "--data",
        "JSON",
        "--data.json_path",
        "data.json",
        *FEW_STEPS,
        "--chat_template",
        "rag",
    ]
    assert (
        "--chat_template rag and --data.prompt_style alpaca both say"
        in litgpt(*words, "--data.prompt_style", "alpaca").err
    )
    run(*words, "--out_dir", "out")
    for place in ("out/final", "base"):  # what was trained is what the result is spoken to in
        style = choose_prompt_style(Path(place), explicit=None if place != "base" else NamedTemplate("rag"))
        assert style.template == RAG


def test_a_finetuned_models_exports_are_spoken_to_as_it_was_trained(run, tmp_path):
    checkpoint_files.chat_model(tmp_path / "base")
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 4))
    data = ["--data", "JSON", "--data.json_path", "data.json", "--data.prompt_style", "alpaca"]
    run("finetune_lora", "base", *data, *FEW_STEPS, "--out_dir", "out")
    for to, target in (("hf", "hf"), ("gguf", "model.gguf")):
        said = run("convert", "out/final", target, "--to", to)
        assert "Its chat template is the prompt format of the training: alpaca." in said
    messages = [{"role": "user", "content": "What is it?"}]
    expected = PromptStyle.from_name("alpaca").render(messages)
    reference = AutoTokenizer.from_pretrained("hf")
    assert reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == expected
    assert choose_prompt_style(open_checkpoint(Path("model.gguf")).files).render(messages) == expected
    said = run("convert", "out/final", "adapter", "--to", "peft")
    assert "An adapter does not carry the prompt format of the training" in said
    assert "prompt format" not in run("convert", "base", "plain", "--to", "hf")


def of_shape(directory: Path, **changes: object) -> GPT:
    """Puts another random model into a checkpoint directory."""
    model = GPT(replace(Config.from_checkpoint(directory), **changes))
    model.init_weights()
    save_model(directory, model, model.config)
    return model


def test_a_reply_ends_where_the_template_ends_it_though_eos_is_another_token(run, tmp_path, monkeypatch):
    """A model that says <|im_end|> at once: what generate, chat and serve make of it."""
    directory = tokenizer_files.byte_level(tmp_path / "model", {"chat_template": tokenizer_files.CHATML})
    model = of_shape(checkpoint_files.with_model(directory, 512), lm_head_bias=True)
    end, eos = (Tokenizer(directory).token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert Tokenizer(directory).stop_ids == {eos}
    with torch.no_grad():
        model.lm_head.bias[end] = 1000
    save_model(directory, model, model.config)
    said = run("generate", directory, "--prompt", "Hi", "--max_new_tokens", 20)
    assert re.search(r", [01] tokens", said), said
    prompts = iter(["Hi", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(prompts))
    said = run("chat", directory, "--max_new_tokens", 20)
    assert re.search(r", [01] tokens", said), said
    with running(directory) as served:
        body = {"model": served.model.name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
        answer = httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=120).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] <= 1


def test_tokens_beyond_the_embedding_are_named_before_training_as_in_generate(litgpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    directory = checkpoint_files.chat_model(tmp_path / "model")
    of_shape(directory, vocab_size=60, padded_vocab_size=64)
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a", "output": "b"}] * 4))
    expected = r"The tokenizer in \S*model gives the token id \d+, but the model's vocabulary ends at 63"
    words = ["finetune_lora", directory, "--data", "JSON", "--data.json_path", "data.json", *FEW_STEPS]
    assert re.search(expected, litgpt(*words).err)
    assert re.search(expected, litgpt("generate", directory, "--prompt", "Hi").err)
