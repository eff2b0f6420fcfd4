"""A directory that PEFT has written, given where a model is expected: it opens on the model that it belongs to."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from litgpt import LLM
from litgpt.sources.door import open_model
from tests import tokenizer_files
from tests.hub_server import Hub, connect, serve_hub

GREEDY = ("--prompt", "Hello", "--top_k", "1", "--precision", "32-true", "--max_new_tokens", "12")


def make_base(directory):
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=704,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer_files.byte_level(directory, {"chat_template": tokenizer_files.CHATML, "eos_token": "<|im_end|>"})
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    return directory


def make_adapter(base, directory, recorded=None):
    """An adapter of PEFT that has learned something; the texts that it is to answer are those of the merged model."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(directory)
    file = directory / "adapter_config.json"
    content = json.loads(file.read_text()) | {"base_model_name_or_path": recorded or str(base)}
    file.write_text(json.dumps(content))
    return directory


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return make_base(tmp_path / "checkpoints" / "org" / "model")


@pytest.fixture
def adapter(base, tmp_path):
    return make_adapter(base, tmp_path / "adapter")


@pytest.fixture
def merged(base, adapter, tmp_path):
    """The same, merged by PEFT."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    shutil.copytree(base, tmp_path / "merged")
    model.save_pretrained(tmp_path / "merged")
    return tmp_path / "merged"


def test_generate_answers_as_the_merged_model(litgpt, base, adapter, merged):
    result = litgpt("generate", adapter, *GREEDY)
    assert result.code == 0, result.err
    assert result.out == litgpt("generate", merged, *GREEDY).out != litgpt("generate", base, *GREEDY).out


def test_every_command_opens_it_by_the_same_door(litgpt, adapter, merged, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(merged)
    llm = LLM.load(adapter, precision="32-true") if hasattr(LLM, "load") else None
    with torch.no_grad():
        ids = torch.tensor([[5, 17, 300, 4]])
        torch.testing.assert_close(llm.model(ids), expected(ids).logits, atol=1e-4, rtol=1e-4)
    for command in (
        ("convert", adapter, tmp_path / "hf", "--to", "hf"),
        ("convert", adapter, tmp_path / "m.gguf", "--to", "gguf"),
    ):
        result = litgpt(*command)
        assert result.code == 0, result.err
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "recorded",
    ["org/model", "checkpoints/org/model", "./checkpoints/org/model", "../checkpoints/org/model", "base"],
)
def test_the_base_is_found(base, tmp_path, recorded):
    """By its id, by a path from here, and by one from the adapter's own directory."""
    adapter = make_adapter(base, tmp_path / "adapter", recorded)
    if recorded == "base":
        shutil.copytree(base, adapter / "base")
    assert open_model(adapter).config.n_layer == 2


def test_the_base_is_had_from_the_hub(base, tmp_path, monkeypatch):
    adapter = make_adapter(base, tmp_path / "adapter", "other/model")
    asked = []

    def download(repo_id, **options):
        asked.append(repo_id)
        return base

    monkeypatch.setattr("litgpt.sources.find.download", download)
    assert open_model(adapter).config.n_layer == 2
    assert asked == ["other/model"]


def test_a_base_that_is_not_there_is_one_clear_line(litgpt, base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", "/somewhere/else/model")
    result = litgpt("generate", adapter, *GREEDY)
    assert result.code in (1, 2)
    lines = [line for line in result.err.splitlines() if line]
    assert len(lines) == 1
    assert "No checkpoint '/somewhere/else/model'" in lines[0]
    assert f"It is the model that '{adapter}' belongs to" in lines[0]
    assert f"litgpt merge_lora {adapter} --pretrained_checkpoint_dir" in lines[0]
    content = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    assert "does not say which model it belongs to" in litgpt("generate", adapter, *GREEDY).err


def test_its_tokenizer_comes_first_and_as_a_whole(base, adapter):
    files = open_model(adapter).files
    assert (files / "tokenizer.json").is_file()
    assert json.loads((files / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    tokenizer_files.byte_level(adapter, {"eos_token": "<|im_end|>"})  # without a chat template
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    files = open_model(adapter).files
    assert not (files / "chat_template.jinja").exists()
    assert json.loads((files / "tokenizer_config.json").read_text()).get("chat_template") is None
    assert json.loads((files / "generation_config.json").read_text())["eos_token_id"] == [2, 7]
    assert (files / "config.json").is_file()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve_hub(Hub()) as hub:
        connect(hub, monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def upload(hub, name, directory):
    hub.repositories[name] = {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}
    shutil.rmtree(directory)


def test_an_adapter_on_the_hub_is_opened_on_its_model(litgpt, hub, base, adapter, merged, tmp_path):
    """Both are downloaded, which is said, and answer as the merged model does."""
    content = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/model"}
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    upload(hub, "org/adapter", adapter)
    upload(hub, "org/model", base)
    hub.repositories["org/adapter"]["README.md"] = b"hello"
    result = litgpt("generate", "org/adapter", *GREEDY)
    assert result.code == 0, result.err
    assert "Downloading org/adapter\norg/adapter holds only an adapter (PEFT). It belongs to org/model.\n" in result.err
    assert "Downloading org/model\n" in result.err
    assert result.out == litgpt("generate", merged, *GREEDY).out
    assert {file.name for file in (tmp_path / "checkpoints/org/adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    requests = len(hub.requests)
    assert litgpt("generate", "org/adapter", *GREEDY).out == result.out
    assert len(hub.requests) == requests  # both are here now


def test_download_of_an_adapter(litgpt, hub, base, tmp_path):
    upload(hub, "org/adapter", make_adapter(base, tmp_path / "adapter", "org/model"))
    for option, value in (("--dtype", "bfloat16"), ("--model_name", "pythia-14m"), ("--keep_hf_files", "false")):
        result = litgpt("download", "org/adapter", option, value)
        assert result.code == 1
        assert f"{option}" in result.err.splitlines()[-1]
    result = litgpt("download", "org/adapter")
    assert result.code == 0, result.err
    assert "Saved the adapter to checkpoints/org/adapter" in result.out
    content = hub.repositories["org/adapter"]
    for damaged, said in ((b"[]", "is a list"), (b"{", "is not valid JSON")):
        hub.repositories["org/damaged"] = {**content, "adapter_config.json": damaged}
        result = litgpt("generate", "org/damaged", *GREEDY)
        assert (result.code, said in result.err.splitlines()[-1]) == (1, True), result.err
        assert not (tmp_path / "checkpoints/org/damaged").exists()
