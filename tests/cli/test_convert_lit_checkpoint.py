"""convert_lit_checkpoint, and what every command makes of the quantised checkpoint that it writes."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from litgpt.adaptation.lora import LORA_WEIGHTS
from litgpt.checkpoint import WEIGHTS, read_state_dict
from litgpt.config import Config
from litgpt.formats.gguf.file import GGUFFile
from litgpt.quantization.layers import kind_of
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from tests import checkpoint_files

ANSWER = ("--prompt", "Hello", "--top_k", 1, "--max_new_tokens", 8)
TRAINING = ("--data", "JSON", "--data.json_path", "records.json", "--data.val_split_fraction", 0.5)
TRAINING += ("--train.max_steps", 1, "--train.global_batch_size", 1, "--train.micro_batch_size", 1)
TRAINING += ("--eval.initial_validation", "false", "--eval.final_validation", "false", "--precision", "bf16-true")


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """The directory of the seed document, with a tokenizer, a prompt style and a record of how it was trained."""
    monkeypatch.chdir(tmp_path)
    directory = checkpoint_files.chat_model(tmp_path / "out" / "phi2-lora" / "final")
    (directory / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    (directory / "hyperparameters.yaml").write_text("seed: 1\n")
    (tmp_path / "records.json").write_text(json.dumps([{"instruction": "Say yes.", "output": "yes"}] * 2))
    return directory


@pytest.fixture
def quantised(litgpt, base) -> Path:
    """The same in 4 bits."""
    result = litgpt(
        "convert_lit_checkpoint", base, "--dtype", "bfloat16", "--quantize", "bnb.nf4", "--out_dir", "small"
    )
    assert result.code == 0, result.err
    return Path("small")


def test_the_seeds_commands_write_checkpoints_that_load_as_they_are(litgpt, base):
    """`litgpt convert_lit_checkpoint out/phi2-lora/final --dtype bfloat16 --quantize bnb.nf4`, and -dq without a type."""
    for kind, options, dtype in (
        ("bnb.nf4", ("--dtype", "bfloat16"), torch.bfloat16),
        ("bnb.nf4-dq", (), torch.float32),
    ):
        result = litgpt("convert_lit_checkpoint", "out/phi2-lora/final", *options, "--quantize", kind)
        assert (result.code, result.err) == (0, "")
        out = base.with_name(f"final-{kind}")
        assert f"to {out}. To talk with it, run:\nlitgpt chat {out}" in result.out
        carried = {file.name for file in base.iterdir()} - {"hyperparameters.yaml"}
        assert {file.name for file in out.iterdir()} == carried
        assert Config.from_checkpoint(out) == Config.from_checkpoint(base)
        loaded, expected = load_model(out), load_model(base, dtype=dtype, quantize=kind)
        assert kind_of(loaded) == kind
        ids = torch.arange(20)[None]
        assert torch.equal(loaded(ids), expected(ids))
        assert loaded(ids).dtype == dtype


def test_generate_takes_the_kind_and_says_so(litgpt, base, quantised, monkeypatch):
    expected = litgpt("generate", base, *ANSWER, "--quantize", "bnb.nf4", "--precision", "bf16-true")
    for options in ((), ("--quantize", "bnb.nf4")):
        result = litgpt("generate", quantised, *ANSWER, *options, "--precision", "bf16-true")
        assert (result.code, result.out) == (0, expected.out), result.err
        assert "(bf16-true, bnb.nf4, cpu)" in result.err
    lines = iter(["Hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    chat = litgpt("chat", quantised, *ANSWER[2:], "--precision", "bf16-true")
    assert expected.out.strip() in chat.out
    assert "(bf16-true, bnb.nf4, cpu)" in chat.err
    result = litgpt("generate", quantised, *ANSWER, "--quantize", "int4")
    assert result.code == 1
    assert "--quantize int4 has no effect here: the weights in 'small' are bnb.nf4 already. Leave it out" in result.err
    result = litgpt("generate_tp", quantised, "--devices", 2, *ANSWER)
    assert result.code == 1
    assert "'small' holds bnb.nf4 weights, which cannot be split over processes" in result.err
    sequential = litgpt("generate_sequentially", quantised, *ANSWER, "--devices", 2, "--precision", "bf16-true")
    assert (sequential.code, sequential.out) == (0, expected.out), sequential.err


def test_plain_weights_are_taken_out_again_and_that_is_said(litgpt, quantised):
    said = "Its bnb.nf4 weights are de-quantised to bfloat16."
    assert litgpt("convert_lit_checkpoint", quantised, "--dtype", "bfloat16").code == 0
    assert open_checkpoint("small-bfloat16").quantized is None
    expected = load_model("small", plain=True)
    for arguments in (
        ("convert_lit_checkpoint", quantised, "--dtype", "bf16", "--out_dir", "plain"),
        ("convert_pretrained_checkpoint", quantised, "stripped"),
        ("convert_from_litgpt", quantised, "hf", "--format", "safetensors"),
    ):
        result = litgpt(*arguments)
        assert (result.code, result.err.strip()) == (0, said)
    ids = torch.arange(20)[None]
    for directory in ("plain", "stripped"):
        assert torch.equal(load_model(directory)(ids), expected(ids))
    exported = AutoModelForCausalLM.from_pretrained("hf", dtype=torch.float32)(ids).logits
    torch.testing.assert_close(
        exported, load_model("small", plain=True, dtype=torch.float32)(ids), rtol=1e-4, atol=1e-4
    )


def test_training_on_it(litgpt, quantised):
    """LoRA and adapters keep 4 bits frozen; where all weights are trained they are de-quantised."""
    result = litgpt("finetune_lora", quantised, *TRAINING, "--out_dir", "lora")
    assert result.code == 0, result.err
    assert "The frozen weights stay as they are in the checkpoint: bnb.nf4" in result.out
    assert "de-quantised" not in result.out
    final = Path("lora/final")
    assert {name.rpartition(".")[2] for name in read_state_dict(final / LORA_WEIGHTS)} == {"lora_A", "lora_B"}
    assert open_checkpoint(final).quantized is None  # merged
    (final / WEIGHTS).unlink()
    result = litgpt("merge_lora", final)
    assert result.code == 0, result.err
    assert result.err.strip() == "Its bnb.nf4 weights are de-quantised to bfloat16."
    before, after = load_model("small", plain=True).state_dict(), load_model(final).state_dict()
    assert torch.equal(before["transformer.h.0.mlp.proj.weight"], after["transformer.h.0.mlp.proj.weight"])

    result = litgpt("finetune_full", quantised, *TRAINING, "--out_dir", "full")
    assert result.code == 0, result.err
    assert "Its bnb.nf4 weights are de-quantised to bfloat16." in result.out
    assert open_checkpoint("full/final").quantized is None
    result = litgpt("finetune_lora", quantised, *TRAINING, "--quantize", "bnb.fp4", "--out_dir", "other")
    assert result.code == 1
    assert "--quantize bnb.fp4 has no effect here: the weights in 'small' are bnb.nf4 already" in result.err


def test_lora_on_weights_for_cpus_is_trained_on_plain_ones(litgpt, base):
    assert litgpt("convert_lit_checkpoint", base, "--quantize", "int4", "--out_dir", "four").code == 0
    result = litgpt("finetune_lora", "four", *TRAINING, "--out_dir", "lora", "--dry_run", "true")
    assert result.code == 0, result.err
    assert "Its int4 weights are de-quantised to float32." in result.out


def test_validate_says_how_they_are_quantised(litgpt, quantised):
    result = litgpt("validate", quantised, "--check_values", "true")
    assert result.code == 0, result.out
    assert "\n  quantised       bnb.nf4\n" in result.out
    report = json.loads(litgpt("validate", quantised, "--json", "true").out)
    assert report["summary"]["quantized"] == "bnb.nf4"
    plain = json.loads(litgpt("validate", "out/phi2-lora/final", "--json", "true").out)
    assert plain["summary"]["quantized"] is None
    sizes = [each["memory"]["methods"]["inference"]["parts"]["weights"] for each in (report, plain)]
    assert sizes[0] < sizes[1]
    content = (quantised / WEIGHTS).read_bytes()
    (quantised / WEIGHTS).write_bytes(content[: len(content) // 2])
    assert "truncated or damaged" in litgpt("validate", quantised).out


def test_the_seeds_gguf_file(litgpt, base):
    """`python scripts/convert_lit_checkpoint.py --checkpoint_path ... --output_path models/phi2.gguf --model_name ...`"""
    named = ("--output_path", "models/phi2.gguf", "--model_name", "microsoft/phi-2")
    result = litgpt("convert_lit_checkpoint", "--checkpoint_path", "out/phi2-lora/final", *named)
    assert (result.code, result.err) == (0, "")
    assert "Saved models/phi2.gguf (" in result.out
    assert "To talk with it, run:\nlitgpt chat models/phi2.gguf" in result.out
    file = GGUFFile(Path("models/phi2.gguf"))
    assert file.metadata["general.name"] == "microsoft/phi-2"
    ids = torch.arange(20)[None]
    assert torch.equal(load_model("models/phi2.gguf")(ids), load_model(base)(ids))
    answers = [
        litgpt(
            "generate", path, "--prompt", "Hello", "--top_k", "1", "--max_new_tokens", "8", "--prompt_style", "default"
        )
        for path in (base, "models/phi2.gguf")
    ]
    assert [answer.code for answer in answers] == [0, 0]
    assert answers[0].out == answers[1].out
    assert litgpt("convert_lit_checkpoint", base, "--output_path", "small.gguf", "--quantize", "q8_0").code == 0
    assert Path("small.gguf").stat().st_size < Path("models/phi2.gguf").stat().st_size
    result = litgpt("convert_from_litgpt", base, "too.gguf", "--dtype", "bf16-true")
    assert result.code == 0, result.err
    assert "bfloat16). To talk" in result.out


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("lit_checkpoint", ("--output_path", "m.bin"), "'m.bin' is not a name of a GGUF file: let it end with .gguf"),
        (
            "from_litgpt",
            ("out.bin", "--format", "gguf"),
            "'out.bin' is not a name of a GGUF file: let it end with .gguf",
        ),
        ("lit_checkpoint", ("--output_path", "m.gguf", "--quantize", "bnb.nf4"), "'bnb.nf4' is not a type of weights"),
        (
            "from_litgpt",
            ("m.gguf", "--dtype", "q80"),
            "'q80' is not a type of weights in a GGUF file. Did you mean 'q8_0'",
        ),
        (
            "lit_checkpoint",
            ("--output_path", "m.gguf", "--out_dir", "o"),
            "--out_dir o cannot be combined with --output_path",
        ),
        (
            "lit_checkpoint",
            ("--output_path", "m.gguf", "--quantize", "q8_0", "--dtype", "float32"),
            "--dtype float32 cannot be combined with --quantize q8_0 in a GGUF file",
        ),
        (
            "lit_checkpoint",
            ("--checkpoint_path", "p", "--output_path", "m.gguf"),
            "--checkpoint_path p is another name",
        ),
        ("lit_checkpoint", ("--model_name", "phi", "--dtype", "float32"), "--model_name phi is not supported without"),
        ("lit_checkpoint", ("--output_path", "there.gguf"), "'there.gguf' exists already"),
    ],
)
def test_gguf_files_that_cannot_be_are_refused(litgpt, base, command, arguments, message):
    Path("there.gguf").write_text("")
    result = litgpt(f"convert_{command}", base, *arguments)
    assert result.code == 1
    assert message in result.err
    assert not Path("m.gguf").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--quantize and --dtype are missing: there is nothing to change"),
        (
            ("--quantize", "bnb.nf5"),
            "--quantize bnb.nf5 is not for checkpoints in litgpt's format. Choose one of: bnb.nf4, ",
        ),
        (("--quantize", "bnb.int8-training"), "--quantize bnb.int8-training is not for checkpoints in litgpt's format"),
        (
            ("--quantize", "int8", "--dtype", "float64"),
            "--dtype float64 cannot be combined with --quantize int8. Use --dtype float32",
        ),
        (("--quantize", "int8", "--dtype", "float8"), "--dtype float8: there is no such type"),
        (("--quantize", "int8", "--out_dir", "out"), "'out' exists already"),
    ],
)
def test_what_cannot_act_is_refused(litgpt, base, arguments, message):
    result = litgpt("convert_lit_checkpoint", base, *arguments)
    assert result.code == 1
    assert message in result.err


def test_what_is_quantised_already_and_adapters_are_refused(litgpt, quantised):
    for kind, message in (("bnb.nf4", "is quantised like that already"), ("int8", "are bnb.nf4 already. Leave it out")):
        result = litgpt("convert_lit_checkpoint", quantised, "--quantize", kind, "--out_dir", "again")
        assert result.code == 1
        assert message in result.err
    first = ("--adapter_start_layer", 0)
    assert litgpt("finetune_adapter", quantised, *TRAINING, *first, "--out_dir", "adapter").code == 0
    result = litgpt("convert_lit_checkpoint", "adapter/final", "--quantize", "int8", "--out_dir", "again")
    assert result.code == 1
    assert "'adapter/final' holds an adapter, which cannot be merged" in result.err
    assert not Path("again").exists()
