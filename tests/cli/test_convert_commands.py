"""convert_to_litgpt, convert_from_litgpt and convert_pretrained_checkpoint, as a user types them."""

import re
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from litgpt.checkpoint import CONFIG, WEIGHTS, read_state_dict, save_model
from litgpt.config import Config
from litgpt.formats.hf_config import config_to_hf
from litgpt.model import GPT
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from tests import tokenizer_files

SIZES = {"vocab_size": 704, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture
def hf(tmp_path):
    """A Hugging Face directory with a tokenizer."""
    torch.manual_seed(0)
    directory = tmp_path / "My-Model"
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(directory)
    tokenizer_files.byte_level(directory, {})
    return directory


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_hugging_face_directory_is_converted_in_place(litgpt, hf):
    before = names(hf)
    result = litgpt("convert_to_litgpt", hf)
    assert result.code == 0, result.err
    assert f"Saving converted checkpoint to {hf}" in result.out
    assert names(hf) == sorted([*before, WEIGHTS, CONFIG])
    assert Config.from_checkpoint(hf).name == "My-Model"
    expected = dict(open_checkpoint(hf, converted=False).weights())
    read = read_state_dict(hf / WEIGHTS)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)
    again = litgpt("convert_to_litgpt", hf, "--dtype", "bfloat16", "--verbose", "true")
    assert again.code == 0, again.err
    assert "transformer.h.1.attn.qkv.weight [64, 32] float32" in again.out
    read = read_state_dict(hf / WEIGHTS)
    assert {tensor.dtype for tensor in read.values()} == {torch.bfloat16}
    assert read["lm_head.weight"].data_ptr() == read["transformer.wte.weight"].data_ptr()


def test_another_directory_gets_the_tokenizer_too(litgpt, hf, tmp_path):
    before = names(hf)
    assert litgpt("convert_to_litgpt", hf, "--out_dir", tmp_path / "out", "--model_name", "Other").code == 0
    assert names(hf) == before
    expected = {WEIGHTS, CONFIG, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(names(tmp_path / "out")) == expected
    assert Config.from_checkpoint(tmp_path / "out").name == "Other"
    refused = litgpt("convert_to_litgpt", hf, "--out_dir", tmp_path / "out")
    assert refused.code == 1
    assert "exists already" in refused.err


def test_a_gguf_file_is_converted_beside_itself(litgpt, smollm2_gguf, tmp_path):
    file = tmp_path / smollm2_gguf.name
    file.symlink_to(smollm2_gguf)
    result = litgpt("convert_to_litgpt", file, "--dtype", "bf16")
    assert result.code == 0, result.err
    out = tmp_path / "SmolLM2-135M-Instruct.Q4_1"
    assert f"Saving converted checkpoint to {out}" in result.out
    expected = {WEIGHTS, CONFIG, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(names(out)) == expected
    config = Config.from_checkpoint(out)
    assert config == Config.from_name("SmolLM2-135M-Instruct", tie_embeddings=False)  # which the file does not hold
    assert load_model(out).num_parameters() == 134_515_008
    assert (out / WEIGHTS).stat().st_size < 2.01 * 134_515_008


def test_that_only_the_text_model_is_used_is_said(litgpt, hf, tmp_path):
    whole = tmp_path / "Whole"
    vision = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = LlavaConfig(text_config=LlamaConfig(**SIZES), vision_config=CLIPVisionConfig(**vision, image_size=32))
    LlavaForConditionalGeneration(config).save_pretrained(whole)
    tokenizer_files.byte_level(whole, {})
    note = "Of LlavaForConditionalGeneration, only the text model is used (LlamaForCausalLM); "
    converted = litgpt("convert_to_litgpt", whole, "--out_dir", tmp_path / "out")
    assert (converted.code, converted.err.count(note)) == (0, 1)
    exported = litgpt("convert_from_litgpt", whole, tmp_path / "text")
    assert (exported.code, exported.err.count(note)) == (0, 1)
    answered = litgpt("generate", whole, "--prompt", "Hello", "--max_new_tokens", "2")
    assert (answered.code, answered.err.count(note)) == (0, 1)
    assert "only the text model" not in litgpt("convert_to_litgpt", hf).err


@pytest.mark.parametrize("format", ["both", "safetensors", "pth"])
def test_what_is_exported_loads_with_transformers(litgpt, hf, tmp_path, format):
    reference = AutoModelForCausalLM.from_pretrained(hf).state_dict()
    original = load_file(hf / "model.safetensors")
    assert litgpt("convert_to_litgpt", hf).code == 0
    (hf / "model.safetensors").unlink()
    out = tmp_path / "out" / "converted_model"
    arguments = [] if format == "both" else ["--format", format]
    result = litgpt("convert_from_litgpt", hf, out, *arguments)
    assert result.code == 0, result.err
    weights = {"both": {"model.safetensors", "model.pth"}, "safetensors": {"model.safetensors"}, "pth": {"model.pth"}}
    rest = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(names(out)) == weights[format] | rest
    assert ("--format safetensors" in result.out) == (format == "both")
    if format != "pth":
        loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
        assert all(torch.equal(loaded[name], reference[name]) for name in reference)
        assert (
            AutoTokenizer.from_pretrained(out)("Hello")["input_ids"]
            == AutoTokenizer.from_pretrained(hf)("Hello")["input_ids"]
        )
    if format != "safetensors":
        state_dict = torch.load(out / "model.pth")
        assert state_dict.keys() == original.keys()
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(out))
        model.load_state_dict(state_dict, strict=False)
        model.tie_weights()
        assert all(torch.equal(model.state_dict()[name], reference[name]) for name in reference)


def test_what_no_architecture_can_express_is_not_exported(litgpt, tmp_path):
    config = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, padding_multiple=32, scale_embeddings=True)
    (tmp_path / "lit").mkdir()
    save_model(tmp_path / "lit", GPT(config), config)
    result = litgpt("convert_from_litgpt", tmp_path / "lit", tmp_path / "out")
    assert result.code == 1
    assert "cannot be written as a Hugging Face checkpoint" in result.err
    assert "scale_embeddings=True" in result.err
    assert "the nearest is GPTNeoXForCausalLM" in result.err
    assert re.findall(r"\w+ForCausalLM", result.err) == ["GPTNeoXForCausalLM"] * 2
    assert names(tmp_path) == ["lit"]


