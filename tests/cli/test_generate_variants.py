"""`generate_full`, `generate_adapter` and `generate_adapter_v2`: the answer is that of the finetuned model."""

import inspect
import re
import shutil

import pytest
import torch

from litgpt.adaptation.adapter import (
    apply_adapter,
    apply_adapter_v2,
    is_adapter,
    is_adapter_v2,
    load_adapter,
    save_adapter,
)
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.prompts import PromptStyle
from litgpt.sources.load import load_model
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import checkpoint_files

GREEDY = ("--prompt", "Hello", "--top_k", 1, "--precision", "32-true", "--max_new_tokens", 12)
ADAPTERS = {"generate_adapter": (apply_adapter, is_adapter), "generate_adapter_v2": (apply_adapter_v2, is_adapter_v2)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoint_files.chat_model(tmp_path_factory.mktemp("base"))


def answer(directory, model, style: str = "chatml", **fields) -> str:
    tokenizer, style = Tokenizer(directory), PromptStyle.from_name(style)
    prompt = style.encode(tokenizer, [{"role": "user", "content": "Hello"}], **fields)
    return tokenizer.decode(Engine(model).complete([Request(prompt, 12, Sampling(0))])[0]) + "\n"


def change(model, parameters) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.3)


@pytest.mark.parametrize("layout", ["directory", "litgpt"])
def test_finetuned_weights_answer_in_place_of_the_checkpoints(litgpt, base, tmp_path, layout):
    model = load_model(base, dtype=torch.float32)
    change(model, model.parameters())
    path = tmp_path
    if layout == "directory":
        torch.save(model.state_dict(), tmp_path / "lit_model.pth")
    else:
        path = tmp_path / "lit_model_finetuned.pth"
        torch.save({"model": model.state_dict()}, path)
    result = litgpt("generate_full", base, "--finetuned_path", path, *GREEDY)
    assert result.code == 0, result.err
    assert result.out == answer(base, model)
    assert result.out != litgpt("generate", base, *GREEDY).out


@pytest.mark.parametrize("command", ADAPTERS)
def test_an_adapter_answers(litgpt, base, tmp_path, command):
    apply, belongs = ADAPTERS[command]
    model = load_model(base, dtype=torch.float32)
    apply(model, 5, 0)
    change(model, [p for p in model.parameters() if p.requires_grad])
    save_adapter(tmp_path, {name: p for name, p in model.state_dict().items() if belongs(name)}, str(base))
    result = litgpt(command, base, "--adapter_path", tmp_path, *GREEDY)
    assert result.code == 0, result.err
    assert result.out == answer(base, model)
    assert result.out != litgpt("generate", base, *GREEDY).out
    (file,) = tmp_path.iterdir()
    assert litgpt(command, base, "--adapter_path", file.rename(tmp_path / "mine.pth"), *GREEDY).out == result.out
    (other,) = ADAPTERS.keys() - {command}
    assert litgpt(other, base, "--adapter_path", tmp_path / "mine.pth", *GREEDY).out == result.out


@pytest.mark.parametrize("command", ADAPTERS)
def test_without_a_path_it_takes_what_finetuning_wrote(litgpt, base, tmp_path, command, monkeypatch):
    from litgpt.commands import finetune_adapter, finetune_adapter_v2

    finetuning = finetune_adapter_v2 if command.endswith("v2") else finetune_adapter
    apply, belongs = ADAPTERS[command]
    model = load_model(base, dtype=torch.float32)
    apply(model, 5, 0)
    change(model, [p for p in model.parameters() if p.requires_grad])
    monkeypatch.chdir(tmp_path)
    directory = inspect.signature(finetuning.setup).parameters["out_dir"].default / "final"
    directory.mkdir(parents=True)
    save_adapter(directory, {name: p for name, p in model.state_dict().items() if belongs(name)}, str(base))
    assert litgpt(command, base, *GREEDY).out == answer(base, model)


def test_the_prompt_format_is_that_of_the_finetuning_and_has_a_place_for_an_input(litgpt, base, tmp_path):
    weights = tmp_path / "lit_model.pth"
    shutil.copy(base / "lit_model.pth", weights)
    (tmp_path / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    model = load_model(base, dtype=torch.float32)
    options = ("generate_full", base, "--finetuned_path", weights, *GREEDY)
    assert litgpt(*options, "--input", "the world").out == answer(base, model, "alpaca", input="the world")
    shown = litgpt(*options, "--input", "the world", "--include_prompt", "true").out
    assert "### Input:\nthe world\n" in shown
    assert "### Input:" not in litgpt(*options, "--include_prompt", "true").out
    # A format without such a place: after the prompt.
    shown = litgpt(*options, "--input", "the world", "--include_prompt", "true", "--prompt_style", "chatml").out
    assert shown.startswith("user\nHello\n\nthe world\nassistant\n")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("generate_full", "finetuned_path"),
        ("generate_adapter", "adapter_path"),
        ("generate_adapter_v2", "adapter_path"),
    ],
)
def test_what_is_not_there_is_named(litgpt, base, command, option, tmp_path):
    result = litgpt(command, base, f"--{option}", tmp_path / "nowhere")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"error: --{option} {tmp_path}/nowhere")
    assert f"`litgpt {command.replace('generate', 'finetune')}`" in result.err


