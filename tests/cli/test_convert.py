"""`litgpt convert DIR --to FORMAT`: each format from each, and that what is not supported is refused by name."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from litgpt.adaptation.lora import LORA_WEIGHTS, LoRASettings, apply_lora, is_lora, read_lora, save_lora
from litgpt.checkpoint import WEIGHTS, copy_companion_files
from litgpt.formats.gguf.file import GGUFFile
from litgpt.quantization.layers import kind_of
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from tests import checkpoint_files

IDS = torch.arange(20)[None]


@pytest.fixture
def ours(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return checkpoint_files.chat_model(Path("checkpoints/org/tiny"))


@pytest.fixture
def lora(ours) -> Path:
    """LoRA weights alone, which change what the model says."""
    model, settings, directory = load_model(ours), LoRASettings(), Path("out/final")
    directory.mkdir(parents=True)
    copy_companion_files(ours, directory)
    apply_lora(model, settings)
    weights = {n: torch.randn_like(p) / 10 for n, p in model.named_parameters() if is_lora(n)}
    save_lora(directory, weights, settings, str(ours))
    return directory


def ok(result) -> str:
    assert result.code == 0, result.err
    return result.out


def test_to_hugging_face_and_back(litgpt, ours):
    assert "litgpt convert" in ok(litgpt("convert", "--help"))
    ok(litgpt("convert", "org/tiny", "--to", "hf", "out/hf"))
    assert {file.name for file in Path("out/hf").glob("*.safetensors")} == {"model.safetensors"}
    expected = load_model(ours)(IDS)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained("out/hf")(IDS).logits, expected)
    ok(litgpt("convert", "out/hf", "out/both", "--to", "hf", "--format", "both", "--dtype", "bf16"))
    assert torch.load("out/both/model.pth", weights_only=True)["lm_head.weight"].dtype == torch.bfloat16
    ok(litgpt("convert", "out/hf", "--to", "litgpt"))
    assert torch.equal(load_model("out/hf")(IDS), expected)
    assert Path("out/hf/model.safetensors").is_file()


def test_to_gguf_and_back(litgpt, ours):
    ok(litgpt("convert", ours, "--to", "gguf", "--model_name", "Tiny"))
    assert GGUFFile(Path("checkpoints/org/tiny.gguf")).metadata["general.name"] == "Tiny"
    ok(litgpt("convert", ours, "--to", "gguf", "--quantize", "q8_0"))
    assert Path("checkpoints/org/tiny-q8_0.gguf").stat().st_size < Path("checkpoints/org/tiny.gguf").stat().st_size
    assert "to checkpoints/org/back." in ok(
        litgpt("convert", "org/tiny.gguf", "checkpoints/org/back", "--to", "litgpt")
    )
    assert torch.equal(load_model("checkpoints/org/back")(IDS), load_model(ours)(IDS))


def test_litgpts_own_in_other_forms(litgpt, ours):
    state = {name: tensor.clone() for name, tensor in open_checkpoint(ours).weights()}
    torch.save({"model": state, "optimizer": {"step": torch.zeros(10_000)}}, ours / WEIGHTS)
    ok(litgpt("convert", ours, "plain", "--to", "litgpt"))
    assert torch.load(Path("plain") / WEIGHTS, weights_only=True).keys() == state.keys()
    out = ok(litgpt("convert", ours, "--to", "litgpt", "--quantize", "bnb.nf4", "--dtype", "bf16"))
    four = ours.resolve().with_name("tiny-bnb.nf4")
    assert f"litgpt chat {four}" in out
    assert kind_of(load_model(four)) == "bnb.nf4"
    result = litgpt("convert", ours, "--to", "litgpt")
    assert result.code == 1
    assert "is in litgpt's format already" in result.err


def test_lora_weights_alone_are_merged_on_the_way(litgpt, ours, lora):
    ok(litgpt("merge_lora", lora, "--out_dir", "merged"))
    expected = load_model("merged")(IDS)
    assert not torch.allclose(expected, load_model(ours)(IDS))
    for arguments in (("--to", "hf", "hf"), ("--to", "gguf", "m.gguf"), ("--to", "litgpt", "lit")):
        ok(litgpt("convert", lora, *arguments))
        torch.testing.assert_close(load_model(arguments[-1])(IDS), expected)


def test_to_peft_and_back(litgpt, ours, lora):
    ok(litgpt("convert", lora, "--to", "peft"))
    assert Path("out/final-peft/adapter_config.json").is_file()
    ok(litgpt("convert", "out/final-peft", "back", "--to", "litgpt", "--pretrained_checkpoint_dir", ours))
    before, after = read_lora(lora / LORA_WEIGHTS)[0], read_lora(Path("back") / LORA_WEIGHTS)[0]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_without_a_config_are_those_of_the_named_model(litgpt, ours):
    ok(litgpt("convert", ours, "hf", "--to", "hf"))
    Path("hf/config.json").unlink()
    result = litgpt("convert", "hf", "--to", "litgpt", "--model_name", "pythia-14m")
    assert result.code == 1
    assert "not those of the model" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--to", "hf", "--quantize", "bnb.nf4"),
            "--quantize bnb.nf4 cannot be combined with --to hf: it is for --to gguf and",
        ),
        (("--to", "hf", "--model_name", "x"), "--model_name x cannot be combined with --to hf"),
        (
            ("--to", "gguf", "--format", "pth"),
            "--format pth cannot be combined with --to gguf: it is for --to hf. Leave it out",
        ),
        (("--to", "litgpt", "--model_name", "x"), "--model_name x has no effect here: "),
        (("--to", "litgpt", "--pretrained_checkpoint_dir", "x"), "it is for --to litgpt from a PEFT adapter"),
        (("--to", "peft", "--dtype", "bf16"), "--dtype bf16 cannot be combined with --to peft"),
        (("--to", "peft"), "holds no LoRA weights"),
        (
            ("--to", "gguf", "--dtype", "bf16", "--quantize", "q8_0"),
            "--dtype bf16 cannot be combined with --quantize q8_0",
        ),
        (("--to", "litgpt", "out", "--quantize", "q8_0"), "--quantize q8_0 is not for checkpoints in litgpt's format"),
        (("--to", "gguf", "out"), "'out' is not a name of a GGUF file"),
        (("--to", "onnx"), "onnx"),
        ((), "missing: --to. Usage: litgpt convert CHECKPOINT_DIR OUT"),
        (("a", "b", "--to", "hf"), "unexpected argument 'b'"),
    ],
)
def test_what_cannot_act_is_refused(litgpt, ours, arguments, message):
    before = sorted(Path().rglob("*"))
    result = litgpt("convert", ours, *arguments)
    assert result.code in (1, 2)
    assert message in result.err
    assert "Traceback" not in result.err
    assert sorted(Path().rglob("*")) == before
