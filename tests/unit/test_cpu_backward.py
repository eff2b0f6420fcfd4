"""Backward passes of our own on a CPU: gradients as autograd has them, and where they are used."""

import pytest
import torch
import torch.nn.functional as F

from litgpt.config import Config
from litgpt.devices import cpu_backward
from litgpt.devices.cpu_backward import BLOCK, CausalAttention, suits_attention
from litgpt.model import GPT

SCALE = 0.3


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (part.repeat_interleave(q.size(2) // k.size(2), dim=2) for part in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) * SCALE
    scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("tokens", [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 44])
def test_attention_has_the_gradients_of_autograd(tokens, heads, groups, dtype):
    torch.manual_seed(0)
    sizes = [heads * 8, groups * 8, groups * 8]
    together = torch.randn(2, tokens, sum(sizes), dtype=dtype)
    weight = torch.randn(2, tokens, heads, 8, dtype=dtype)

    def outcome(attention, qkv: torch.Tensor) -> list[torch.Tensor]:
        qkv = qkv.clone().requires_grad_(True)
        y = attention(*(part.unflatten(-1, (-1, 8)) for part in qkv.split(sizes, dim=-1)))
        (y * weight.to(y.dtype)).sum().backward()
        return [y.detach().double(), qkv.grad.double()]

    found = outcome(lambda q, k, v: CausalAttention.apply(q, k, v, SCALE), together)
    for one, exact in zip(found, outcome(written_out, together.double()), strict=True):
        assert ((one - exact).norm() / exact.norm()).item() < (1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_what_16_bit_training_on_a_cpu_uses(packed, monkeypatch):
    """And the gradients are those of torch's own backward pass, to within the rounding of 16 bits."""
    config = Config(n_layer=2, n_embd=64, n_head=4, n_query_groups=2, vocab_size=50, block_size=64)
    torch.manual_seed(0)
    gpt, calls = GPT(config).to(torch.bfloat16), []
    idx = torch.randint(0, 50, (2, 40))
    documents = (torch.arange(40) // 13).expand(2, -1) if packed else None

    def gradients() -> torch.Tensor:
        gpt.zero_grad()
        F.cross_entropy(gpt(idx, document_ids=documents).flatten(0, 1).float(), idx.flatten()).backward()
        return torch.cat([p.grad.float().flatten() for p in gpt.transformer.h.parameters()])

    backward = CausalAttention.backward
    monkeypatch.setattr(CausalAttention, "backward", lambda *given: calls.append(given) or backward(*given))
    found = gradients()
    assert len(calls) == 2 * (8 if packed else 1)
    monkeypatch.setattr(cpu_backward, "suits_attention", lambda q, k: False)
    expected = gradients()
    assert ((found - expected).norm() / expected.norm()).item() < 0.02


def test_where_attention_does_not_suit():
    q, k = torch.randn(1, 5, 4, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(1, 5, 2, 8).bfloat16()
    assert suits_attention(q, k)
    assert not suits_attention(q.float(), k.float())
    assert not suits_attention(q, q)
    assert not suits_attention(q.detach(), k)
    with torch.no_grad():
        assert not suits_attention(q, k)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_has_the_gradients_of_autograd(dtype, trained):
    torch.manual_seed(0)
    x, gradient = torch.randn(3, 40, 65, dtype=dtype) * 5 + 2, torch.randn(3, 40, 65, dtype=dtype)
    weight = torch.randn(65, dtype=dtype)

    def outcome(norm, x: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        leaves = x.clone().requires_grad_(True), weight.clone().requires_grad_(trained)
        y = norm(*leaves)
        y.backward(gradient.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]

    found = outcome(lambda x, weight: cpu_backward.RMSNormFunction.apply(x, weight, 0.1), x, weight)
    exact = outcome(lambda x, weight: F.rms_norm(x, weight.shape, weight, 0.1), x.double(), weight.double())
    assert len(found) == 2 + trained
    for one, right in zip(found, exact, strict=True):
        assert one.dtype == dtype
        assert ((one.double() - right).norm() / right.norm()).item() < (0.005 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("config", [{}, {"norm_unit_offset": True}, {"norm_qk": True}])
def test_rms_norm_is_what_training_on_a_cpu_uses(config, monkeypatch):
    """And the gradients of a whole model are those of torch's own backward pass."""
    config = Config(n_layer=2, n_embd=32, n_head=4, norm_class_name="RMSNorm", vocab_size=50, block_size=64, **config)
    torch.manual_seed(0)
    gpt, calls = GPT(config), []
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3)
    idx = torch.randint(0, 50, (2, 40))

    def gradients() -> dict[str, torch.Tensor]:
        gpt.zero_grad()
        F.cross_entropy(gpt(idx).flatten(0, 1), idx.flatten()).backward()
        return {name: p.grad for name, p in gpt.named_parameters()}

    backward = cpu_backward.RMSNormFunction.backward
    monkeypatch.setattr(
        cpu_backward.RMSNormFunction, "backward", lambda *given: calls.append(given) or backward(*given)
    )
    found = gradients()
    assert len(calls) == sum(type(module).__name__ == "RMSNorm" for module in gpt.modules())
    monkeypatch.setattr(cpu_backward, "suits", lambda *tensors: False)
    for name, expected in gradients().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item() + 1e-8)
