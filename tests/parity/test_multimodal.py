"""The text models of multimodal checkpoints of transformers: loaded, converted and exported alone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Ministral3Config,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from litgpt.checkpoint import save_model
from litgpt.export.hf_writer import export_hf
from litgpt.formats.hf_config import config_from_hf
from litgpt.formats.quantised_weights import dequantised_type
from litgpt.formats.recognition import architecture_of, text_model, text_name
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model

IDS = torch.arange(40)[None] % 64
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def llava(text, tied):
    return LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION), tie_word_embeddings=tied)
    )


def mistral3(text, tied):
    return Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=PixtralVisionConfig(**VISION), tie_word_embeddings=tied)
    )


def gemma3(text, tied):
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**VISION), tie_word_embeddings=tied)
    )


ROWS = {
    # name: (the whole, its text model, the class of the latter)
    "Llava Llama": (llava, lambda: LlamaConfig(**TEXT), "LlamaForCausalLM"),
    "Llava Qwen2": (llava, lambda: Qwen2Config(**TEXT), "Qwen2ForCausalLM"),
    "Mistral3 Mistral": (
        mistral3,
        lambda: MistralConfig(**TEXT, head_dim=16, sliding_window=8),
        "MistralForCausalLM",
    ),
    "Mistral3 Ministral3": (
        mistral3,
        lambda: Ministral3Config(**TEXT, head_dim=8, rope_parameters=YARN),
        "Ministral3ForCausalLM",
    ),
    "Gemma3": (gemma3, lambda: Gemma3TextConfig(**TEXT, **WINDOW), "Gemma3ForCausalLM"),
}


def make(directory, row, tied=False):
    """A random multimodal model, saved; the model."""
    whole, text, _ = ROWS[row]
    torch.manual_seed(1)
    model = whole(text(), tied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    return model.eval()


def logits(model):
    with torch.no_grad():
        answer = model(IDS)
    return answer if isinstance(answer, torch.Tensor) else answer.logits


def edit(directory, change):
    """Has a function change the content of `config.json` in place."""
    content = json.loads((directory / "config.json").read_text())
    change(content)
    (directory / "config.json").write_text(json.dumps(content))


def rename(directory, change):
    """Renames the tensors of a checkpoint."""
    tensors = {change(name): tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors")


def newer(name):
    """The names that transformers 4.52 began to write."""
    name = name.replace("language_model.model.", "model.language_model.", 1)
    return name.replace("language_model.lm_head", "lm_head") if "lm_head" in name else name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("names", ["older", "newer"])
@pytest.mark.parametrize("row", ROWS)
def test_the_text_model_is_the_reference(tmp_path, row, names, tied):
    reference = make(tmp_path / "hf", row, tied)
    if names == "newer":
        rename(tmp_path / "hf", newer)
    expected = logits(reference)
    assert expected.std() > 0.1
    source = open_checkpoint(tmp_path / "hf")
    assert source.config.tie_embeddings == tied
    model = load_model(source)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    export_hf(tmp_path / "hf", tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(again).__name__ == ROWS[row][2]
    torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_what_is_left_out_is_said(tmp_path, row):
    reference = make(tmp_path / "hf", row)
    others = sum("vision_tower" in name or "projector" in name for name, _ in reference.named_parameters())
    others += sum(
        "vision" in name for name in load_file(tmp_path / "hf" / "model.safetensors") if "position_ids" in name
    )
    note = open_checkpoint(tmp_path / "hf").note
    assert note == (
        f"Of {type(reference).__name__}, only the text model is used ({ROWS[row][2]}); "
        f"{others} tensors of its other parts are left out."
    )


def test_a_converted_text_model_is_exported(tmp_path):
    reference = make(tmp_path / "hf", "Gemma3", tied=True)
    source = open_checkpoint(tmp_path / "hf")
    save_model(tmp_path / "hf", source.weights(), source.config, source.release)
    converted = open_checkpoint(tmp_path / "hf")
    assert converted.note is None
    assert converted.config == source.config
    export_hf(converted, tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(logits(again), logits(reference), atol=1e-5, rtol=1e-5)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "vision_config" not in written
    assert written["eos_token_id"] == 2


def test_figures_that_the_text_config_leaves_out_are_those_of_its_class():
    """As in google/gemma-3-4b-it and llava-hf/llava-1.5-7b-hf, which say only what differs."""
    config_json = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "torch_dtype": "bfloat16",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    }
    config = config_from_hf(config_json, "google/gemma-3-4b-it")
    assert (config.n_head, config.n_query_groups, config.head_size, config.padded_vocab_size) == (8, 4, 256, 262208)
    assert config.tie_embeddings
    assert text_model(config_json)["eos_token_id"] == [1, 106]
    assert text_model(config_json)["torch_dtype"] == "bfloat16"
    config_json = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": {
            "_name_or_path": "lmsys/vicuna-7b-v1.5",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float16",
            "vocab_size": 32064,
        },
    }
    config = config_from_hf(config_json)
    assert (config.n_embd, config.n_layer, config.n_head, config.intermediate_size) == (4096, 32, 32, 11008)
    assert (config.padded_vocab_size, config.block_size, config.norm_eps) == (32064, 4096, 1e-5)


def test_the_text_config_may_name_a_class_without_a_head():
    inner = TEXT | {"model_type": "llama", "architectures": ["LlamaModel"]}
    whole = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": inner}
    assert architecture_of(whole).name == "LlamaForCausalLM"
    assert architecture_of(inner).name == "LlamaForCausalLM"


@pytest.mark.parametrize(("whole", "text"), [("dtype", "torch_dtype"), ("torch_dtype", "dtype")])
def test_the_type_of_the_whole_is_that_of_the_text_model(whole, text):
    inner = TEXT | {"model_type": "llama", text: "float32"}
    outer = {"architectures": ["LlavaForConditionalGeneration"], "text_config": inner}
    assert dequantised_type(text_model(outer | {whole: "float16"})) == torch.float16
    assert dequantised_type(text_model(outer)) == torch.float32


@pytest.mark.parametrize(("whole", "text", "tied"), [(True, False, True), (False, False, False), (False, True, True)])
def test_whether_the_head_is_tied_the_whole_says_first(whole, text, tied):
    """Llava takes a tied text model's word against its own False."""
    inner = TEXT | {"model_type": "llama", "tie_word_embeddings": text}
    outer = {"architectures": ["LlavaForConditionalGeneration"], "tie_word_embeddings": whole, "text_config": inner}
    assert config_from_hf(outer).tie_embeddings == tied
    assert config_from_hf(outer | {"tie_word_embeddings": None}).tie_embeddings


