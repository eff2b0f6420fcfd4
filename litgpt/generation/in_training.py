"""Answers of a model in the middle of its training, which goes on as if none had been given."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from tqdm import tqdm

from litgpt.generation.engine import Engine
from litgpt.generation.request import Request
from litgpt.model import GPT
from litgpt.parallel.sharding import whole_parameters


def complete_in_training(
    gpt: GPT,
    requests: Sequence[Request],
    *,
    within: nn.Module | None = None,
    autocast: torch.dtype | None = None,
    progress: str | None = None,
) -> list[list[int]]:
    """The answers to some requests by the model as it is now; the keys and values are freed afterwards.

    Args:
        gpt: The model.
        requests: What to answer.
        within: The module that is trained, where the model is only a part of it. Where it is sharded, every rank must
            call this, each with requests of its own, or with none; meanwhile each device holds all weights.
        autocast: The dtype to compute in where the weights are kept in another.
        progress: What to call the progress bar, shown from two seconds on; None for no bar.

    Returns:
        The token ids of each answer.
    """
    module = gpt if within is None else within
    answers: list[list[int]] = [[] for _ in requests]
    with whole_parameters(module), _evaluating(module), torch.random.fork_rng(devices=[]):
        if not requests:
            return answers
        engine = Engine(gpt, autocast=autocast)
        with tqdm(total=len(requests), desc=progress, delay=2, disable=None if progress else True, leave=False) as bar:
            for output in engine.generate(requests):
                answers[output.request] += output.token_ids
                bar.update(output.finish_reason is not None)
    return answers


@contextmanager
def _evaluating(module: nn.Module) -> Generator[None, None, None]:
    """In evaluation mode, and not compiled: each new length of the cache would be compiled for, until the limit is
    reached and training is no longer compiled either."""
    training = [part for part in module.modules() if part.training]
    compiled = any(part._compiled_call_impl is not None for part in module.modules())
    module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for part in training:
            part.training = True
