"""LoRA: what is adapted, what it computes and learns, and that merging changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litgpt.adaptation.lora import (
    LORA_WEIGHTS,
    TARGETS,
    Dropout,
    LoRALinear,
    LoRASettings,
    LowRank,
    apply_lora,
    is_lora,
    lora_layers,
    merge_lora,
    merged_weights,
    parameter_groups,
    plain_weight,
    read_lora,
    reset_lora,
    save_lora,
)
from litgpt.config import Config
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.model import GPT
from litgpt.training.loss import NextTokenLoss
from tests.shapes import LLAMA

SIZES = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "intermediate_size": 40,
    "vocab_size": 64,
    "block_size": 64,
    "padding_multiple": 64,
}
LATENT = {"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 10}
KINDS = {
    "multi-head, biases": {"bias": True, "lm_head_bias": True},
    "grouped": LLAMA | {"n_query_groups": 2},
    "multi-query": LLAMA | {"n_query_groups": 1},
    "odd head size": LLAMA | {"n_query_groups": 2, "head_size": 14},
    "tied head": LLAMA | {"n_query_groups": 2, "tie_embeddings": True},
    "experts": LLAMA | {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "n_shared_expert": 1},
    "latent": LLAMA | {"latent_attention": LATENT | {"q_lora_rank": 12}},
    "latent, queries whole": LLAMA | {"latent_attention": LATENT | {"q_lora_rank": None}},
}
VARIANTS = {"plain": {}, "DoRA": {"dora": True}, "rank-stabilised": {"rs": True}}


def settings(*targets: str, **changed) -> LoRASettings:
    switches = {target: target in (targets or TARGETS) for target in TARGETS}
    return LoRASettings(**{"r": 3, "alpha": 7, "dropout": 0.0, **switches, **changed})


def build(kind: str = "grouped") -> GPT:
    torch.manual_seed(0)
    gpt = GPT(Config(**{**SIZES, **KINDS[kind]}))
    gpt.init_weights()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return gpt.eval()


def adapted(kind: str = "grouped", lora: LoRASettings | None = None) -> GPT:
    """A model whose update has learned something."""
    gpt = build(kind)
    apply_lora(gpt, lora or settings())
    learn(gpt)
    return gpt


@torch.no_grad()
def learn(gpt: GPT) -> None:
    for name, p in gpt.named_parameters():
        if is_lora(name):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)


def tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


def test_published_counts():
    """What LitGPT prints for phi-2 at rank 8 with every switch on."""
    with torch.device("meta"):
        gpt = GPT(Config.from_name("phi-2"))
        apply_lora(gpt, LoRASettings(r=8, **dict.fromkeys(TARGETS, True)))
    assert gpt.num_parameters(trainable_only=True) == 12_226_560
    assert gpt.num_parameters() - gpt.num_parameters(trainable_only=True) == 2_779_683_840


@pytest.mark.parametrize(
    ("kind", "targets", "layers"),
    [
        ("grouped", ["query"], {"attn.qkv"}),
        ("grouped", ["key"], {"attn.qkv"}),
        ("grouped", ["value"], {"attn.qkv"}),
        ("grouped", ["projection"], {"attn.proj"}),
        ("grouped", ["mlp"], {"mlp.fc_1", "mlp.fc_2", "mlp.proj"}),
        ("grouped", ["head"], {"lm_head"}),
        ("multi-head, biases", ["mlp", "projection"], {"attn.proj", "mlp.fc", "mlp.proj"}),
        (
            "experts",
            ["mlp"],
            {f"mlp.{e}.{n}" for e in ("experts.#", "shared_experts") for n in ("fc_1", "fc_2", "proj")},
        ),
        ("latent", ["query"], {"attn.q_a_proj", "attn.q_b_proj"}),
        ("latent", ["value"], {"attn.kv_a_proj_with_mqa", "attn.kv_b_proj"}),
        ("latent, queries whole", ["query"], {"attn.q_proj"}),
    ],
)
def test_each_switch_adapts_its_layers(kind, targets, layers):
    gpt = build(kind)
    apply_lora(gpt, settings(*targets))
    found = {name for name, layer in gpt.named_modules() if isinstance(layer, LoRALinear)}
    per_block = {name.split(".", 3)[-1] if "." in name else name for name in found}
    assert {".".join("#" if part.isdigit() else part for part in name.split(".")) for name in per_block} == layers
    assert len(found) == len(per_block) * (1 if targets == ["head"] else 2)


@pytest.mark.parametrize(
    ("targets", "rows"),
    [(["query"], {"q"}), (["key"], {"k"}), (["query", "value"], {"q", "v"}), (["key", "value"], {"k", "v"})],
)
@torch.no_grad()
def test_queries_keys_and_values_are_apart(targets, rows):
    """With one adapted, the rows of the others stay to the bit; shapes as in LitGPT 0.5.13."""
    before = build("odd head size").transformer.h[0].attn.qkv.weight
    gpt = adapted("odd head size", settings(*targets))
    layer = gpt.transformer.h[0].attn.qkv
    sizes = {"q": 56, "k": 28, "v": 28}
    assert layer.lora_A.shape == (3 * len(rows), 32)
    assert layer.lora_B.shape == (sum(sizes[row] for row in rows), 3)
    parts = zip(
        sizes, before.split(list(sizes.values())), layer.merged_weight().split(list(sizes.values())), strict=True
    )
    assert {row for row, old, new in parts if not torch.equal(old, new)} == rows


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_begins_as_the_model_it_adapts(kind, variant):
    gpt = build(kind)
    before = gpt(tokens())
    apply_lora(gpt, settings(**VARIANTS[variant]))
    assert (gpt(tokens()) - before).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("targets", [[], *([target] for target in TARGETS), ["query", "value"]])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merged_equals_unmerged(kind, targets, variant):
    lora = settings(*targets, **VARIANTS[variant])
    gpt = adapted(kind, lora)
    update = {name: p.clone() for name, p in gpt.state_dict().items() if is_lora(name)}
    unmerged, base = gpt(tokens()), build(kind)
    assert (unmerged - base(tokens())).abs().max() > 1e-2, "otherwise 1e-5 says little"
    streamed = dict(merged_weights(base.state_dict().items(), base.config, update, lora))
    merge_lora(gpt)
    scale = unmerged.abs().max()
    assert (gpt(tokens()) - unmerged).abs().max() < 1e-5 * scale
    assert not list(lora_layers(gpt))
    assert streamed.keys() == gpt.state_dict().keys()
    assert all(torch.equal(p, streamed[name]) for name, p in gpt.state_dict().items())


@torch.no_grad()
def test_the_embedding_does_not_learn_what_a_tied_head_has_learned():
    gpt = adapted("tied head", settings("head"))
    embedding = gpt.transformer.wte.weight.clone()
    merge_lora(gpt)
    assert torch.equal(gpt.transformer.wte.weight, embedding)
    assert not torch.equal(gpt.lm_head.weight, embedding)
    assert not gpt.config.tie_embeddings


@torch.no_grad()
def test_the_update_is_scaled_product():
    for variant, scaling in ((settings(), 7 / 3), (settings(rs=True), 7 / math.sqrt(3))):
        layer = adapted("grouped", variant).transformer.h[0].attn.proj
        x = torch.randn(5, 32)
        expected = x @ layer.linear.weight.T + scaling * x @ layer.lora_A.T @ layer.lora_B.T
        assert torch.allclose(layer(x), expected, atol=1e-5)


@torch.no_grad()
def test_dora_scales_each_row_to_its_learned_length():
    layer = adapted("multi-head, biases", settings(dora=True)).transformer.h[0].mlp.fc
    x = torch.randn(5, 32)
    rows = layer.linear.weight + 7 / 3 * layer.lora_B @ layer.lora_A
    rows = layer.lora_magnitude[:, None] * F.normalize(rows, dim=1)
    assert torch.allclose(layer(x), x @ rows.T + layer.linear.bias, atol=1e-5)
    assert torch.allclose(layer.merged_weight().norm(dim=1), layer.lora_magnitude.abs(), atol=1e-5)


def test_dropout_acts_in_training_only():
    gpt = adapted(lora=settings(dropout=0.5))
    expected = adapted()(tokens())
    assert torch.equal(gpt(tokens()), expected)
    gpt.train()
    assert not torch.equal(gpt(tokens()), gpt(tokens()))
    inputs = torch.ones(1, 32)
    layer = gpt.transformer.h[0].attn.proj
    frozen = layer.linear(inputs)
    layer.lora_B.data.zero_()
    assert torch.equal(layer(inputs), frozen), "the frozen weight sees everything"


def test_dropout_zeroes_its_share():
    drop, x = Dropout(0.05), torch.ones(3, 333, 401)
    torch.manual_seed(0)
    kept = drop.keeps(x)
    assert kept.dtype == torch.uint8
    assert set(kept.unique().tolist()) == {0, 1}
    assert (kept == 0).float().mean().item() == pytest.approx(0.05, abs=0.002)  # 6 standard deviations
    torch.manual_seed(0)
    assert torch.equal(drop.keeps(x), kept)
    assert not torch.equal(drop.keeps(x), kept)
    dropped = kept.flatten() == 0
    for distance in (1, 2, 3, 4):  # four values share a draw
        together = (dropped[distance:] & dropped[:-distance]).float().mean().item()
        assert together == pytest.approx(0.05**2, abs=0.0005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("drops", [False, True])
def test_the_update_and_its_gradients(drops, dtype):
    """As autograd has it for the steps one by one."""
    kept = torch.randint(0, 2, (4, 7, 24), dtype=torch.uint8) if drops else None
    shapes = (4, 7, 24), (5, 24), (30, 5)
    x, down, up = (torch.randn(shape, dtype=dtype) for shape in shapes)

    def outcome(update, *tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_(True) for tensor in tensors]
        y = update(*leaves)
        y.square().sum().backward()
        return [y, *(leaf.grad for leaf in leaves)]

    def one_by_one(x, down, up):
        return F.linear(F.linear(x if kept is None else x * kept, down), up) * 1.7

    matrices = (down.float(), up.float()) if dtype == torch.bfloat16 else (down, up)  # what is trained is in float32
    found = outcome(lambda x, down, up: LowRank.apply(x, down, up, kept, 1.7), x, *matrices)
    expected = outcome(one_by_one, x.double(), down.double(), up.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float64: 1e-12}[dtype]
    for one, of_autograd, dtype_of in zip(found, expected, (x, x, *matrices), strict=True):
        assert one.dtype == dtype_of.dtype
        scale = of_autograd.abs().max().item()
        torch.testing.assert_close(one.double(), of_autograd, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_and_its_scale_reach_the_update(autocast, monkeypatch):
    layer = LoRALinear(nn.Linear(24, 30), settings(dropout=0.3), [(10, True), (8, False), (12, True)])
    layer.reset_lora()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 7, 24)
    kept = torch.randint(0, 2, x.shape, dtype=torch.uint8)
    monkeypatch.setattr(layer.dropout, "keeps", lambda _: kept)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = layer(x)
    weight = layer.merged_weight() - layer.linear.weight
    expected = layer.linear(x) + F.linear(x * kept / 0.7, weight)
    assert found.dtype == (torch.bfloat16 if autocast else torch.float32)
    tolerance = 0.02 if autocast else 1e-5
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_alone_learns(kind, variant):
    gpt = adapted(kind, settings(**VARIANTS[variant])).train()
    idx = tokens()
    NextTokenLoss(gpt)(idx[:, :-1], idx[:, 1:]).backward()
    for name, p in gpt.named_parameters():
        assert p.requires_grad == is_lora(name), name
        assert (p.grad is not None) == is_lora(name), name
        if is_lora(name) and "experts" not in name:
            assert p.grad.abs().max() > 0, name


def test_it_stays_in_float32_when_the_model_is_converted():
    gpt = adapted(lora=settings(dora=True))
    exact = {name: p.clone() for name, p in gpt.named_parameters() if is_lora(name)}
    expected = gpt(tokens())
    gpt.to(torch.bfloat16)
    for name, p in gpt.named_parameters():
        assert p.dtype == (torch.float32 if is_lora(name) else torch.bfloat16), name
        assert name not in exact or torch.equal(p, exact[name]), name
    logits = gpt(tokens())
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    NextTokenLoss(gpt)(tokens()[:, :-1], tokens()[:, 1:]).backward()
    assert {p.grad.dtype for p in gpt.parameters() if p.requires_grad} == {torch.float32}


@torch.no_grad()
def test_it_starts_anew():
    gpt = adapted(lora=settings(dora=True))
    before = build()(tokens())
    assert not torch.allclose(gpt(tokens()), before, atol=1e-3)
    reset_lora(gpt)
    assert torch.allclose(gpt(tokens()), before, atol=1e-5)


class Scaled(nn.Module):
    """A layer that holds its weight in another form, as quantised ones do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.halves = nn.Parameter(linear.weight.detach() / 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.halves * 2, self.bias)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_what_is_in_another_form_is_adapted_and_merged_as_if_it_were_plain(bias):
    torch.manual_seed(0)
    plain = nn.Linear(8, 6, bias=bias)
    other = Scaled(plain)
    assert torch.allclose(plain_weight(other), plain.weight, atol=1e-6)
    layer = LoRALinear(other, settings(dora=True), [(6, True)])
    layer.reset_lora()
    layer.lora_B.normal_()
    x = torch.randn(3, 8)
    assert torch.allclose(layer(x), F.linear(x, layer.merged_weight(), plain.bias), atol=1e-5)