def test_a_head_of_its_own_is_found_where_nothing_says_that_there_is_one(tmp_path):
    """As in Mistral Small 3.1, whose config.json does not say it."""
    reference = make(tmp_path / "hf", "Mistral3 Mistral", tied=False)

    def change(content):
        del content["tie_word_embeddings"], content["text_config"]["tie_word_embeddings"]

    edit(tmp_path / "hf", change)
    source = open_checkpoint(tmp_path / "hf")
    assert not source.config.tie_embeddings
    torch.testing.assert_close(logits(load_model(source)), logits(reference), atol=1e-4, rtol=1e-4)
    export_hf(source, tmp_path / "text")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    torch.testing.assert_close(logits(again), logits(reference), atol=1e-5, rtol=1e-5)


def test_the_whole_says_how_the_text_model_is_quantised(tmp_path):
    """As in Ministral 3 Instruct: one factor for each matrix; the vision tower is not quantised."""
    reference = make(tmp_path / "hf", "Mistral3 Ministral3", tied=True).bfloat16()
    tensors = {}
    for name, tensor in load_file(tmp_path / "hf" / "model.safetensors").items():
        tensors[name] = tensor.bfloat16()
        if "language_model" in name and "_proj" in name:
            scale = tensor.abs().max() / 448
            tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
            tensors[name.replace("weight", "activation_scale")] = torch.tensor(0.1)
            parameter = reference.get_parameter(newer(name))
            parameter.data = (tensors[name].float() * scale).bfloat16()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    edit(tmp_path / "hf", lambda content: content.update(quantization_config=settings, dtype="bfloat16"))
    source = open_checkpoint(tmp_path / "hf")
    assert source.dtype == torch.bfloat16
    assert "fp8 weights are de-quantised to bfloat16" in source.note
    ours = load_model(source, dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(reference.float()), atol=1e-4, rtol=1e-4)
    export_hf(source, tmp_path / "text")
    assert "quantization_config" not in json.loads((tmp_path / "text" / "config.json").read_text())


def test_a_misfit_of_the_text_model_is_no_other_part(tmp_path):
    make(tmp_path / "hf", "Llava Llama")
    rename(tmp_path / "hf", lambda name: name.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"))
    with pytest.raises(ValueError, match="2 problems") as info:
        open_checkpoint(tmp_path / "hf")
    assert "missing: model.layers.1.mlp.up_proj.weight" in str(info.value)
    assert "unexpected: model.layers.7.mlp.up_proj.weight" in str(info.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.text_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.gpt_neox.embed_in.weight", "gpt_neox.embed_in.weight"),
        ("vision_tower.vision_model.language_model.weight", None),
        ("model.vision_tower.layers.0.weight", None),
        ("multi_modal_projector.linear_1.bias", None),
    ],
)
def test_names_of_the_text_model(name, expected):
    assert text_name(name) == expected


@pytest.mark.parametrize(
    ("whole", "text", "missing"),
    [
        (
            "MllamaForConditionalGeneration",
            {"model_type": "mllama_text_model", "cross_attention_layers": [3, 8]},
            "It has cross-attention layers.",
        ),
        ("Gemma3nForConditionalGeneration", {"model_type": "gemma3n_text", "altup_num_inputs": 4}, "AltUp"),
        ("Qwen3_5ForConditionalGeneration", {"model_type": "qwen3_5_text", "linear_num_value_heads": 32}, "linear"),
        ("Llama4ForConditionalGeneration", {"model_type": "llama4_text"}, "is not supported. Supported:"),
    ],
)
def test_a_text_model_that_is_not_supported_is_named(whole, text, missing):
    with pytest.raises(ValueError, match="is not supported") as info:
        config_from_hf({"architectures": [whole], "text_config": text})
    assert f"({whole}, whose text model is '{text['model_type']}')" in str(info.value)
    assert missing in str(info.value)


def test_a_supported_architecture_keeps_its_own_figures():
    inner = {"model_type": "llama", "hidden_size": 1}
    plain = TEXT | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "text_config": inner}
    assert text_model(plain) is plain
    assert architecture_of(plain).name == "LlamaForCausalLM"
    assert config_from_hf(plain).n_embd == 32
