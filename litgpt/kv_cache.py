"""What a model remembers between calls: the keys and values of the tokens that it has seen."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass
class AttentionPlan:
    """Who sees whom in one call, shared by all layers of a kind."""

    mask: Tensor | None
    """(B or 1, 1, T, S), added to the scores; None: token t sees the tokens 0..t of this call."""
    slots: Tensor | None = None
    """(B, T) where the keys of this call go in the cache."""
    reads: str = "call"
    """Which keys are seen: those of the `call`, of the `cache` with those of the call in it, or of `both`, in a row."""
    read_length: int | None = None
    """Only this many slots of the cache are read."""
    documents: Tensor | None = None
    """(documents + 1,) int32, where each begins in the B * T tokens, row after row: attention within each says what the
    mask says."""
    window: int | None = None
    """Of such attention."""


def _arange(length: int, device: torch.device | str) -> Tensor:
    """(length,) int64. On the meta device, where there are no values, torch.arange imports sympy: half a second."""
    if torch.device(device).type == "meta":
        return torch.empty(length, dtype=torch.int64, device=device)
    return torch.arange(length, device=device)


class Ring:
    """Which position each slot of a cache holds; slot = position modulo the number of slots.

    The last slot is for what must not be kept (padding): it is written to and never seen. The number of slots is a
    multiple of 8, which attention kernels like.
    """

    def __init__(self, batch_size: int, length: int, device: torch.device | str) -> None:
        slots = -(-(length + 1) // 8) * 8
        self.table = torch.full((batch_size, slots), -1, dtype=torch.int64, device=device)  # -1 = empty
        self.chosen: slice | Tensor = slice(None)  # the rows that this call is about
        self.rows = _arange(batch_size, device)[:, None]  # (B, 1), the same as indices
        self.read_length: int | None = None
        self._elsewhere: dict[torch.device, tuple[Tensor, slice | Tensor]] = {}

    @property
    def length(self) -> int:
        return self.table.size(1) - 1

    @property
    def positions(self) -> Tensor:
        """(B, slots)."""
        return self.table[self.chosen]

    def claim(self, positions: Tensor) -> Tensor:
        """Marks the slots of these (B, T) positions as theirs and returns them, (B, T)."""
        newest = positions.amax(dim=1, keepdim=True)
        keep = (positions >= 0) & (positions > newest - self.length)
        slots = torch.where(keep, positions % self.length, self.length)
        self.table[self.rows, slots] = torch.where(keep, positions, -1)
        return slots

    def indices(self, device: torch.device) -> tuple[Tensor, slice | Tensor]:
        """`rows` and `chosen` for tensors on a device, which may be another than this table's."""
        if device == self.table.device:
            return self.rows, self.chosen
        if device not in self._elsewhere:
            chosen = self.chosen if isinstance(self.chosen, slice) else self.chosen.to(device)
            self._elsewhere[device] = self.rows.to(device), chosen
        return self._elsewhere[device]

    def select(self, rows: slice | Tensor) -> "Ring":
        selected = copy(self)
        selected.chosen = rows
        selected._elsewhere = {}
        selected.rows = torch.arange(self.table.size(0), device=self.table.device)[rows, None]
        return selected


