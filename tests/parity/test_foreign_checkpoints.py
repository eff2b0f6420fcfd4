"""Checkpoints as programs around transformers leave them: whatever the reference loads, loads here with the same logits.

Each is made from a directory that the reference has written; what is changed in it is what a published one looks like.
"""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from litgpt.checkpoint import WEIGHTS, save_model
from litgpt.config import Config
from litgpt.export.hf_writer import export_hf
from litgpt.formats.hf_config import config_from_hf
from litgpt.formats.written_config import original_config
from litgpt.model import GPT
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.checks import examine
from litgpt.sources.load import load_model

from . import test_architectures as architectures
from . import test_multimodal as multimodal

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture
def directory(tmp_path):
    architectures.build("Llama", tmp_path / "hf")
    return tmp_path / "hf"


def edit_config(directory, **entries):
    file = directory / "config.json"
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(directory, change):
    """Has a function change the tensors by name in place."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def rename(directory, change):
    def all_names(tensors):
        renamed = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    edit_tensors(directory, all_names)


@torch.inference_mode()
def assert_equals_the_reference(directory):
    """The reference and ours compute the same from a directory."""
    idx = architectures.tokens(2, 40)
    expected = AutoModelForCausalLM.from_pretrained(directory).eval()(idx).logits.float()
    assert expected.abs().max() > 1, "otherwise 1e-4 says little"
    assert architectures.distance(load_model(directory, dtype=torch.float32)(idx), expected) < 1e-4


# --- config.json


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["LLaMAForCausalLM"], "LLaMAForCausalLM"),
        (["UnslothLlamaForCausalLM"], "UnslothLlamaForCausalLM"),
        (["LlamaForSequenceClassification"], "LlamaForSequenceClassification"),
        (..., None),
        (None, None),
        ([], None),
        ("LlamaForCausalLM", None),
    ],
)
def test_the_model_type_says_the_architecture(directory, names, said):
    edit_config(directory, architectures=names)
    assert_equals_the_reference(directory)
    note = open_checkpoint(directory).note
    assert (note is None) if said is None else f"{said} is read as LlamaForCausalLM (model_type 'llama')" in note
    export_hf(directory, directory / "out")
    assert json.loads((directory / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert original_config(directory)["architectures"] == ["LlamaForCausalLM"]


def test_of_two_known_architectures_the_model_type_counts(tmp_path):
    architectures.build("Mistral", tmp_path)  # its layers have a window, which LlamaForCausalLM would not read
    edit_config(tmp_path, architectures=["LlamaForCausalLM"])
    assert_equals_the_reference(tmp_path)
    assert "LlamaForCausalLM is read as MistralForCausalLM" in open_checkpoint(tmp_path).note


def test_a_class_without_a_head_is_refused_where_the_head_is_not_tied(directory):
    edit_config(directory, architectures=["LlamaModel"])
    rename(directory, lambda name: name.removeprefix("model."))
    edit_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"1 problem\):\n  missing: lm_head.weight") as info:
        open_checkpoint(directory)
    assert "LlamaModel is read as LlamaForCausalLM" in str(info.value)


def test_a_class_without_a_head_is_a_model_where_the_head_is_tied(tmp_path):
    """As in Qwen3-Embedding: `embed_tokens.weight`, where others have `model.embed_tokens.weight`."""
    architectures.build("Qwen3", tmp_path)
    edit_config(tmp_path, architectures=["Qwen3Model"])
    rename(tmp_path, lambda name: name.removeprefix("model."))
    assert_equals_the_reference(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "ignored"),
    [
        (YARN | {"attn_factor": 1.3, "finetuned": True, "extrapolation_factor": 1.0}, ["attn_factor", "finetuned"]),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "alpha": 2.0}
            | {"original_max_position_embeddings": 16},
            ["alpha"],
        ),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, ["beta_fast"]),
        ({"rope_type": "default", "factor": 2.0, "mrope_section": [2, 3, 3]}, ["factor", "mrope_section"]),
        ({"rope_type": "linear", "type": "yarn", "factor": 2.0}, ["type"]),
    ],
    ids=["yarn", "llama3", "linear", "default", "two types"],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_entries_that_the_reference_ignores_are_ignored_with_a_note(directory, key, scaling, ignored):
    edit_config(directory, **{"rope_parameters": ..., "rope_theta": 10000.0, key: scaling})
    assert_equals_the_reference(directory)
    note = open_checkpoint(directory).note
    assert note.endswith(" is ignored." if len(ignored) == 1 else " are ignored.")
    assert all(f"'{name}'" in note for name in ignored)


def test_rope_entries_by_layer_are_ignored_alike(tmp_path):
    architectures.build("Gemma3", tmp_path)
    config_json = json.loads((tmp_path / "config.json").read_text())
    config_json["rope_parameters"]["full_attention"]["finetuned"] = True
    config_json["rope_parameters"]["sliding_attention"]["attn_factor"] = 2.0
    edit_config(tmp_path, **config_json)
    assert_equals_the_reference(tmp_path)
    note = open_checkpoint(tmp_path).note
    assert "'finetuned'" in note
    assert "'attn_factor'" in note


def test_what_the_reference_reads_is_no_note(tmp_path):
    for row in ("Llama yarn rope", "Llama llama3 rope", "Gemma3", "Phi3 beyond longrope", "Ministral3", "GptOss"):
        architectures.build(row, tmp_path / row)
        assert open_checkpoint(tmp_path / row).note is None, row


# --- tensors


def add(**sizes):
    return lambda tensors: tensors.update({name: torch.ones(size) for name, size in sizes.items()})


SURPLUS = {
    "KV scales": {
        **{f"model.layers.{i}.self_attn.{x}": (1,) for i in range(3) for x in ("k_scale", "v_scale")},
        "model.layers.0.self_attn.k_proj.output_scale": (1,),
    },
    "value head": {"v_head.summary.weight": (1, 64), "v_head.summary.bias": (1,)},
    "classifier": {"score.weight": (2, 64)},
    "predictors": {"mtp.fc.weight": (64, 128), "mtp.layers.0.self_attn.q_proj.weight": (64, 64)},
    "predictors after the last layer": {
        "model.layers.3.eh_proj.weight": (64, 128),
        "model.layers.3.mlp.up_proj.weight": (96, 64),
    },
    "masks": {"model.layers.1.self_attn.masked_bias": (), "model.layers.1.self_attn.bias": (1, 1, 8, 8)},
}


@pytest.mark.parametrize("kind", SURPLUS)
def test_surplus_tensors_are_left_out_with_a_note(directory, kind):
    edit_tensors(directory, add(**SURPLUS[kind]))
    assert_equals_the_reference(directory)
    source = open_checkpoint(directory)
    count = len(SURPLUS[kind])
    assert re.search(rf"\b{count} tensors? that LlamaForCausalLM does not have", source.note), source.note
    assert re.sub(r"\.\d+\.", ".*.", next(iter(SURPLUS[kind]))) in source.note
    export_hf(source, directory / "out")
    assert not set(SURPLUS[kind]) & set(load_file(directory / "out" / "model.safetensors"))


def test_rotary_frequencies_are_left_out_in_silence(directory):
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")
    edit_tensors(directory, add(**dict.fromkeys(names, (8,))))
    assert open_checkpoint(directory).note is None


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("model.layers.0.self_attn.q_proj.bias", (64,)),  # config.json lacks attention_bias
        ("model.layers.0.self_attn.q_norm.weight", (16,)),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (4, 64)),  # finetuning that would be lost
    ],
)
def test_surplus_tensors_that_would_be_computed_with_are_refused(directory, name, size):
    edit_tensors(directory, add(**{name: size}))
    with pytest.raises(ValueError, match=rf"1 problem\):\n  unexpected: {re.escape(name)}"):
        open_checkpoint(directory)


def test_missing_tensors_are_refused_beside_surplus_ones(directory):
    edit_tensors(directory, add(**SURPLUS["value head"]))
    edit_tensors(directory, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"(?s)3 problems.*missing: model\.norm\.weight.*unexpected: v_head"):
        open_checkpoint(directory)


def test_float8_without_a_word_about_its_scales_is_refused(directory):
    """As in directories that have hf_quant_config.json alone: the scales are no surplus tensors."""

    def change(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name + "_scale"] = torch.tensor(0.5)

    edit_tensors(directory, change)
    with pytest.raises(ValueError, match=r"wrong type: model\.layers\.0\.mlp\.up_proj\.weight is float8_e4m3fn"):
        open_checkpoint(directory)


PREFIXES = (
    "_orig_mod.",
    "module.",
    "base_model.model.",
    "module._orig_mod.",
    "_orig_mod.module.base_model.model.",
    "_forward_module._fsdp_wrapped_module.",
    "policy.llm.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_seen_through(directory, prefix):
    expected = load_model(directory).state_dict()
    rename(directory, lambda name: prefix + name)
    found = load_model(directory).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert open_checkpoint(directory).note is None


def test_blocks_compiled_or_wrapped_one_by_one_are_seen_through(directory):
    expected = load_model(directory).state_dict()
    rename(directory, lambda name: re.sub(r"layers\.(\d)\.", r"layers.\1._orig_mod._checkpoint_wrapped_module.", name))
    found = load_model(directory).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_name_that_only_contains_a_prefix_is_another(directory):
    edit_tensors(directory, add(**{"lm_head.original_module.weight": (97, 64)}))
    assert "lm_head.original_module.weight" in open_checkpoint(directory).note


def test_two_tensors_of_one_name_are_refused(directory):
    edit_tensors(directory, add(**{"module.model.norm.weight": (64,)}))
    with pytest.raises(ValueError, match=r"hold model\.norm\.weight twice, as module\.model\.norm\.weight"):
        open_checkpoint(directory)


def test_prefixes_of_multimodal_checkpoints_are_seen_through(tmp_path):
    reference = multimodal.make(tmp_path, "Gemma3")
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        rename(tmp_path, lambda name, prefix=prefix: prefix + name)
        torch.testing.assert_close(
            multimodal.logits(load_model(tmp_path)), multimodal.logits(reference), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("prefix", [*PREFIXES, "model."])
def test_prefixes_in_our_own_format_are_seen_through(tmp_path, prefix):
    config = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, padding_multiple=32)
    model = GPT(config)
    save_model(tmp_path, {prefix + name: tensor for name, tensor in model.state_dict().items()}, config)
    found = load_model(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_surplus_tensors_in_our_own_format(tmp_path):
    config = Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, padding_multiple=32)
    tensors = GPT(config).state_dict()
    save_model(tmp_path, {**tensors, "v_head.weight": torch.ones(1, 16)}, config)
    assert open_checkpoint(tmp_path).note == "1 tensor that the model does not have is left out (v_head.weight)."
    for name in ("transformer.h.0.attn.norm_q.weight", "transformer.h.0.attn.qkv.lora_A"):
        save_model(tmp_path, {**tensors, name: torch.ones(8)}, config)
        with pytest.raises(ValueError, match=rf"1 problem\):\n  unexpected: {re.escape(name)}"):
            open_checkpoint(tmp_path)


# --- quantization_config


STALE = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
    "none named": {"load_in_4bit": False},
}


@pytest.mark.parametrize("method", STALE)
def test_a_stale_quantization_config_over_plain_weights_loads_with_a_note(directory, method):
    expected = load_model(directory).state_dict()
    edit_config(directory, quantization_config=STALE[method])
    source = open_checkpoint(directory)
    assert source.note == (
        f"The quantization_config in config.json (quant_method: {STALE[method].get('quant_method')}) is ignored: the "
        "weights are plain float32."
    )
    assert all(torch.equal(load_model(source).state_dict()[name], tensor) for name, tensor in expected.items())
    export_hf(source, directory / "out")
    assert "quantization_config" not in json.loads((directory / "out" / "config.json").read_text())
    findings = examine(directory)
    assert not [problem for problem in findings.problems if problem.fails and problem.group in ("config", "weights")]


@pytest.mark.parametrize("type", [torch.int32, torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_quantised_are_refused_by_their_method(directory, type):
    edit_config(directory, quantization_config=STALE["gptq"])
    edit_tensors(directory, lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(8, 96).to(type)}))
    with pytest.raises(ValueError, match="quant_method 'gptq' are not supported"):
        open_checkpoint(directory)


def test_weights_trained_to_be_quantised_as_they_are_used_are_no_plain_ones(directory):
    """BitNet keeps bfloat16 weights that mean something only after rounding."""
    edit_config(directory, quantization_config={"quant_method": "bitnet", "quantization_mode": "online"})
    with pytest.raises(ValueError, match="quant_method 'bitnet' are not supported"):
        open_checkpoint(directory)


def test_a_configuration_alone_cannot_say_that_its_method_is_stale():
    with pytest.raises(ValueError, match="quant_method 'gptq'"):
        config_from_hf({"model_type": "llama", "hidden_size": 64, "quantization_config": STALE["gptq"]})


# --- .bin and .pth files


def test_a_bin_file_with_prefixes_and_surplus(directory):
    expected = load_model(directory).state_dict()
    tensors = {
        f"_orig_mod.{name}": tensor.clone() for name, tensor in load_file(directory / "model.safetensors").items()
    }
    (directory / "model.safetensors").unlink()
    torch.save({"state_dict": tensors | {"v_head.weight": torch.ones(1, 64)}}, directory / "pytorch_model.bin")
    source = open_checkpoint(directory)
    assert "v_head.weight" in source.note
    assert all(torch.equal(load_model(source).state_dict()[name], tensor) for name, tensor in expected.items())


def test_wrapped_lora_weights_are_seen_through(tmp_path):
    from litgpt.adaptation.lora import LORA_WEIGHTS, LoRASettings, apply_lora, is_lora, read_lora, save_lora

    model = GPT(Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32, padding_multiple=32))
    apply_lora(model, LoRASettings())
    matrices = {name: tensor for name, tensor in model.state_dict().items() if is_lora(name)}
    save_lora(tmp_path, {f"_orig_mod.module.{n}": t for n, t in matrices.items()}, LoRASettings(), "org/model")
    assert read_lora(tmp_path / LORA_WEIGHTS)[0].keys() == matrices.keys()
    assert WEIGHTS not in {file.name for file in tmp_path.iterdir()}
