"""What is evaluated, and what an evaluation does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from litgpt.config import Config
from litgpt.evaluation.engines import RequestRunner
from litgpt.prompts import ChatTemplate, PromptStyle
from litgpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Evaluated:
    """A model that is loaded."""

    run: RequestRunner
    tokenizer: Tokenizer
    config: Config
    style: PromptStyle
    """Its prompt format."""
    name: str

    @property
    def template(self) -> str:
        """What makes its prompts, as results record it: the text of its chat template, or the name of a style."""
        if isinstance(self.style, ChatTemplate):
            return self.style.template
        return f"litgpt prompt style: {type(self.style).__name__}"


class Work(Protocol):
    """Something to be measured."""

    def results(self, model: Evaluated) -> dict[str, Any]:
        """The figures, in the form of lm-evaluation-harness."""

    def part(self) -> dict[str, Any] | None:
        """After an interruption: the figures of what is done; None where nothing is."""


def tell(text: str) -> None:
    """A line about the work, on stderr: stdout is for the figures."""
    print(text, file=sys.stderr, flush=True)


def chosen_style(style: PromptStyle, template: bool | str) -> PromptStyle:
    """A model's prompt format, with the chat template that the user names.

    Args:
        style: The format.
        template: Whether tasks are put in it; or the name of one of several templates.

    Raises:
        ValueError: There is no such template.
    """
    if isinstance(template, str):
        if not isinstance(style, ChatTemplate):
            raise ValueError(
                f"apply_chat_template={template} names a chat template, and the checkpoint has none. `true` puts "
                "tasks in the prompt format that it has."
            )
        return style.named(template)
    if not template and isinstance(style, ChatTemplate):
        tell("The checkpoint has a chat template; --apply_chat_template true puts tasks as conversations.")
    return style


def results_of(work: Sequence[Work], model: Evaluated) -> tuple[list[dict[str, Any]], KeyboardInterrupt | None]:
    """The results of what there is to do, and whether it was interrupted: then they are those of what is done."""
    parts = []
    for one in work:
        try:
            parts.append(one.results(model))
        except KeyboardInterrupt as interruption:
            tell("\nInterrupted. What is done is kept.")
            if (part := one.part()) is not None:
                parts.append(part)
            return parts, interruption
    return parts, None