def test_groups_of_lora_plus():
    gpt = adapted(lora=settings(dora=True))
    whole = parameter_groups(gpt, 1e-3, None)
    slow, fast = parameter_groups(gpt, 1e-3, 16)
    assert [name for name, _ in whole] == [name for name, _ in gpt.named_parameters() if is_lora(name)]
    assert len(whole) == len(slow["params"]) + len(fast["params"])
    assert fast["lr"] == pytest.approx(1.6e-2)
    fast_ids = {id(p) for p in fast["params"]}
    assert all((id(p) in fast_ids) == name.endswith("lora_B") for name, p in gpt.named_parameters() if is_lora(name))


def test_a_file_carries_what_it_is(tmp_path):
    lora = settings("query", "mlp", dora=True)
    weights = {name: p for name, p in adapted(lora=lora).state_dict().items() if is_lora(name)}
    save_lora(tmp_path, weights, lora, "org/model")
    found, read, base = read_lora(tmp_path)
    assert (read, base) == (lora, "org/model")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_a_file_of_litgpt_is_explained_by_what_is_beside_it(tmp_path):
    weights = {name: p for name, p in adapted().state_dict().items() if is_lora(name)}
    torch.save({"model": weights}, tmp_path / LORA_WEIGHTS)
    with pytest.raises(ValueError, match=r"does not say what it is, and there is no hyperparameters\.yaml"):
        read_lora(tmp_path)
    (tmp_path / "hyperparameters.yaml").write_text(
        "checkpoint_dir: checkpoints/org/model\nprecision: bf16-true\nlora_r: 4\nlora_alpha: 5\nlora_dropout: 0.1\n"
        "lora_query: false\nlora_key: true\nlora_value: false\nlora_projection: false\nlora_mlp: true\nlora_head: false\n"
    )
    _, read, base = read_lora(tmp_path)
    assert base == "checkpoints/org/model"
    assert read == LoRASettings(4, 5, 0.1, query=False, key=True, value=False, mlp=True)


