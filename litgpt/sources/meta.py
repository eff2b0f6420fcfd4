"""A model with shapes and no memory, and memory for it."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from litgpt.config import Config
from litgpt.devices.huge_pages import Pages
from litgpt.model import GPT, RotaryEmbedding
from litgpt.quantization.layers import replace_linears
from litgpt.sources.source import EMBEDDING, Place


def on_meta(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and type, without memory."""
    return torch.empty_like(tensor, device="meta")


def shapes_of(config: Config, quantize: str | None = None) -> dict[str, Tensor]:
    """Our names of all weights of such a model, with tensors on the meta device."""
    return meta_model(config, quantize).state_dict()


def meta_model(config: Config, quantize: str | None = None, dtype: torch.dtype = torch.float32) -> GPT:
    """A model with shapes and no memory; where it is quantised, in a type."""
    with torch.device("meta"), _NoInitialisation():
        model = GPT(config)
    if quantize is not None:
        replace_linears(model, quantize, dtype)
        model.to(dtype)
    return model


def give_memory(model: GPT, dtype: torch.dtype, device: Place) -> None:
    """Uninitialised weights for a model that was built on the meta device, on one device or each on its own.

    (`Module.to_empty` would do, but asks the meta device for it, which imports sympy: a second and 32 MB.)
    """
    model.to(dtype)  # what keeps its own type, whatever that of the model is, knows it
    shapes = model.state_dict().items()
    place = device if callable(device) else lambda name: device
    pages = Pages(like.nbytes for name, like in shapes if torch.device(place(name)).type == "cpu")
    empty = {name: pages.empty(like.shape, like.dtype, place(name)) for name, like in shapes}
    model.load_state_dict(empty, assign=True)
    model.rope = RotaryEmbedding(model.config).to(place(EMBEDDING))  # its tables are no weights
    model.tie_weights()


class _NoInitialisation(TorchFunctionMode):
    """Skips `torch.nn.init`: on the meta device there is nothing to fill, and trying imports torch's compiler (3 s)."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
