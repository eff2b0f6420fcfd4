"""No file of a checkpoint directory names code that is run, or another file that is opened."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from litgpt.llm import LLM
from litgpt.prompts import rendering
from tests import checkpoint_files, tokenizer_files

CODE = "planted.Planted"
OUTSIDE = "../outside"
opened: list[str] = []
"""What was opened while a test watches; an audit hook cannot be taken away again."""
watching = False


def hook(event: str, arguments: tuple) -> None:
    if watching and event == "open" and "outside" in str(arguments[0]):
        opened.append(str(arguments[0]))


sys.addaudithook(hook)


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Iterator[Path]:
    """A good checkpoint whose every side file also names a module that lies in it, and a file next to it."""
    global watching
    directory = checkpoint_files.chat_model(tmp_path / "checkpoint")
    for name in ("planted", "modeling_planted", "wandb", "sentencepiece_model_pb2"):
        (directory / f"{name}.py").write_text("open('ran', 'w').close()\nclass Planted: pass\n")
    (tmp_path / "outside").write_text("{}")
    automatic = {"AutoConfig": CODE, "AutoModelForCausalLM": CODE, "AutoTokenizer": [CODE, CODE]}
    named = {"class_path": CODE, "init_args": {"path": OUTSIDE}}
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"):
        file = directory / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        content |= {"auto_map": automatic, "_target_": CODE, "custom_generate": CODE, "trust_remote_code": True}
        content |= {"tokenizer_file": OUTSIDE, "vocab_file": OUTSIDE, "chat_template_file": OUTSIDE, **named}
        file.write_text(json.dumps(content))
    settings = {"prompt_style": CODE, "data": named, "optimizer": named, "logger_name": CODE, "checkpoint_dir": OUTSIDE}
    (directory / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    (directory / "adapter_config.json").write_text(json.dumps({"auto_mapping": {"parent_library": CODE}}))
    (directory / "requirements.txt").write_text(OUTSIDE)
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    opened.clear()
    watching = True
    yield directory
    watching = False
    assert not (directory / "ran").exists()
    assert not [name for name in sys.modules if "planted" in name]
    assert opened == []


def test_generate(litgpt, directory):
    result = litgpt("generate", ".", "--prompt", "Hello", "--max_new_tokens", 2)
    assert result.code == 0, result.err


def test_finetune(litgpt, directory):
    Path("data.json").write_text(json.dumps([{"instruction": "Hello", "output": "Hello"}] * 4))
    result = litgpt("finetune_lora", ".", "--data", "JSON", "--data.json_path", "data.json", "--dry_run", "true")
    assert result.code == 0, result.err


def test_python_and_serve(directory):
    LLM.load(".")  # serve loads by the same function


@pytest.mark.parametrize(
    "content", [f"class_path: {CODE}", f"class_path: litgpt.prompts.{CODE}", "class_path: os.system"]
)
def test_a_prompt_style(content, litgpt, directory):
    Path("prompt_style.yaml").write_text(content)
    Path("data.json").write_text(json.dumps([{"instruction": "Hello", "output": "Hello"}] * 4))
    data = ("--data", "JSON", "--data.json_path", "data.json", "--dry_run", "true")
    for command in (("generate", "."), ("finetune_lora", ".", *data), ("chat", ".")):
        result = litgpt(*command)
        assert result.code == 1
        assert "code that a checkpoint names is not run" in result.err
    with pytest.raises(ValueError, match="code that a checkpoint names is not run"):
        LLM.load(".")


def test_a_model_config(litgpt, directory):
    content = Path("model_config.yaml").read_text()
    Path("model_config.yaml").write_text(f"{content}norm_class_name: {CODE}\n")
    result = litgpt("generate", ".")
    assert (result.code, "norm_class_name" in result.err) == (1, True)
    Path("model_config.yaml").write_text(f"{content}name: !!python/object/apply:planted.Planted []\n")
    assert litgpt("generate", ".").code == 1


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
AFTER_A_WORD = "{% if messages[0].content == 'Hello' %}" + LOOPS + "{% endif %}" + tokenizer_files.CHATML


@pytest.mark.parametrize("template", [LOOPS, AFTER_A_WORD])
def test_a_template_that_does_not_end(template, litgpt, tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.3)
    monkeypatch.chdir(tmp_path)
    checkpoint_files.chat_model(tmp_path / "model", template=template)
    Path("data.json").write_text(json.dumps([{"instruction": "Hello", "output": "Hello"}] * 100))
    data = ("--data", "JSON", "--data.json_path", "data.json", "--dry_run", "true")
    for command in (("generate", "model", "--prompt", "Hello"), ("finetune_lora", "model", *data)):
        result = litgpt(*command)
        assert result.code == 1
        assert "chat template takes more than 0.3 seconds of processor time" in result.err
        assert "Traceback" not in result.err
