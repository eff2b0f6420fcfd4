"""Metrics of torchmetrics over generated answers and what they should have been: `--eval.metrics`.

torchmetrics takes seconds to import (it brings transformers along where that is installed), so that is done only when a
metric is asked for.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from litgpt.cli.classes import ClassChoice, parse_init_args, unknown_init_args
from litgpt.cli.hints import members
from litgpt.cli.suggest import did_you_mean
from litgpt.cli.values import instantiate
from litgpt.training.criterion import LOSS

if TYPE_CHECKING:
    from torchmetrics import Metric

OPTION = "eval.metrics"
PACKAGE = "torchmetrics.text"
# What every metric must cope with before a run starts: references, and answers unlike them, one of them empty.
TRIAL_REFERENCES = ["the cat sat on the mat", "all dogs bark", "some bird or other"]
TRIAL_ANSWERS = ["the mat was blue", "few dogs bark", ""]


@dataclass(frozen=True)
class Named:
    """What a short name stands for."""

    class_path: str
    init_args: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, str] | None = None
    """Which of the class's results to record, and as what; None for all, as they are called there"""


NAMED = {
    "exact_match": Named("litgpt.training.exact_match.ExactMatch", figures={"": "exact_match"}),
    "bleu": Named("torchmetrics.text.BLEUScore", figures={"": "bleu"}),
    # rougeLsum, among the class's defaults, is left out: it downloads a model that finds sentences.
    "rouge": Named(
        "torchmetrics.text.ROUGEScore",
        {"rouge_keys": ("rouge1", "rouge2", "rougeL")},
        {f"{key}_fmeasure": key for key in ("rouge1", "rouge2", "rougeL")},
    ),
}


