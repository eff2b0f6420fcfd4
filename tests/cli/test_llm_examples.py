"""The Python API as people meet it: its tutorial and its examples; and that the command line says the same."""

import json
import re
from pathlib import Path

import pytest
import torch

from litgpt import LLM
from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora, save_lora
from litgpt.checkpoint import copy_companion_files
from litgpt.sources.load import load_model
from tests import checkpoint_files
from tests.hub_server import Hub, connect, serve_hub

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "tutorials/examples"


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A working directory with `checkpoints/microsoft/phi-2`, a tiny model under that name."""
    monkeypatch.chdir(tmp_path)
    return checkpoint_files.chat_model(tmp_path / "checkpoints/microsoft/phi-2")


def test_one_prompt_has_one_answer(litgpt, checkpoint, monkeypatch):
    greedy = ("--top_k", 1, "--precision", "32-true", "--max_new_tokens", 12)
    answer = LLM.load(checkpoint, precision="32-true").generate("Hello", top_k=1, max_new_tokens=12)
    assert litgpt("generate", checkpoint, "--prompt", "Hello", *greedy).out == f"{answer}\n"
    lines = iter(["Hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert (
        f"\n>> Prompt: Hello\n>> Reply: {answer}\n\n"
        in "\n>> Prompt: " + litgpt("chat", checkpoint, *greedy).out.split("Seed set to 1234\n")[1]
    )


@pytest.mark.parametrize("kind", ["bnb.nf4", "bnb.fp4-dq", "bnb.int8"])
def test_quantised_the_answer_is_the_same_everywhere(litgpt, checkpoint, kind, monkeypatch):
    options = ("--top_k", 1, "--precision", "bf16-true", "--max_new_tokens", 8, "--quantize", kind)
    llm = LLM.load(checkpoint, precision="bf16-true", quantize=kind)
    assert any("quantized" in name for name in llm.state_dict())
    answer = llm.generate("Hello", top_k=1, max_new_tokens=8)
    result = litgpt("generate", checkpoint, "--prompt", "Hello", *options)
    assert result.out == f"{answer}\n"
    assert f"(bf16-true, {kind}, cpu)" in result.err
    lines = iter(["Hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert answer in litgpt("chat", checkpoint, *options).out


def test_a_repository_is_downloaded_first(tmp_path, monkeypatch, capfd):
    checkpoint_files.chat_model(tmp_path / "made")
    from litgpt.commands import convert_from_litgpt

    convert_from_litgpt.setup(tmp_path / "made", tmp_path / "hf", format="safetensors")
    monkeypatch.chdir(tmp_path)
    with serve_hub(Hub()) as hub:
        connect(hub, monkeypatch)
        hub.repositories["org/tiny"] = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
        llm = LLM.load("org/tiny", precision="32-true")
        assert "Downloading org/tiny" in capfd.readouterr().err
        expected = LLM.load(tmp_path / "made", precision="32-true").generate("Hello", top_k=1)
        assert llm.generate("Hello", top_k=1) == expected
        hub.requests.clear()
        LLM.load("org/tiny")
        assert hub.requests == []


def test_the_training_loop_learns_and_saves(checkpoint, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_in_a_loop

    train_in_a_loop.main(str(checkpoint), "out")
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] / 3
    question = "What is the capital of Llamaland?"
    said = re.search(rf"{re.escape(question)} -> (.*)", printed)[1]
    assert LLM.load("out", precision="32-true").generate(question, top_k=1) == said


def test_the_lightning_trainer_learns_and_saves(checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="the Trainer is in the package lightning")
    monkeypatch.syspath_prepend(EXAMPLES)
    import train_with_lightning

    records = [{"instruction": f"Say {i}.", "output": f"{i} it is."} for i in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    quiet = {
        "enable_progress_bar": False,
        "logger": False,
        "max_steps": 8,
        "val_check_interval": 4,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    train_with_lightning.main(str(checkpoint), "data.json", "out", **quiet)
    before, after = load_model(checkpoint), load_model(tmp_path / "out")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert LLM.load("out").generate("Say 3.", max_new_tokens=4)


@pytest.fixture
def finetuned(checkpoint) -> Path:
    """`out/phi2-lora/final`, the matrices alone, as `finetune_lora` leaves them."""
    model, settings, directory = load_model(checkpoint), LoRASettings(), Path("out/phi2-lora/final")
    directory.mkdir(parents=True)
    copy_companion_files(checkpoint, directory)
    apply_lora(model, settings)
    save_lora(
        directory, {n: p.detach() for n, p in model.named_parameters() if is_lora(n)}, settings, "microsoft/phi-2"
    )
    return directory


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_commands_open_finetuned_weights_alone(litgpt, finetuned, command, monkeypatch):
    lines = iter(["Hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    prompt = ("--prompt", "Hello") if command == "generate" else ()
    result = litgpt(command, finetuned, *prompt, "--top_k", 1, "--precision", "32-true", "--max_new_tokens", 8)
    assert result.code == 0, result.err
    assert LLM.load(finetuned, precision="32-true").generate("Hello", top_k=1, max_new_tokens=8) in result.out