@torch.no_grad()
def test_routers_that_litgpt_has_adapted_are_merged():
    gpt, lora = build("experts"), settings("mlp")
    update = {name: p for name, p in adapted("experts", lora).state_dict().items() if is_lora(name)}
    for layer in range(2):
        update[f"transformer.h.{layer}.mlp.gate.lora_A"] = torch.randn(3, 32)
        update[f"transformer.h.{layer}.mlp.gate.lora_B"] = torch.randn(4, 3)
    merged = dict(merged_weights(gpt.state_dict().items(), gpt.config, update, lora))
    name = "transformer.h.1.mlp.gate"
    expected = gpt.state_dict()[name + ".weight"] + 7 / 3 * update[name + ".lora_B"] @ update[name + ".lora_A"]
    assert torch.allclose(merged[name + ".weight"], expected, atol=1e-5)


def test_weights_of_another_model_are_refused(tmp_path):
    gpt, lora = build(), settings("query")
    update = {name: p for name, p in adapted(lora=lora).state_dict().items() if is_lora(name)}
    for other in ("odd head size", "latent"):
        base = build(other)
        with pytest.raises(ValueError, match="do not belong to this model: transformer"):
            dict(merged_weights(base.state_dict().items(), base.config, update, lora))
    with pytest.raises(FileNotFoundError, match=r"holds no lit_model\.pth\.lora"):
        read_lora(tmp_path)
    torch.save(gpt.state_dict(), tmp_path / LORA_WEIGHTS)
    with pytest.raises(ValueError, match=r"holds no LoRA weights: lm_head\.weight"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": 0}, "^r=0:"),
        ({"alpha": 0}, "^alpha=0:"),
        ({"dropout": 1.0}, r"^dropout=1\.0:"),
        ({"query": False, "value": False}, "`query`, .*`head`"),
    ],
)
def test_settings_that_cannot_act_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        LoRASettings(**changed)


