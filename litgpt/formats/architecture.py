"""What a Hugging Face architecture is to us: a map of its `config.json` and a map of its weights."""

from dataclasses import dataclass, field
from typing import Any

from litgpt.formats.fields import ConfigField
from litgpt.formats.rules import RuleTable


@dataclass(frozen=True)
class Architecture:
    """One row of `litgpt.formats.architectures`.

    Attributes:
        name: As in `architectures` of `config.json`.
        model_type: As in `model_type` there.
        config: The map between `config.json` and `Config`.
        weights: The map between the weights' names and layouts.
        defaults: What entries mean that a `config.json` of this architecture has, but the `text_config` of a multimodal
            one may leave out.
    """

    name: str
    model_type: str
    config: tuple[ConfigField, ...]
    weights: RuleTable
    defaults: dict[str, Any] = field(default_factory=dict)
