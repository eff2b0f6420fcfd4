"""Lightning Thunder as a backend of `torch.compile`, under the name `thunder`.

`torch.compile` traces a function into a graph, and guards it; Thunder gets the graph, makes programs of the parts that
it knows, and has torch's own compiler do the rest. What of a GPT's blocks Thunder 0.2.6 does not know is added here:
RMSNorm, and attention with groups of heads. So a block is one program of Thunder's, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import thunder.torch as ltorch
import torch
import torch.nn.functional as F
from thunder.core.jit_ext import (
    ensure_recursive_proxies,
    interpreter_needs_wrap,
    record_source_loc_in_symbol_header,
    register_general_jit_lookaside,
)
from thunder.dynamo import ThunderCompiler, utils
from thunder.torch import torchsymbol
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module


@torchsymbol(torch.rms_norm, F.rms_norm, id="litgpt.rms_norm")
def rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    """`torch.nn.functional.rms_norm` over the last dimension, in float32 and back: (..., C) -> (..., C)."""
    if len(normalized_shape) != 1:
        raise NotImplementedError("rms_norm over more than the last dimension")
    x32 = ltorch.to(x, torch.float32)
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    y = x32 * ltorch.rsqrt(ltorch.mean(x32 * x32, -1, keepdim=True) + eps)
    return ltorch.to(y if weight is None else y * weight, x.dtype)


@torchsymbol(F.scaled_dot_product_attention, id="litgpt.scaled_dot_product_attention")
def scaled_dot_product_attention(q: Any, k: Any, v: Any, *args: Any, enable_gqa: bool = False, **options: Any) -> Any:
    """Thunder's own, and with `enable_gqa`: q (B, H, T, D), k and v (B, G, S, D), each of them for H / G heads."""
    if enable_gqa and k.shape[1] != q.shape[1]:
        k, v = (_for_each_head(tensor, q.shape[1]) for tensor in (k, v))
    return ltorch.scaled_dot_product_attention(q, k, v, *args, **options)


def _for_each_head(x: Any, heads: int) -> Any:
    batch, groups, tokens, width = x.shape
    x = ltorch.expand(ltorch.unsqueeze(x, 2), (batch, groups, heads // groups, tokens, width))
    return ltorch.reshape(x, (batch, heads, tokens, width))


# Thunder's interpreter took its table of torch's functions when it was imported.
for function, symbol in (
    (torch.rms_norm, rms_norm),
    (F.rms_norm, rms_norm),
    (F.scaled_dot_product_attention, scaled_dot_product_attention),
):
    register_general_jit_lookaside(function)(
        ensure_recursive_proxies(interpreter_needs_wrap(record_source_loc_in_symbol_header(symbol)))
    )

# Thunder takes functions with a backward pass of their own (LoRA's) as earlier versions of torch wrote them into
# graphs, and fails on the arguments that torch 2.12 gives them. Named here, they are torch's to compile.
utils.UNSUPPORTED_THUNDER_FUNCTION = (
    *utils.UNSUPPORTED_THUNDER_FUNCTION,
    torch.ops.higher_order.autograd_function_apply,
)


def thunder(graph: fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
    """The graph, compiled.

    Args:
        graph: What `torch.compile` has traced.
        example_inputs: The inputs that it has traced it with.
    """
    # A graph writes its Python code when it first runs, and Thunder, which interprets that run instruction by
    # instruction, would go through the writing, too, and fail in it. So it is written now.
    _LazyGraphModule.force_recompile(graph)
    with _use_lazy_graph_module(False):  # for the parts into which Thunder splits the graph
        return compiler()(graph, example_inputs)


@cache
def compiler() -> ThunderCompiler:
    """One for all graphs of the process; its `subgraph_infos` tell what was split off, and why."""
    return ThunderCompiler()
