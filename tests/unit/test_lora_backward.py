"""What LoRA's backward pass computes and keeps: nothing for the weights that are frozen."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.training.frozen_weights import store_frozen_matrices
from litgpt.training.loss import NextTokenLoss

LLAMA = {
    **{"block_size": 64, "n_layer": 3, "n_head": 4, "n_query_groups": 2, "n_embd": 64, "intermediate_size": 160},
    **{"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "rotary_percentage": 1.0},
    **{"parallel_residual": False, "vocab_size": 300, "padding_multiple": 64},
}
IDX = torch.arange(128).view(2, 64)


def adapted(dropout: float = 0.0, **shape) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(Config(**{**LLAMA, "bias": False, **shape}))
    gpt.init_weights()
    apply_lora(gpt, LoRASettings(r=4, dropout=dropout))
    for name, parameter in gpt.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return gpt


def kept_by_linear_layers(gpt: GPT) -> dict[str, int]:
    """Bytes that each plain linear layer keeps for the backward pass next to its parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    kept: dict[str, int] = {}
    running: list[str] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if running and tensor.untyped_storage().data_ptr() not in parameters:
            kept[running[-1]] = kept.get(running[-1], 0) + tensor.nbytes
        return tensor

    for name, module in gpt.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":  # the loss runs the head forwards and backwards at once
            module.register_forward_pre_hook(lambda *args, name=name: running.append(name))
            module.register_forward_hook(lambda *args: running.pop() and None)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        NextTokenLoss(gpt)(IDX, IDX)
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_frozen_layers_keep_no_activation(dropout):
    assert kept_by_linear_layers(adapted(dropout)) == {}
    trained = adapted()
    trained.requires_grad_(True)
    assert len(kept_by_linear_layers(trained)) == 3 * 5  # with gradients of their own, all keep their inputs


def test_frozen_weights_get_no_gradient_and_cost_none():
    gpt = adapted()
    with FlopCounterMode(display=False) as forward:
        hidden = gpt.hidden_states(IDX)
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    assert {name for name, p in gpt.named_parameters() if p.grad is not None} == {
        name for name in gpt.state_dict() if "lora_" in name
    }
    # Gradients of inputs alone: no more than the forward pass, attention (whose backward is 2.5 times as much) apart.
    products, gradients = (sum_of(counter, "mm") for counter in (forward, backward))
    lora = 3 * 2 * 128 * 4 * (2 * 64 + 64 + 32)  # of 3 blocks: x A and, for queries and values, its product with B
    assert gradients <= products + lora


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": True}, {"bias": True}], ids=["plain", "tied", "bias"])
def test_mixed_precision_needs_no_second_copy_of_frozen_weights(shape):
    plain, stored = adapted(**shape), adapted(**shape)
    store_frozen_matrices(stored, "32-true")
    assert {p.dtype for p in stored.parameters()} == {torch.float32}
    store_frozen_matrices(stored, "bf16-mixed")
    loss, gradients, copies = mixed_precision_run(plain)
    other_loss, other_gradients, other_copies = mixed_precision_run(stored)
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
    assert copies >= 3 * 4  # fc_1, fc_2 and both projections of each block
    assert other_copies == 0
    assert stored.transformer.wte.weight.dtype == stored.transformer.ln_f.weight.dtype == torch.float32
    matrices = [p for name, p in stored.named_parameters() if "linear" in name or "mlp" in name]
    assert {p.dtype for p in matrices} == {torch.bfloat16}


def mixed_precision_run(gpt: GPT) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and how many tensors of a frozen weight's shape are kept next to the weights."""
    parameters = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    shapes = {layer.weight.T.shape for name, layer in gpt.named_modules() if name.endswith(("fc_1", "fc_2", "proj"))}
    copies: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape in shapes and tensor.untyped_storage().data_ptr() not in parameters:
            copies.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = NextTokenLoss(gpt)(IDX, IDX)
    loss.backward()
    return loss, {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}, len(copies)


def sum_of(counter: FlopCounterMode, operation: str) -> int:
    totals = counter.get_flop_counts()["Global"]
    return sum(flops for name, flops in totals.items() if str(name).endswith((f".{operation}", f".add{operation}")))
