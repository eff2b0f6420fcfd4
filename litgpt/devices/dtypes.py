"""Types of numbers by the names that people call them."""

import torch

from litgpt.cli.suggest import did_you_mean

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


def dtype_from_name(name: str | None, option: str = "dtype") -> torch.dtype | None:
    """`bfloat16`, `bf16` or `bf16-true` -> torch.bfloat16. Raises `ValueError` for a name that is none."""
    if name is None:
        return None
    name = name.removeprefix("torch.")
    dtype = DTYPES.get(_ALIASES.get(name, name))
    if dtype is None:
        hint = did_you_mean(name, [*DTYPES, *_ALIASES])
        raise ValueError(f"{option}={name}: there is no such type of weights.{hint} Choose {', '.join(DTYPES)}.")
    return dtype
