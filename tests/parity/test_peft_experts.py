"""PEFT adapters of mixtures of experts: transformers 4 had a linear layer for each expert, 5 holds all in one tensor."""

import json
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from litgpt.adaptation.lora import apply_lora
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from litgpt.sources.peft import import_peft

from . import test_architectures as architectures

FUSED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MIXTURES = ("Mixtral", "Qwen3Moe", "Qwen3Moe dense first layer", "GptOss", "DeepseekV3", "Glm4Moe")
EACH = {  # the layers of an expert in the files of transformers 4
    "Mixtral": r"block_sparse_moe\.experts\.\d+\.w[123]",
    "Qwen3Moe": r"mlp\.experts\.\d+\.(gate|up|down)_proj",
    "DeepseekV2": r"mlp\.experts\.\d+\.(gate|up|down)_proj",
}


def ours(base, adapter, notes=None):
    weights, lora = import_peft(adapter, open_checkpoint(base), notes)
    gpt = load_model(base, dtype=torch.float32)
    apply_lora(gpt, lora)
    assert not gpt.load_state_dict(weights, strict=False).unexpected_keys
    return gpt


@pytest.mark.parametrize("parameters", [FUSED, FUSED[:1], FUSED[1:]], ids=["both", "gate and up", "down"])
@pytest.mark.parametrize("row", MIXTURES)
@torch.no_grad()
def test_all_experts_in_one_tensor(row, parameters, tmp_path):
    pair = architectures.build(row, tmp_path / "base")
    config = LoraConfig(
        r=3, lora_alpha=9, target_modules=["q_b_proj" if "Deepseek" in row else "q_proj"], target_parameters=parameters
    )
    torch.manual_seed(4)
    idx = architectures.tokens(2, 24)
    before = pair.reference(idx).logits
    theirs = get_peft_model(pair.reference, config).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    expected = theirs(idx).logits
    assert (expected - before).abs().max() > 0.1, "otherwise 1e-4 says little"
    assert architectures.distance(ours(tmp_path / "base", tmp_path / "adapter")(idx), expected) < 1e-4


@pytest.mark.parametrize("row", EACH)
@torch.no_grad()
def test_a_layer_for_each_expert(row, tmp_path):
    """As transformers 4 and peft wrote them; what they mean is added to the weights of the files."""
    architectures.build(row, tmp_path / "base")
    generator = torch.Generator().manual_seed(5)
    weights, adapter = dict(load_file(tmp_path / "base" / "model.safetensors")), {}
    for name, weight in weights.items():
        if re.search(rf"({EACH[row]}|o_proj)\.weight$", name):
            a = torch.randn(4, weight.shape[1], generator=generator) * 0.2
            b = torch.randn(weight.shape[0], 4, generator=generator) * 0.2
            weights[name] = weight + 9 / 4 * b @ a
            module = f"base_model.model.{name.removesuffix('.weight')}"
            adapter |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    (tmp_path / "adapter").mkdir()
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    targets = ["w1", "w2", "w3", "o_proj"] if row == "Mixtral" else ["gate_proj", "up_proj", "down_proj", "o_proj"]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 9, "target_modules": targets, "bias": "none"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    gpt = ours(tmp_path / "base", tmp_path / "adapter")
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    idx = architectures.tokens(2, 24)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()(idx).logits
    assert architectures.distance(gpt(idx), expected) < 1e-4


@torch.no_grad()
def test_rows_and_columns_exchanged_as_by_earlier_versions_of_peft(tmp_path):
    pair = architectures.build("Qwen3Moe", tmp_path / "base")
    config = LoraConfig(r=3, lora_alpha=9, target_modules=[], target_parameters=FUSED)
    torch.manual_seed(4)
    theirs = get_peft_model(pair.reference, config).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors, experts = load_file(file), 6
    for name in [name for name in tensors if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        a = tensors[name].unflatten(0, (experts, -1))  # (E, r, in)
        b = tensors[other].unflatten(1, (-1, experts))  # (out, r, E)
        tensors[name] = b.permute(2, 1, 0).flatten(0, 1).contiguous()  # (E * r, out)
        tensors[other] = a.permute(2, 1, 0).flatten(1).contiguous()  # (in, r * E)
    save_file(tensors, file)
    idx = architectures.tokens(2, 24)
    gpt = ours(tmp_path / "base", tmp_path / "adapter")
    assert architectures.distance(gpt(idx), theirs(idx).logits) < 1e-4


@pytest.mark.parametrize("row", ["Mixtral", "Qwen3Moe"])
@torch.no_grad()
def test_names_of_transformers_4_that_peft_translates(row, tmp_path):
    """Then what holds gate and up has a rank and an alpha of its own."""
    pair = architectures.build(row, tmp_path / "base")
    names = ["w1", "w2", "w3"] if row == "Mixtral" else ["gate_proj", "up_proj", "down_proj"]
    theirs = get_peft_model(pair.reference, LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", *names])).eval()
    torch.manual_seed(4)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["rank_pattern"]
    assert written["alpha_pattern"]
    idx, notes = architectures.tokens(2, 24), []
    gpt = ours(tmp_path / "base", tmp_path / "adapter", notes)
    assert architectures.distance(gpt(idx), theirs(idx).logits) < 1e-4
    assert notes == []


def test_experts_that_were_asked_for_and_missed_are_said(tmp_path):
    """As by versions of PEFT that looked for layers of these names, where transformers 5 has none."""
    pair = architectures.build("Qwen3Moe", tmp_path / "base")
    get_peft_model(pair.reference, LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text()) | {"target_modules": ["q_proj", "up_proj", "down_proj"]}
    file.write_text(json.dumps(content))
    notes = []
    import_peft(tmp_path / "adapter", open_checkpoint(tmp_path / "base"), notes)
    assert notes == ["The adapter was to have updates of the experts (up_proj, down_proj), and has none."]


def test_experts_of_another_model_are_refused(tmp_path):
    pair = architectures.build("Qwen3Moe", tmp_path / "base")
    config = LoraConfig(r=3, target_modules=[], target_parameters=FUSED)
    get_peft_model(pair.reference, config).save_pretrained(tmp_path / "adapter")
    for row, message in (
        ("Mixtral", "is not a tensor of 5 experts here"),
        ("GptOss", "is not a tensor of 5 experts here"),
        ("Llama", "is not a tensor of 1 experts here"),
        ("Qwen3Moe dense first layer", r"there is no transformer\.h\.0\.mlp\.experts\.0\.fc_1 here"),
    ):
        architectures.build(row, tmp_path / row)
        with pytest.raises(ValueError, match=message):
            import_peft(tmp_path / "adapter", open_checkpoint(tmp_path / row))
