"""Checkpoints as GGUF files: read again by us, by transformers and, where it is there, by llama.cpp.

llama.cpp's tests need a Python that has `llama_cpp`: LITGPT_LLAMA_CPP=peers/llama-cpp/bin/python (see CONTRIBUTING.md).
"""

import json
import os
import subprocess
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from litgpt.config import Config
from litgpt.export.gguf_kinds import KINDS
from litgpt.export.gguf_writer import describe_in_gguf, export_gguf
from litgpt.formats.gguf.file import GGUFFile
from litgpt.formats.hf_config import differences
from litgpt.quantization import block_weight
from litgpt.quantization.layers import quantized_layers
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import tokenizer_files
from tests.parity.test_architectures import COMMON, TIED

SIZES = COMMON | {"vocab_size": 416}  # the tokenizer has fewer
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
ROWS = {
    # name: (class of transformers, what differs from SIZES, architecture in GGUF)
    "Llama": ("Llama", {}, "llama"),
    "Llama tied, wide heads": ("Llama", {"head_dim": 32} | TIED, "llama"),
    "Llama attention bias": ("Llama", {"attention_bias": True}, "llama"),
    "Llama llama3 rope": ("Llama", {"rope_parameters": LLAMA3}, "llama"),
    "Llama yarn rope": ("Llama", {"rope_parameters": YARN}, "llama"),
    "Llama linear rope": ("Llama", {"rope_parameters": LINEAR}, "llama"),
    "Mistral": ("Mistral", {"sliding_window": None}, "llama"),
    "Qwen2": ("Qwen2", TIED, "qwen2"),
    "Qwen3": ("Qwen3", {"head_dim": 128} | TIED, "qwen3"),
    "Phi": ("Phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}, "phi2"),
    "Phi3": ("Phi3", {"sliding_window": None}, "phi3"),
    "Gemma": ("Gemma", {"head_dim": 32, "num_key_value_heads": 1} | TIED, "gemma"),
    "Gemma2": ("Gemma2", {"head_dim": 256, "sliding_window": 8} | TIED, "gemma2"),
    "Gemma3": (
        "Gemma3",
        {"num_hidden_layers": 6, "head_dim": 256, "sliding_window": 8} | TIED,
        "gemma3",
    ),
    "GPTNeoX": ("GPTNeoX", {"intermediate_size": 256}, "gptneox"),
    "GPTNeoX in sequence": ("GPTNeoX", {"use_parallel_residual": False, "rotary_pct": 0.5}, "gptneox"),
    "Olmo2": ("Olmo2", {"num_key_value_heads": 4}, "olmo2"),
}
READ_BY_TRANSFORMERS = ("Llama", "Llama tied, wide heads", "Qwen2", "Qwen3", "Gemma2", "Gemma3")
IDS = [[5, 17, 300, 4, 99, 256, 31, 8, 120, 7, 7, 64, 200, 33, 2, 11]]
LLAMA_CPP = os.environ.get("LITGPT_LLAMA_CPP")
ASK_LLAMA_CPP = """
import json, sys
from llama_cpp import Llama

file, text, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = Llama(file, n_ctx=128, logits_all=True, verbose=False, n_threads=2)
model.eval(ids)
logits = model.scores[: len(ids)].tolist()
print(json.dumps({"logits": logits, "tokens": model.tokenize(text.encode(), add_bos=False, special=False)}))
"""


def make(name: str, directory: Path) -> transformers.PreTrainedModel:
    """A tiny random model with a tokenizer, as transformers saves it."""
    kind, changes, _ = ROWS[name]
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**(SIZES | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases that are all ones or zeros would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    tokenizer_files.byte_level(directory, {"chat_template": tokenizer_files.CHATML})
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> the model and its GGUF file in float32."""
    cache: dict[str, tuple[transformers.PreTrainedModel, Path]] = {}

    def get(name: str):
        if name not in cache:
            directory = tmp_path_factory.mktemp("gguf")
            model = make(name, directory / "hf")
            export_gguf(open_checkpoint(directory / "hf"), directory / "tiny.gguf", "float32")
            cache[name] = model, directory / "tiny.gguf"
        return cache[name]

    return get


@pytest.mark.parametrize("name", ROWS)
def test_what_is_written_is_read_again(made, name):
    _, file = made(name)
    wanted, found = open_checkpoint(file.parent / "hf"), open_checkpoint(file)
    assert GGUFFile(file).metadata["general.architecture"] == ROWS[name][2]
    assert differences(found.config, wanted.config) == []
    weights = dict(found.weights())
    expected = dict(wanted.weights())
    assert weights.keys() == expected.keys()
    for key, weight in expected.items():
        if ROWS[name][2].startswith("gemma") and weight.dim() == 1:  # to which one was added
            torch.testing.assert_close(weights[key], weight, rtol=0, atol=2**-23)
        else:
            assert torch.equal(weights[key], weight), key


@pytest.mark.parametrize("name", ROWS)
def test_the_model_from_the_file_computes_the_same(made, name):
    model, file = made(name)
    with torch.no_grad():
        expected, found = model(torch.tensor(IDS)).logits, load_model(file)(torch.tensor(IDS))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ROWS)
def test_the_model_runs_from_the_blocks_of_the_file(made, name, tmp_path, monkeypatch):
    """What every architecture does to rows on their way to ours is done to blocks, too."""
    monkeypatch.setattr(block_weight, "FEW", 0)  # for fewer rows inputs are rounded
    _, file = made(name)
    export_gguf(open_checkpoint(file.parent / "hf"), tmp_path / "m.gguf", "q5_1")
    expected = load_model(tmp_path / "m.gguf")(torch.tensor(IDS))
    model = load_model(tmp_path / "m.gguf", quantize="gguf")
    torch.testing.assert_close(model(torch.tensor(IDS)), expected, rtol=1e-4, atol=1e-4)
    forms = {form for _, layer in quantized_layers(model) for form in layer.quantized.forms}
    assert forms == {"q5_1", "q8_0"}  # the latter outside the layers


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_file(made, name):
    model, file = made(name)
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            read(torch.tensor(IDS)).logits, model(torch.tensor(IDS)).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.skipif(not LLAMA_CPP, reason="LITGPT_LLAMA_CPP names no Python that has llama_cpp")
@pytest.mark.parametrize("name", ROWS)
def test_llama_cpp_computes_the_same(made, name):
    model, file = made(name)
    text = "To be, or  not\n\nto be: 12345 naïve 日本語 don't"
    answer = subprocess.run(
        [LLAMA_CPP, "-c", ASK_LLAMA_CPP, str(file), text, json.dumps(IDS[0])], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    found = json.loads(answer.stdout.splitlines()[-1])
    assert found["tokens"] == Tokenizer(file.parent / "hf").encode_ids(text)
    with torch.no_grad():
        expected = model(torch.tensor(IDS)).logits[0]
    # Its KV cache is in 16 bits, and so are parts of its attention.
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=0, atol=0.02 * float(expected.std()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_weights(made, kind, tmp_path):
    """Each tensor is of the type that it should be, and holds the weight; vectors stay as they are."""
    _, file = made("Llama")
    source = open_checkpoint(file.parent / "hf")
    assert export_gguf(source, tmp_path / "m.gguf", kind) == kind
    written = GGUFFile(tmp_path / "m.gguf")
    assert written.metadata["general.file_type"] == KINDS[kind].file_type
    tensors, plain = written.tensors, GGUFFile(file).tensors
    assert tensors.keys() == plain.keys()
    for name, tensor in tensors.items():
        assert tensor.kind == KINDS[kind].stored(name, tensor.shape, source.config.n_layer, False), name
        bits = {"q4": 0.09, "q5": 0.045, "q6": 0.02, "q8": 0.01}.get(tensor.kind.name[:2].lower(), 0.003)
        wanted = plain[name].read()
        assert (tensor.read().float() - wanted).norm() < bits * wanted.norm(), name
    assert tensors["output_norm.weight"].kind == gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize("files", [tokenizer_files.byte_level, tokenizer_files.byte_fallback, "sentencepiece"])
def test_the_tokenizer_gives_the_same_ids(files, tmp_path):
    directory = tmp_path / "hf"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**(SIZES | {"vocab_size": 704}))).save_pretrained(directory)
    if files == "sentencepiece":
        files = tokenizer_files.sentencepiece_model
    files(directory, {"chat_template": tokenizer_files.CHATML})
    wanted = Tokenizer(directory)
    export_gguf(open_checkpoint(directory), tmp_path / "m.gguf")
    found = Tokenizer(open_checkpoint(tmp_path / "m.gguf").files)
    for text in (*tokenizer_files.TEXT[:5], "  two  spaces", "x\n\ny", ""):
        assert found.encode_ids(text) == wanted.encode_ids(text), text
    assert (found.bos_id, found.eos_id, found.adds_bos) == (wanted.bos_id, wanted.eos_id, wanted.adds_bos)
    assert found.chat_template == wanted.chat_template == tokenizer_files.CHATML
    controls = [number for number in range(wanted.vocab_size) if wanted.is_control(number)]
    assert [number for number in range(wanted.vocab_size) if found.is_control(number)] == controls
    assert len(GGUFFile(tmp_path / "m.gguf").metadata["tokenizer.ggml.tokens"]) == 704


AS_FROM_GGUF = {
    # What transformers writes of a model that it has read from a GGUF file, with all digits of 32 bits.
    "Llama": {"rms_norm_eps": 9.999999747378752e-06, "rope_parameters": {"rope_theta": 10000.099609375}},
    "Llama yarn rope": {
        "rope_parameters": YARN | {"rope_theta": 1000.0999755859375, "attention_factor": 1.2000000476837158}
    },
    "Qwen2": {"rms_norm_eps": 9.999999974752427e-07} | TIED,
    "Gemma2": {"rms_norm_eps": 9.999999974752427e-07, "final_logit_softcapping": 30.100000381469727},
    "GPTNeoX": {"layer_norm_eps": 9.999999747378752e-06},
}


@pytest.mark.parametrize("name", AS_FROM_GGUF)
def test_figures_rounded_to_32_bits_are_written(name, tmp_path, monkeypatch):
    kind, usual, architecture = ROWS[name]
    monkeypatch.setitem(ROWS, name, (kind, usual | AS_FROM_GGUF[name], architecture))
    model = make(name, tmp_path / "hf")
    export_gguf(open_checkpoint(tmp_path / "hf"), tmp_path / "tiny.gguf", "float32")
    found = load_model(tmp_path / "tiny.gguf")
    assert found.config.norm_eps == pytest.approx(load_model(tmp_path / "hf").config.norm_eps, rel=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(found(torch.tensor(IDS)), model(torch.tensor(IDS)).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "usual", "message"),
    [
        ("Mixtral-8x7B-v0.1", {}, None, r"\(MixtralForCausalLM\).*: there is none of its kind here \(only llama, "),
        (
            "Qwen2.5-0.5B",
            {"sliding_window_size": 16, "sliding_window_indices": [1] * 24},
            "Qwen2ForCausalLM",
            r"\(Qwen2ForCausalLM\).*: as qwen2, it has no use_sliding_window=True\. Write it with",
        ),
        (
            "Gemma-2-2b",
            {"attention_scores_scalar": 40},
            "Gemma2ForCausalLM",
            r"as gemma2, it has no query_pre_attn_scalar=40 \(only 256\)",
        ),
    ],
)
def test_a_failure_speaks_of_the_models_own_architecture(name, changes, usual, message):
    config = Config(**{**vars(Config.from_name(name)), **changes})
    with pytest.raises(ValueError, match=message) as info:
        describe_in_gguf(config, usual)
    assert len(str(info.value).splitlines()) == 1
    assert not any(f"as {other}, " in str(info.value) for other in ("llama", "phi2", "gptneox"))


def test_what_gguf_cannot_say_is_refused(made, tmp_path):
    _, file = made("Llama")
    directory = tmp_path / "hf"
    source = open_checkpoint(file.parent / "hf")
    with pytest.raises(ValueError, match=r"'q8' is not a type of weights in a GGUF file\..*Choose float32"):
        export_gguf(source, tmp_path / "m.gguf", "q8")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(directory)
    tokenizer_files.byte_fallback(directory)  # 700 tokens
    with pytest.raises(ValueError, match=r"has 544 tokens, the model only 416"):
        export_gguf(open_checkpoint(directory), tmp_path / "m.gguf")
    content = json.loads((file.parent / "hf/tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="in a way that has no name in GGUF files"):
        export_gguf(open_checkpoint(directory), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()
