"""Weight maps: each architecture's table of rules, read in both directions.

A rule ties tensors of ours to tensors of a Hugging Face checkpoint by name templates:

    Rule("transformer.h.{layer}.attn.qkv.{p}",
         ("model.layers.{layer}.self_attn.q_proj.{p}", "...k_proj.{p}", "...v_proj.{p}"), Concat(qkv_sizes))

`{p}` stands for `weight` and `bias`; any other placeholder for a number. A rule may name tensors that a model does not
have (biases): what must be there follows from the model itself, not from the table. Where `{expert}` stands on our side
alone, theirs holds all experts in one tensor. A transform is a pair of inverse functions between the two sides, exact
to the bit.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from litgpt.checkpoint import Release
from litgpt.config import Config

Named = tuple[str, Tensor]
EXPERT = "{expert}"


class Transform(Protocol):
    """Two inverse functions between the tensors of one rule. They also work on the meta device, for shapes alone."""

    def to_ours(self, theirs: Sequence[Tensor], config: Config) -> list[Tensor]: ...

    def to_theirs(self, ours: Sequence[Tensor], config: Config) -> list[Tensor]: ...


class Same:
    """One tensor, the same on both sides."""

    def to_ours(self, theirs: Sequence[Tensor], config: Config) -> list[Tensor]:
        return list(theirs)

    def to_theirs(self, ours: Sequence[Tensor], config: Config) -> list[Tensor]:
        return list(ours)


@dataclass(frozen=True)
class Concat:
    """Several tensors of theirs are one of ours, one below the other.

    `sizes` gives the number of rows of each from the configuration.
    """

    sizes: Callable[[Config], tuple[int, ...]]

    def to_ours(self, theirs: Sequence[Tensor], config: Config) -> list[Tensor]:
        return [concatenate(theirs)]

    def to_theirs(self, ours: Sequence[Tensor], config: Config) -> list[Tensor]:
        return list(ours[0].split(self.sizes(config)))


@dataclass(frozen=True)
class Reverse:
    """Another transform with the sides exchanged."""

    transform: Transform

    def to_ours(self, theirs: Sequence[Tensor], config: Config) -> list[Tensor]:
        return self.transform.to_theirs(theirs, config)

    def to_theirs(self, ours: Sequence[Tensor], config: Config) -> list[Tensor]:
        return self.transform.to_ours(ours, config)


class InterleavedQKV:
    """Theirs holds for each key/value group its queries, its key and its value; ours all queries, keys, values.

    With R = H / G + 2 blocks of D rows a group, theirs is (G, R, D, ...) and ours the same rows in the order q, k, v.
    """

    def to_ours(self, theirs: Sequence[Tensor], config: Config) -> list[Tensor]:
        queries, groups, size = config.n_head // config.n_query_groups, config.n_query_groups, config.head_size
        rows = theirs[0].unflatten(0, (groups, queries + 2, size))
        return [concatenate([part.flatten(0, 2) for part in rows.split((queries, 1, 1), dim=1)])]

    def to_theirs(self, ours: Sequence[Tensor], config: Config) -> list[Tensor]:
        groups, size = config.n_query_groups, config.head_size
        parts = [part.unflatten(0, (groups, -1, size)) for part in ours[0].split(qkv_sizes(config))]
        return [concatenate(parts, dim=1).flatten(0, 2)]


def concatenate(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`. On the meta device the shape alone is made: torch.cat would import torch's compiler (2 s)."""
    first = parts[0]
    if not first.is_meta:
        return torch.cat(list(parts), dim)
    dim %= first.dim()
    size = sum(part.shape[dim] for part in parts)
    return first.new_empty((*first.shape[:dim], size, *first.shape[dim + 1 :]))


