"""Counting the memory of tensors that have shapes and no values."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode


class Measured:
    """What some operations took, in bytes beyond what was there before; known after them."""

    peak = 0
    """The most at any time."""
    held = 0
    """At the end."""


class LiveMemory(TorchDispatchMode):
    """The bytes of the storages that torch's operations make within `with`, as long as anything holds them.

    Views of a storage count once. What a kernel takes for itself is not seen. Tensors of the meta device count like
    real ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self._now = self._peak = 0
        self._sizes: dict[int, int] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which nothing here does; to be sure that it is not compiled would import the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._add(storage, storage.nbytes())
        return result

    def ignore(self, tensor: Tensor) -> None:
        """Leave out a tensor that was made before, and its views."""
        self._add(tensor.untyped_storage(), 0)

    @contextmanager
    def measured(self) -> Generator[Measured]:
        """Measure what is done within it."""
        before, peak_before = self._now, self._peak
        self._peak, measured = before, Measured()
        yield measured
        measured.peak, measured.held = self._peak - before, self._now - before
        self._peak = max(peak_before, self._peak)

    def reach(self, size: int) -> None:
        """Take it that so many bytes more came and went."""
        self._peak = max(self._peak, self._now + size)

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = id(storage)  # torch keeps the Python object as long as the storage
        if key not in self._sizes:
            self._sizes[key] = size
            self._now += size
            self._peak = max(self._peak, self._now)
            weakref.finalize(storage, self._remove, key).atexit = False

    def _remove(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


class PretendedDevice(TorchFunctionMode):
    """Within it, tensors are made without values and say that they are on a kind of device, which need not be there.

    Operations are the meta device's, but for these, which depend on the device: attention, RMSNorm and autocast.
    Attention, and RMSNorm anywhere but on a CPU, is one kernel that holds its inputs and a number for each row, as
    FlashAttention and the other fused ones do.

    Args:
        device: The kind of device.
        compute: The type that autocast computes in, if it does.
    """

    def __init__(self, device: str, compute: torch.dtype | None = None) -> None:
        super().__init__()
        self.device, self.compute = torch.device(device), compute
        self._constructors = _device_constructors()
        self._instead: dict[Callable, Callable] = {
            torch.Tensor.device.__get__: self._device_of,
            torch.arange: _empty_range,
            torch.bincount: _spread_evenly,
            F.scaled_dot_product_attention: self._attention,
        }
        if self.device.type != "cpu":
            self._instead[F.rms_norm] = _fused_rms_norm
        self._casts: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def autocast(self) -> Generator[None]:
        """Products are computed in `compute`, and who asks is told so."""
        kind = self.device.type
        before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        torch.set_autocast_enabled(kind, self.compute is not None)
        torch.set_autocast_dtype(kind, self.compute or before[1])
        try:
            yield
        finally:
            torch.set_autocast_enabled(kind, before[0])
            torch.set_autocast_dtype(kind, before[1])
            self.clear_casts()

    @property
    def cast_bytes(self) -> int:
        """Of the weights that autocast has cast, and keeps."""
        return sum(cast.nbytes for cast in self._casts.values())

    def clear_casts(self) -> None:
        """Have autocast keep no weights that it has cast."""
        self._casts.clear()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self._constructors or "device" in kwargs:
            kwargs["device"] = self._made_on(kwargs.get("device"))
        args = tuple(self._made_on(arg) if isinstance(arg, torch.device) else arg for arg in args)
        if func in _PRODUCTS and self.compute is not None and torch.is_autocast_enabled(self.device.type):
            args = tuple(self._cast(arg) for arg in args)
            kwargs = {name: self._cast(arg) for name, arg in kwargs.items()}
        return self._instead.get(func, func)(*args, **kwargs)

    def _device_of(self, tensor: Tensor) -> torch.device:
        own = torch.Tensor.device.__get__(tensor)
        return self.device if own.type == "meta" else own

    def _made_on(self, device: Any) -> torch.device:
        device = self.device if device is None else torch.device(device)
        return torch.device("meta") if device.type == self.device.type else device

    def _cast(self, value: Any) -> Any:
        """As autocast: copies of trained weights stay until its end."""
        if isinstance(value, (tuple, list)):
            return type(value)(self._cast(part) for part in value)
        if (
            not isinstance(value, Tensor)
            or not value.is_floating_point()
            or value.dtype in (self.compute, torch.float64)
        ):
            return value
        if not isinstance(value, nn.Parameter) or not value.requires_grad:
            return value.to(self.compute)
        if value not in self._casts:
            self._casts[value] = value.to(self.compute)
        return self._casts[value]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """(B, H, T, Q), (B, G, S, Q), (B, G, S, D) -> (B, H, T, D), with all scores where a CPU has no kernel."""
        how = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if self.device.type == "cpu" and not _cpu_has_kernel(query, key, value, **how):
            return F.scaled_dot_product_attention(query, key, value, **how)
        batch, heads, tokens, _ = query.shape

        def make() -> Tensor:
            return query.new_empty(batch, tokens, heads, value.size(-1)).transpose(1, 2)

        held = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        return _Kernel.apply(make, True, *held)


_PRODUCTS = {F.linear, F.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul, torch.bmm, torch.einsum}
_PRODUCTS |= {torch.Tensor.__matmul__, torch.Tensor.__rmatmul__}


class _Kernel(torch.autograd.Function):
    """One that holds its inputs and a float for each row of its result, and where asked for the result as well."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], holds_result: bool, *inputs: Tensor) -> Tensor:
        result = make()
        rows = result.new_empty(result.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(rows, *inputs, *([result] if holds_result else []))
        ctx.num_inputs = len(inputs)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        _, *inputs = ctx.saved_tensors
        needed = zip(inputs, ctx.needs_input_grad[2:], strict=False)
        return None, None, *(torch.empty_like(part) if needs else None for part, needs in needed)


def _cpu_has_kernel(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> bool:
    """As torch decides it, of tensors that have a row of memory each."""

    def row(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.size(-1), device="cpu").expand(tensor.shape)

    mask = how.pop("attn_mask")
    mask = None if mask is None else row(mask)
    return torch._fused_sdp_choice(row(query), row(key), row(value), mask, dropout_p=0.0, **how) > 0


def _fused_rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    return _Kernel.apply(lambda: torch.empty_like(x), False, x, weight)


def _empty_range(start: int, end: int | None = None, *, device: torch.device, dtype: Any = torch.int64) -> Tensor:
    """torch.arange imports sympy for the meta device: half a second."""
    return torch.empty(start if end is None else end - start, device=device, dtype=dtype)


def _spread_evenly(numbers: Tensor, minlength: int) -> Tensor:
    """How often each number below `minlength` occurs: the only values that a model asks for (tokens of each expert)."""
    each, rest = divmod(numbers.numel(), minlength)
    return torch.tensor([each + (number < rest) for number in range(minlength)], device="cpu")
