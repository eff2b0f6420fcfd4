"""K-quants: written by us, run from the file by us and by llama.cpp, and calibrated by a text.

llama.cpp's tests need a Python that has `llama_cpp`, as in test_gguf_export.py.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from litgpt.__main__ import main
from litgpt.export.calibration import importance
from litgpt.export.gguf_kinds import KINDS
from litgpt.export.gguf_writer import export_gguf
from litgpt.formats.gguf.file import GGUFFile
from litgpt.quantization import block_weight
from litgpt.quantization.layers import quantized_layers
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import tokenizer_files
from tests.parity.test_gguf_export import ASK_LLAMA_CPP, IDS, LLAMA_CPP, SIZES

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "initializer_range": 0.04}
MIXTURES = ("q4_k_m", "q4_k_s", "q5_k_m", "q5_k_s", "q6_k")
QUANTISE = """
import ctypes, sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.nthread = int(sys.argv[3]), 1
assert llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(parameters)) == 0
"""


# Weights in another order for AMX, which llama.cpp would make, end it with an illegal instruction on some virtual machines.
AS_THEY_LIE = """
import llama_cpp.llama_cpp as library
usual = library.llama_model_default_params
def as_they_lie():
    parameters = usual()
    parameters.use_extra_bufts = False
    return parameters
