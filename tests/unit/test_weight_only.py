"""int4 and int8 weights for inference on CPUs: near the weights they stand for, and the same for few rows and many."""

import pytest
import torch

from litgpt.checkpoint import save_model
from litgpt.config import Config
from litgpt.kernels import native
from litgpt.model import GPT
from litgpt.quantization.layers import QuantizedLinear, check_quantize, quantized_layers, replace_linears
from litgpt.quantization.weight_only import FEW, GROUP, KINDS, Int4Weight, Int8Weight
from litgpt.sources.load import load_model
from tests import shapes

# Relative errors of normally distributed weights, as of a uniform grid over the range of 32 values or of a row.
ROUNDING = {"int4": 0.08, "int8": 0.009}
TIED = Config(
    block_size=64,
    n_layer=2,
    n_embd=96,
    n_head=4,
    n_query_groups=2,
    padded_vocab_size=200,
    intermediate_size=160,
    **shapes.LLAMA,
    tie_embeddings=True,
)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def layer_of(weight: torch.Tensor, kind: str, dtype: torch.dtype) -> QuantizedLinear:
    layer = QuantizedLinear(weight.size(1), weight.size(0), True, kind, dtype)
    layer.load_weight(weight)
    torch.nn.init.normal_(layer.bias)
    return layer


SHAPES = {"whole": (192, 128), "uneven-rows": (130, 96), "odd": (37, 33)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows_and_many_are_multiplied_by_the_same_weight(kind, shape):
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.bfloat16, 4e-3)):  # inputs of int4 are rounded to 16 bits
        weight = torch.randn(shape)
        layer = layer_of(weight, kind, dtype)
        assert error(layer.plain_weight(), weight) < ROUNDING[kind]
        for batch in ((1, 1), (3, 1), (2, FEW[kind]), (1, FEW[kind]), (0, 1)):
            x = torch.randn(*batch, shape[1]).to(dtype)
            expected = x.double() @ layer.quantized.dequantised(torch.float64).T + layer.bias.double()
            y = layer(x)
            assert y.dtype == dtype
            assert y.shape == expected.shape
            assert not y.numel() or error(y, expected) < tolerance


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_order_for_files_is_rows_of_neighbours(shape):
    weight = torch.randn(shape)
    packed = Int4Weight(weight.shape, torch.bfloat16, "cpu")
    packed.fill(iter([weight]))
    plain = packed.plain()
    assert {name: tensor.shape for name, tensor in plain.items()} == packed.plain_shapes()
    codes = torch.stack((plain["codes"] & 15, plain["codes"] >> 4), dim=2).flatten(1).float()
    scale, middle = plain["scales"].float().repeat_interleave(GROUP, dim=1).unbind(2)
    values = ((codes - 8) * scale + middle)[:, : shape[1]]
    torch.testing.assert_close(values, packed.dequantised(torch.float32))
    before = {name: parameter.clone() for name, parameter in packed.named_parameters()}
    for parameter in packed.parameters():
        parameter.data.fill_(1)
    packed.take_plain(**plain)
    assert all(torch.equal(before[name], parameter) for name, parameter in packed.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_without_kernels_the_weight_is_dequantised_once(kind, monkeypatch):
    monkeypatch.setattr(native, "library", lambda wait=True: None)
    layer, made = layer_of(torch.randn(37, 33), kind, torch.float32), []
    real = type(layer.quantized).dequantised
    monkeypatch.setattr(
        type(layer.quantized), "dequantised", lambda self, dtype: made.append(dtype) or real(self, dtype)
    )
    x = torch.randn(2, 33)
    for _ in range(3):
        torch.testing.assert_close(layer(x), x @ real(layer.quantized, torch.float32).T + layer.bias)
    assert made == [torch.float32]


def test_a_group_spans_its_values_and_a_constant_one_is_exact():
    weight = torch.linspace(-3, 5, GROUP).repeat(64, 2)
    weight[:, GROUP:] = 0.75
    packed = Int4Weight(weight.shape, torch.float32, "cpu")
    packed.fill(iter([weight]))
    values = packed.dequantised(torch.float32)
    torch.testing.assert_close(values[:, [0, GROUP - 1]], weight[:, [0, GROUP - 1]])  # the ends of the range
    assert (values - weight)[:, :GROUP].abs().max() <= 8 / 15 / 2 + 1e-6
    torch.testing.assert_close(values[:, GROUP:], weight[:, GROUP:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_quantised_while_it_is_loaded_with_its_head(kind, tmp_path):
    torch.manual_seed(0)
    model = GPT(TIED).eval()
    model.init_weights()
    save_model(tmp_path, model, TIED)
    loaded = load_model(tmp_path, quantize=kind)
    assert sum(1 for _ in quantized_layers(loaded)) == 2 * 5 + 1
    assert isinstance(loaded.lm_head.quantized, Int8Weight)  # for both
    torch.testing.assert_close(loaded.transformer["wte"].weight, model.transformer["wte"].weight)
    replace_linears(model, kind, torch.float32)
    ids = torch.arange(48)[None] * 7 % 200
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-4, atol=1e-5)
    copy = load_model(tmp_path, quantize=kind)
    for parameter in copy.parameters():
        parameter.data.zero_()
    copy.load_state_dict(loaded.state_dict())
    with torch.inference_mode():
        assert torch.equal(copy(ids), loaded(ids))


def test_what_they_are_not_for_is_refused():
    check_quantize("int4", "bf16-true", training=False, device="cpu")
    with pytest.raises(ValueError, match=r"int4 is not for training. Choose one of: bnb\.nf4"):
        check_quantize("int4", "bf16-true", training=True)
    with pytest.raises(ValueError, match=r"int8 is for CPUs, and the model goes to cuda. Use quantize=bnb\.int8"):
        check_quantize("int8", "bf16-true", training=False, device="cuda")
