"""PEFT adapters of multimodal models: of the text model in them, in both directions."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, SmolVLMConfig, SmolVLMForConditionalGeneration

from litgpt.adaptation.lora import LoRASettings, apply_lora, is_lora, save_lora
from litgpt.checkpoint import save_model
from litgpt.export.peft import save_peft
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from litgpt.sources.peft import import_peft

from . import test_multimodal as multimodal

LORA = LoRASettings(r=3, alpha=7, dropout=0.0, query=True, key=False, value=True, mlp=True, head=True)


def smolvlm(directory):
    """One whose text model has another name than those of the others; the model, saved."""
    torch.manual_seed(1)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SmolVLMConfig(
        text_config={**multimodal.TEXT, "model_type": "llama"},
        vision_config={**vision, "image_size": 8, "patch_size": 4},
        scale_factor=2,
        tie_word_embeddings=False,
    )
    model = SmolVLMForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    return model.eval()


def make(directory, row):
    return smolvlm(directory) if row == "SmolVLM" else multimodal.make(directory, row)


ROWS = ("Llava Llama", "Mistral3 Ministral3", "Gemma3", "SmolVLM")


def randomise(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_lora(name) or "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)


def adapted(directory):
    """Our text model with an update that has learned something, and that saved next to the configuration."""
    gpt = load_model(directory, dtype=torch.float32)
    apply_lora(gpt, LORA)
    torch.manual_seed(3)
    randomise(gpt)
    return gpt


@pytest.mark.parametrize("converted", [False, True], ids=["as it is", "converted"])
@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_peft_computes_the_same_in_the_multimodal_model(row, converted, tmp_path):
    reference = make(tmp_path / "base", row)
    before = multimodal.logits(reference)
    if converted:
        source = open_checkpoint(tmp_path / "base")
        save_model(tmp_path / "base", source.weights(), source.config, source.release)
    gpt = adapted(tmp_path / "base")
    (tmp_path / "lora").mkdir()
    matrices = {name: p for name, p in gpt.state_dict().items() if is_lora(name)}
    save_lora(tmp_path / "lora", matrices, LORA, str(tmp_path / "base"))
    if converted:  # as finetune_lora leaves it: with the configuration and the files of the base
        gpt.config.save(tmp_path / "lora")
        (tmp_path / "lora" / "config.json").write_bytes((tmp_path / "base" / "config.json").read_bytes())
    save_peft(tmp_path / "lora", tmp_path / "peft")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").eval()
    theirs = PeftModel.from_pretrained(whole, tmp_path / "peft")
    expected = multimodal.logits(gpt)
    assert (expected - before).abs().max() > 0.1, "otherwise 1e-4 says little"
    torch.testing.assert_close(multimodal.logits(theirs), expected, atol=1e-4, rtol=1e-4)
    in_memory = {name for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert len(in_memory) == len(load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    again, read = import_peft(tmp_path / "peft", open_checkpoint(tmp_path / "base"))
    assert read == LORA
    assert all(torch.equal(again[name], p) for name, p in matrices.items())


def older(name):
    """As adapters were called before transformers 4.52."""
    return name.replace("model.model.language_model.", "model.language_model.model.")


@pytest.mark.parametrize("names", [str, older], ids=["newer", "older"])
@pytest.mark.parametrize("row", ROWS)
@torch.no_grad()
def test_we_compute_the_same_from_what_peft_writes(row, names, tmp_path):
    reference = make(tmp_path / "base", row)
    vision = "vision_model" if row == "SmolVLM" else "vision_tower"
    config = LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "up_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(reference, config).eval()
    torch.manual_seed(4)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {names(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    expected, notes = multimodal.logits(theirs), []
    weights, lora = import_peft(tmp_path / "adapter", open_checkpoint(tmp_path / "base"), notes)
    gpt = load_model(tmp_path / "base", dtype=torch.float32)
    apply_lora(gpt, lora)
    assert not gpt.load_state_dict(weights, strict=False).unexpected_keys
    torch.testing.assert_close(multimodal.logits(gpt), expected, atol=1e-4, rtol=1e-4)
    others = sum(vision in name and "lora_A" in name for name in tensors)
    assert others > 0
    assert notes == [f"Of the adapter, {others} updates of other parts than the text model are left out."]


def test_the_adapter_of_a_text_model_alone_keeps_its_names(tmp_path):
    make(tmp_path / "base", "Gemma3")
    from litgpt.export.hf_writer import export_hf

    export_hf(tmp_path / "base", tmp_path / "text")
    gpt = adapted(tmp_path / "text")
    (tmp_path / "lora").mkdir()
    matrices = {name: p for name, p in gpt.state_dict().items() if is_lora(name)}
    save_lora(tmp_path / "lora", matrices, LORA, str(tmp_path / "text"))
    save_peft(tmp_path / "lora", tmp_path / "peft")
    assert "q_proj" in json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["target_modules"]
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in names
