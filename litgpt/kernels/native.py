"""The library of kernels, and what it does with tensors."""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from litgpt.cli.notes import say_note
from litgpt.kernels.build import NoLibraryError, is_built, library_path
from litgpt.kernels.levels import Level, chosen

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8, INT4 = 3, 4
# The formats of `litgpt.quantization.blocks`.
BLOCKS = {
    name: 5 + place
    for place, name in enumerate(("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"))
}
PIECE = 2**22  # values of a weight that are widened at a time


class Matrix(ctypes.Structure):
    """A weight, as matrix.h has it."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
        ("out", ctypes.c_int64),
        ("in_", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("exact", ctypes.c_int64),
    ]


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Operation(ctypes.Structure):
    """A part of a step, as step.h has it."""

    _fields_ = [
        *_fields(ctypes.c_int64, "kind"),
        *_fields(ctypes.c_void_p, "x y other"),
        *_fields(ctypes.c_int64, "x_stride y_stride other_stride"),
        *_fields(ctypes.c_void_p, "m gated prepared weight bias gated_bias"),
        *_fields(ctypes.c_int64, "weight_type"),
        *_fields(ctypes.c_void_p, "residual"),
        *_fields(ctypes.c_int64, "residual_stride count width layer groups rotation rotated activation flag"),
        *_fields(ctypes.c_double, "factor epsilon offset scale cap clip"),
    ]


class RingState(ctypes.Structure):
    """Where each slot of the layers of a kind says which position it holds."""

    _fields_ = [*_fields(ctypes.c_void_p, "table"), *_fields(ctypes.c_int64, "slots length window read_length")]


class LayerState(ctypes.Structure):
    """Where a layer's keys and values are."""

    _fields_ = [*_fields(ctypes.c_void_p, "keys values"), *_fields(ctypes.c_int64, "type ring")]


class StepCall(ctypes.Structure):
    """What differs from step to step."""

    _fields_ = [
        *_fields(ctypes.c_int64, "tokens rings layers threads"),
        *_fields(ctypes.c_void_p, "ids positions rows lengths logits"),
        *_fields(ctypes.c_int64, "logits_stride"),
        *_fields(ctypes.c_void_p, "ring layer frequencies magnitudes"),
        *_fields(ctypes.c_int64, "tables pairs long_from"),
        *_fields(ctypes.c_double, "query_beta query_period"),
    ]


_library: ctypes.CDLL | None = None
_failure: str | None = None
_building: threading.Thread | None = None
_lock = threading.Lock()


def library(wait: bool = True) -> ctypes.CDLL | None:
    """The library for this CPU, loaded; None where there is none, which is said once.

    Args:
        wait: Wait while it is being built; None then means that there is none. Otherwise None may also mean that a
            thread is building it.
    """
    global _building
    if _library is not None or _failure is not None:
        return _library
    if wait or _is_at_hand():
        _load_once()
    elif _building is None:
        _building = threading.Thread(target=_load_once, name="build kernels", daemon=True)
        _building.start()
    return _library


def _load_once() -> None:
    global _library, _failure
    with _lock:
        if _library is None and _failure is None:
            try:
                _library = load(chosen())
            except NoLibraryError as error:
                _failure = str(error)
                say_note(f"litgpt's kernels for CPUs are not used: {_failure}. What they would do is slower.")


def _is_at_hand() -> bool:
    """Whether the library can be loaded without being built, or not at all."""
    level = chosen()
    return _building is None and (level is None or is_built(level))


def linear(matrix: Matrix, x: Tensor, exact: bool = False) -> Tensor:
    """(..., in) -> (..., out), in the type of x, which is float32, bfloat16 or float16."""
    flat = x.reshape(-1, matrix.in_).contiguous()
    y = torch.empty(flat.size(0), matrix.out, dtype=x.dtype)
    kind, loaded = TYPES[x.dtype], library()
    assert loaded is not None
    matrix.exact = exact
    if loaded.litgpt_linear(
        ctypes.byref(matrix), flat.data_ptr(), kind, y.data_ptr(), kind, flat.size(0), torch.get_num_threads()
    ):
        raise MemoryError(f"There is no memory for {flat.size(0)} rows of {matrix.in_} inputs.")
    return y.view(*x.shape[:-1], matrix.out)


def widened_product(matrix: Matrix, x: Tensor) -> Tensor:
    """(..., in) -> (..., out) for many rows: torch's product with some rows of the weight at a time."""
    flat = x.reshape(-1, matrix.in_)
    y = torch.empty(flat.size(0), matrix.out, dtype=x.dtype)
    rows = max(PIECE // max(matrix.in_, 1) // 64, 1) * 64
    room = torch.empty(min(rows, matrix.out), matrix.in_, dtype=x.dtype)
    for first in range(0, matrix.out, rows):
        some = widen(matrix, first, min(first + rows, matrix.out), room)
        if rows >= matrix.out:
            torch.mm(flat, some.T, out=y)
        else:
            y[:, first : first + rows] = flat @ some.T
    return y.view(*x.shape[:-1], matrix.out)


def widen(matrix: Matrix, first: int, end: int, room: Tensor) -> Tensor:
    """(end - first, in) rows of a weight as numbers, put into a tensor that has room for them."""
    some, loaded = room[: end - first], library()
    assert loaded is not None
    loaded.litgpt_widen(ctypes.byref(matrix), some.data_ptr(), TYPES[room.dtype], first, end, torch.get_num_threads())
    return some


def load(level: Level | None) -> ctypes.CDLL:
    """The library for a level, built before if need be.

    Raises:
        NoLibraryError: There is none; says why.
    """
    if level is None:
        raise NoLibraryError("there are none for this CPU, or LITGPT_CPU_LEVEL is none")
    path = library_path(level, say_note)
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoLibraryError(f"'{path}' cannot be loaded ({error})") from error
    pointer, number, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    matrix = ctypes.POINTER(Matrix)
    loaded.litgpt_linear.argtypes = [matrix, pointer, number, pointer, number, size, size]
    loaded.litgpt_widen.argtypes = [matrix, pointer, number, size, size, size]
    loaded.litgpt_widen.restype = None
    loaded.litgpt_step.argtypes = [pointer, size, pointer]
    loaded.litgpt_prepared_bytes.argtypes, loaded.litgpt_prepared_bytes.restype = [matrix, size], size
    if loaded.litgpt_start():
        raise NoLibraryError("the system lets no process use the CPU's tiles. Set LITGPT_CPU_LEVEL=avx512bf16")
    return loaded
