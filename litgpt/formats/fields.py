"""Pieces of the map between Hugging Face's `config.json` and `Config`, each read in both directions.

Whatever in a `config.json` changes the mathematics is either mapped by one of these or refused by name. What remains
(token ids, dropout, initialisation, versions) has no effect on what a model computes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from litgpt.cli.untrusted import shown
from litgpt.config import Config

REQUIRED = object()
HFConfig = dict[str, Any]


class ConfigField(Protocol):
    """One entry of an architecture's map."""

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        """Values of `Config` fields. Raises `ValueError` naming what is missing or not supported."""

    def write(self, config: Config) -> HFConfig:
        """Entries of `config.json`. Raises `ValueError` naming what cannot be said there."""


@dataclass(frozen=True)
class Field:
    """One value under two names. A null or absent entry means `default`, which may be computed from the others.

    `to_ours` and `to_theirs` are inverse functions, where the two sides count differently.
    """

    ours: str
    theirs: str
    default: Any = REQUIRED
    to_ours: Callable[[Any], Any] = lambda value: value
    to_theirs: Callable[[Any], Any] = lambda value: value

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        value = theirs.get(self.theirs)
        if value is None:
            if self.default is REQUIRED:
                raise ValueError(f"it lacks '{self.theirs}'")
            try:
                value = self.default(theirs) if callable(self.default) else self.default
            except (KeyError, TypeError):
                return {}  # what it follows from is missing, which its own field reports
        return {self.ours: None if value is None else self.to_ours(value)}

    def write(self, config: Config) -> HFConfig:
        value = getattr(config, self.ours)
        return {self.theirs: None if value is None else self.to_theirs(value)}


@dataclass(frozen=True)
class Implied:
    """`Config` fields that the architecture itself says."""

    ours: dict[str, Any]

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        return dict(self.ours)

    def write(self, config: Config) -> HFConfig:
        wrong = [
            f"{name}={getattr(config, name)!r}" for name, value in self.ours.items() if getattr(config, name) != value
        ]
        if wrong:
            raise ValueError(f"it has no {', '.join(wrong)}")
        return {}


@dataclass(frozen=True)
class Choice:
    """Entries of `config.json` that allow only some combinations of values, each standing for `Config` fields.

    Attributes:
        keys: The entries, with the value that an absent one means.
        meanings: The `Config` fields for each combination; the first that fits is the one written.
    """

    keys: dict[str, Any]
    meanings: dict[tuple, dict[str, Any]]

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        given = tuple(default if theirs.get(key) is None else theirs[key] for key, default in self.keys.items())
        if given not in self.meanings:
            wanted = " or ".join(_pairs(self.keys, values) for values in self.meanings)
            raise ValueError(f"{_pairs(self.keys, given)} is not supported (only {wanted})")
        return dict(self.meanings[given])

    def write(self, config: Config) -> HFConfig:
        for values, meaning in self.meanings.items():
            if all(getattr(config, name) == value for name, value in meaning.items()):
                return dict(zip(self.keys, values, strict=True))
        names = dict.fromkeys(name for meaning in self.meanings.values() for name in meaning)
        raise ValueError(f"it has no {', '.join(f'{name}={getattr(config, name)!r}' for name in names)}")


