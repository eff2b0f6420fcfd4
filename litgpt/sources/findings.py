"""What is found out about a checkpoint: as far as it can be read, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from litgpt.checkpoint import WEIGHTS, holds_adaptation_alone, is_peft_alone
from litgpt.checkpoint.names import LORA_WEIGHTS
from litgpt.config import Config
from litgpt.prompts import PromptStyle
from litgpt.sources.source import Source
from litgpt.tokenizer.tokenizer import Tokenizer

GROUPS = ("files", "config", "tokenizer", "weights")


@dataclass(frozen=True)
class Problem:
    """Something wrong, and what to do about it."""

    group: str
    """One of GROUPS"""
    message: str
    fails: bool = True
    """False: a warning, the checkpoint works"""
    details: tuple[str, ...] = ()
    """Where it is one problem with many faces (keys and shapes), each of them"""


@dataclass
class Findings:
    """A checkpoint as far as it can be read, and what is wrong with it."""

    path: Path
    problems: list[Problem] = field(default_factory=list)
    config: Config | None = None
    source: Source | None = None
    tokenizer: Tokenizer | None = None
    style: PromptStyle | None = None

    @property
    def valid(self) -> bool:
        return not any(problem.fails for problem in self.problems)

    @property
    def unchecked(self) -> dict[str, str]:
        """Groups that could not be looked at, since something else is wrong: why."""
        if self.source is not None:
            return {}
        if self.path.is_file():
            return dict.fromkeys(GROUPS[1:], "the file cannot be read")
        wrong = [group for group in ("files", "config") if self.failed(group)]
        return {} if not wrong else {"weights": f"the errors of {' and '.join(wrong)} stand before them"}

    @property
    def kind(self) -> str:
        """Whose format the weights are in, or what was learned on others."""
        if self.path.is_file():
            return "GGUF"
        if holds_adaptation_alone(self.path):
            return "PEFT" if is_peft_alone(self.path) else "LoRA" if (self.path / LORA_WEIGHTS).exists() else "adapter"
        return "litgpt" if (self.path / WEIGHTS).exists() else "Hugging Face"

    def fail(self, group: str, message: str, details: Iterable[str] = ()) -> None:
        self.problems.append(Problem(group, message, True, tuple(details)))

    def warn(self, group: str, message: str) -> None:
        self.problems.append(Problem(group, message, False))

    def failed(self, *groups: str) -> bool:
        return any(problem.fails and problem.group in groups for problem in self.problems)

    @contextmanager
    def catching(self, group: str) -> Generator[None]:
        """An error that a user can mend becomes a problem. Its indented lines are details."""
        try:
            yield
        except (ValueError, OSError) as error:
            lines = _message(error).splitlines()
            details = [line.strip() for line in lines if line.startswith("  ")]
            self.fail(group, " ".join(line for line in lines if not line.startswith("  ")), details)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: '{error.filename}'. Check its permissions, or download it again."
    return str(error)
