"""Quantised layers: what bitsandbytes computes, in every architecture, saved and loaded, under LoRA, in bounded memory."""

import copy
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from litgpt.adaptation.lora import LoRASettings, apply_lora, lora_layers
from litgpt.checkpoint import save_model, write_state_dict
from litgpt.config import Config
from litgpt.export.hf_writer import export_hf
from litgpt.formats.quantised_parts import saved_weights
from litgpt.model import GPT, Router
from litgpt.quantization.layers import (
    FOUR_BIT_KINDS,
    INFERENCE_KINDS,
    TRAINING_KINDS,
    QuantizedLinear,
    check_quantize,
    import_bitsandbytes,
    num_parameters,
    quantized_layers,
    replace_linears,
    without_mixing,
)
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from litgpt.sources.meta import meta_model
from litgpt.training.loss import NextTokenLoss
from tests import shapes

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

KINDS = (*TRAINING_KINDS, "bnb.int8")
ROUNDING = {"nf4": 0.10, "fp4": 0.13, "int": 0.01}  # relative error of normally distributed weights, by type
SIZES = {"block_size": 64, "n_layer": 2, "n_embd": 96, "n_head": 4, "vocab_size": 128, "padded_vocab_size": 128}
LLAMA = {
    **shapes.LLAMA,
    "n_query_groups": 2,
    "intermediate_size": 160,
}
MOE = LLAMA | {
    "mlp_class_name": "LLaMAMoE",
    "n_expert": 4,
    "n_expert_per_token": 2,
    "moe_intermediate_size": 64,
    "router_scores": "sigmoid",
    "n_shared_expert": 1,
    "first_k_dense_replace": 1,
}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
MODELS = {"neox": {}, "llama": LLAMA, "moe": MOE, "mla": MOE | {"n_query_groups": 4, "latent_attention": LATENT}}
IDS = torch.arange(64).view(2, 32) * 7 % 128


def make(kind: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(**SIZES, **MODELS[kind]))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases would be zero
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request) -> GPT:
    return make(request.param)


def quantised(model: GPT, kind: str, dtype: torch.dtype = torch.float32) -> GPT:
    model = copy.deepcopy(model)
    replace_linears(model, kind, dtype)
    return model