def _pairs(keys: dict[str, Any], values: tuple) -> str:
    return " with ".join(f"{key}={shown(value)}" for key, value in zip(keys, values, strict=True))


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the embedding. How many of them the tokenizer uses, `config.json` does not say."""

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        rows = Field("padded_vocab_size", "vocab_size").read(theirs)["padded_vocab_size"]
        return {"vocab_size": rows, "padded_vocab_size": rows}

    def write(self, config: Config) -> HFConfig:
        return {"vocab_size": config.padded_vocab_size}


SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class SlidingWindow:
    """Which layers look only so far back, and how far.

    Attributes:
        size: The window where the entry is absent; null means that there is none.
        usual: Where `layer_types` is absent: whether a layer has the window, from `config.json` and its number.
        types: Whether the architecture knows `layer_types`; without, all layers are of one kind.
        switch: An entry that must be true for the window to be used.
    """

    size: int | None = None
    usual: Callable[[HFConfig, int], bool] = lambda theirs, layer: True
    types: bool = True
    switch: str | None = None

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        size = theirs.get("sliding_window", self.size)
        if self.switch is not None and not theirs.get(self.switch):
            size = None
        indices = self.layers(theirs)
        if size is None or not any(indices):
            return {"sliding_window_size": None, "sliding_window_indices": None}
        return {"sliding_window_size": size, "sliding_window_indices": indices}

    def layers(self, theirs: HFConfig) -> list[int]:
        """One entry per layer, 1 = sliding window."""
        types = theirs.get("layer_types") if self.types else None
        if types is None:
            return [int(self.usual(theirs, layer)) for layer in range(theirs.get("num_hidden_layers") or 0)]
        unknown = sorted(set(types) - {SLIDING, FULL})
        if unknown:
            raise ValueError(f"layer_types with {', '.join(unknown)} is not supported (only {SLIDING}, {FULL})")
        return [int(kind == SLIDING) for kind in types]

    def write(self, config: Config) -> HFConfig:
        size = config.sliding_window_size
        indices = (size is not None and config.sliding_window_indices) or [0] * config.n_layer
        theirs: HFConfig = {"sliding_window": size}
        if self.switch is not None:
            theirs[self.switch] = size is not None
        if self.types:
            theirs["layer_types"] = [SLIDING if sliding else FULL for sliding in indices]
        elif len(set(indices)) > 1:
            raise ValueError("it has no sliding window in some layers only")
        return theirs


# Ministral 3 repeats its context among the rope parameters.
_BESIDE_SCALING = ("rope_theta", "partial_rotary_factor", "max_position_embeddings")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate", "llama_4_scaling_beta")


@dataclass(frozen=True)
class Rope:
    """The rotary embedding, as `rope_theta` and `rope_scaling` or, since transformers 5, as `rope_parameters`.

    Attributes:
        theta: The base where none is given.
        theta_keys: Names of the base outside these dictionaries; the first is written.
        share: The share of a head that is rotated, where none is given.
        share_keys: Names of that share there; empty where the architecture rotates all of it.
        usual: What takes the place of these dictionaries where there are none.
        renamed: Rope types that mean another one.
    """

    theta: float = 10000
    theta_keys: tuple[str, ...] = ("rope_theta",)
    share: float = 1.0
    share_keys: tuple[str, ...] = ()
    usual: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        return self.read_one(self._given(theirs), theirs)

    def ignored(self, theirs: HFConfig) -> list[str]:
        """Names of entries that have no effect in the reference either."""
        return self.ignored_in(self._given(theirs), theirs)

    def _given(self, theirs: HFConfig) -> dict[str, Any]:
        given = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
        nested = [key for key, value in given.items() if isinstance(value, dict)]
        if nested:
            raise ValueError(f"rope_parameters of its own for {', '.join(nested)} is not supported")
        return given or dict(self.usual)

    def read_one(self, given: dict[str, Any], theirs: HFConfig) -> dict[str, Any]:
        """The fields that one dictionary of rope parameters, and what stands next to it, mean."""
        outside = {key: theirs[key] for key in (*self.theta_keys, *self.share_keys) if theirs.get(key) is not None}
        theta = _first(("rope_theta",), given) or _first(self.theta_keys, outside) or self.theta
        share = (
            _first(("partial_rotary_factor",), {**theirs, **given}) or _first(self.share_keys, outside) or self.share
        )
        if not self.share_keys and share != 1:
            raise ValueError(f"partial_rotary_factor={share} is not supported")
        scaling, _ = self._read_scaling(given, theirs)
        return {"rope_base": _whole(theta), "rotary_percentage": float(share), **scaling}

    def ignored_in(self, given: dict[str, Any], theirs: HFConfig) -> list[str]:
        """As `ignored`, of one dictionary of rope parameters."""
        return self._read_scaling(given, theirs)[1]

    def _read_scaling(self, given: dict[str, Any], theirs: HFConfig) -> tuple[dict[str, Any], list[str]]:
        """What stretches the context, and the names of what is not read."""
        given = {key: value for key, value in given.items() if value is not None and key not in _BESIDE_SCALING}
        # It may be there under both names, of which the reference goes by the newer one.
        kind, older = (self.renamed.get(x, x) for x in (given.pop("rope_type", None), given.pop("type", None)))
        ignored = ["type"] if None not in (kind, older) and kind != older else []
        kind = kind or older or "default"
        fields: dict[str, Any] = {"rope_condense_ratio": 1, "rope_adjustments": None}
        if kind == "linear":
            fields["rope_condense_ratio"] = _whole(_take(given, "factor", kind))
        elif kind in _READERS:
            fields["rope_adjustments"] = _READERS[kind](given, theirs)
        elif kind != "default":
            raise ValueError(f"rope type '{kind}' is not supported (only default, linear, {', '.join(_READERS)})")
        given.pop("original_max_position_embeddings", None)
        return fields, [*ignored, *given]

    def write(self, config: Config) -> HFConfig:
        # The older spelling: transformers 4 and 5, and the other readers of config.json, all know it.
        theirs: HFConfig = {self.theta_keys[0]: float(config.rope_base), "rope_scaling": self.write_scaling(config)}
        if config.rope_kind == "longrope" and config.rope_adjustments:  # where Phi 3 looks first
            theirs["original_max_position_embeddings"] = config.rope_adjustments["original_max_seq_len"]
        if self.share_keys:
            theirs[self.share_keys[0]] = config.rotary_percentage
        elif config.rotary_percentage != 1:
            raise ValueError(f"it has no rotary_percentage={config.rotary_percentage}")
        return theirs

    def write_scaling(self, config: Config) -> dict[str, Any] | None:
        """What stretches the context, as one dictionary."""
        adjustments = config.rope_adjustments
        if adjustments is None or config.rope_kind == "linear":
            factor = config.rope_condense_ratio * (adjustments or {"factor": 1})["factor"]
            if factor == 1:
                return {"rope_type": "default"} if self.usual else None
            return {"rope_type": "linear", "type": "linear", "factor": float(factor)}
        if config.rope_condense_ratio != 1:
            raise ValueError("it has no rope_condense_ratio together with rope_adjustments")
        theirs = {_THEIRS.get(key, key): value for key, value in adjustments.items()}
        return {"rope_type": config.rope_kind, "type": config.rope_kind, **theirs}


@dataclass(frozen=True)
class RopeByLayer:
    """A rotary embedding for the layers that see everything and, without any stretching, one for those with a window.

    Attributes:
        full: The former.
        windows: Which layers are the latter.
        theta_key: The name of their base in the older spelling; there, without one, it is that of the others.
        theta: Their base where none is given.
    """

    full: Rope
    windows: SlidingWindow
    theta_key: str | None = None
    theta: float = 10000

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        full, local = self._given(theirs)
        fields = self.full.read_one(full, theirs)
        theta = local.get("rope_theta") or (
            theirs.get(self.theta_key) or self.theta if self.theta_key else fields["rope_base"]
        )
        kind = local.get("rope_type") or local.get("type") or "default"
        if kind != "default":
            raise ValueError(f"rope type '{kind}' of layers with a window is not supported")
        indices = self.windows.layers(theirs)
        differ = any(indices) and (theta, 1, None) != (
            fields["rope_base"],
            fields["rope_condense_ratio"],
            fields["rope_adjustments"],
        )
        if not differ:
            return fields | {"rope_local_base_freq": None, "rope_indices": None}
        if fields["rope_condense_ratio"] != 1:  # which says nothing about whom it is for; adjustments are for rope_base
            fields |= {"rope_condense_ratio": 1, "rope_adjustments": {"factor": float(fields["rope_condense_ratio"])}}
        return fields | {"rope_local_base_freq": float(theta), "rope_indices": indices}

    def ignored(self, theirs: HFConfig) -> list[str]:
        """Names of entries that have no effect in the reference either."""
        full, local = self._given(theirs)
        return list(dict.fromkeys((*self.full.ignored_in(full, theirs), *self.full.ignored_in(local, theirs))))

    def _given(self, theirs: HFConfig) -> tuple[dict[str, Any], dict[str, Any]]:
        """The rope parameters of the layers that see everything, and of those with a window."""
        nested = theirs.get("rope_parameters") or {}
        if FULL not in nested and SLIDING not in nested:
            nested = {FULL: nested}
        return {**(theirs.get("rope_scaling") or {}), **(nested.get(FULL) or {})}, dict(nested.get(SLIDING) or {})

    def write(self, config: Config) -> HFConfig:
        theirs = self.full.write(config)
        theta = config.rope_base if config.rope_local_base_freq is None else config.rope_local_base_freq
        scaling = theirs["rope_scaling"] or {"rope_type": "default"}
        share = {"partial_rotary_factor": config.rotary_percentage} if self.full.share_keys else {}
        theirs["rope_parameters"] = {
            FULL: {"rope_theta": float(config.rope_base), **scaling, **share},
            SLIDING: {"rope_theta": float(theta), "rope_type": "default", **share},
        }
        return theirs | ({self.theta_key: float(theta)} if self.theta_key else {})


def _read_llama3(given: dict[str, Any], theirs: HFConfig) -> dict[str, Any]:
    return {_OURS.get(key, key): _take(given, key, "llama3") for key in _LLAMA3}


def _read_yarn(given: dict[str, Any], theirs: HFConfig) -> dict[str, Any]:
    original = _original_context(given, theirs)
    factor = given.pop("factor", None) or theirs["max_position_embeddings"] / original
    adjustments = {"factor": factor, "original_max_seq_len": original}
    adjustments.update({"beta_fast": 32, "beta_slow": 1})  # the values an absent entry means, as in the paper
    return adjustments | {key: given.pop(key) for key in _YARN if key in given}


def _read_longrope(given: dict[str, Any], theirs: HFConfig) -> dict[str, Any]:
    """The magnitude follows from how much longer the context became (https://arxiv.org/abs/2402.13753)."""
    original = _original_context(given, theirs)
    factor = given.pop("factor", None) or theirs["max_position_embeddings"] / original
    magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    divisors = {key: _take(given, key, "longrope") for key in ("short_factor", "long_factor")}
    return {
        **divisors,
        "original_max_seq_len": original,
        "attention_factor": given.pop("attention_factor", None) or magnitude,
    }


def _original_context(given: dict[str, Any], theirs: HFConfig) -> int:
    """Of the two places it may stand in, the one outside wins, as in transformers."""
    inside = given.pop("original_max_position_embeddings", None)
    return theirs.get("original_max_position_embeddings") or inside or theirs["max_position_embeddings"]


_READERS = {"llama3": _read_llama3, "yarn": _read_yarn, "longrope": _read_longrope}
_OURS = {"original_max_position_embeddings": "original_max_seq_len"}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}


def _take(given: dict[str, Any], key: str, kind: str) -> Any:
    if key not in given:
        raise ValueError(f"rope type '{kind}' needs '{key}'")
    return given.pop(key)


def _first(keys: tuple[str, ...], values: dict[str, Any]) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _whole(number: float) -> int | float:
    return int(number) if float(number).is_integer() else number


@dataclass(frozen=True)
class Unsupported:
    """Entries that must be absent, null or one of the values given, as nothing here computes what they ask for."""

    allowed: dict[str, tuple] = field(default_factory=dict)

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        for key, values in self.allowed.items():
            if theirs.get(key) is not None and theirs[key] not in values:
                raise ValueError(f"{key}={shown(theirs[key])} is not supported")
        return {}

    def write(self, config: Config) -> HFConfig:
        return {}