def test_a_step_of_training_after_texts_and_a_validation_without_gradients():
    """What inference leaves in the model (tables, masks) must not be a tensor that autograd refuses."""
    gpt = GPT(Config(**SIZES))
    gpt.init_weights()
    apply_lora(gpt, LoRASettings(r=4))  # queries and values alone
    idx = torch.randint(0, 64, (2, 12))
    for _ in range(2):
        gpt.eval()
        Engine(gpt).complete([Request([1, 2, 3], 4, Sampling(0))])
        with torch.inference_mode():
            NextTokenLoss(gpt)(idx[:, :-1], idx[:, 1:])
        gpt.train()
        NextTokenLoss(gpt)(idx[:, :-1], idx[:, 1:]).backward()
    assert all(p.grad is not None for p in gpt.parameters() if p.requires_grad)


@pytest.mark.parametrize("shared", [None, 1])
def test_of_a_mixture_every_expert_is_adapted(shared):
    config = Config(
        **SIZES | {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "bias": False},
        n_shared_expert=shared,
        router_scores="softmax",
    )
    gpt = GPT(config)
    apply_lora(gpt, LoRASettings(r=4, query=False, value=False, mlp=True))
    linear = {
        name for name, layer in gpt.named_modules() if name.endswith((".fc_1", ".fc_2", ".proj")) and ".mlp." in name
    }
    adapted = {name for name, layer in gpt.named_modules() if isinstance(layer, LoRALinear)}
    assert adapted == linear
    assert len([name for name in adapted if ".experts." in name]) == 2 * 4 * 3
