"""Checkpoints of transformers, loaded, converted and exported: bit for bit, in bounded memory, with clear errors."""

import itertools
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from litgpt.checkpoint import CONFIG, WEIGHTS, read_state_dict, save_model, write_state_dict
from litgpt.config import Config
from litgpt.export.hf_writer import export_hf
from litgpt.model import GPT
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from tests import tokenizer_files

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, **kw)),
    "neox": lambda **kw: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=128, **kw)),
}


def make(kind, directory, *, dtype=torch.float32, binary=False, shard="1MB", **settings):
    """A random model of transformers, saved; its state dict."""
    torch.manual_seed(1)
    model = MODELS[kind](**settings).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(directory, max_shard_size=shard)
    if binary:
        to_binary(directory)
    return model.eval()


def to_binary(directory):
    """The same files as torch.save would have written them; transformers 5 itself no longer does."""
    for file in list(directory.glob("*.safetensors")):
        torch.save(load_file(file), file.with_name(file.name.replace("model", "pytorch_model")).with_suffix(".bin"))
        file.unlink()
    index = directory / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (directory / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def files_of(directory):
    """All tensors of a Hugging Face directory by name."""
    tensors = {}
    for file in directory.iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif file.suffix == ".bin":
            tensors |= torch.load(file, weights_only=True)
    return tensors


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name


IDS = torch.arange(40)[None] % 64


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("binary", "shard"), list(itertools.product([False, True], ["1MB", "20KB"])))
def test_there_and_back_is_bit_exact(tmp_path, kind, dtype, binary, shard):
    make(kind, tmp_path / "hf", dtype=dtype, binary=binary, shard=shard)
    original = files_of(tmp_path / "hf")
    assert (len(list((tmp_path / "hf").glob("*model*.*"))) > 1) == (shard == "20KB")
    source = open_checkpoint(tmp_path / "hf")
    assert source.dtype == dtype
    (tmp_path / "lit").mkdir()
    save_model(tmp_path / "lit", source.weights(), source.config)
    converted = open_checkpoint(tmp_path / "lit")
    assert converted.config == source.config
    export_hf(converted, tmp_path / "back", pth=True, shard_size=20_000)
    assert_equal(files_of(tmp_path / "back"), original)
    assert_equal(torch.load(tmp_path / "back" / "model.pth", weights_only=True), original)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", MODELS)
def test_logits_equal_the_reference_before_and_after(tmp_path, kind, tied):
    reference = make(kind, tmp_path / "hf", tie_word_embeddings=tied)
    model = load_model(tmp_path / "hf")
    assert (model.lm_head.weight is model.transformer["wte"].weight) == tied
    with torch.no_grad():
        expected = reference(IDS).logits
        torch.testing.assert_close(model(IDS), expected, atol=1e-5, rtol=1e-5)
        export_hf(tmp_path / "hf", tmp_path / "back")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
        assert torch.equal(again(IDS).logits, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_ours_is_exported_without_any_config_json(tmp_path, kind):
    config = open_config(kind, tmp_path)
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    (tmp_path / "lit").mkdir()
    save_model(tmp_path / "lit", model, config)
    (tmp_path / "lit" / "generation_config.json").write_text('{"bos_token_id": 3, "eos_token_id": [4, 5]}')
    export_hf(tmp_path / "lit", tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (3, [4, 5])
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), reference(IDS).logits, atol=1e-5, rtol=1e-5)


def open_config(kind, tmp_path):
    make(kind, tmp_path / "like")
    return open_checkpoint(tmp_path / "like").config


