"""What the conversion commands share: names of data types, and showing progress."""

import sys
from collections.abc import Iterator

import torch
from tqdm import tqdm

from litgpt.convert.source import Named, Source
from litgpt.suggest import did_you_mean

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_ALIASES = {
    "fp32": "float32",
    "32-true": "float32",
    "fp16": "float16",
    "16-true": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "bf16-true": "bfloat16",
    "16-mixed": "float32",  # these train weights in float32
    "bf16-mixed": "float32",
    "64-true": "float64",
}


def dtype_from_name(name: str | None, option: str = "--dtype") -> torch.dtype | None:
    """`bfloat16`, `bf16` or `bf16-true` -> torch.bfloat16. Raises `ValueError` for a name that is none."""
    if name is None:
        return None
    name = name.removeprefix("torch.")
    dtype = DTYPES.get(_ALIASES.get(name, name))
    if dtype is None:
        hint = did_you_mean(name, [*DTYPES, *_ALIASES])
        raise ValueError(f"{option} {name}: there is no such type of weights.{hint} Choose {', '.join(DTYPES)}.")
    return dtype


def tell_note(source: Source) -> None:
    """Says on stderr what of a checkpoint is left out or changed by taking its plain weights, if anything is."""
    if source.note_on_plain:
        print(source.note_on_plain, file=sys.stderr)


class Progress:
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
            previous = converted = None
            for name, tensor in weights:
                if self.verbose:
                    print(f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
                if tensor is not previous:  # tied weights come as one tensor, twice in a row, and must stay one
                    previous, converted = tensor, tensor.to(self.dtype or tensor.dtype)
                yield name, converted
                bar.update(tensor.numel() * tensor.dtype.itemsize)
