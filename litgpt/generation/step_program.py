"""A model's step as a list of operations, which the kernels for CPUs do in one call, with any number of rows.

The list is made once per model, by walking through it. It holds the addresses of the weights, which may change in
place. What a model is made of decides whether there is one (`why_not`): other models run layer by layer.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from litgpt.kernels import native
from litgpt.kernels.native import TYPES, LayerState, Matrix, Operation, RingState, StepCall
from litgpt.kv_cache import KVCache, LayerCache
from litgpt.model import (
    CLAMPED_SWIGLU_ALPHA,
    GPT,
    Block,
    CausalSelfAttention,
    GemmaMLP,
    GptNeoxMLP,
    LLaMAMLP,
    LLaMAMoE,
    RMSNorm,
    positions_or_default,
    rotation_of,
    window_of,
)
from litgpt.quantization.block_weight import BlockWeight
from litgpt.quantization.layers import QuantizedLinear
from litgpt.quantization.weight_only import WeightOnly

T = TypeVar("T")
START, EMBED, NORM, PREPARE, LINEAR, ROTATE, ATTEND, MERGE = range(8)
NONE, SILU, GELU, GELU_TANH, CLAMPED = range(5)
# Tokens of a call: for more, torch's products layer by layer are the quicker ones.
MAX_TOKENS, MAX_PROMPT_TOKENS = 64, 32


def why_not(model: GPT) -> str | None:
    """Why the step of a model is not done by the kernels; None if it is."""
    if model.layer_cache is not LayerCache:
        return f"keys and values are kept in a {model.layer_cache.__name__}"
    if model.config.latent_attention is not None or model.config.mlp_class_name == "LLaMAMoE":
        return "multi-head latent attention and mixtures of experts run layer by layer"
    for module in model.modules():
        if _has_hooks(module):
            return "the model is spread over several devices"
        if isinstance(module, QuantizedLinear):
            if isinstance(module.quantized, BlockWeight):
                return "the blocks of a GGUF file run layer by layer"
            if not isinstance(module.quantized, WeightOnly):
                return "the weights are quantised by bitsandbytes"
            continue
        name = type(module).__module__
        if not name.startswith(("torch.nn.", "litgpt.model", "litgpt.quantization.weight_only")):
            return f"the model holds {type(module).__name__} modules. Merge them into the weights first"
    for parameter in model.parameters():
        if parameter.device.type != "cpu" or not parameter.is_contiguous():
            return "its weights are not all in this machine's memory, one after another"
        if parameter.is_floating_point() and parameter.dtype not in TYPES:
            return f"its weights are in {parameter.dtype}"
    return None


def _has_hooks(module: nn.Module) -> bool:
    """Whether something is to be done when a module is called, which the kernels would not do."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class StepProgram:
    """Decodes with a model, of which `why_not` says nothing.

    Args:
        model: In eval mode, with its weights, which may change in place but not be put elsewhere.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self._operations: Operations | None = None
        self._states: WeakKeyDictionary[KVCache, _State] = WeakKeyDictionary()
        self._modules = list(model.modules())
        rope = model.rope
        self._frequencies, self._magnitudes = rope.frequencies, torch.tensor(rope.magnitudes)

    def __call__(self, tokens: Tensor, positions: Tensor, *, cache: KVCache) -> Tensor:
        """(B, T) tokens at (B, T) positions, -1 for none -> (B, T, V) logits in float32, zeros where there is none."""
        library = native.library(wait=False)
        if library is None or not self.suits(tokens, cache):
            return self.model(tokens, positions, cache=cache)
        logits = torch.empty(*tokens.shape, self.model.config.padded_vocab_size)
        self._run(library, tokens, positions, cache, logits)
        return logits

    def hidden_states(self, tokens: Tensor, positions: Tensor | None, *, cache: KVCache) -> Tensor:
        """As `GPT.hidden_states`: (B, T) tokens -> (B, T, C); zeros where there is none."""
        library = native.library(wait=False)
        if library is None or tokens.numel() > MAX_PROMPT_TOKENS or not self.suits(tokens, cache):
            return self.model.hidden_states(tokens, positions, cache=cache)
        positions = positions_or_default(tokens, positions)
        operations = self._run(library, tokens, positions, cache, None)
        weight, present = self.model.transformer.wte.weight, positions.flatten() >= 0
        found = operations.hidden.values[: int(present.sum())]
        states = torch.zeros(tokens.numel(), found.size(1), dtype=weight.dtype)
        states[present] = found.to(weight.dtype)
        return states.view(*tokens.shape, -1)

    def _run(
        self, library: ctypes.CDLL, tokens: Tensor, positions: Tensor, cache: KVCache, logits: Tensor | None
    ) -> Operations:
        """Take tokens through the model: all of it, or without the head.

        Raises:
            IndexError: A token is not in the vocabulary; the kernels would read beside the embedding.
        """
        total = tokens.numel()
        smallest, largest = torch.aminmax(tokens.masked_fill(positions < 0, 0))
        if smallest < 0 or largest >= self.model.transformer.wte.weight.size(0):
            raise IndexError(f"A token of {smallest} to {largest} is not in the vocabulary.")
        operations = self._operations
        if operations is None or operations.rows < total:
            operations = self._operations = Operations(self.model, 1 << (total - 1).bit_length())
        state = self._state(cache, tokens.size(1))
        if cache.is_empty:
            for ring in cache.rings.values():
                ring.table[ring.rows[:, 0]] = -1
            cache.is_empty = False
        tokens, positions = tokens.contiguous(), positions.contiguous()
        call = state.call
        call.tokens, call.threads = total, torch.get_num_threads()
        call.ids, call.positions = tokens.data_ptr(), positions.data_ptr()
        call.logits = None if logits is None else logits.data_ptr()
        state.read_lengths(cache)
        count = len(operations.array) - (logits is None)  # the head comes last
        if library.litgpt_step(operations.array, count, ctypes.byref(call)):
            raise MemoryError(f"There is no memory for a step of {total} tokens.")
        return operations

    def suits(self, tokens: Tensor, cache: KVCache) -> bool:
        """Whether a call is one for the kernels."""
        batch, count = tokens.shape
        if not 0 < batch * count <= MAX_TOKENS or torch.is_autocast_enabled("cpu"):
            return False
        if any(map(_has_hooks, self._modules)):  # since then
            return False
        for window, ring in cache.rings.items():
            needed = 0 if window is None else count if cache.is_empty else window + count - 1
            if needed > ring.length:
                return False  # the last tokens would push out what the first ones see
        return cache.layers[0].tensors[0].dtype in TYPES

    def _state(self, cache: KVCache, count: int) -> _State:
        state = self._states.get(cache)
        if state is None or not state.is_of(cache, count):
            state = self._states[cache] = _State(cache, count, self.model, self._frequencies, self._magnitudes)
        return state


class _State:
    """Where a cache lies, and what else a call has to know of it."""

    def __init__(self, cache: KVCache, count: int, model: GPT, frequencies: Tensor, magnitudes: Tensor) -> None:
        config = model.config
        self.count, self.kept = count, [tensor for layer in cache.layers for tensor in layer.tensors]
        order = list(cache.rings)
        self.rings = (RingState * len(order))()
        for state, (window, ring) in zip(self.rings, cache.rings.items(), strict=True):
            state.table, state.slots, state.length = ring.table.data_ptr(), ring.table.size(1), ring.length
            state.window = window or 0
        self.layers = (LayerState * len(cache.layers))()
        for number, (state, layer) in enumerate(zip(self.layers, cache.layers, strict=True)):
            keys, values = layer.tensors
            state.keys, state.values, state.type = keys.data_ptr(), values.data_ptr(), TYPES[keys.dtype]
            state.ring = order.index(window_of(config, number))
        rows = next(iter(cache.rings.values())).rows[:, 0]
        self.rows = rows.repeat_interleave(count)
        self.lengths = cache.lengths[:, 0].repeat_interleave(count)
        self.call = StepCall(rings=len(order), layers=len(cache.layers), rows=self.rows.data_ptr())
        self.call.lengths = self.lengths.data_ptr()
        self.call.ring, self.call.layer = ctypes.addressof(self.rings), ctypes.addressof(self.layers)
        self.call.logits_stride = config.padded_vocab_size
        self.call.frequencies, self.call.magnitudes = frequencies.data_ptr(), magnitudes.data_ptr()
        self.call.tables, self.call.pairs = frequencies.shape
        stretch = config.rope_adjustments or {}
        self.call.long_from = stretch["original_max_seq_len"] if config.rope_kind == "longrope" else -1
        self.call.query_beta = stretch.get("llama_4_scaling_beta") or 0.0
        self.call.query_period = stretch.get("original_max_seq_len") or 1.0

    def is_of(self, cache: KVCache, count: int) -> bool:
        """Whether the cache lies where it did."""
        return count == self.count and self.kept[-1] is cache.layers[-1].tensors[-1]

    def read_lengths(self, cache: KVCache) -> None:
        """Note how far the cache is to be read, and how long its rows get."""
        for state, ring in zip(self.rings, cache.rings.values(), strict=True):
            state.read_length = ring.table.size(1) if ring.read_length is None else ring.read_length
        if self.call.long_from >= 0:
            self.lengths.copy_(cache.lengths[:, 0].repeat_interleave(self.count))


@dataclass
class _Buffer:
    """Numbers of each token, (rows, width), and in which forms they lie prepared for a weight."""

    values: Tensor
    producer: Operation | None = None
    forms: dict[tuple[int, int, bool], Tensor] = field(default_factory=dict)


class Operations:
    """The list for a model.

    Args:
        model: The model.
        rows: For so many tokens at a time.
    """

    def __init__(self, model: GPT, rows: int) -> None:
        self.rows = rows
        self._model, self._config = model, model.config
        self._kept: list[object] = []  # what has addresses in the list
        self._list: list[Operation] = []
        self._exact = next(model.transformer.ln_f.parameters(), torch.empty(0)).dtype == torch.float32
        width, heads = self._config.n_embd, self._config.n_head * self._config.head_size
        self._add(START)
        self._residual, self._next = self._buffer(width), self._buffer(width)
        self._normed, self._between = (self._buffer(width), self._buffer(width)), self._buffer(width)
        self._attended = self._buffer(heads)
        self._embed()
        for layer, block in enumerate(model.transformer.h):
            self._block(layer, block)
        self.hidden = self._norm(model.transformer.ln_f, self._residual, self._normed[0])
        cap = self._config.final_logit_softcapping or 0
        scale = 1 / self._config.logits_scaling
        self._linear(
            model.lm_head, self.hidden, self._buffer(self._config.padded_vocab_size), flag=1, scale=scale, cap=cap
        )
        self.array = (Operation * len(self._list))(*self._list)

    # -- the parts of a model

    def _embed(self) -> None:
        config = self._config
        scale = math.sqrt(config.n_embd) if config.scale_embeddings else config.embedding_multiplier
        weight = self._model.transformer.wte.weight
        table = self._keep(Matrix(TYPES[weight.dtype], 0, *weight.shape, weight.data_ptr()))
        self._add(EMBED, y=self._residual, m=ctypes.addressof(table), factor=scale)

    def _block(self, layer: int, block: Block) -> None:
        attention, multiplier = block.attn, block.multiplier
        assert isinstance(attention, CausalSelfAttention)
        before = self._residual
        normed = self._norm(block.norm_1, before, self._normed[0])
        mlp_input = normed
        if block.parallel and not block.shared_norm:
            mlp_input = self._norm(block.norm_2, before, self._normed[1])
        attended = self._attend(layer, attention, normed)
        self._write(attention.proj, block.post_attention_norm, attended, multiplier)
        if not block.parallel:
            mlp_input = self._norm(block.norm_2, self._residual, self._normed[1])
        assert not isinstance(block.mlp, LLaMAMoE)  # `why_not` says so
        self._write(block.mlp.proj, block.post_mlp_norm, self._mlp(block.mlp, mlp_input), multiplier)

    def _write(self, linear: nn.Linear | QuantizedLinear, norm: nn.Module, x: _Buffer, factor: float) -> None:
        """Add what comes out of a linear layer, and of the norm after it, to the residual stream."""
        if isinstance(norm, nn.Identity):
            self._linear(linear, x, self._next, residual=self._residual, factor=factor)
        else:
            self._linear(linear, x, self._between)
            self._norm(norm, self._between, self._next, residual=self._residual, factor=factor)
        self._residual, self._next = self._next, self._residual

    def _attend(self, layer: int, attention: CausalSelfAttention, x: _Buffer) -> _Buffer:
        heads, groups, _ = attention.sizes
        size = attention.head_size
        qkv = self._buffer((heads + 2 * groups) * size)
        self._linear(attention.qkv, x, qkv, clip=attention.clip or 0)
        for norm, first, count in ((attention.norm_q, 0, heads), (attention.norm_k, heads, groups)):
            if norm is not None:
                part = _Buffer(qkv.values[:, first * size : (first + count) * size])
                self._norm(norm, part, part, count=1 if attention.norm_all_heads else count)
        rotation = rotation_of(self._config, layer) if self._config.rope_n_elem else -1
        shape = {"count": heads, "width": size, "layer": layer, "groups": groups}
        self._add(ROTATE, x=qkv, **shape, rotation=rotation, flag=int(attention.interleave))
        self._add(ATTEND, x=qkv, **shape, scale=attention.scale, cap=attention.softcap or 0)
        merge = self._add(MERGE, y=self._attended, **shape)
        if attention.sinks is not None:
            merge.weight, merge.weight_type = attention.sinks.data_ptr(), TYPES[attention.sinks.dtype]
        return self._attended

    def _mlp(self, mlp: GptNeoxMLP | LLaMAMLP, x: _Buffer) -> _Buffer:
        if isinstance(mlp, GptNeoxMLP):
            hidden = self._buffer(_shape(mlp.fc)[0])
            self._linear(mlp.fc, x, hidden, activation=_gelu(mlp))
            return hidden
        hidden, other = self._buffer(_shape(mlp.fc_1)[0]), self._buffer(_shape(mlp.fc_1)[0])
        settings = {"activation": SILU}
        if isinstance(mlp, GemmaMLP):
            settings = {"activation": _gelu(mlp)}
        elif mlp.limit is not None:
            settings = {"activation": CLAMPED, "scale": mlp.limit, "cap": CLAMPED_SWIGLU_ALPHA}
        gated = self._matrix(mlp.fc_2)
        bias = mlp.fc_2.bias
        self._linear(
            mlp.fc_1,
            x,
            hidden,
            gated=ctypes.addressof(gated),
            gated_bias=None if bias is None else bias.data_ptr(),
            other=other.values.data_ptr(),
            other_stride=other.values.stride(0),
            **settings,
        )
        return hidden

    # -- operations

    def _norm(self, norm: nn.Module, x: _Buffer, y: _Buffer, count: int = 1, **settings: Any) -> _Buffer:
        if isinstance(norm, nn.Identity):
            return x
        assert isinstance(norm, (RMSNorm, nn.LayerNorm))
        is_rms = isinstance(norm, RMSNorm)
        operation = self._add(
            NORM,
            x=x,
            y=y,
            count=count,
            width=x.values.size(1) // count,
            epsilon=norm.eps,
            offset=float(is_rms and norm.unit_offset),
            flag=int(not is_rms),
            **settings,
        )
        if norm.weight is not None:
            operation.weight, operation.weight_type = norm.weight.data_ptr(), TYPES[norm.weight.dtype]
        if not is_rms and norm.bias is not None:
            operation.bias = norm.bias.data_ptr()
        return y

    def _linear(self, linear: nn.Linear | QuantizedLinear, x: _Buffer, y: _Buffer, **settings: Any) -> None:
        matrix = self._matrix(linear)
        # The form in which inputs are prepared depends on these (matrix.h).
        form = matrix.type, matrix.in_, matrix.out % 32 == 0
        if form not in x.forms:
            library = native.library()
            assert library is not None
            size = library.litgpt_prepared_bytes(ctypes.byref(matrix), self.rows)
            room = x.forms[form] = torch.empty(size + 64, dtype=torch.uint8)
            producer = x.producer
            if producer is None or producer.kind not in (NORM, MERGE) or producer.m:
                producer = self._add(PREPARE, x=x)
            producer.m = ctypes.addressof(matrix)
            producer.prepared = room.data_ptr() + -room.data_ptr() % 64
            self._kept.append(room)
        room = x.forms[form]
        operation = self._add(LINEAR, x=x, y=y, m=ctypes.addressof(matrix), **settings)
        operation.prepared = room.data_ptr() + -room.data_ptr() % 64
        if linear.bias is not None:
            operation.bias, operation.weight_type = linear.bias.data_ptr(), TYPES[linear.bias.dtype]

    def _matrix(self, linear: nn.Linear | QuantizedLinear) -> Matrix:
        if isinstance(linear, QuantizedLinear):
            assert isinstance(linear.quantized, WeightOnly)
            return self._keep(linear.quantized.matrix())
        weight = linear.weight
        return self._keep(Matrix(TYPES[weight.dtype], 0, *weight.shape, weight.data_ptr(), exact=int(self._exact)))

    def _add(
        self,
        kind: int,
        *,
        x: _Buffer | None = None,
        y: _Buffer | None = None,
        residual: _Buffer | None = None,
        **fields: object,
    ) -> Operation:
        operation = self._keep(Operation(kind=kind, factor=fields.pop("factor", 1.0), **fields))
        if x is not None:
            operation.x, operation.x_stride = x.values.data_ptr(), x.values.stride(0)
        if y is not None:
            operation.y, operation.y_stride = y.values.data_ptr(), y.values.stride(0)
            y.producer, y.forms = operation, {}
        if residual is not None:
            operation.residual, operation.residual_stride = residual.values.data_ptr(), residual.values.stride(0)
        self._list.append(operation)
        return operation

    def _buffer(self, width: int) -> _Buffer:
        stride = -(-width // 16) * 16
        return _Buffer(self._keep(torch.zeros(self.rows, stride))[:, :width])

    def _keep(self, thing: T) -> T:
        self._kept.append(thing)
        return thing


def _gelu(mlp: GptNeoxMLP | LLaMAMLP) -> int:
    return GELU_TANH if mlp.approximate == "tanh" else GELU


def _shape(linear: nn.Linear | QuantizedLinear) -> tuple[int, int]:
    return linear.out_features, linear.in_features
