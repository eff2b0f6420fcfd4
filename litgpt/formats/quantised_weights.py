"""Weights that a Hugging Face checkpoint holds quantised, computed when they are asked for.

    fp8     `X` in float8 with `X_scale_inv`: a factor for each block of rows and columns, or one for all of it
            (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.2)
    mxfp4   `X_blocks` and `X_scales`: 4 bits a value, and for 32 values a common power of two
            (OCP Microscaling Formats, version 1.0; gpt-oss)

Which tensors are quantised, their names say; `quantization_config` in `config.json` says how.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from litgpt.checkpoint import Release
from litgpt.cli.untrusted import is_count, shown

_AT_ONCE = 2**20  # values computed at a time
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BYTES = (torch.uint8, torch.float8_e8m0fnu)
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # E2M1
# The two values of a byte, low half first, as one element of twice the size, to be looked up at once.
_PAIRS = torch.stack([_FP4.repeat(16), _FP4.repeat_interleave(16)], dim=1).view(torch.int64).view(256)


class Quantised(ABC):
    """A weight in quantised form.

    Attributes:
        like: A tensor of the weight's shape and type, on the meta device.
    """

    like: Tensor

    @abstractmethod
    def read(self, release: Release) -> Tensor:
        """Computes the weight a part at a time; `release` is called with each part of the form that has been used."""


class BlockScaled(Quantised):
    """Float8 values (..., R, C) times factors (..., ceil(R / r), ceil(C / c)), or values of any shape times one factor.

    Args:
        values: The float8 values.
        scales: The factors.
        block: r and c; None where one factor is for a whole matrix.
        dtype: The type of the weight. Products are taken in float32 and rounded once.

    Raises:
        ValueError: The values are not float8, or the factors are not those of such blocks.
    """

    def __init__(self, values: Tensor, scales: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> None:
        if values.dtype not in _FLOAT8:
            raise ValueError(f"it is of type {_name(values.dtype)}, where float8 was expected")
        self.like = torch.empty(values.shape, dtype=dtype, device="meta")
        self.values = (
            values.reshape(-1, *values.shape[-2:]) if values.dim() > 1 else values.reshape(1, 1, -1)
        )  # (N, R, C)
        count, rows, columns = self.values.shape
        if scales.numel() == 1:
            self.block, self.scales = (rows, columns), scales.view(1, 1, 1).expand(count, 1, 1)
            return
        self.block = block or (rows, columns)
        grid = (*values.shape[:-2], -(-rows // self.block[0]), -(-columns // self.block[1]))
        if tuple(scales.shape) != grid:
            raise ValueError(f"its scales are {list(scales.shape)}, where {list(grid)} was expected")
        self.scales = scales.reshape(count, *grid[-2:])

    def read(self, release: Release) -> Tensor:
        weight = torch.empty(self.values.shape, dtype=self.like.dtype)
        columns = self.values.shape[-1]
        rows_at_once = max(1, _AT_ONCE // max(1, columns))
        table = torch.arange(256, dtype=torch.uint8).view(self.values.dtype).float()
        block_of_row = torch.arange(self.values.shape[1]) // self.block[0]
        for target, values, scales in zip(weight, self.values, self.scales, strict=True):
            factors = scales.float().repeat_interleave(self.block[1], dim=1)[:, :columns]  # (R / r, C)
            parts = (tensor.split(rows_at_once) for tensor in (target, values, block_of_row))
            for place, part, blocks in zip(*parts, strict=True):
                place.copy_(_look_up(table, part.view(torch.uint8)).mul_(factors[blocks]))
                release(part)
        # As a whole, too: reading a part brings in pages of the part before, which was released already.
        release(self.values)
        release(self.scales)
        return weight.view(self.like.shape)


class PackedFP4(Quantised):
    """Bytes (E, R, C / 32, 16), two FP4 values in each, and powers of two in E8M0 (E, R, C / 32), for 32 values each.

    The weight is (E, C, R), input before output, as gpt-oss has it; a view of (E, R, C), as a linear layer is held.

    Raises:
        ValueError: Types or shapes are not of this form.
    """

    def __init__(self, blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
        if blocks.dtype != torch.uint8 or blocks.dim() != 4 or blocks.shape[-1] != 16:
            raise ValueError(f"its blocks are {list(blocks.shape)} {_name(blocks.dtype)}, where 16 bytes were expected")
        if scales.dtype not in _BYTES or scales.shape != blocks.shape[:-1]:
            found = f"{list(scales.shape)} {_name(scales.dtype)}"
            raise ValueError(f"its scales are {found}, where {list(blocks.shape[:-1])} uint8 was expected")
        experts, rows, groups, _ = blocks.shape
        self.like = torch.empty((experts, groups * 32, rows), dtype=dtype, device="meta")
        self.blocks = blocks.reshape(experts * rows, groups, 16)
        self.scales = scales.reshape(experts * rows, groups, 1)

    def read(self, release: Release) -> Tensor:
        experts, columns, rows = self.like.shape
        weight = torch.empty((experts * rows, columns), dtype=self.like.dtype)
        rows_at_once = max(1, _AT_ONCE // max(1, columns))
        parts = (tensor.split(rows_at_once) for tensor in (weight, self.blocks, self.scales))
        for place, blocks, scales in zip(*parts, strict=True):
            values = _look_up(_PAIRS, blocks).view(torch.float32)  # (rows, C / 32, 32)
            place.copy_(values.mul_(scales.view(torch.float8_e8m0fnu).float()).flatten(1))
            release(blocks)
        release(self.blocks)
        release(self.scales)
        return weight.view(experts, rows, columns).transpose(1, 2)


def _look_up(table: Tensor, bytes_: Tensor) -> Tensor:
    """The element of a table of 256 that each byte stands for. (Twice as fast as torch converts float8.)"""
    return table.index_select(0, bytes_.reshape(-1).int()).view(bytes_.shape)


Settings = dict[str, Any]
Weights = dict[str, "Tensor | Quantised"]


def _read_fp8(tensors: dict[str, Tensor], settings: Settings, dtype: torch.dtype, problems: list[str]) -> Weights:
    block = settings.get("weight_block_size")
    weights: Weights = {}
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name}_scale_inv")
        if scales is not None:
            _add(weights, problems, name, lambda t=tensor, s=scales: BlockScaled(t, s, block and tuple(block), dtype))
        elif tensor.dtype in _FLOAT8:
            problems.append(f"  {name} is float8 without {name}_scale_inv")
        elif name.endswith("_scale_inv") and name.removesuffix("_scale_inv") not in tensors:
            problems.append(f"  {name} belongs to no weight")
        elif not name.endswith(("_scale_inv", "activation_scale")):
            weights[name] = tensor
    return weights


def _read_mxfp4(tensors: dict[str, Tensor], settings: Settings, dtype: torch.dtype, problems: list[str]) -> Weights:
    weights: Weights = {}
    for name, tensor in tensors.items():
        whole = name.removesuffix("_blocks").removesuffix("_scales")
        blocks, scales = tensors.get(f"{whole}_blocks"), tensors.get(f"{whole}_scales")
        if whole == name:
            weights[name] = tensor
        elif blocks is None or scales is None:
            problems.append(f"  {name} without {whole}_{'blocks' if blocks is None else 'scales'}")
        elif tensor is blocks:
            _add(weights, problems, whole, lambda b=blocks, s=scales: PackedFP4(b, s, dtype))
    return weights


def _add(weights: Weights, problems: list[str], name: str, make: Callable[[], Quantised]) -> None:
    try:
        weights[name] = make()
    except ValueError as error:
        problems.append(f"  {name}: {error}")


_READERS = {"fp8": _read_fp8, "mxfp4": _read_mxfp4}
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_COUNTS = (torch.bool, torch.int64)  # masks and positions
_PARTS = ("_scale_inv", "_blocks", "_scales", ".scales", ".weight_scale")
# Methods whose plain weights mean something only as they are rounded in every use.
_ROUNDED_IN_USE = ("bitnet",)


def check_method(config_json: dict[str, Any]) -> None:
    """Raises `ValueError` for weights quantised by a method that is not supported; names it."""
    settings = config_json.get("quantization_config")
    method = settings.get("quant_method", "none named") if settings else None
    if method is not None and (not isinstance(method, str) or method not in _READERS):
        raise ValueError(
            f"weights with quant_method {shown(method)} are not supported (only {', '.join(_READERS)}); "
            "use an unquantised repository of the model"
        )
    block = settings.get("weight_block_size") if settings else None
    is_pair = isinstance(block, list) and len(block) == 2 and all(is_count(size) and size for size in block)
    if block is not None and not is_pair:
        raise ValueError(f"weight_block_size={shown(block)} is not supported (only two positive numbers)")


def is_stale(config_json: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    """Whether `config.json` says that weights are quantised that are not, as is left when a model was de-quantised or
    merged, or where it was to be quantised on loading.

    Args:
        config_json: Its content.
        tensors: All tensors of the checkpoint by name.
    """
    settings = config_json.get("quantization_config")
    if not settings or settings.get("quant_method") in _ROUNDED_IN_USE:
        return False
    return all(t.dtype in (*_PLAIN, *_COUNTS) and not name.endswith(_PARTS) for name, t in tensors.items())


def unscaled(tensors: dict[str, Tensor | Quantised]) -> list[str]:
    """A line for each weight in a type that means nothing without a scale, which nothing here says."""
    plain = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    return [
        f"  wrong type: {name} is {_name(tensor.dtype)}, and config.json does not say how it is quantised"
        for name, tensor in plain.items()
        if tensor.dtype not in _PLAIN
    ]


def read_quantised(tensors: dict[str, Tensor], config_json: dict[str, Any]) -> Weights:
    """Puts together what belongs to a quantised weight, without reading it.

    Args:
        tensors: All tensors of the checkpoint by name, in whichever file they are.
        config_json: Its `config.json`, with a method that `check_method` lets pass.

    Returns:
        The weights by name, in the same order; those that are quantised as `Quantised`.

    Raises:
        ValueError: Something is missing or of a wrong shape; a line for each.
    """
    settings = config_json.get("quantization_config")
    if not settings:
        return dict(tensors)
    problems: list[str] = []
    weights = _READERS[settings["quant_method"]](tensors, settings, dequantised_type(config_json), problems)
    if problems:
        raise ValueError("\n".join(problems))
    return weights


def dequantised_type(config_json: dict[str, Any]) -> torch.dtype:
    """The type that `config.json` names for the weights; bfloat16 where it names none that could hold them."""
    name = str(config_json.get("dtype") or config_json.get("torch_dtype")).removeprefix("torch.")
    named = {_name(dtype): dtype for dtype in (torch.float32, torch.float16, torch.float64)}
    return named.get(name, torch.bfloat16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
