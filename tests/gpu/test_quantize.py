"""Quantised layers on a GPU: the CPU's values by other kernels, in a model and under LoRA."""

import copy
from importlib.util import find_spec

import pytest
import torch

from litgpt.adaptation.lora import LoRASettings, apply_lora, lora_layers
from litgpt.checkpoint import save_model
from litgpt.formats.quantised_parts import saved_weights
from litgpt.quantization.layers import FOUR_BIT_KINDS, TRAINING_KINDS
from litgpt.sources.load import load_model
from tests.unit.test_quantize import IDS, MODELS, error, layer_of, loss_of, make, quantised

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
]


@pytest.mark.parametrize("width", [128, 96], ids=["whole-rows", "uneven-rows"])
@pytest.mark.parametrize("kind", TRAINING_KINDS)
@pytest.mark.parametrize("rows", [1, 4, 300])
def test_a_layer_quantised_there_or_moved_there_computes_as_on_the_cpu(kind, width, rows):
    weight, x = torch.randn(80, width), torch.randn(rows, width)
    layer = layer_of(weight, kind)
    moved = copy.deepcopy(layer).cuda()
    torch.testing.assert_close(moved.plain_weight().cpu(), layer.plain_weight())
    there = copy.deepcopy(layer).cuda()
    there.load_weight(weight.cuda())
    assert error(there.plain_weight().cpu(), layer.plain_weight()) < 0.01  # halfway between two codes either will do
    assert error(moved(x.cuda()).cpu(), x @ layer.plain_weight().T) < (1e-3 if kind in FOUR_BIT_KINDS else 0.03)
    half = moved.to(torch.bfloat16)
    assert error(half(x.cuda().bfloat16()).cpu(), x @ layer.plain_weight().T) < 0.03


@pytest.mark.parametrize("kind", [*FOUR_BIT_KINDS, "bnb.int8"])
def test_saved_from_there_it_is_the_same_there_and_here(kind, tmp_path):
    model = quantised(make("moe"), kind).cuda()
    save_model(tmp_path, saved_weights(model), model.config)
    for device in ("cpu", "cuda"):
        again = load_model(tmp_path, device=device).state_dict()
        assert {tensor.device.type for tensor in again.values()} == {device}
        assert all(torch.equal(again[name].cpu(), tensor.cpu()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", TRAINING_KINDS)
def test_loss_and_lora_gradients_equal_those_of_the_cpu(name, kind):
    model = quantised(make(name), kind).train()
    torch.manual_seed(1)
    apply_lora(model, LoRASettings(r=4, dropout=0.0, key=True, projection=True, mlp=True))
    for layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    results = []
    for device in ("cpu", "cuda"):
        there = copy.deepcopy(model).to(device)
        loss = loss_of(there, IDS.to(device))
        loss.backward()
        gradients = torch.cat([p.grad.flatten().cpu() for p in there.parameters() if p.requires_grad])
        results.append((loss.item(), gradients))
    (expected, on_cpu), (actual, on_gpu) = results
    assert actual == pytest.approx(expected, rel=1e-4 if kind in FOUR_BIT_KINDS else 0.02)
    assert error(on_gpu, on_cpu) < (1e-3 if kind in FOUR_BIT_KINDS else 0.2)
