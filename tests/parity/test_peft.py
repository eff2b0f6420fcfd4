"""LoRA against `peft` on the reference's models: what it computes, in both directions, and how it learns."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from litgpt.adaptation.lora import TARGETS, LoRASettings, apply_lora, is_lora, merged_weights
from litgpt.export.peft_writer import export_peft
from litgpt.model import GPT
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from litgpt.sources.peft import import_peft
from litgpt.training.loss import NextTokenLoss

from . import test_architectures as architectures

VARIANTS = {"plain": {}, "rank-stabilised": {"rs": True}, "DoRA": {"dora": True}}
ATTENTION = ("query", "key", "value", "projection", "head")
# row of test_architectures: what is adapted
ROWS = {
    "Llama": TARGETS,
    "Llama multi-head, tied": TARGETS,
    "Qwen2": TARGETS,
    "Gemma2": TARGETS,
    "Phi": TARGETS,
    "Phi3": TARGETS,  # queries, keys and values are one module there, gate and linear half are, too
    "Glm4": TARGETS,
    "GPTNeoX": TARGETS,  # queries, keys and values are one module, interleaved
    "Falcon grouped": TARGETS,
    "Falcon multi-query": TARGETS,
    "Mixtral": ATTENTION,
    "GptOss": ATTENTION,
    "DeepseekV2": ATTENTION,
}
SOME = {
    "Llama": ("query", "value", "mlp"),
    "Phi3": ("query", "value"),
    "GPTNeoX": ("key", "head"),
    "Falcon grouped": ("value",),
}
CASES = [(row, targets, variant) for row, targets in ROWS.items() for variant in VARIANTS]
CASES += [(row, targets, variant) for row, targets in SOME.items() for variant in ("plain", "rank-stabilised")]


def settings(targets, variant: str = "plain") -> LoRASettings:
    switches = {target: target in targets for target in TARGETS}
    return LoRASettings(r=3, alpha=7, dropout=0.0, **switches, **VARIANTS[variant])


def adapted(path, lora: LoRASettings) -> GPT:
    """Our model of a directory, with an update that has learned something."""
    gpt = load_model(path, dtype=torch.float32)
    apply_lora(gpt, lora)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if is_lora(name):
                p.add_(torch.randn_like(p) * 0.1)
    return gpt


def matrices(gpt: GPT) -> dict[str, torch.Tensor]:
    return {name: p for name, p in gpt.state_dict().items() if is_lora(name)}


def architecture(pair) -> str:
    return type(pair.reference).__name__


@pytest.mark.parametrize(("row", "targets", "variant"), CASES)
@torch.no_grad()
def test_peft_computes_the_same_from_what_is_exported(row, targets, variant, tmp_path):
    pair = architectures.build(row, tmp_path / "base")
    lora, idx = settings(targets, variant), architectures.tokens(2, 24)
    before, gpt = pair.reference(idx).logits, adapted(tmp_path / "base", lora)
    out = tmp_path / "adapter"
    out.mkdir()
    export_peft(matrices(gpt), lora, gpt.config, architecture(pair), "org/model", out)
    theirs = PeftModel.from_pretrained(pair.reference, out)
    expected = theirs(idx).logits
    assert architectures.distance(gpt(idx), expected) < 1e-4
    assert (expected - before).abs().max() > 0.1, "otherwise 1e-4 says little"
    in_memory = {name for name, _ in theirs.named_parameters() if ".lora_" in name}
    assert len(in_memory) == len(load_file(out / "adapter_model.safetensors"))
    # Back again, it is the same to the bit.
    again, read = import_peft(out, open_checkpoint(tmp_path / "base"))
    assert read == lora
    assert again.keys() == matrices(gpt).keys()
    assert all(torch.equal(again[name], p) for name, p in matrices(gpt).items())


OF_PEFT = {
    "some modules of some layers": ("Llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "ranks and alphas by pattern": (
        "Qwen2",
        {
            "target_modules": ["q_proj", "k_proj", "gate_proj"],
            "rank_pattern": {"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 5},
            "alpha_pattern": {"gate_proj": 3},
        },
    ),
    "the same, rank-stabilised": (
        "Llama",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "use_rslora": True},
    ),
    "DoRA": ("Llama", {"target_modules": ["o_proj", "up_proj", "v_proj"], "use_dora": True}),
    "joint queries, keys and values": ("Phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "joint, DoRA": ("Phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    "interleaved": ("GPTNeoX", {"target_modules": ["query_key_value", "lm_head"]}),
    "everything linear": ("Gemma2", {"target_modules": "all-linear"}),
    "latents": ("DeepseekV2", {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]}),
}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("case", OF_PEFT)
@torch.no_grad()
def test_we_compute_the_same_from_what_peft_writes(case, trained, tmp_path):
    row, options = OF_PEFT[case]
    pair = architectures.build(row, tmp_path / "base")
    torch.manual_seed(4)
    config = LoraConfig(r=4, lora_alpha=9, lora_dropout=0.1, task_type="CAUSAL_LM", **options)
    theirs = get_peft_model(pair.reference, config).eval()
    for name, p in theirs.named_parameters():
        if trained and ("lora_" in name):
            p.add_(torch.randn_like(p) * 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    idx = architectures.tokens(2, 24)
    expected = theirs(idx).logits
    weights, lora = import_peft(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    assert lora.dropout == 0.1
    gpt = load_model(tmp_path / "base", dtype=torch.float32)
    apply_lora(gpt, lora)
    assert not gpt.load_state_dict(weights, strict=False).unexpected_keys
    assert architectures.distance(gpt(idx), expected) < 1e-4
    source = open_checkpoint(tmp_path / "base")
    merged = GPT(source.config).eval()
    merged.load_state_dict(dict(merged_weights(source.weights(), source.config, weights, lora)))
    assert architectures.distance(merged(idx), expected) < 1e-4


def test_what_is_filled_up_can_learn(tmp_path):
    """One layer is adapted in theirs; the other ones do nothing yet, and a gradient comes through."""
    pair = architectures.build("Llama", tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    get_peft_model(pair.reference, config).save_pretrained(tmp_path / "adapter")
    weights, lora = import_peft(tmp_path / "adapter", open_checkpoint(tmp_path / "base"))
    gpt = load_model(tmp_path / "base", dtype=torch.float32)
    apply_lora(gpt, lora)
    gpt.load_state_dict(weights, strict=False)
    idx = architectures.tokens(2, 12)
    NextTokenLoss(gpt)(idx[:, :-1], idx[:, 1:]).backward()
    assert all(p.grad.abs().max() > 0 for name, p in gpt.named_parameters() if name.endswith("lora_B"))


@pytest.mark.parametrize(
    ("row", "lora", "message"),
    [
        ("Mixtral", settings(TARGETS), r"h\.0\.mlp\.experts\.0\.fc_1\.weight: transformers has all experts"),
        ("GptOss", settings(["mlp"]), "transformers has all experts of a layer in one tensor"),
        (
            "Phi3",
            settings(["query", "value"], "DoRA"),
            r"DoRA update of some rows of model\.layers\.0\.self_attn\.qkv_proj",
        ),
    ],
)
def test_what_peft_cannot_hold_is_refused_by_name(row, lora, message, tmp_path):
    pair = architectures.build(row, tmp_path / "base")
    with pytest.raises(ValueError, match=message):
        export_peft(
            matrices(adapted(tmp_path / "base", lora)), lora, pair.ours.config, architecture(pair), "", tmp_path
        )


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        ({"target_modules": ["embed_tokens"]}, {}, r"embed_tokens\.lora_embedding_A is not supported"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {}, r"modules_to_save=\['lm_head'\]"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, {}, "bias='lora_only'"),
        ({"target_modules": ["q_proj"]}, {"init_lora_weights": "pissa_niter_4"}, "has changed the base weights"),
        ({"target_modules": ["q_proj"]}, {"peft_type": "IA3"}, "peft_type='IA3'"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(options, changed, message, tmp_path):
    pair = architectures.build("Llama", tmp_path / "base")
    get_peft_model(pair.reference, LoraConfig(r=4, task_type="CAUSAL_LM", **options)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ValueError, match=message):
        import_peft(tmp_path, open_checkpoint(tmp_path / "base"))


def test_adapters_of_other_models_are_refused(tmp_path):
    pair = architectures.build("Llama", tmp_path / "base")
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    get_peft_model(pair.reference, LoraConfig(**options)).save_pretrained(tmp_path)
    architectures.build("Llama multi-query, wide heads", tmp_path / "wide")
    with pytest.raises(ValueError, match=r"another model: model\.layers\.0\.self_attn\.q_proj\.weight is \[128, 64\]"):
        import_peft(tmp_path, open_checkpoint(tmp_path / "wide"))
    router = {"base_model.model.model.layers.0.mlp.gate.lora_A.weight": torch.zeros(4, 64)}
    router["base_model.model.model.layers.0.mlp.gate.lora_B.weight"] = torch.zeros(6, 4)
    save_file(router, tmp_path / "adapter_model.safetensors")
    architectures.build("Qwen3Moe", tmp_path / "mixture")
    with pytest.raises(ValueError, match=r"h\.0\.mlp\.gate is not supported"):
        import_peft(tmp_path, open_checkpoint(tmp_path / "mixture"))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate\.weight is not a layer of this model"):
        import_peft(tmp_path, open_checkpoint(tmp_path / "base"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_loss_curve(variant, tmp_path):
    """Twenty steps on the same batches from the same matrices, in float32."""
    lora, learning_rate = settings(TARGETS, variant), 5e-3
    pair = architectures.build("Llama", tmp_path / "base")
    gpt = adapted(tmp_path / "base", lora).train()
    out = tmp_path / "adapter"
    out.mkdir()
    export_peft(matrices(gpt), lora, gpt.config, architecture(pair), "", out)
    theirs = PeftModel.from_pretrained(pair.reference, out, is_trainable=True).train()
    data = torch.randint(3, 40, (5, 4, 24), generator=torch.Generator().manual_seed(2))

    module, losses = NextTokenLoss(gpt), []
    optimizer = torch.optim.AdamW([p for p in gpt.parameters() if p.requires_grad], lr=learning_rate)
    for step in range(20):
        idx = data[step % 5]
        loss = module(idx[:, :-1], idx[:, 1:]) / idx[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=learning_rate)
    for step in range(20):
        loss = theirs(data[step % 5], labels=data[step % 5]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss.item() - losses[step]) < 1e-3, f"step {step}: {losses[step]} here, {loss.item()} there"
    assert losses[-1] < 0.8 * losses[0], "otherwise nothing was learned"
