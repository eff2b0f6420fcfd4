"""What a model's tensors take in training and in answering, counted on one block of each kind.

The model's own code runs on tensors without values (`litgpt.runs.live_memory`): `GPT.hidden_states`, the blocks, the
loss and the backward pass, with whatever LoRA, adapters or quantised layers have made of them. Of blocks that are
alike, the first is run and stands for the others.

Letters as in `litgpt.model`: B batch, T tokens, C width, S keys, N = B * T rows.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt.generation.engine import PREFILL_CHUNK
from litgpt.generation.kv_cache_manager import limit_attention
from litgpt.kv_cache import AttentionPlan, LayerCache
from litgpt.model import GPT, Block, Rotation
from litgpt.quantization.layers import QuantizedLinear
from litgpt.runs.live_memory import LiveMemory, PretendedDevice
from litgpt.training.activation_checkpointing import checkpointed_blocks
from litgpt.training.loss import even_rows, rows_per_chunk, summed_cross_entropy

M = TypeVar("M", bound=nn.Module)


class StepMemory(NamedTuple):
    """Bytes of tensors beside weights, their gradients and the optimizer's state."""

    activations: int
    """Held between forward and backward pass."""
    working: int
    """The most beyond these at any time."""


def training_memory(
    model: GPT, batch_size: int, context: int, device: str, compute: torch.dtype | None, checkpointed: str | int
) -> StepMemory:
    """What one micro-batch needs while the gradients of earlier ones are there.

    Args:
        model: As it is trained, on any device; it stays as it is.
        batch_size: B.
        context: T.
        device: The kind of device.
        compute: The type that autocast computes in, if it does.
        checkpointed: The blocks of which only the input is kept: none, full, or N for every N-th.
    """
    memory, pretended = LiveMemory(), PretendedDevice(device, compute)
    blocks = _Blocks(model, memory, pretended, {id(block) for block in checkpointed_blocks(model, checkpointed)})
    gpt = blocks.gpt.train()
    with torch.enable_grad(), pretended, memory:
        idx = torch.zeros(batch_size, context, dtype=torch.int64)
        with pretended.autocast():
            with memory.measured() as forward:
                hidden = gpt.hidden_states(idx)
            of_kinds = (kind.held + kind.y.nbytes for kind in blocks.kinds.values() if kind.y is not None)
            once = forward.held - hidden.nbytes - sum(of_kinds)
            loss = _loss_memory(memory, gpt, hidden)
        activations = once + sum(kind.kept for kind in blocks.calls)
        casts = sum(kind.casts for kind in blocks.calls)
        peaks = [activations + casts + loss, once + blocks.embedding]
        size = hidden.nbytes
        with memory.measured() as norm:
            if hidden.requires_grad:
                torch.autograd.backward(hidden, torch.empty_like(hidden))
            del hidden
        below = once + norm.held + size  # what the last norm held is gone when the last block's turn comes
        backward = {id(kind): _backward_memory(memory, kind) for kind in blocks.kinds.values()}
        casts = 0
        for kind in blocks.calls:
            peaks += [below + casts + kind.forward, below + max(backward[id(kind)], kind.recomputed)]
            below, casts = below + kind.kept, casts + kind.casts
    return StepMemory(activations, max(peaks) - activations)


