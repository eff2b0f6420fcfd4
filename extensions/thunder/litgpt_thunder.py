"""Lightning Thunder as a backend of `torch.compile`, under the name `thunder`.

`torch.compile` traces a function into a graph, and guards it; Thunder gets the graph, makes programs of the parts that
it knows, and has torch's own compiler do the rest. So what runs is as right as `torch.compile` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from thunder.dynamo import ThunderCompiler, utils
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module

# Thunder 0.2.6 takes functions with a backward pass of their own (LoRA's) as earlier versions of torch wrote them into
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