def test_a_stale_config_json_is_not_exported(tmp_path):
    make("llama", tmp_path / "hf", rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    source = open_checkpoint(tmp_path / "hf")
    save_model(tmp_path / "hf", source.weights(), source.config)
    text = (tmp_path / "hf" / CONFIG).read_text()
    assert "rope_base: 10000\n" in text
    (tmp_path / "hf" / CONFIG).write_text(text.replace("rope_base: 10000\n", "rope_base: 20000\n"))
    export_hf(tmp_path / "hf", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["rope_theta"] == 20000
    assert written["eos_token_id"] == 2


def test_the_type_can_be_changed(tmp_path):
    original = make("llama", tmp_path / "hf").state_dict()
    assert load_model(tmp_path / "hf", dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16
    export_hf(tmp_path / "hf", tmp_path / "half", dtype=torch.float16)
    assert_equal(files_of(tmp_path / "half"), {name: tensor.half() for name, tensor in original.items()})
    assert "float16" in (tmp_path / "half" / "config.json").read_text()


# --- tied embeddings


def test_a_tied_head_is_stored_once_under_both_names(tmp_path):
    make("llama", tmp_path / "hf", tie_word_embeddings=True)
    assert "lm_head.weight" not in files_of(tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf")
    (tmp_path / "lit").mkdir()
    save_model(tmp_path / "lit", source.weights(), source.config)
    tensors = torch.load(tmp_path / "lit" / WEIGHTS, weights_only=True)
    assert tensors["lm_head.weight"].data_ptr() == tensors["transformer.wte.weight"].data_ptr()
    assert "tie" not in (tmp_path / "lit" / CONFIG).read_text()
    model = load_model(tmp_path / "lit")
    assert model.lm_head.weight is model.transformer["wte"].weight
    (tmp_path / "again").mkdir()
    save_model(tmp_path / "again", model, model.config)
    assert (tmp_path / "again" / WEIGHTS).stat().st_size == (tmp_path / "lit" / WEIGHTS).stat().st_size
    export_hf(tmp_path / "again", tmp_path / "back")
    assert_equal(files_of(tmp_path / "back"), files_of(tmp_path / "hf"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("equal", [True, False])
def test_files_that_hold_a_head_that_the_config_ties(tmp_path, equal):
    make("llama", tmp_path / "hf", tie_word_embeddings=True)
    tensors = files_of(tmp_path / "hf")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    model = load_model(tmp_path / "hf")
    assert (model.lm_head.weight is model.transformer["wte"].weight) == equal
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_two_equal_copies_are_tied_where_the_config_json_says_so(tmp_path):
    make("llama", tmp_path / "hf", tie_word_embeddings=True)
    source = open_checkpoint(tmp_path / "hf")
    copies = [(name, tensor.clone()) for name, tensor in source.weights()]  # as other programs write them
    save_model(tmp_path / "hf", copies, source.config)
    assert open_checkpoint(tmp_path / "hf").config.tie_embeddings
    copies[1][1][0, 0] += 1
    save_model(tmp_path / "hf", copies, source.config)
    assert not open_checkpoint(tmp_path / "hf").config.tie_embeddings


# --- streaming


def test_queries_keys_and_values_may_lie_in_different_files(tmp_path):
    original = make("llama", tmp_path / "hf").state_dict()
    expected = load_model(tmp_path / "hf").state_dict()
    (tmp_path / "hf" / "model.safetensors").unlink()
    names = sorted(original, key=lambda name: ("q_proj" in name, "v_proj" in name, "k_proj" in name, name))
    weight_map = {}
    for i, name in enumerate(names):
        weight_map[name] = f"model-{i:05}.safetensors"
        save_file({name: original[name].clone()}, tmp_path / "hf" / weight_map[name])
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(load_model(tmp_path / "hf").state_dict(), expected)


PEAK = """
import sys
from pathlib import Path
from litgpt.sources.load import load_model
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.checkpoint import save_model
from litgpt import LLM, Tokenizer
path, what = Path(sys.argv[1]), sys.argv[2]
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
source = open_checkpoint(path)
Tokenizer(path)  # what it imports
before = peak()
if what == "convert":
    save_model(path, source.weights(), source.config, source.release)
elif what == "LLM":
    LLM.load(path, precision="32-true")
else:
    load_model(source)
print(peak() - before)
"""


def peak_of(directory, what):
    command = [sys.executable, "-c", textwrap.dedent(PEAK), str(directory), what]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return float(result.stdout)


def write_large(directory, layers, binary):
    """A Llama checkpoint of 13 MB a layer and a tied embedding of 80 MB, in files of two layers."""
    config = SIZES | {"num_hidden_layers": layers, "hidden_size": 512, "intermediate_size": 1536}
    config |= {"vocab_size": 40_960, "tie_word_embeddings": True}
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": 4}
    config |= {"num_attention_heads": 4}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    named = {}
    with torch.device("meta"):
        shapes = LlamaForCausalLM(LlamaConfig(**config)).state_dict()
        del shapes["lm_head.weight"]
    for i in range(0, layers, 2):
        part = [n for n in shapes if f".{i}." in n or f".{i + 1}." in n or (i == 0 and "layers" not in n)]
        tensors = {name: torch.ones(shapes[name].shape) for name in part}
        file = f"pytorch_model-{i:05}.bin" if binary else f"model-{i:05}.safetensors"
        torch.save(tensors, directory / file) if binary else save_file(tensors, directory / file)
        named |= dict.fromkeys(part, file)
    index = "pytorch_model.bin.index.json" if binary else "model.safetensors.index.json"
    (directory / index).write_text(json.dumps({"weight_map": named}))
    return sum(shape.numel() * 4 for shape in shapes.values()) / 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_converting_takes_memory_for_a_part_of_a_file_however_many_there_are(tmp_path, binary):
    size = write_large(tmp_path / "large", 10, binary)
    tokenizer_files.byte_level(tmp_path / "large")
    assert size > 190
    assert peak_of(tmp_path / "large", "convert") < 60
    # What was converted loads at the size of the model, and not at that of model and file.
    if not binary:
        assert peak_of(tmp_path / "large", "load") < 1.15 * size
        assert peak_of(tmp_path / "large", "LLM") < 1.15 * size


# --- damage


def test_every_misfit_is_listed(tmp_path):
    make("llama", tmp_path / "hf")
    tensors = files_of(tmp_path / "hf")
    del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 31)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(31, 32)
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # a buffer of older versions, no weight
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match="5 problems") as info:
        open_checkpoint(tmp_path / "hf")
    for line in (
        "missing: model.norm.weight [32]",
        "missing: model.layers.1.self_attn.k_proj.weight [16, 32]",
        "unexpected: model.layers.7.mlp.up_proj.weight [1]",
        "wrong shape: model.layers.0.mlp.up_proj.weight is [48, 31] in the files, [48, 32] in config.json",
        "wrong shape: model.layers.0.self_attn.q_proj.weight is [31, 32] in the files, [32, 32] in config.json",
    ):
        assert line in str(info.value)
    assert "inv_freq" not in str(info.value)


def test_every_misfit_of_a_converted_checkpoint_is_listed(tmp_path):
    config = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, padding_multiple=32)
    tensors = GPT(config).state_dict()
    del tensors["transformer.ln_f.weight"]
    tensors["extra"] = torch.zeros(2)
    tensors["lm_head.weight"] = torch.zeros(31, 16)
    save_model(tmp_path, tensors, config)
    with pytest.raises(ValueError, match=r"(?s)3 problems.*missing: transformer.ln_f.weight.*unexpected: extra"):
        open_checkpoint(tmp_path)


def test_a_model_of_another_shape_is_refused_unchanged(tmp_path):
    make("llama", tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf")
    other = GPT(Config(**{**vars(source.config), "intermediate_size": 40}))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"6 problems") as info:
        source.load_into(other)
    assert "mlp.fc_1.weight is [48, 32] in the checkpoint, [40, 32] in this model" in str(info.value)
    assert_equal(other.state_dict(), before)
    tied = GPT(Config(**{**vars(source.config), "tie_embeddings": True}))
    with pytest.raises(ValueError, match="differ in the checkpoint; this model ties them"):
        source.load_into(tied)


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_truncated_weight_file_is_named(tmp_path, binary, share):
    make("llama", tmp_path / "hf", binary=binary)
    file = next((tmp_path / "hf").glob("*model.*"))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"Cannot read weights from.*model.*again"):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\x10" + b"\0" * 7 + b"[1,2,3]" + b" " * 20, b"<html>" * 50])
def test_a_foreign_file_is_named(tmp_path, content):
    make("llama", tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors.*(no safetensors file|web page)"):
        open_checkpoint(tmp_path / "hf")


def test_a_header_of_odd_length_is_read(tmp_path):
    make("llama", tmp_path / "hf", dtype=torch.bfloat16)
    # Copies: the safetensors package gives views of the file that is about to change.
    expected = {name: tensor.clone() for name, tensor in files_of(tmp_path / "hf").items()}
    file = tmp_path / "hf" / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes((length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :])
    export_hf(tmp_path / "hf", tmp_path / "back")
    assert_equal(files_of(tmp_path / "back"), expected)


def test_lit_model_wins_over_the_weights_beside_it(tmp_path):
    make("llama", tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf")
    save_model(tmp_path / "hf", ((name, torch.zeros_like(tensor)) for name, tensor in source.weights()), source.config)
    assert load_model(tmp_path / "hf").lm_head.weight.count_nonzero() == 0
    original = open_checkpoint(tmp_path / "hf", converted=False)
    assert dict(original.weights())["lm_head.weight"].count_nonzero() > 0


def test_a_directory_without_config_json_needs_a_name(tmp_path):
    config = SIZES | {"vocab_size": 50304, "hidden_size": 128, "num_hidden_layers": 6, "max_position_embeddings": 512}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**config, intermediate_size=512))
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        open_checkpoint(tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf", "pythia-14m")
    assert source.config == Config.from_name("pythia-14m")
    assert len(dict(source.weights())) == len(dict(source.layout())) == 76


def test_wrappers_before_the_names_are_taken_off(tmp_path):
    config = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, padding_multiple=32)
    state = {f"_orig_mod.{name}": tensor for name, tensor in GPT(config).state_dict().items()}
    config.save(tmp_path)
    torch.save({"model": state, "iter_num": 3}, tmp_path / WEIGHTS)
    assert load_model(tmp_path).config == config


# --- LitGPT itself


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_litgpt_reads_what_we_write_and_the_other_way_round(tmp_path, kind, smollm2_gguf):
    """LITGPT_PEER is the command of LitGPT 0.5.13 in an environment of its own."""
    peer = os.environ.get("LITGPT_PEER")
    if not peer:
        pytest.skip("LITGPT_PEER does not name LitGPT's own command")
    gguf = open_checkpoint(smollm2_gguf)
    if kind == "llama":
        directory = tmp_path / "SmolLM2-135M-Instruct"
        export_hf(gguf, directory)
    else:
        directory = tmp_path / "pythia-14m"
        config = Config.from_name("pythia-14m")
        torch.manual_seed(0)
        model = GPT(config)
        model.init_weights()
        ours = tmp_path / "ours"
        ours.mkdir()
        save_model(ours, model, config)
        export_hf(ours, directory)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (directory / file).write_bytes((gguf.files / file).read_bytes())
    subprocess.run([peer, "convert_to_litgpt", str(directory)], check=True, capture_output=True)
    theirs = read_state_dict(directory / WEIGHTS)
    their_answer = greedy(peer, directory)
    source = open_checkpoint(directory, converted=False)
    expected = dict(source.weights())
    assert_equal(dict(theirs), expected)
    assert open_checkpoint(directory).config == source.config
    their_config = (directory / CONFIG).read_text()
    save_model(directory, source.weights(), source.config, source.release)
    assert sorted((directory / CONFIG).read_text().splitlines()) == sorted(their_config.splitlines())
    assert greedy(peer, directory) == their_answer


def greedy(peer, directory):
    command = [peer, "generate", str(directory), "--prompt", "What is the capital of France?", "--top_k", "1"]
    command += ["--max_new_tokens", "20", "--precision", "32-true"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_write_state_dict_is_what_save_model_uses(tmp_path):
    config = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, padding_multiple=32)
    model = GPT(config)
    save_model(tmp_path, model, config)
    write_state_dict(tmp_path / "other.pth", model.state_dict().items())
    assert (tmp_path / "other.pth").read_bytes() == (tmp_path / WEIGHTS).read_bytes()
