"""Backward passes for training on a CPU: of causal attention and of RMSNorm, where torch's own take twice as long.

torch's attention is slow in 16 bits where query heads share keys. Forward and back, in milliseconds on 2 threads:

    H, G, D      T = 64           128              300              512              1,024
    9, 3, 64     1.6 -> 1.0       4.8 -> 1.5       5.8 -> 4.5       12.3 -> 8.0      30.5 -> 23.5
    32, 8, 128   4.1 -> 2.1       10.2 -> 3.9      24.7 -> 13.5     47.7 -> 33.2

Letters: B batch, T tokens, H query heads, G key/value heads, R = H / G, D head size, n queries of a block.

Its RMSNorm is ten kernels there, which keep their results. 512 rows of 576 take 1.4 -> 0.8 in bfloat16, 0.9 -> 0.5 in
float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries at a time: the scores of one head stay in a core's cache, and half of them are not computed


def suits(*tensors: Tensor) -> bool:
    """Whether a gradient is wanted of any, on a CPU, and nothing is compiled."""
    if tensors[0].device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return any(tensor.requires_grad for tensor in tensors)


def suits_attention(q: Tensor, k: Tensor) -> bool:
    """Whether queries (B, T, H, D) and keys (B, T, G, D) are better served by `CausalAttention`."""
    return q.element_size() == 2 and q.size(2) != k.size(2) and suits(q, k)


class CausalAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v, token t seeing the tokens 0..t: q (B, T, H, D), k and v (B, T, G, D) -> (B, T, H, D).

    The backward pass computes the scores again, a block of queries with the keys up to its last one at a time; it holds
    q, k and v only.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        queries, keys, values = (part.transpose(1, 2) for part in (q, k, v))
        grouped = q.size(2) != k.size(2)
        y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return _attention_gradients(ctx, *grad_outputs)


@once_differentiable
def _attention_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v = ctx.saved_tensors
    grad_q = torch.empty_like(q)
    keys, values = _by_group(k, k.size(2)), _by_group(v, k.size(2))  # (B * G, T, D)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    for start in range(0, q.size(1), BLOCK):
        block = slice(start, start + BLOCK)
        queries = _by_group(q[:, block] * ctx.scale, k.size(2))  # (B * G, R * n, D), a head's n rows together
        grad_y = _by_group(grad_output[:, block], k.size(2))
        n = min(BLOCK, q.size(1) - start)
        seen = slice(0, start + n)
        scores = queries @ keys[:, seen].transpose(1, 2)  # (B * G, R * n, start + n)
        mask = torch.full((n, n), float("-inf"), dtype=scores.dtype).triu_(1)
        scores.unflatten(1, (-1, n))[..., start:].add_(mask)
        weights = scores.softmax(dim=-1)
        grad_values[:, seen] += weights.transpose(1, 2) @ grad_y
        grad_weights = torch.matmul(grad_y, values[:, seen].transpose(1, 2), out=scores)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_keys[:, seen] += grad_scores.transpose(1, 2) @ queries
        rows = (grad_scores @ keys[:, seen]).mul_(ctx.scale)
        grad_q[:, block] = rows.view(q.size(0), q.size(2), n, -1).transpose(1, 2)
    grad_k, grad_v = (part.unflatten(0, (k.size(0), -1)).transpose(1, 2) for part in (grad_keys, grad_values))
    return grad_q, grad_k, grad_v, None


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, n, heads, D) -> (B * G, heads / G * n, D)."""
    return x.transpose(1, 2).reshape(x.size(0) * groups, -1, x.size(3))


class RMSNormFunction(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight: (..., C) and (C,) of the same type -> (..., C). It holds x, and a float for
    each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_()
        factor = square.div_(x.size(-1)).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, factor)
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return _norm_gradients(ctx, *grad_outputs)


@once_differentiable
def _norm_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None]:
    x, weight, factor = ctx.saved_tensors
    width = weight.numel()
    # LayerNorm's kernel, for a mean of zero. It takes away what goes through the mean: that is put back.
    nothing, only_x = torch.zeros_like(factor), [True, False, False]
    grad_x, *_ = torch.ops.aten.native_layer_norm_backward(
        grad_output, x, [width], nothing, factor, weight.to(factor.dtype), None, only_x
    )
    grad_x += (grad_output @ weight)[..., None] * factor / width
    grad_weight = None
    if ctx.needs_input_grad[1]:
        grad_weight = (grad_output * (x * factor)).flatten(0, -2).sum(dim=0, dtype=factor.dtype).to(weight.dtype)
    return grad_x, grad_weight, None