class LayerCache:
    """What one layer remembers: tensors of shape (B, slots, G, D), in slots shared by the layers of its kind.

    A cache that remembers otherwise is a subclass with an `update` of its own, or with `memory`, `encode` and `decode`;
    `GPT.layer_cache` puts it to use.

    Attributes:
        kind: What users call it (`--kv_cache`); None for the plain one, and for one of somebody's own.
        tensors: What is kept, each (B, slots, ...).
    """

    kind: str | None = None

    def __init__(self, ring: Ring, tensors: Sequence[Tensor]) -> None:
        self.ring = ring
        self.tensors = tensors

    @staticmethod
    def memory(slots: torch.Size, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: Any) -> list[Tensor]:
        """What is kept of an empty cache.

        Args:
            slots: (B, slots).
            shapes: (G, D) of each tensor of a token.
            dtype: The type that the model computes in.
            device: Where it goes.
        """
        # Zeros, not empty: a masked slot is multiplied by 0, which must not meet a NaN.
        return [torch.zeros(*slots, *shape, dtype=dtype, device=device) for shape in shapes]

    def update(self, plan: AttentionPlan, *new: Tensor) -> tuple[Tensor, ...]:
        """Stores tensors (B, T, G, D) of this call and returns those to attend to, (B, S, G, D)."""
        rows, chosen = self.ring.indices(self.tensors[0].device)
        kept = self.encode(new)
        read = self.decode(kept, new)
        if plan.reads == "both":
            earlier = self.decode([stored[chosen] for stored in self.tensors], new)
            read = tuple(
                torch.cat((stored.to(fresh.dtype), fresh), dim=1) for stored, fresh in zip(earlier, read, strict=True)
            )
        for stored, fresh in zip(self.tensors, kept, strict=True):
            stored[rows, plan.slots] = fresh.detach().to(stored.dtype)
        if plan.reads == "cache":
            read = self.decode([stored[chosen, : plan.read_length] for stored in self.tensors], new)
        return read

    def encode(self, new: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is kept of tensors (B, T, G, D), one for each of `tensors`."""
        return new

    def decode(self, kept: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What attention sees, (B, S, G, D), of what is kept; `like` are tensors of the types that suit it."""
        return tuple(kept)

    def select(self, ring: Ring) -> "LayerCache":
        """The same memory, with the rows of this ring."""
        selected = copy(self)
        selected.ring = ring
        return selected


class Int8LayerCache(LayerCache):
    """Keys and values in 8 bits, with a scale for each token and head; de-quantised where attention reads them.

    A value is off by at most half of its scale, which is the largest size of the D values that share it, / 127. The
    tokens of a call see one another as later ones will see them, so that an answer depends neither on the chunks in
    which a prompt is prefilled nor on what of it is known already.

    Attributes:
        tensors: Of each tensor of a token the codes (B, slots, G, D), int8, and their scales (B, slots, G).
    """

    kind = "int8"

    @staticmethod
    def memory(slots: torch.Size, shapes: Sequence[tuple[int, int]], dtype: torch.dtype, device: Any) -> list[Tensor]:
        tensors = []
        for heads, size in shapes:
            tensors.append(torch.zeros(*slots, heads, size, dtype=torch.int8, device=device))
            tensors.append(torch.zeros(*slots, heads, dtype=dtype, device=device))
        return tensors

    def encode(self, new: Sequence[Tensor]) -> Sequence[Tensor]:
        return [part for fresh in new for part in to_int8(fresh, self.tensors[1].dtype)]

    def decode(self, kept: Sequence[Tensor], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
        parts = zip(kept[::2], kept[1::2], like, strict=True)
        return tuple((codes * scales[..., None]).to(fresh.dtype) for codes, scales, fresh in parts)


def to_int8(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., D) values -> codes (..., D), int8, and scales (...) of a type: the values are about their product."""
    values = values.float()
    # The codes are for the scale as it is rounded.
    scale = (values.abs().amax(dim=-1) / 127).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    return (values / scale.float()[..., None]).round().clamp(-127, 127).to(torch.int8), scale


KINDS: dict[str, type[LayerCache]] = {"int8": Int8LayerCache}


def layer_cache_of(kind: str | None) -> type[LayerCache]:
    """What the layers of a cache are made of, of what users call it; None is the plain one.

    Raises:
        ValueError: There is no such kind.
    """
    if kind is None:
        return LayerCache
    if kind not in KINDS:
        raise ValueError(f"kv_cache={kind!r} is unknown. Give {' or '.join(KINDS)}, or leave it out.")
    return KINDS[kind]


class LayerShape(NamedTuple):
    """What a cache has to know of a layer."""

    window: int | None
    """The size of its sliding window."""
    shapes: list[tuple[int, int]]
    """Of each tensor that it keeps of a token."""
    device: torch.device | str


class KVCache:
    """Keys and values of a batch of rows, each row at a position of its own. Made by `GPT.new_cache`.

    Layers with a sliding window keep a window's worth of slots, the others `max_length`; multi-head latent attention
    keeps its latents. A position at or beyond `max_length` does not fit: the caller sees to that.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        batch_size: int,
        max_length: int,
        device: torch.device | str,
        dtype: torch.dtype,
        spare: int = 0,
        layer_cache: type[LayerCache] = LayerCache,
    ) -> None:
        if max_length <= 0:
            raise ValueError(f"max_length={max_length}: a cache holds at least one token.")
        self.batch_size = batch_size
        self.max_length = max_length
        self.spare = spare
        self.is_empty = True
        # How long each row will get at most: the rotations of some models depend on it.
        self.lengths = torch.full((batch_size, 1), max_length, dtype=torch.int64, device=device)
        self.windows = [layer.window for layer in layers]
        self.rings = self._rings(batch_size, max_length, device)
        self.dtype = dtype
        self.layers = []
        for window, shapes, place in layers:
            ring = self.rings[window]
            self.layers.append(layer_cache(ring, layer_cache.memory(ring.table.shape, shapes, dtype, place)))

    def _rings(self, batch_size: int, max_length: int, device: torch.device | str) -> dict[int | None, Ring]:
        """One for each kind of layer."""
        lengths = {w: max_length if w is None else min(w + self.spare, max_length) for w in self.windows}
        return {window: Ring(batch_size, length, device) for window, length in lengths.items()}

    def select(self, rows: slice | Tensor, is_empty: bool = False) -> "KVCache":
        """A cache of some of the rows, in the same memory; for a slice attention reads it without a copy.

        Args:
            rows: A slice, or indices (B',) of rows.
            is_empty: Whether nothing that these rows hold is to be seen.
        """
        selected = copy(self)
        selected.rings = {window: ring.select(rows) for window, ring in self.rings.items()}
        layers = zip(self.windows, self.layers, strict=True)
        selected.layers = [layer.select(selected.rings[window]) for window, layer in layers]
        selected.lengths = self.lengths[rows]
        selected.batch_size = selected.lengths.size(0)
        selected.is_empty = is_empty
        return selected

    def reset(self, rows: Sequence[int] | Tensor | None = None) -> None:
        """Forgets some rows, or everything."""
        for ring in self.rings.values():
            ring.table[slice(None) if rows is None else rows] = -1
        self.is_empty = self.is_empty or rows is None

    def can_rewind(self, held: int, length: int) -> bool:
        """Whether a row that holds the positions below `held` still has all that position `length` is to see: sliding
        windows drop earlier positions for later ones.
        """
        dropped = {window: held - ring.length for window, ring in self.rings.items()}  # all below this position
        return all(
            first <= 0 or (window is not None and first <= length - window + 1) for window, first in dropped.items()
        )

    def rewind(self, row: int, length: int) -> None:
        """Forgets the positions of a row from `length` on."""
        for ring in self.rings.values():
            ring.table[row].masked_fill_(ring.table[row] >= length, -1)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Gives one row what another holds of the positions below `length`; those from there on are then to be
        forgotten (`rewind`)."""
        for window, ring in self.rings.items():
            slots = slice(length if window is None else None)
            ring.table[target, slots] = ring.table[source, slots]
            for layer in self.layers:
                if layer.ring is ring:
                    for tensor in layer.tensors:
                        tensor[target, slots] = tensor[source, slots]

    def resize(self, rows: Sequence[int], batch_size: int, max_length: int) -> None:
        """Makes it larger or smaller, layer by layer.

        Args:
            rows: Those that stay, in the order in which they are to stand first; none holds more than `max_length`.
            batch_size: How many rows there are then.
            max_length: How many positions each of them has.
        """
        # The slot of a position stays the same: positions wrap around in windows only, which stay as long as they are
        # unless they have room for every position.
        device = self.lengths.device
        rings = self._rings(batch_size, max_length, device)
        for window, ring in self.rings.items():
            new = put_rows(ring.table, rows, rings[window].table)
            if new.size(1) < ring.table.size(1):
                new.masked_fill_(new >= rings[window].length, -1)
        for window, layer in zip(self.windows, self.layers, strict=True):
            for index, old in enumerate(layer.tensors):
                layer.tensors[index] = put_rows(old, rows, old.new_zeros(*rings[window].table.shape, *old.shape[2:]))
            layer.ring = rings[window]
        self.rings = rings
        self.lengths = put_rows(self.lengths, rows, torch.full((batch_size, 1), max_length, device=device))
        self.batch_size, self.max_length = batch_size, max_length

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of (B, ...) that the model changes in place."""
        for ring in self.rings.values():
            yield ring.table
        for layer in self.layers:
            yield from layer.tensors

    def read_only(self, length: int | None) -> None:
        """Promises that every position up to the next promise is below `length`, so that attention reads no further.

        None takes the promise back. Layers with a sliding window always read their whole window.
        """
        if None in self.rings:
            self.rings[None].read_length = length


def put_rows(old: Tensor, rows: Sequence[int], new: Tensor) -> Tensor:
    """Puts some rows of a tensor first in another of other first two sizes, as much of them as that has room for, and
    returns it."""
    width = min(old.size(1), new.size(1))
    for target, source in enumerate(rows):
        new[target, :width] = old[source, :width]
    return new
