"""What compiles a model's blocks for training: torch.compile, with its own code generator or another package's.

A package offers one under the name of an entry point of the group `torch_dynamo_backends`
(https://docs.pytorch.org/docs/stable/user_guide/torch_compiler/torch.compiler_custom_backends.html), as
`extensions/thunder` does: nothing here knows it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import torch

from litgpt.cli.suggest import did_you_mean
from litgpt.model import GPT

ENTRY_POINTS = "torch_dynamo_backends"
OWN = "torch"
INSTALL = {
    "thunder": "Lightning Thunder, which runs on PyTorch 2.12 or older. In an environment with that, install it from "
    "litgpt's source tree: pip install extensions/thunder"
}

Backend = str | Callable[..., Any]


def choose_compiler(compile: bool, compiler: str | None) -> Backend | None:
    """What `--compile` and `--compiler` mean: a backend of `torch.compile`; None for no compilation.

    Args:
        compile: Whether to compile; a compiler that is named means it, too.
        compiler: torch, the default, or the name of a backend that some package offers.

    Raises:
        ValueError: There is no such compiler, or it does not run here.
    """
    if compiler is None:
        return "inductor" if compile else None
    if compiler == OWN:
        return "inductor"
    offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if compiler not in offered:
        if compiler in INSTALL:
            raise ValueError(
                f"compiler={compiler} is not installed here (PyTorch {torch.__version__}). It needs "
                f"{INSTALL[compiler]}. Or choose compiler={OWN}."
            )
        known = list(dict.fromkeys([OWN, *INSTALL, *offered]))
        raise ValueError(
            f"compiler={compiler} is unknown.{did_you_mean(compiler, known)} Choose from: {', '.join(known)}."
        )
    try:
        return offered[compiler].load()
    except Exception as error:  # a package made for another torch fails in any way there is
        needs = f" It needs {INSTALL[compiler]}." if compiler in INSTALL else ""
        raise ValueError(
            f"compiler={compiler} cannot be loaded with PyTorch {torch.__version__} ({type(error).__name__}: "
            f"{error}).{needs} Or choose compiler={OWN}."
        ) from error


def compile_blocks(gpt: GPT, backend: Backend | None, say: Callable[[str], object] = lambda text: None) -> None:
    """Have a backend compile each block when it first runs; None compiles nothing. All names stay what they are.

    Args:
        gpt: The model.
        backend: What compiles.
        say: Is told what is compiled.
    """
    if backend is not None:
        by = f"torch.compile, {backend}" if isinstance(backend, str) else getattr(backend, "__name__", "its backend")
        say(f"Compiling the model's blocks ({by}): the first step waits for that, which can take minutes.")
        for block in gpt.transformer.h:
            block.compile(backend=backend)
