"""Pieces of the map between Hugging Face's `config.json` and `Config`, each read in both directions.

Whatever in a `config.json` changes the mathematics is either mapped by one of these or refused by name. What remains
(token ids, dropout, initialisation, versions) has no effect on what a model computes.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

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
    """The same value under two names. A null or absent entry means `default`, which may be computed from the others."""

    ours: str
    theirs: str
    default: Any = REQUIRED

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        value = theirs.get(self.theirs)
        if value is None:
            if self.default is REQUIRED:
                raise ValueError(f"it lacks '{self.theirs}'")
            try:
                value = self.default(theirs) if callable(self.default) else self.default
            except (KeyError, TypeError):
                return {}  # what it follows from is missing, which its own field reports
        return {self.ours: value}

    def write(self, config: Config) -> HFConfig:
        return {self.theirs: getattr(config, self.ours)}


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
    return " with ".join(f"{key}={value!r}" for key, value in zip(keys, values, strict=True))


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the embedding. How many of them the tokenizer uses, `config.json` does not say."""

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        rows = Field("padded_vocab_size", "vocab_size").read(theirs)["padded_vocab_size"]
        return {"vocab_size": rows, "padded_vocab_size": rows}

    def write(self, config: Config) -> HFConfig:
        return {"vocab_size": config.padded_vocab_size}


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate")


@dataclass(frozen=True)
class Rope:
    """The rotary embedding, as `rope_theta` and `rope_scaling` or, since transformers 5, as `rope_parameters`.

    Attributes:
        theta_keys: Names of the base outside these dictionaries; the first is written.
        share_keys: Names of the rotated share of a head there; empty where the architecture rotates all of it.
        share: The share where none is given.
    """

    theta: float = 10000
    theta_keys: tuple[str, ...] = ("rope_theta",)
    share: float = 1.0
    share_keys: tuple[str, ...] = ()

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        given = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
        nested = [key for key, value in given.items() if isinstance(value, dict)]
        if nested:
            raise ValueError(f"rope_parameters of its own for {', '.join(nested)} is not supported")
        outside = {key: theirs[key] for key in (*self.theta_keys, *self.share_keys) if theirs.get(key) is not None}
        theta = _first(("rope_theta",), given) or _first(self.theta_keys, outside) or self.theta
        share = (
            _first(("partial_rotary_factor",), {**theirs, **given}) or _first(self.share_keys, outside) or self.share
        )
        if not self.share_keys and share != 1:
            raise ValueError(f"partial_rotary_factor={share} is not supported")
        scaling = {key: value for key, value in given.items() if key not in ("rope_theta", "partial_rotary_factor")}
        return {"rope_base": _whole(theta), "rotary_percentage": float(share), **self._read_scaling(scaling, theirs)}

    def _read_scaling(self, given: dict[str, Any], theirs: HFConfig) -> dict[str, Any]:
        kinds = {given.pop(key) for key in ("type", "rope_type") if key in given}
        kind = kinds.pop() if kinds else "default"
        fields: dict[str, Any] = {"rope_condense_ratio": 1, "rope_adjustments": None}
        if kinds or kind not in ("default", "linear", "llama3", "yarn"):
            names = ", ".join(sorted({kind, *kinds}))
            raise ValueError(f"rope type '{names}' is not supported (only default, linear, llama3, yarn)")
        given = {key: value for key, value in given.items() if value is not None}
        if kind == "linear":
            fields["rope_condense_ratio"] = _whole(_take(given, "factor", kind))
        elif kind == "llama3":
            fields["rope_adjustments"] = {_OURS.get(key, key): _take(given, key, kind) for key in _LLAMA3}
        elif kind == "yarn":
            fields["rope_adjustments"] = self._read_yarn(given, theirs)
        if given and kind != "default":
            raise ValueError(f"rope parameter '{', '.join(given)}' of rope type '{kind}' is not supported")
        return fields

    @staticmethod
    def _read_yarn(given: dict[str, Any], theirs: HFConfig) -> dict[str, Any]:
        original = given.pop("original_max_position_embeddings", None) or theirs.get("max_position_embeddings")
        adjustments = {"factor": _take(given, "factor", "yarn"), "original_max_seq_len": original}
        adjustments.update({"beta_fast": 32, "beta_slow": 1})  # the values an absent entry means, as in the paper
        return adjustments | {key: given.pop(key) for key in _YARN if key in given}

    def write(self, config: Config) -> HFConfig:
        # The older spelling: transformers 4 and 5, and the other readers of config.json, all know it.
        theirs: HFConfig = {self.theta_keys[0]: float(config.rope_base), "rope_scaling": self._write_scaling(config)}
        if self.share_keys:
            theirs[self.share_keys[0]] = config.rotary_percentage
        elif config.rotary_percentage != 1:
            raise ValueError(f"it has no rotary_percentage={config.rotary_percentage}")
        return theirs

    @staticmethod
    def _write_scaling(config: Config) -> dict[str, Any] | None:
        adjustments = config.rope_adjustments
        if adjustments is None or config.rope_kind == "linear":
            factor = config.rope_condense_ratio * (adjustments or {"factor": 1})["factor"]
            return None if factor == 1 else {"rope_type": "linear", "type": "linear", "factor": float(factor)}
        if config.rope_condense_ratio != 1:
            raise ValueError("it has no rope_condense_ratio together with rope_adjustments")
        theirs = {_THEIRS.get(key, key): value for key, value in adjustments.items()}
        return {"rope_type": config.rope_kind, "type": config.rope_kind, **theirs}


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
                raise ValueError(f"{key}={theirs[key]!r} is not supported")
        return {}

    def write(self, config: Config) -> HFConfig:
        return {}