def test_weights_of_another_model_are_refused(litgpt, base, tmp_path):
    model = load_model(base)
    weights = {name: tensor[:4] for name, tensor in model.state_dict().items()}
    torch.save(weights, tmp_path / "lit_model.pth")
    result = litgpt("generate_full", base, "--finetuned_path", tmp_path, *GREEDY)
    assert (result.code, result.out) == (1, "")
    assert "wrong shape: lm_head.weight is [4, 32] in lit_model.pth, [704, 32] in model_config.yaml" in result.err
    adapter = {"gating_factor": torch.zeros(1, 1, 7, 1), "adapter_wte.weight": torch.zeros(3, 32)}
    torch.save({f"transformer.h.1.attn.{name}": p for name, p in adapter.items()}, tmp_path / "lit_model.pth.adapter")
    result = litgpt("generate_adapter", base, "--adapter_path", tmp_path, *GREEDY)
    assert (result.code, result.out) == (1, "")
    assert "The adapter belongs to another model" in result.err


def test_quantized_base_weights(litgpt, base, tmp_path):
    model = load_model(base, dtype=torch.float32, quantize="bnb.nf4")
    apply_adapter(model, 5, 0)
    change(model, [p for p in model.parameters() if p.requires_grad])
    weights = {name: p for name, p in model.state_dict().items() if is_adapter(name)}
    save_adapter(tmp_path, weights, str(base))
    again = load_model(base, dtype=torch.float32, quantize="bnb.nf4")
    load_adapter(again, weights)
    result = litgpt("generate_adapter", base, "--adapter_path", tmp_path, *GREEDY, "--quantize", "bnb.nf4")
    assert result.out == answer(base, again)
    assert "(32-true, bnb.nf4, cpu)" in result.err


RATE = r"Acceptance rate: (\d+\.\d\d)% \((\d+) of (\d+) drafted tokens\); (\d\.\d\d) tokens per call of the model"


@pytest.mark.parametrize("drafted", ["model", "lookup"])
def test_speculation_gives_the_same_greedy_answer_and_its_acceptance_rate(litgpt, base, tmp_path, drafted):
    expected = litgpt("generate", base, *GREEDY).out
    options = ("--draft_model_checkpoint_dir", base, "--speculative_k", 4) if drafted == "model" else ()
    result = litgpt("generate_speculatively", "--target_model_checkpoint_dir", base, *options, *GREEDY)
    assert result.code == 0, result.err
    assert result.out == expected
    rate, accepted, proposed, per_call = re.search(RATE, result.err).groups()
    if drafted == "model":  # it drafts for itself: 12 tokens are 1, three more without drafts, 5 and 3
        assert (rate, accepted, proposed, per_call) == ("100.00", "6", "6", "2.00")
    assert re.search(r"Time for inference 1: .* 12 tokens$", result.err, re.MULTILINE)


def test_a_draft_with_other_tokens_is_refused(litgpt, base, tmp_path):
    other = checkpoint_files.bare_model(tmp_path)
    result = litgpt("generate_speculatively", base, "--draft_model_checkpoint_dir", other, *GREEDY)
    assert (result.code, result.out) == (1, "")
    assert f"--draft_model_checkpoint_dir {other} has another tokenizer than {base}: the token id 3 is" in result.err


def test_what_speculation_cannot_do_is_refused(litgpt, base):
    for option, value in (("--speculative_k", 0), ("--compile", "true")):
        result = litgpt("generate_speculatively", base, option, value)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith(f"error: {option} {value} ")


def test_blocks_on_several_devices_answer_the_same(litgpt, base):
    expected = litgpt("generate", base, *GREEDY).out
    for devices in (1, 2):
        result = litgpt("generate_sequentially", base, *GREEDY, "--devices", devices)
        assert (result.code, result.out) == (0, expected), result.err
    quantised = ("--quantize", "bnb.int8")
    expected = litgpt("generate", base, *GREEDY, *quantised).out
    assert litgpt("generate_sequentially", base, *GREEDY, "--devices", 2, *quantised).out == expected
    for options, message in (
        (("--devices", 3), "--devices 3: tiny-random has 2 blocks"),
        (("--devices", 2, "--compile", "true"), "--compile true cannot be combined with sequential"),
        (("--devices", "x"), "--devices x is not a number of devices"),
        (("--devices", "0,x"), "--devices 0,x names a device that there is not"),
    ):
        result = litgpt("generate_sequentially", base, *options)
        assert (result.code, result.out) == (1, "")
        assert f"error: {message}" in result.err
