"""Weights on their way from a checkpoint: what is left out, and how far they are."""

import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from litgpt.formats.rules import Named
from litgpt.sources.source import Source


def tell_note(source: Source) -> None:
    """Says on stderr what of a checkpoint is left out or changed by taking its plain weights, if anything is."""
    if source.note_on_plain:
        print(source.note_on_plain, file=sys.stderr)


class WeightProgress:
    """Wraps a stream of weights: a bar when it takes more than two seconds, or a line for each tensor."""

    def __init__(
        self, source: Source, verbose: bool = False, dtype: torch.dtype | None = None, title: str = "Converting"
    ) -> None:
        self.total = sum(tensor.numel() * tensor.dtype.itemsize for tensor in source.layout().values())
        self.verbose = verbose
        self.dtype = dtype
        self.title = title

    def __call__(self, weights: Iterator[Named]) -> Iterator[Named]:
        """The same stream, converted to `dtype` if one was given."""
        hidden = True if self.verbose else None  # None: hidden where stderr is no terminal
        with tqdm(total=self.total, desc=self.title, unit="B", unit_scale=True, delay=2, disable=hidden) as bar:
            last: tuple[Tensor, Tensor] | None = None
            for name, tensor in weights:
                if self.verbose:
                    print(f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
                if last is None or tensor is not last[0]:  # tied weights come as one, twice in a row, and stay one
                    last = tensor, tensor.to(self.dtype or tensor.dtype)
                yield name, last[1]
                bar.update(tensor.numel() * tensor.dtype.itemsize)
