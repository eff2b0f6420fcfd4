"""What `--eval.metrics` and `--eval.best_by` take: names, classes, what is wrong with them, which values are the good ones."""

import re
import typing

import pytest
import torchmetrics.text
from torchmetrics import Metric

from litgpt.training.answer_metrics import AnswerMetric, AnswerMetrics
from litgpt.training.arguments import EvalArgs
from litgpt.training.criterion import Criterion, choose_criterion
from litgpt.training.preference import PreferenceLoss
from litgpt.training.state import Progress

REFERENCES = ["the cat sat on the mat", "all dogs bark", "yes"]
ANSWERS = ["the cat sat on a mat", " all dogs bark\n", "no"]
# What needs a model from the Hub, or something else than two lists of texts.
OTHERS = {"BERTScore", "InfoLM", "Perplexity", "SQuAD", "ROUGEScore"}


class Picky(Metric):
    """Scores no text with a question mark."""

    def update(self, preds: list[str], target: list[str]) -> None:
        if any("?" in text for text in preds):
            raise TypeError("no\nquestions")

    def compute(self) -> float:
        return 1.0


def test_exact_match_leaves_out_white_space_around_a_text():
    assert AnswerMetric("exact_match").score(ANSWERS, REFERENCES) == {"exact_match": pytest.approx(1 / 3)}


def test_bleu_and_rouge_are_those_of_torchmetrics():
    bleu = torchmetrics.text.BLEUScore()
    bleu.update(ANSWERS, [[text] for text in REFERENCES])
    assert AnswerMetric("bleu").score(ANSWERS, REFERENCES) == {"bleu": float(bleu.compute())}
    rouge = torchmetrics.text.ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL"))
    rouge.update(ANSWERS, REFERENCES)
    expected = {name: float(rouge.compute()[f"{name}_fmeasure"]) for name in ("rouge1", "rouge2", "rougeL")}
    assert AnswerMetric("rouge").score(ANSWERS, REFERENCES) == expected
    assert 0 < expected["rougeL"] < 1


@pytest.mark.parametrize("name", sorted(set(torchmetrics.text.__all__) - OTHERS))
def test_every_class_gets_references_in_the_form_that_it_wants(name):
    """Of the two forms, one of them in place of the other often goes without an error, and gives nonsense: texts that
    equal their references must get the best value there is."""
    metric = AnswerMetric(name)
    (best,) = metric.score(REFERENCES, REFERENCES).values()
    (other,) = metric.score(ANSWERS, REFERENCES).values()
    higher_is_better = best > other
    assert best == pytest.approx(float(higher_is_better), abs=0.03)  # not quite 0: ExtendedEditDistance
    # torchmetrics 1.9 says that the best value of this one is the lowest.
    expected = None if name == "WordInfoPreserved" else higher_is_better
    assert metric.higher_is_better == {name: expected}