@pytest.mark.parametrize(
    ("name", "changes", "own", "lack"),
    [
        ("Llama-3.2-1B", {"scale_embeddings": True}, "LlamaForCausalLM", "scale_embeddings=True"),
        ("Gemma-2-2b", {"post_mlp_norm": False}, "Gemma2ForCausalLM", "post_mlp_norm=False"),
        ("my-own", {"final_logit_softcapping": 30.0}, None, "final_logit_softcapping=30.0"),
    ],
)
def test_a_failed_export_speaks_of_the_models_own_class(name, changes, own, lack):
    config = Config(**{**vars(Config.from_name("Llama-3.2-1B" if own is None else name)), "name": name, **changes})
    with pytest.raises(ValueError) as info:
        config_to_hf(config)
    said = str(info.value)
    assert lack in said
    assert f"It is a {own}:" in said if own else "the nearest is LlamaForCausalLM:" in said
    assert set(re.findall(r"\w+ForCausalLM", said)) == {own or "LlamaForCausalLM"}
    with pytest.raises(ValueError, match="It is a LlamaForCausalLM"):
        config_to_hf(config, "LlamaForCausalLM")


def test_training_state_is_left_behind(litgpt, hf, tmp_path):
    source = open_checkpoint(hf)
    run = tmp_path / "final"
    run.mkdir()
    source.config.save(run)
    state = dict(source.weights())
    torch.save({"model": state, "optimizer": {"step": torch.zeros(10_000)}, "iter_num": 7}, run / WEIGHTS)
    tokenizer_files.byte_level(run, {})
    result = litgpt("convert_pretrained_checkpoint", run, tmp_path / "converted")
    assert result.code == 0, result.err
    assert {WEIGHTS, CONFIG, "tokenizer.json"} <= set(names(tmp_path / "converted"))
    plain = torch.load(tmp_path / "converted" / WEIGHTS, weights_only=True)
    assert plain.keys() == state.keys()
    assert all(torch.equal(plain[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert_to_litgpt", "nowhere"], "No checkpoint 'nowhere'"),
        (["convert_to_litgpt", "{empty}"], "lacks weights"),
        (["convert_to_litgpt", "{hf}", "--dtype", "bfloat61"], "Did you mean 'bfloat16'"),
        (["convert_from_litgpt", "{hf}", "{empty}", "--format", "zip"], "zip"),
        (["convert_pretrained_checkpoint", "{empty}", "x"], "it lacks weights"),
    ],
)
def test_mistakes_are_told_without_a_traceback(litgpt, hf, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    result = litgpt(*(word.format(empty=tmp_path / "empty", hf=hf) for word in arguments))
    assert result.code in (1, 2)
    assert message in result.err
    assert "Traceback" not in result.err


def test_a_full_disk_leaves_what_was_there(litgpt, hf, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        result = litgpt("convert_to_litgpt", hf, "--out_dir", disk / "out", "--dtype", "float64")
        assert result.code == 1
        assert "no space left to write" in result.err
        assert names(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)