class AnswerMetric:
    """One metric, made and tried out.

    Args:
        value: A name in NAMED, a class of torchmetrics.text, the dotted path of any class of torchmetrics' kind, or
            `{class_path: ..., init_args: ..., name: ...}`, where `name` is what its figure is called.

    Raises:
        ValueError: There is no such metric, its arguments are wrong, or it does not score texts by texts.
    """

    def __init__(self, value: str | dict[str, Any]) -> None:
        spec: dict[str, Any] = {"class_path": value} if isinstance(value, str) else dict(value)
        self.label, name = str(spec.pop("class_path", "")), spec.pop("name", None)
        init_args = dict(spec.pop("init_args", None) or {})
        if spec or not self.label:
            raise ValueError(
                f"{OPTION}={value}: a metric is a name, or a class_path with init_args and, if it is to be called "
                "otherwise than its class, a name."
            )
        named = NAMED.get(self.label)
        self._metric = self._made(named, init_args)
        self._nested = takes_several_references(self._metric)
        unlike, alike = (self._results(answers, TRIAL_REFERENCES) for answers in (TRIAL_ANSWERS, TRIAL_REFERENCES))
        figures = None if named is None else named.figures
        if name is not None:
            figures = {"": name}
        if figures is None:
            class_name = type(self._metric).__name__
            figures = {key: key or class_name for key in unlike}
        elif not figures.keys() <= unlike.keys():
            problem = "with these init_args it" if name is None else f"name {name} is for a single figure, but it"
            raise ValueError(f"{OPTION}={self.label}: {problem} gives {', '.join(unlike)}.")
        self._figures = figures
        said = self._metric.higher_is_better
        self.higher_is_better: dict[str, bool | None] = {
            # torchmetrics 1.9 says of WordInfoPreserved the contrary of what is true.
            name: None if said is None or (unlike[key] > alike[key] if said else unlike[key] < alike[key]) else said
            for key, name in figures.items()
        }
        """The names of its figures, and which values of them are the good ones; None where the class does not say, or
        says what scores of equal texts contradict"""

    def score(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Its figures over all of the answers."""
        results = self._results(answers, references)
        return {name: results[key] for key, name in self._figures.items()}

    def _made(self, named: Named | None, given: dict[str, Any]) -> Metric:
        try:
            found = find_class(self.label if named is None else named.class_path)
            for problem in unknown_init_args(OPTION, found, given):
                name, _, what = problem.partition(":")
                raise ValueError(f"`{name}`:{what}")
            values, parser = parse_init_args(OPTION, found, given, defaults=False)
            init_args = values if isinstance(values, dict) else vars(instantiate(parser, values))
            return found(**{**({} if named is None else named.init_args), **init_args})
        except Exception as error:  # of any kind: the class may be anybody's, and may download something
            if isinstance(error, ValueError) and re.match(rf"(--|`)?{OPTION}", str(error)):
                raise
            raise ValueError(f"{OPTION}={self.label}: {one_line(error)}") from error

    def _results(self, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """What the class computes; a single number under an empty name."""
        self._metric.distributed_available_fn = lambda: False  # one rank has all texts, and computes alone
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._metric.reset()
                self._metric.update(list(answers), [[text] if self._nested else text for text in references])
                found = self._metric.compute()
                self._metric.reset()
            return {key: float(value) for key, value in (found if isinstance(found, dict) else {"": found}).items()}
        except Exception as error:
            raise ValueError(
                f"{OPTION}={self.label} does not score a list of texts by a list of texts: {one_line(error)}"
            ) from error


class AnswerMetrics:
    """All metrics of a run. Without any, torchmetrics is not imported.

    Args:
        values: As for `AnswerMetric`.
        figures: Names of what the run's loss gives besides itself.
    """

    def __init__(self, values: Sequence[str | dict[str, Any]], figures: Sequence[str] = ()) -> None:
        self.metrics = [AnswerMetric(value) for value in values]
        owners = dict.fromkeys((LOSS, *figures), "the run itself")
        for metric in self.metrics:
            for name in metric.higher_is_better:
                if name in owners:
                    raise ValueError(
                        f"`{OPTION}`: {metric.label} and {owners[name]} both have a figure called {name}. Give one of "
                        f"them another name: {{class_path: {metric.label}, name: another}}."
                    )
                owners[name] = metric.label

    @property
    def higher_is_better(self) -> dict[str, bool | None]:
        """The names of all figures, in order, and which values of them are the good ones; None where that is not
        certain."""
        return {name: value for metric in self.metrics for name, value in metric.higher_is_better.items()}

    def score(self, answers: Sequence[str], references: Sequence[str]) -> tuple[dict[str, float | None], list[str]]:
        """All figures; and what is wrong where a metric cannot deal with these texts, whose figures are None: no reason
        for a long run to end."""
        figures: dict[str, float | None] = {}
        problems: list[str] = []
        for metric in self.metrics:
            try:
                figures |= metric.score(answers, references)
            except ValueError as error:
                problems.append(str(error))
                figures |= dict.fromkeys(metric.higher_is_better)
        return figures, problems


def metric_class() -> type[Metric]:
    """What all metrics are subclasses of.

    Raises:
        ValueError: torchmetrics is not installed.
    """
    try:
        from torchmetrics import Metric
    except ImportError as error:
        raise ValueError(
            f"`{OPTION}` needs the package torchmetrics: pip install torchmetrics (or 'litgpt[all]')."
        ) from error
    return Metric


def find_class(name: str) -> type[Metric]:
    """A class by its name in torchmetrics.text or its dotted path."""
    choice = ClassChoice(PACKAGE, metric_class())
    if "." in name:
        return choice.resolve(name)[1]
    known = [*NAMED, *choice.names()]
    if name not in known:
        raise ValueError(
            f"{OPTION}={name} is unknown.{did_you_mean(name, known)} Choose from {', '.join(known)}, or give the "
            "dotted path of a class of torchmetrics' kind."
        )
    return choice.resolve(name)[1]


def takes_several_references(metric: Metric) -> bool:
    """Whether each answer is compared with a list of references, as BLEU's are, rather than with a single text.

    The class says so in its type hints. One of the two forms in place of the other may go without an error, and give
    nonsense.
    """
    try:
        hint = get_type_hints(type(metric).update).get("target")
    except (NameError, TypeError):  # hints for type checkers only
        return False
    entries = [entry for member in members(hint) for part in get_args(member)[:1] for entry in members(part)]
    return bool(entries) and str not in entries


def one_line(error: Exception) -> str:
    """An error's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