def test_classes_with_arguments():
    spec = {"class_path": "torchmetrics.text.BLEUScore", "init_args": {"n_gram": 1}}
    assert AnswerMetric(spec).score(["a b"], ["a c"]) == {"BLEUScore": 0.5}
    assert AnswerMetric({**spec, "name": "unigrams"}).score(["a b"], ["a c"]) == {"unigrams": 0.5}
    rouge = {"class_path": "ROUGEScore", "init_args": {"rouge_keys": ["rouge1"]}}  # a tuple, in YAML's words
    assert list(AnswerMetric(rouge).higher_is_better) == ["rouge1_fmeasure", "rouge1_precision", "rouge1_recall"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("ruge", "eval.metrics=ruge is unknown. Did you mean 'rouge'? Choose from exact_match, bleu, rouge, "),
        ("torchmetrics.text.CHRFScor", "Did you mean 'CHRFScore'?"),
        ("nowhere.Metric", "There is no module 'nowhere'"),
        ("torch.nn.Linear", "is not a subclass of Metric"),
        ("SQuAD", "eval.metrics=SQuAD does not score a list of texts by a list of texts: "),
        ("torchmetrics.classification.MulticlassExactMatch", "--eval.metrics.num_classes is missing"),
        ({"class_path": "bleu", "init_args": {"ngram": 2}}, "BLEUScore has no such setting. Did you mean 'n_gram'?"),
        (
            {"class_path": "BLEUScore", "init_args": {"n_gram": "two"}},
            "--eval.metrics.n_gram: expected an integer, got 'two'.",
        ),
        ({"class_path": "BLEUScore", "n_gram": 2}, "a metric is a name, or a class_path with init_args"),
        ({"class_path": "rouge", "name": "r"}, "name r is for a single figure, but it gives rouge1_fmeasure, "),
    ],
)
def test_wrong_metrics_are_named(value, message):
    with pytest.raises(ValueError) as error:
        AnswerMetric(value)
    assert re.match(r"(--|`)?eval\.metrics", str(error.value))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_two_figures_of_one_name_are_refused():
    twice = [{"class_path": "BLEUScore", "init_args": {"n_gram": n}} for n in (2, 4)]
    with pytest.raises(ValueError, match="both have a figure called BLEUScore"):
        AnswerMetrics(twice)
    with pytest.raises(ValueError, match="bleu and the run itself both have a figure called loss"):
        AnswerMetrics([{"class_path": "bleu", "name": "loss"}])
    for figure in PreferenceLoss.figures:
        named = [{"class_path": "bleu", "name": figure}]
        with pytest.raises(ValueError, match=f"bleu and the run itself both have a figure called {figure}"):
            AnswerMetrics(named, figures=PreferenceLoss.figures)
        AnswerMetrics(named)
    assert list(AnswerMetrics([twice[0], {**twice[1], "name": "four"}]).higher_is_better) == ["BLEUScore", "four"]


def test_texts_that_cannot_be_scored_are_no_reason_to_end_a_run():
    metrics = AnswerMetrics(["exact_match", f"{__name__}.Picky"])
    assert metrics.score(["yes"], ["yes"]) == ({"exact_match": 1.0, "Picky": 1.0}, [])
    figures, problems = metrics.score(["yes?"], ["yes"])
    assert figures == {"exact_match": 0.0, "Picky": None}
    assert problems == [
        f"eval.metrics={__name__}.Picky does not score a list of texts by a list of texts: no questions"
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("exact_match, rouge", ["exact_match", "rouge"]),
        ({"class_path": "BLEUScore"}, [{"class_path": "BLEUScore"}]),
        (["bleu"], ["bleu"]),
        (None, None),
    ],
)
def test_one_metric_needs_no_list(given: typing.Any, expected: typing.Any):
    assert EvalArgs(metrics=given).metrics == expected


def test_the_best_by_a_figure():
    known = {"exact_match": True, "WordErrorRate": False, "unsaid": None}
    assert choose_criterion("loss", {}) == Criterion("loss", False)
    highest, lowest = choose_criterion("exact_match", known), choose_criterion("WordErrorRate", known)
    assert (highest.column, lowest.column) == ("val_exact_match", "val_WordErrorRate")
    for criterion, values in ((highest, [0.5, 0.5, 0.75, 0.25]), (lowest, [0.5, 0.5, 0.25, 0.75])):
        progress = Progress()
        progress.judge_by(criterion)
        found = []
        for step, value in enumerate([None, float("nan"), *values]):
            progress.step = step
            found.append(progress.judge(value, criterion))
        assert found == [False, False, True, False, True, False]
        assert (progress.best_value, progress.best_step, progress.stale_validations) == (values[2], 4, 1)
        progress.judge_by(criterion)
        assert progress.best_step == 4
        progress.judge_by(Criterion())  # of a run that is resumed with another figure, nothing was the best yet
        assert (progress.best_by, progress.best_value, progress.best_step, progress.stale_validations) == (
            *("loss", None, None, 0),
        )
    with pytest.raises(ValueError, match=r"eval\.best_by=exactmatch: .* Did you mean 'exact_match'\?"):
        choose_criterion("exactmatch", known)
    with pytest.raises(ValueError, match=r"eval\.best_by=unsaid: it is not certain which values are the good ones"):
        choose_criterion("unsaid", known)