library.llama_model_default_params = as_they_lie
"""


@pytest.fixture(scope="module", params=["own head", "tied"])
def wide(request, tmp_path_factory) -> Path:
    """A model whose rows are whole blocks of 256 values."""
    directory = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SIZES | WIDE | {"tie_word_embeddings": request.param == "tied"}))
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer_files.byte_level(directory, {"chat_template": tokenizer_files.CHATML})
    return directory


def logits(file: Path, quantize: str | None = None) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(file, dtype=torch.float32, quantize=quantize)(torch.tensor(IDS))


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_runs_from_its_file(wide, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(block_weight, "FEW", 0)  # for fewer rows inputs are rounded
    file = tmp_path / "m.gguf"
    assert main(["convert_from_litgpt", str(wide), str(file), "--dtype", kind]) in (0, None)
    source = open_checkpoint(wide)
    tied = source.config.tie_embeddings
    for name, tensor in GGUFFile(file).tensors.items():
        assert tensor.kind == KINDS[kind].stored(name, tensor.shape, 8, tied)
    torch.testing.assert_close(logits(file, "gguf"), logits(file), rtol=1e-4, atol=1e-4)
    weights = dict(source.weights())
    for name, found in open_checkpoint(file).weights():
        bound = {"q4": 0.09, "q5": 0.045, "q6": 0.02}[kind[:2]]
        assert (found - weights[name]).norm() < bound * weights[name].norm(), name


def test_queries_keys_and_values_of_several_kinds_are_one_matrix(wide, tmp_path):
    export_gguf(open_checkpoint(wide), tmp_path / "m.gguf", "q4_k_m")
    layers = dict(quantized_layers(load_model(tmp_path / "m.gguf", quantize="gguf")))
    assert layers["transformer.h.0.attn.qkv"].quantized.forms == ["q4_k", "q4_k", "q6_k"]
    assert layers["transformer.h.2.attn.qkv"].quantized.forms == ["q4_k"] * 3


@pytest.mark.skipif(not LLAMA_CPP, reason="LITGPT_LLAMA_CPP names no Python that has llama_cpp")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("q")])
def test_llama_cpp_would_take_the_same_types(wide, kind, tmp_path):
    export_gguf(open_checkpoint(wide), tmp_path / "float.gguf", "float32")
    export_gguf(open_checkpoint(wide), tmp_path / "ours.gguf", kind)
    command = [LLAMA_CPP, "-c", QUANTISE, str(tmp_path / "float.gguf"), str(tmp_path / "theirs.gguf")]
    done = subprocess.run([*command, str(int(KINDS[kind].file_type))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = (GGUFFile(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    assert ours.metadata["general.file_type"] == theirs.metadata["general.file_type"]
    found, wanted = ({name: tensor.kind.name for name, tensor in file.tensors.items()} for file in (ours, theirs))
    if "_k" not in kind:  # outside the layers ours have 8 bits
        found, wanted = ({n: k for n, k in kinds.items() if n.startswith("blk")} for kinds in (found, wanted))
    assert found == wanted


@pytest.mark.skipif(not LLAMA_CPP, reason="LITGPT_LLAMA_CPP names no Python that has llama_cpp")
@pytest.mark.parametrize("kind", MIXTURES)
def test_llama_cpp_computes_the_same(wide, kind, tmp_path):
    file, text = tmp_path / "m.gguf", "To be, or not"
    export_gguf(open_checkpoint(wide), file, kind)
    command = [LLAMA_CPP, "-c", AS_THEY_LIE + ASK_LLAMA_CPP, str(file), text, json.dumps(IDS[0])]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-3000:]
    found, expected = torch.tensor(json.loads(answer.stdout.splitlines()[-1])["logits"]), logits(file)[0]
    # It rounds the inputs of every layer to 8 bits.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15 * float(expected.std()))


@pytest.fixture(scope="module")
def text(tmp_path_factory, page_of_text) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(page_of_text[:3000], encoding="utf-8")
    return file


def test_importance_is_the_mean_square_of_what_layers_are_given(wide, text):
    source = open_checkpoint(wide)
    found = importance(source, text)
    model, tokens = load_model(source, dtype=torch.float32), Tokenizer(wide).encode(text.read_text())
    given = {}
    layer = model.transformer.h[3]
    for name, module in {"qkv": layer.attn.qkv, "proj": layer.mlp.proj, "head": model.lm_head}.items():
        module.register_forward_pre_hook(lambda _, inputs, name=name: given.setdefault(name, []).append(inputs[0][0]))
    size = model.config.block_size
    with torch.inference_mode():
        for first in range(0, len(tokens), size):
            model(tokens[None, first : first + size])
    assert len(found) == 8 * 5 + 1
    for name, weight in (
        ("qkv", "transformer.h.3.attn.qkv"),
        ("proj", "transformer.h.3.mlp.proj"),
        ("head", "lm_head"),
    ):
        wanted = torch.cat(given[name]).double().square().mean(dim=0)
        assert len(torch.cat(given[name])) == len(tokens)
        torch.testing.assert_close(found[f"{weight}.weight"].double(), wanted, rtol=1e-4, atol=0)


def test_importance_comes_to_the_tensors_of_its_layer(wide, tmp_path):
    source = open_checkpoint(wide)
    export_gguf(source, tmp_path / "plain.gguf", "q4_k_s")
    for weight, tensors in {
        "transformer.h.2.attn.qkv.weight": {"blk.2.attn_q.weight", "blk.2.attn_k.weight", "blk.2.attn_v.weight"},
        "transformer.h.2.mlp.fc_2.weight": {"blk.2.ffn_up.weight"},
        "lm_head.weight": {"token_embd.weight" if source.config.tie_embeddings else "output.weight"},
    }.items():
        given = {weight: torch.rand(256) + 0.01}
        export_gguf(source, tmp_path / "m.gguf", "q4_k_s", importance=given)
        plain, found = (GGUFFile(tmp_path / f"{name}.gguf").tensors for name in ("plain", "m"))
        assert {name for name in plain if not torch.equal(plain[name].read(), found[name].read())} == tensors


@pytest.mark.parametrize("command", [["convert_from_litgpt", "--dtype"], ["convert", "--to", "gguf", "--quantize"]])
def test_a_text_calibrates(wide, text, command, tmp_path, capsys):
    start = [command[0], str(wide), str(tmp_path / "m.gguf"), *command[1:]]
    calibration = ["--calibration", str(text)]
    assert main([*start, "q4_k_m", *calibration]) in (0, None)
    source = open_checkpoint(wide)
    export_gguf(source, tmp_path / "wanted.gguf", "q4_k_m", importance=importance(source, text))
    assert (tmp_path / "m.gguf").stat().st_size == (tmp_path / "wanted.gguf").stat().st_size
    found, wanted = (GGUFFile(tmp_path / f"{name}.gguf").tensors for name in ("m", "wanted"))
    assert all(torch.equal(found[name].read(), wanted[name].read()) for name in wanted)
    (tmp_path / "m.gguf").unlink()
    for kind, options, message in (
        ("float32" if command[0] != "convert" else "q8_0", ["--calibration", str(tmp_path / "none.txt")], ""),
        ("q4_k_m", ["--calibration", str(tmp_path / "none.txt")], "there is no such file"),
        ("q4_k_m", ["--calibration", str(tmp_path / "short.txt")], "tokens, which are too few"),
        ("q4_k_m", ["--calibration", str(tmp_path / "binary.txt")], "is no text in UTF-8"),
    ):
        (tmp_path / "short.txt").write_text("To be, or not to be")
        (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80" * 100)
        assert main([*start, kind, *options]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "m.gguf").exists()
