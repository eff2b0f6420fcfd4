"""The chunked loss equals the plain one, in value and in every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt.adaptation.lora import LoRALinear, LoRASettings, apply_lora
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.training.loss import NextTokenLoss, summed_cross_entropy

SHAPE = {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 50, "padding_multiple": 64}


def plain_loss(gpt: GPT, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(gpt(idx).flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")


def gradients(gpt: GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in gpt.named_parameters()}


@pytest.mark.parametrize(
    "change", [{}, {"lm_head_bias": True}, {"final_logit_softcapping": 3.0}, {"tie_embeddings": True}]
)
@pytest.mark.parametrize("chunk_rows", [1, 7, 24, 1000])
def test_value_and_gradients_equal_the_plain_loss(change, chunk_rows):
    torch.manual_seed(0)
    gpt = GPT(Config(**SHAPE, **change))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    idx = torch.randint(0, 50, (2, 12))
    targets = torch.randint(0, 50, (2, 12))
    targets[0, :5] = -100
    targets[1, 7] = -100

    expected = plain_loss(gpt, idx, targets)
    (expected * 0.125).backward()
    wanted = gradients(gpt)
    gpt.zero_grad()
    loss = summed_cross_entropy(gpt.logits, gpt.hidden_states(idx), targets, gpt.lm_head.parameters(), chunk_rows)
    (loss * 0.125).backward()

    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients(gpt).items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
    with torch.no_grad():
        hidden = gpt.hidden_states(idx)
        evaluated = summed_cross_entropy(gpt.logits, hidden, targets, gpt.lm_head.parameters(), chunk_rows)
    torch.testing.assert_close(evaluated, expected.detach())


def test_frozen_head_and_nothing_to_predict():
    torch.manual_seed(0)
    gpt = GPT(Config(**SHAPE))
    gpt.lm_head.requires_grad_(False)
    idx = torch.randint(0, 50, (1, 8))
    loss = NextTokenLoss(gpt)(idx, torch.full((1, 8), -100))
    loss.backward()
    assert loss.item() == 0
    assert gpt.lm_head.weight.grad is None
    assert gpt.transformer.wte.weight.grad.count_nonzero() == 0


def adapted(head: bool, **settings) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(Config(**SHAPE))
    gpt.init_weights()
    apply_lora(gpt, LoRASettings(r=4, head=head, dropout=0.0, **settings))
    for name, parameter in gpt.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.5)
    return gpt


@pytest.mark.parametrize("settings", [{}, {"dora": True}])
@pytest.mark.parametrize("head", [False, True])
def test_an_adapted_model_with_its_head_frozen_or_adapted(head, settings):
    gpt = adapted(head, **settings)
    assert isinstance(gpt.lm_head, LoRALinear) == head
    idx, targets = torch.randint(0, 50, (2, 2, 12))
    plain_loss(gpt, idx, targets).backward()
    wanted = {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}
    gpt.zero_grad()
    summed_cross_entropy(gpt.logits, gpt.hidden_states(idx), targets, gpt.lm_head.parameters(), 5).backward()
    found = {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() == {name for name in gpt.state_dict() if "lora_" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


def test_a_frozen_head_is_neither_copied_nor_differentiated():
    """What the loss holds until the backward pass is one gradient of the hidden states, and nothing of the head's size."""
    gpt = adapted(head=False)
    hidden = gpt.hidden_states(torch.randint(0, 50, (2, 12)))
    targets = torch.randint(0, 50, (2, 12))
    loss = summed_cross_entropy(gpt.logits, hidden, targets, gpt.lm_head.parameters(), 5)
    assert [tuple(g.shape) for g in loss.grad_fn.gradients] == [(24, 16)]
    products = []
    for trained in (False, True):
        gpt.lm_head.requires_grad_(trained)
        with MatrixProducts() as counter:
            summed_cross_entropy(gpt.logits, hidden, targets, gpt.lm_head.parameters(), 24)
        products.append(counter.count)
    assert products == [2, 3]  # logits and the gradient of their input; that of the weight


class MatrixProducts(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_never_holds_all_logits(monkeypatch):
    """The largest logits that exist at a time have as many rows as a chunk; the chunks are of one size, nearly."""
    gpt = GPT(Config(**SHAPE))
    monkeypatch.setattr("litgpt.training.loss.CHUNK_ELEMENTS", {"cpu": 1})
    rows, head = [], gpt.logits
    monkeypatch.setattr(gpt, "logits", lambda x: rows.append(len(x)) or head(x))
    idx = torch.zeros(100, 16, dtype=torch.int64)
    NextTokenLoss(gpt)(idx, idx).backward()
    assert rows == [229] * 6 + [226]  # seven times 256 would be more than 1,600
    rows.clear()
    with torch.no_grad():
        NextTokenLoss(gpt)(idx, idx)
    assert max(rows) == 229


def test_bfloat16_loss_is_computed_in_float32():
    torch.manual_seed(0)
    gpt = GPT(Config(**SHAPE)).bfloat16()
    idx, targets = torch.randint(0, 50, (2, 16)), torch.randint(0, 50, (2, 16))
    loss = NextTokenLoss(gpt)(idx, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain_loss(gpt, idx, targets), rtol=1e-4, atol=1e-3)


def test_a_second_backward_is_an_error_not_a_wrong_gradient():
    gpt = GPT(Config(**SHAPE))
    idx = torch.zeros(1, 8, dtype=torch.int64)
    loss = NextTokenLoss(gpt)(idx, idx)
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()