def stack(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.stack`, on the meta device by the shape alone, as `join`."""
    parts = [part.unsqueeze(dim) for part in parts]
    return concatenate(parts, dim)


def gate_sizes(config: Config) -> tuple[int, int]:
    """Rows of the gate and of the linear half where theirs holds both, one below the other."""
    return config.intermediate_size, config.intermediate_size


def qkv_sizes(config: Config) -> tuple[int, int, int]:
    """Rows of queries, keys and values in `attn.qkv`."""
    keys = config.n_query_groups * config.head_size
    return config.n_head * config.head_size, keys, keys


@dataclass(frozen=True)
class Rule:
    """Tensors of ours that are made of tensors of theirs and the other way round. See the module's docstring.

    `when` says for which configurations; without it, for all.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    transform: Transform = Same()  # noqa: RUF009 - it has no state
    when: Callable[[Config], bool] = lambda config: True

    def side(self, ours: bool) -> tuple[str, ...]:
        """The name templates of one side."""
        names = self.ours if ours else self.theirs
        return (names,) if isinstance(names, str) else names

    @property
    def is_stacked(self) -> bool:
        """Whether theirs holds all experts in one tensor; our side is then every expert's, template by template."""
        return EXPERT in self.side(True)[0] and EXPERT not in self.side(False)[0]

    def names(self, ours: bool, kind: str, numbers: Sequence[str], config: Config) -> tuple[str, ...]:
        """The names of one side, placeholders filled with numbers that do not count the expert of a stacked rule."""
        if not (ours and self.is_stacked):
            return tuple(_fill(template, kind, numbers) for template in self.side(ours))
        experts = [str(expert) for expert in range(config.n_expert)]
        return tuple(_fill(template, kind, [*numbers, expert]) for template in self.side(True) for expert in experts)


class Family(NamedTuple):
    """Tensors of ours, those of theirs that they are made of, and the way between them."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform


@dataclass(frozen=True)
class RuleTable:
    """The rules of an architecture.

    Attributes:
        rules: They cover every tensor.
        ignored: Patterns of names in Hugging Face files that hold no weights (buffers saved by older versions).
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()

    def to_ours(self, tensors: Iterable[Named], config: Config, done: Release = lambda tensor: None) -> Iterator[Named]:
        """Renames and rearranges a stream of tensors in whatever order it comes.

        Pieces of a tensor wait, by reference, until all have come.

        Args:
            tensors: Hugging Face names and tensors.
            config: The shape of the model.
            done: Called with every tensor of the input when what was made of it has been consumed.

        Raises:
            ValueError: Names that no rule knows, or pieces that never came; all of them.
        """
        return self._translate(tensors, config, True, done)

    def to_theirs(
        self, tensors: Iterable[Named], config: Config, done: Release = lambda tensor: None
    ) -> Iterator[Named]:
        """The other direction of `to_ours`."""
        return self._translate(tensors, config, False, done)

    def family(self, name: str, config: Config, ours: bool) -> Family | None:
        """What a tensor is transformed together with; None for a name that no rule knows.

        Args:
            name: Our name of the tensor, or theirs.
            config: The shape of the model.
            ours: Whether the name is ours.
        """
        shape, numbers = _shape_of(name)
        rule, _, kind = _index([rule for rule in self.rules if rule.when(config)], ours).get(shape, (None, 0, ""))
        if rule is None:
            return None
        if rule.is_stacked and ours:
            numbers.pop()  # the expert's, which theirs does not have
        mine, theirs = (rule.names(side, kind, numbers, config) for side in (True, False))
        return Family(mine, theirs, rule.transform)

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of a Hugging Face file is none of the model's weights."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def _translate(
        self,
        tensors: Iterable[Named],
        config: Config,
        to_ours: bool,
        done: Release,
    ) -> Iterator[Named]:
        index = _index([rule for rule in self.rules if rule.when(config)], ours=not to_ours)
        pending: dict[tuple[str, ...], dict[int, Tensor]] = {}
        unknown = []
        for name, tensor in tensors:
            shape, numbers = _shape_of(name)
            rule, slot, kind = index.get(shape, (None, 0, ""))
            if rule is None:
                unknown.append(name)
                continue
            wanted = len(rule.side(not to_ours))
            if rule.is_stacked and not to_ours:
                *numbers, expert = numbers
                slot, wanted = slot * config.n_expert + int(expert), wanted * config.n_expert
            targets = rule.names(to_ours, kind, numbers, config)
            pieces = pending.setdefault(targets, {})
            pieces[slot] = tensor
            if len(pieces) < wanted:
                continue
            ordered = [piece for _, piece in sorted(pending.pop(targets).items())]
            transform = rule.transform.to_ours if to_ours else rule.transform.to_theirs
            yield from zip(targets, transform(ordered, config), strict=True)
            for piece in ordered:
                done(piece)
        if unknown or pending:
            lines = [f"no rule for {name}" for name in unknown]
            lines += [f"not all parts of {', '.join(targets)} are there" for targets in pending]
            raise ValueError("The weights do not fit the architecture:\n  " + "\n  ".join(lines))


def _index(rules: Sequence[Rule], ours: bool) -> dict[str, tuple[Rule, int, str]]:
    """Rules by the shape of each name on one side: `{p}` filled, other placeholders as `#`."""
    index = {}
    for rule in rules:
        for slot, template in enumerate(rule.side(ours)):
            for kind in ("weight", "bias") if "{p}" in template else ("",):
                index[re.sub(r"\{\w+\}", "#", template.replace("{p}", kind))] = (rule, slot, kind)
    return index


def _shape_of(name: str) -> tuple[str, list[str]]:
    """`a.12.b_1.weight` -> (`a.#.b_1.weight`, ["12"])."""
    parts = name.split(".")
    return ".".join("#" if part.isdigit() else part for part in parts), [part for part in parts if part.isdigit()]


def _fill(template: str, kind: str, numbers: Sequence[str]) -> str:
    # Placeholders come in the same order on both sides: layer, then expert.
    remaining = iter(numbers)
    return re.sub(r"\{\w+\}", lambda match: next(remaining), template.replace("{p}", kind))