def inference_memory(model: GPT, batch_size: int, context: int, device: str, compute: torch.dtype | None) -> int:
    """The most bytes beside weights and cache: while the last chunk of prompts is prefilled that fill the context, or
    the last token of all of them is decoded.

    Args:
        model: As it answers, on any device; it stays as it is.
        batch_size: B, the sequences that are in the cache.
        context: S, the tokens of each.
        device: The kind of device.
        compute: The type that autocast computes in, if it does.
    """
    memory, pretended = LiveMemory(), PretendedDevice(device, compute)
    blocks = _Blocks(model, memory, pretended, set())
    gpt = blocks.gpt.eval()
    dtype = compute or model.transformer.wte.weight.dtype
    with torch.no_grad(), pretended, memory:
        cache = model.new_cache(batch_size, context, device=torch.device(device), dtype=dtype)
        limit_attention(cache, context)
        width = min(PREFILL_CHUNK, context)
        with memory.measured() as calls:
            for rows, tokens in ((min(batch_size, PREFILL_CHUNK // width), width), (batch_size, 1)):
                first = context - tokens
                chosen = slice(rows) if rows in (1, batch_size) and tokens == 1 else torch.arange(rows)
                positions = torch.arange(first, context).expand(rows, -1) if first else None
                part = cache.select(chosen, is_empty=not first)
                with pretended.autocast():
                    gpt.hidden_states(torch.zeros(rows, tokens, dtype=torch.int64), positions, cache=part)
                blocks.calls.clear()
    return calls.peak


# --- blocks ----------------------------------------------------------------------------------------------------------


@dataclass
class _Kind:
    """What one block of a kind takes, in bytes beyond what is there before its forward pass, without its output."""

    y: Tensor | None
    """(B, T, C) the output, where it has a graph."""
    held: int
    """What the graph holds."""
    kept: int
    """The same, or the input alone where the rest is computed again."""
    forward: int
    """The most in the forward pass."""
    recomputed: int
    """The most while it is computed again."""
    casts: int
    """What autocast keeps besides until the end of the forward pass."""


class _Blocks:
    """The copies without values that stand for a model's blocks.

    Attributes:
        gpt: The model without values, whose blocks are counted as they are called.
        kinds: What blocks take, by what is alike.
        calls: The same for every block in turn.
        embedding: What the embedding's backward pass takes.
    """

    def __init__(self, model: GPT, memory: LiveMemory, pretended: PretendedDevice, checkpointed: set[int]) -> None:
        self.memory, self.pretended = memory, pretended
        self.kinds: dict[Hashable, _Kind] = {}
        self.calls: list[_Kind] = []
        self.embedding = 0
        copies: dict[Hashable, Block] = {}
        memo: dict[int, Any] = {id(model.config): model.config}
        within: set[int] = set()
        for block in model.transformer.h:
            form = _form(block)
            if form not in copies:
                copies[form] = _without_values(block, memory, {}, _tensors(block))
            memo[id(block)] = _CountedBlock(copies[form], self, id(block) in checkpointed)
            within.update(map(id, _tensors(block)))
        self.gpt = _without_values(model, memory, memo, (t for t in _tensors(model) if id(t) not in within))

    def call(self, block: Block, again: bool, x: Tensor, *others: Any) -> Tensor:
        """(B, T, C) -> the same, by a block or one that is like it."""
        if not self.calls and x.requires_grad and x.grad_fn is not None:
            self.embedding = _backward_peak(self.memory, x)
        shared = tuple(id(other.ring if isinstance(other, LayerCache) else other) for other in others)
        key = (id(block), shared, x.requires_grad, again)
        if key not in self.kinds:
            self.kinds[key] = self._measure(block, again, x, *others)
        kind = self.kinds[key]
        self.memory.reach(sum(earlier.casts for earlier in self.calls) + kind.forward)
        self.calls.append(kind)
        return torch.empty_like(x).requires_grad_(kind.y is not None)

    def _measure(self, block: Block, again: bool, x: Tensor, *others: Any) -> _Kind:
        with self.memory.measured() as forward:
            if torch.is_grad_enabled():  # an input of its own, which is no leaf
                x = torch.empty(1, 1, 1, dtype=x.dtype).requires_grad_(x.requires_grad).expand(x.shape).clone()
            size = x.nbytes
            y = block(x, *others)
            del x
            casts = self.pretended.cast_bytes
        self.pretended.clear_casts()  # or another block with the same copy would not make its own
        held = forward.held - y.nbytes
        return _Kind(
            y if y.requires_grad else None,
            held,
            size if again and held else held,
            forward.peak,
            forward.peak if again else 0,
            casts if again or not torch.is_grad_enabled() else 0,  # otherwise the graph holds them
        )


class _CountedBlock(nn.Module):
    """Stands where a block stands."""

    def __init__(self, block: Block, blocks: _Blocks, again: bool) -> None:
        super().__init__()
        self._call = partial(blocks.call, block, again)

    def forward(
        self, x: Tensor, rotation: Rotation | None, plan: AttentionPlan, cache: LayerCache | None = None
    ) -> Tensor:
        return self._call(x, rotation, plan, cache)


def _backward_memory(memory: LiveMemory, kind: _Kind) -> int:
    """The most in a block's backward pass, beyond what was there before its forward pass; it frees the graph."""
    return 0 if kind.y is None else kind.held + _backward_peak(memory, kind.y)


def _backward_peak(memory: LiveMemory, y: Tensor) -> int:
    with memory.measured() as backward:
        torch.autograd.backward(y, torch.empty_like(y))
    return backward.peak


def _loss_memory(memory: LiveMemory, gpt: GPT, hidden: Tensor) -> int:
    """The most that the loss of (B, T, C) hidden states takes, with these. Of chunks of rows, all are alike from the
    first one on, or from the second, where the gradients of the head's weights are added up."""
    rows = hidden.shape[:-1].numel()
    vocabulary = gpt.config.padded_vocab_size
    chunk = even_rows(rows, rows_per_chunk(hidden.device.type, vocabulary))
    head = list(gpt.lm_head.parameters())
    some = min(rows, chunk * (1 + any(p.requires_grad for p in head)))
    with memory.measured() as step:
        x = hidden.new_empty(1, some, hidden.size(-1)).requires_grad_(hidden.requires_grad)
        targets = torch.zeros(1, some, dtype=torch.int64)
        loss = summed_cross_entropy(gpt.logits, x, targets, head, chunk)
        if loss.requires_grad:
            torch.autograd.backward(loss)
    others = (rows - some) * hidden.size(-1) * hidden.itemsize  # whose gradients are held, too
    return step.peak - x.nbytes + hidden.nbytes + others


# --- copies without values -------------------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return chain(module.parameters(), module.buffers())


def _form(module: nn.Module) -> Hashable:
    """Equal for modules that compute alike."""
    types = tuple((name, type(part)) for name, part in module.named_modules())
    return types, tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in module.named_parameters())


def _without_values(module: M, memory: LiveMemory, memo: dict[int, Any], tensors: Iterable[Tensor]) -> M:
    """A copy whose `tensors` have no values, with gradients where they are trained; they are not counted."""
    memo = memo | {id(tensor): _valueless(tensor, memory) for tensor in tensors}
    for part in module.modules():
        if isinstance(part, QuantizedLinear):  # whose kernels would read memory that is not there
            memo[id(part.quantized)] = _Dequantized(part)
    copied = copy.deepcopy(module, memo)
    vars(copied).pop("forward", None)  # which activation checkpointing put there
    return copied


def _valueless(tensor: Tensor, memory: LiveMemory) -> Tensor:
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    memory.ignore(new)
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
        if tensor.requires_grad:
            new.grad = torch.empty_like(new)
            memory.ignore(new.grad)
    return new


class _Dequantized(nn.Module):
    """A quantised weight, taken to be there as a whole matrix for each product, as it is with bitsandbytes."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.shape = layer.out_features, layer.in_features

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """(out, in)."""
        return torch.empty(self.shape, dtype=dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.dequantised(x.dtype))