def dequantised(model: GPT) -> GPT:
    """The same model with plain layers, of the values that the quantised ones stand for."""
    model = copy.deepcopy(model)
    for name, layer in list(quantized_layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight.data.copy_(layer.plain_weight())
        if layer.bias is not None:
            plain.bias.data.copy_(layer.bias)
        model.set_submodule(name, plain)
    return model


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def layer_of(weight: torch.Tensor, kind: str, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    layer = QuantizedLinear(weight.size(1), weight.size(0), False, kind, dtype)
    layer.load_weight(weight)
    return layer


# --- one layer


@pytest.mark.parametrize("width", [128, 96, 33], ids=["whole-rows", "uneven-rows", "odd-rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_quantised_as_bitsandbytes_does_it(kind, width):
    """Also where a row is no multiple of 64, for which bitsandbytes' kernel on CPUs must be told another shape, and in
    weights large enough to be quantised in parts."""
    functional = import_bitsandbytes().functional
    for rows, dtype in ((37, torch.float32), (4100, torch.bfloat16)):
        weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
        layer = layer_of(weight, kind)
        if kind in FOUR_BIT_KINDS:
            code, nested = kind[4:7], kind.endswith("dq")
            packed, state = functional.quantize_4bit(weight, quant_type=code, compress_statistics=nested)
            state.shape, state.dtype = torch.Size([weight.numel()]), torch.float32
            expected = functional.dequantize_4bit(packed, state).view(rows, width)
        else:
            codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
            expected = functional.int8_vectorwise_dequant(codes, absmax)
        torch.testing.assert_close(layer.plain_weight(), expected, rtol=1e-6, atol=0)
        assert error(layer.plain_weight(), weight) < ROUNDING[kind[4:7]]


def test_four_bits_are_the_nearest_code_times_the_largest_value_of_the_block():
    """Computed here from the formula alone (https://arxiv.org/abs/2305.14314, section 3)."""
    weight = torch.randn(20, 96)
    code = import_bitsandbytes().functional.get_4bit_type("nf4", device="cpu")  # (16,)
    blocks = weight.view(-1, 64)
    absmax = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks[..., None] / absmax[..., None] - code).abs().argmin(dim=-1)
    expected = (code[nearest] * absmax).view(20, 96)
    torch.testing.assert_close(layer_of(weight, "bnb.nf4").plain_weight(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_reaches_the_input_and_nothing_is_kept_for_it(kind, dtype):
    layer = layer_of(torch.randn(80, 96), kind, dtype)
    x = torch.randn(3, 5, 96, dtype=dtype, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        y = layer(x)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    weight = layer.plain_weight()
    assert weight.dtype == y.dtype == x.grad.dtype == dtype
    assert error(y, x.float() @ weight.float().T) < (0.01 if kind in FOUR_BIT_KINDS else 0.03)
    assert error(x.grad, gradient.float() @ weight.float()) < 0.01
    assert not kept
    assert all(p.grad is None for p in layer.parameters())


def test_an_expert_without_tokens_gives_nothing():
    for kind in KINDS:
        x = torch.empty(0, 96, requires_grad=True)
        y = layer_of(torch.randn(80, 96), kind)(x)
        y.sum().backward()
        assert y.shape == (0, 80)
        assert x.grad.shape == (0, 96)


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_changes_the_type_of_what_it_computes_and_not_the_scales(kind):
    layer = QuantizedLinear(96, 80, True, kind, torch.float32)
    layer.load_weight(torch.randn(80, 96))
    layer.bias.data.normal_()
    before = copy.deepcopy(layer.quantized.state_dict())
    expected = layer.plain_weight()
    layer.to(torch.bfloat16)
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.quantized.state_dict().items())
    assert (layer.bias.dtype, layer.plain_weight().dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(layer.to(torch.float32).plain_weight(), expected)


# --- whole models


def test_the_linear_layers_of_the_blocks_are_replaced_and_nothing_else(model):
    smaller = quantised(model, "bnb.nf4")
    replaced = {name for name, _ in quantized_layers(smaller)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    routers = {name for name, module in model.named_modules() if isinstance(module, Router)}
    latent = {name for name in linear if name.endswith("kv_b_proj")}
    assert replaced == linear - {"lm_head"} - routers - latent
    assert num_parameters(smaller) == model.num_parameters()
    quantised_names = {f"{name}.weight" for name in replaced}
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in quantised_names}
    after = smaller.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_computes_with_the_values_that_its_codes_stand_for(model, kind):
    smaller = quantised(model, kind)
    with torch.no_grad():
        full, actual, expected = model(IDS), smaller(IDS), dequantised(smaller)(IDS)
    assert error(actual, expected) < (1e-6 if kind in FOUR_BIT_KINDS else 0.06)
    assert 0.01 < error(actual, full) < 4 * ROUNDING[kind[4:7]]


@torch.no_grad()
def test_decoding_with_the_cache_gives_the_logits_of_one_pass(model):
    smaller = quantised(model, "bnb.nf4-dq")
    expected = smaller(IDS)
    cache = smaller.new_cache(2, 32)
    parts = [smaller(IDS[:, :20], cache=cache)]
    for place in range(20, 32):
        positions = torch.full((2, 1), place)
        parts.append(smaller(IDS[:, place : place + 1], positions=positions, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_weights_load_into_a_new_model(tmp_path, model, kind):
    smaller = quantised(model, kind)
    write_state_dict(tmp_path / "weights.pth", smaller.state_dict().items())
    other = GPT(model.config)
    other.init_weights()
    again = quantised(other.eval(), kind)
    assert not torch.equal(again(IDS), smaller(IDS))
    again.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    assert torch.equal(again(IDS), smaller(IDS))
    empty = meta_model(model.config)
    replace_linears(empty, kind, torch.float32)
    empty.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True, mmap=True), assign=True)
    empty.rope = model.rope
    assert torch.equal(empty.eval()(IDS), smaller(IDS))
    with pytest.raises(RuntimeError, match="Missing key"):
        GPT(model.config).load_state_dict(smaller.state_dict())


# --- LoRA on top (QLoRA)

EVERYWHERE = LoRASettings(r=4, dropout=0.0, key=True, projection=True, mlp=True)


def loss_of(model: GPT, ids: torch.Tensor = IDS) -> torch.Tensor:
    return NextTokenLoss(model)(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", TRAINING_KINDS)
def test_lora_has_the_gradients_that_it_has_on_the_dequantised_weights(model, kind, dora):
    settings = LoRASettings(**EVERYWHERE.to_dict() | {"dora": dora})
    gradients = []
    for quantised_model in (quantised(model, kind).train(), dequantised(quantised(model, kind)).train()):
        torch.manual_seed(1)
        apply_lora(quantised_model, settings)
        for layer in lora_layers(quantised_model):
            nn.init.normal_(layer.lora_B, std=0.02)
        loss_of(quantised_model).backward()
        gradients.append({name: p.grad for name, p in quantised_model.named_parameters() if p.grad is not None})
    actual, expected = gradients
    assert actual.keys() == expected.keys()
    assert all("lora_" in name for name in actual)
    if kind in FOUR_BIT_KINDS:
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    else:  # the inputs are rounded, too, which may send a token to another expert
        together = [torch.cat([g.flatten() for g in found.values()]) for found in gradients]
        assert error(*together) < 0.2


@pytest.mark.parametrize("kind", TRAINING_KINDS)
def test_lora_on_quantised_weights_learns(kind):
    smaller = quantised(make("llama"), kind, torch.bfloat16).to(torch.bfloat16).train()
    before = copy.deepcopy(smaller.state_dict())
    torch.manual_seed(1)
    apply_lora(smaller, EVERYWHERE)
    optimizer = torch.optim.AdamW([p for p in smaller.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = loss_of(smaller)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = {name.replace(".linear.", "."): tensor for name, tensor in smaller.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# --- loading


@pytest.mark.parametrize("form", ["lit", "hf", "gguf"])
@pytest.mark.parametrize("kind", ["bnb.nf4-dq", "bnb.int8"])
def test_a_checkpoint_is_quantised_while_it_is_loaded(tmp_path, form, kind):
    path = checkpoint(tmp_path, form)
    expected = quantised(load_model(path), kind)
    actual = load_model(path, quantize=kind)
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name
    assert torch.equal(actual(IDS % 64), expected(IDS % 64))


def checkpoint(folder: Path, form: str) -> Path:
    from tests.unit import test_convert_gguf as gguf_files

    if form == "gguf":
        torch.manual_seed(0)
        model = GPT(gguf_files.CONFIG)
        model.init_weights()
        return gguf_files.write(folder / "m.gguf", gguf_files.named(model))
    (folder / "lit").mkdir()
    save_model(folder / "lit", make("llama"), make("llama").config)
    if form == "hf":
        export_hf(folder / "lit", folder / "hf")
    return folder / form


def test_what_stays_in_float32_is_loaded_in_float32(tmp_path):
    model = make("moe")
    bias = model.transformer["h"][1].mlp.gate.e_score_correction_bias.normal_()
    save_model(tmp_path, model, model.config)
    for kind in (None, "bnb.nf4"):
        loaded = load_model(tmp_path, dtype=torch.bfloat16, quantize=kind)
        assert torch.equal(loaded.transformer["h"][1].mlp.gate.e_score_correction_bias, bias)
        assert loaded.transformer["h"][1].mlp.gate.weight.dtype == torch.bfloat16


def test_a_misfit_is_named_and_nothing_is_changed(tmp_path):
    checkpoint(tmp_path, "lit")
    other = quantised(GPT(Config(**SIZES | LLAMA | {"intermediate_size": 128})), "bnb.nf4")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="6 problems") as info:
        open_checkpoint(tmp_path / "lit").load_into(other)
    assert "mlp.fc_1.weight is [160, 96] in the checkpoint, [128, 96] in this model" in str(info.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


PEAK = """
import sys
from pathlib import Path
import torch
from litgpt.sources.load import load_model
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.quantization.layers import QuantizedLinear

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) / 1024

QuantizedLinear(64, 64, False, sys.argv[2], torch.float32).load_weight(torch.ones(64, 64))  # imports what it needs
source = open_checkpoint(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
model = load_model(source, quantize=sys.argv[2])
size = sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in model.state_dict().values()}.values()) / 2**20
print(status("VmHWM") - before, size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the memory from /proc")
@pytest.mark.parametrize(
    ("form", "kind"),
    [("lit", "bnb.nf4-dq"), ("lit", "bnb.int8"), ("hf", "bnb.nf4"), ("gguf", "bnb.nf4-dq"), ("saved", "bnb.nf4")],
)
def test_the_peak_is_the_quantised_model_and_one_layer(tmp_path, form, kind):
    """8 layers of 6.3 million weights, 25 MB each in float32: 200 MB, in 4 bits 26 MB, in 8 bits 51 MB."""
    layer = 25
    path = large_checkpoint(tmp_path, form)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK, str(path), kind]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    peak, size = (float(number) for number in done.stdout.split())
    assert 25 < size < 55
    assert peak < size + (layer / 4 if form == "saved" else layer)  # what is quantised already is copied alone


def large_checkpoint(folder: Path, form: str) -> Path:
    config = Config(
        **SIZES
        | LLAMA
        | {"n_layer": 8, "n_embd": 768, "n_head": 12, "n_query_groups": 12, "intermediate_size": 1728}
        | {"name": "large", "tie_embeddings": True}
    )
    shapes = meta_model(config).state_dict()
    embedding = torch.ones(shapes["lm_head.weight"].shape)
    alone = {"lm_head.weight": embedding, "transformer.wte.weight": embedding}
    weights = ((name, alone.get(name, torch.ones(like.shape))) for name, like in shapes.items())
    if form == "gguf":
        return large_gguf(folder / "large.gguf", config, dict(weights))
    (folder / "lit").mkdir()
    save_model(folder / "lit", weights, config)
    if form == "hf":
        export_hf(folder / "lit", folder / "hf")
    if form == "saved":
        (folder / "saved").mkdir()
        save_model(folder / "saved", saved_weights(load_model(folder / "lit", quantize="bnb.nf4")), config)
    return folder / form


def large_gguf(path: Path, config: Config, weights: dict[str, torch.Tensor]) -> Path:
    import gguf

    from litgpt.formats.architectures import ARCHITECTURES

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.block_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.n_layer)
    named = [pair for pair in weights.items() if pair[0] != "lm_head.weight"]
    for name, tensor in ARCHITECTURES["LlamaForCausalLM"].weights.to_theirs(named, config):
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@torch.no_grad()
def test_a_real_model_knows_nearly_as_much_in_four_bits(smollm2_gguf, page_of_text):
    from litgpt.tokenizer.tokenizer import Tokenizer

    source = open_checkpoint(smollm2_gguf)
    ids = torch.tensor([Tokenizer(source.files).encode_ids(page_of_text)[:256]])

    def loss(kind: str | None) -> float:
        model = load_model(source, dtype=torch.bfloat16, quantize=kind)
        return NextTokenLoss(model)(ids[:, :-1], ids[:, 1:]).item() / (ids.numel() - 1)

    full = loss(None)
    assert abs(loss("bnb.int8") - full) < 0.03
    assert -0.05 < loss("bnb.nf4") - full < 0.35


# --- what is refused, and quiet


def test_options_that_cannot_act_are_refused():
    check_quantize(None, "bf16-mixed", training=True)
    for kind in TRAINING_KINDS:
        check_quantize(kind, "bf16-true", training=True)
    for kind in INFERENCE_KINDS:
        check_quantize(kind, "32-true", training=False)
    for kind, training, remedy in (
        ("bnb.int8", True, "bnb.int8-training"),
        ("bnb.int8-training", False, "bnb.int8"),
        ("gptq", True, "bnb.nf4"),
    ):
        with pytest.raises(ValueError, match=rf"quantize={kind} .*{remedy}"):
            check_quantize(kind, "bf16-true", training=training)
    with pytest.raises(ValueError, match=r"precision=16-mixed cannot be combined .* Use precision=16-true"):
        check_quantize("bnb.nf4", "16-mixed", training=True)
    with pytest.raises(ValueError, match=r"precision=64-true cannot be combined .* Use precision=32-true"):
        check_quantize("bnb.nf4", "64-true", training=False)
    with pytest.raises(ValueError, match=r"quantize=bnb\.nf5 is unknown.*bnb\.nf4"):
        replace_linears(make("neox"), "bnb.nf5", torch.float32)
    assert without_mixing("bf16-mixed") == without_mixing("bf16-true") == "bf16-true"


def run(code: str, *folders: Path) -> subprocess.CompletedProcess:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, folders), root])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_without_bitsandbytes_one_line_says_what_to_install(tmp_path):
    (tmp_path / "bitsandbytes.py").write_text("raise ImportError('No module named bitsandbytes')")
    code = "from litgpt.quantization.layers import check_quantize\ncheck_quantize('bnb.nf4', '32-true', training=True)"
    last = run(code, tmp_path).stderr.splitlines()[-1]
    assert last.startswith("ValueError: Quantised weights and 8-bit optimizers need bitsandbytes")
    assert "pip install 'bitsandbytes" in last


def test_importing_bitsandbytes_is_quiet_quick_and_fetches_no_code(tmp_path):
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs): print('FETCHED')")
    code = """
import sys, torch
from litgpt.quantization.layers import import_bitsandbytes
compiler = torch.compile
import_bitsandbytes()
assert "torch._inductor" not in sys.modules and torch.compile is compiler
import kernels
assert kernels.get_kernel
"""
    done = run(code, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
