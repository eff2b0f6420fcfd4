"""merge_lora, and LoRA weights as PEFT adapters, as a user types them."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from litgpt.adaptation.lora import (
    LORA_WEIGHTS,
    TARGETS,
    LoRASettings,
    apply_lora,
    is_lora,
    merge_lora,
    read_lora,
    save_lora,
)
from litgpt.checkpoint import CONFIG, WEIGHTS, read_state_dict
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from tests import tokenizer_files

SIZES = {"vocab_size": 704, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LORA = LoRASettings(r=2, alpha=6, dropout=0.0, **dict.fromkeys(TARGETS, True))


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A Hugging Face directory below checkpoints/, with a tied head."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    directory = tmp_path / "checkpoints" / "org" / "model"
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(directory)
    tokenizer_files.byte_level(directory, {})
    return directory


@pytest.fixture
def tuned(base, tmp_path):
    """What finetune_lora leaves, and the logits of the model with the update next to it."""
    directory = tmp_path / "out" / "final"
    directory.mkdir(parents=True)
    gpt = adapted(base)
    with torch.inference_mode():
        torch.save(gpt(tokens()), tmp_path / "expected.pt")
    save_lora(
        directory, {name: p for name, p in gpt.state_dict().items() if is_lora(name)}, LORA, "checkpoints/org/model"
    )
    gpt.config.save(directory)
    tokenizer_files.byte_level(directory, {})
    (directory / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    return directory


def adapted(base):
    gpt = load_model(base)
    torch.manual_seed(1)
    apply_lora(gpt, LORA)
    for name, p in gpt.named_parameters():
        if is_lora(name):
            p.data.add_(torch.randn_like(p) * 0.05)
    return gpt


def tokens():
    return torch.randint(0, 700, (2, 16), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def distance(directory, tmp_path, dtype=torch.float32):
    expected = torch.load(tmp_path / "expected.pt")
    return ((load_model(directory, dtype=dtype)(tokens()) - expected).abs().max() / expected.abs().max()).item()


def names(directory):
    return {path.name for path in directory.iterdir()}


def test_into_the_directory_itself(litgpt, base, tuned, tmp_path):
    before = names(tuned)
    result = litgpt("merge_lora", tuned)
    assert result.code == 0, result.err
    assert result.out == f"Saved merged weights to '{tuned / WEIGHTS}'\n"
    assert names(tuned) == before | {WEIGHTS, "config.json", "generation_config.json"}
    assert "Alpaca" in (tuned / "prompt_style.yaml").read_text()
    assert distance(tuned, tmp_path) < 1e-5
    assert distance(base, tmp_path) > 1e-2
    first = read_state_dict(tuned / WEIGHTS)["lm_head.weight"].clone()
    assert litgpt("merge_lora", tuned).code == 0
    assert torch.equal(read_state_dict(tuned / WEIGHTS)["lm_head.weight"], first), "merged twice is merged once"
    assert not open_checkpoint(tuned).config.tie_embeddings, "the head has learned, the embedding has not"


def test_into_another_directory(litgpt, tuned, tmp_path):
    before = names(tuned)
    result = litgpt("merge_lora", tuned, "--out_dir", tmp_path / "merged")
    assert result.code == 0, result.err
    assert names(tuned) == before
    assert {WEIGHTS, CONFIG, "tokenizer.json", "prompt_style.yaml"} <= names(tmp_path / "merged")
    assert LORA_WEIGHTS not in names(tmp_path / "merged")
    assert distance(tmp_path / "merged", tmp_path) < 1e-5
    refused = litgpt("merge_lora", tuned, "--out_dir", tmp_path / "merged")
    assert (refused.code, "exists already" in refused.err) == (1, True)


def test_by_the_file(litgpt, tuned, tmp_path):
    assert litgpt("merge_lora", "out/final/lit_model.pth.lora").code == 0
    assert distance(tuned, tmp_path) < 1e-5
    (tuned / WEIGHTS).unlink()
    for _ in ("as it is named in the manual, the file there under its usual name", "really under that name"):
        result = litgpt("merge_lora", "out/final/final_lora.pth")
        assert result.code == 0, result.err
        assert WEIGHTS not in names(tuned)
        merged = tmp_path / "out" / "final-merged"
        assert distance(merged, tmp_path) < 1e-5
        merged.rename(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").rename(tmp_path / f"merged-{len(list(tmp_path.iterdir()))}")
        if (tuned / LORA_WEIGHTS).exists():
            (tuned / LORA_WEIGHTS).rename(tuned / "final_lora.pth")


def test_where_the_model_has_moved(litgpt, base, tuned, tmp_path):
    moved = base.rename(tmp_path / "moved")
    result = litgpt("merge_lora", tuned)
    assert result.code == 1
    assert "It is the model that" in result.err
    assert "--pretrained_checkpoint_dir" in result.err
    assert "Traceback" not in result.err
    assert litgpt("merge_lora", tuned, "--pretrained_checkpoint_dir", moved).code == 0
    assert distance(tuned, tmp_path) < 1e-5


def test_into_a_type_rounded_once(litgpt, base, tuned, tmp_path):
    """From bfloat16 weights to float32 nothing is rounded; to bfloat16, as the exact sum is."""
    assert litgpt("convert_to_litgpt", base, "--dtype", "bf16", "--out_dir", "half").code == 0
    exact = adapted("half").float()
    merge_lora(exact)
    for precision, dtype in (("32-true", torch.float32), ("bf16-true", torch.bfloat16), (None, torch.bfloat16)):
        options = [] if precision is None else ["--precision", precision]
        out = tmp_path / f"merged-{precision}"
        result = litgpt("merge_lora", tuned, "--pretrained_checkpoint_dir", "half", "--out_dir", out, *options)
        assert result.code == 0, result.err
        found = read_state_dict(out / WEIGHTS)
        assert {p.dtype for p in found.values()} == {dtype}
        for name, p in exact.state_dict().items():
            near = torch.allclose(found[name].float(), p, atol=1e-7)
            assert near if dtype == torch.float32 else (found[name].float() - p).abs().max() <= p.abs().max() / 256, (
                name
            )


def test_lora_weights_as_litgpt_leaves_them(litgpt, base, tuned, tmp_path):
    weights = {name: p.clone() for name, p in read_lora(tuned)[0].items()}  # not views of the file written over
    torch.save({"model": weights}, tuned / LORA_WEIGHTS)
    lines = [f"lora_{target}: true" for target in TARGETS]
    lines += ["lora_r: 2", "lora_alpha: 6", "lora_dropout: 0.0", "checkpoint_dir: checkpoints/org/model"]
    (tuned / "hyperparameters.yaml").write_text("\n".join(lines))
    result = litgpt("merge_lora", tuned)
    assert result.code == 0, result.err
    assert distance(tuned, tmp_path) < 1e-5


def test_as_a_peft_adapter_and_back(litgpt, base, tuned, tmp_path):
    result = litgpt("convert_from_litgpt", tuned, tmp_path / "adapter", "--format", "peft")
    assert result.code == 0, result.err
    assert names(tmp_path / "adapter") == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "org/model"
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    expected = torch.load(tmp_path / "expected.pt")
    with torch.inference_mode():
        assert (theirs(tokens()).logits - expected).abs().max() < 1e-4
    for out in (tmp_path / "back", tmp_path / "adapter"):
        options = [] if out.name == "adapter" else ["--out_dir", out]
        result = litgpt("convert_to_litgpt", tmp_path / "adapter", *options)
        assert result.code == 0, result.err
        assert f"litgpt merge_lora {out}" in result.out
        (weights, lora, name), (original, _, _) = read_lora(out), read_lora(tuned)
        assert (lora, name) == (LORA, "org/model")
        assert all(torch.equal(weights[key], original[key]) for key in original)
        assert litgpt("merge_lora", out).code == 0
        assert distance(out, tmp_path) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge_lora", "nowhere"], "No checkpoint 'nowhere'"),
        (["merge_lora", "checkpoints/org/model"], "holds no LoRA weights (no lit_model.pth.lora, no PEFT adapter)"),
        (["merge_lora", "out/final", "--precision", "bf61-true"], "--precision bf61-true"),
        (["merge_lora", "out/final", "--out_dir", "checkpoints/org/model"], "holds the model that was finetuned"),
        (
            ["convert_from_litgpt", "out/final", "x", "--format", "peft", "--dtype", "bf16"],
            "--dtype bf16 cannot be combined with --format peft",
        ),
        (
            ["convert_from_litgpt", "checkpoints/org/model", "x", "--format", "peft"],
            "holds no LoRA weights (no lit_model.pth.lora, no PEFT adapter)",
        ),
        (
            ["convert_to_litgpt", "org/model", "--pretrained_checkpoint_dir", "org/model"],
            "--pretrained_checkpoint_dir org/model has no effect here",
        ),
    ],
)
def test_mistakes_are_told_without_a_traceback(litgpt, tuned, tmp_path, arguments, message):
    result = litgpt(*arguments)
    assert result.code in (1, 2)
    assert message in result.err
    assert "Traceback" not in result.err
    assert not (tmp_path / "x").exists()
