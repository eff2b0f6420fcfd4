"""How likely a model finds given tokens: many requests at once, in an order that reads what they share once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from litgpt.evaluation.engines import RequestRunner
from litgpt.generation.request import Output, Request, TokenLogprob

BEGINNING = 32  # tokens that tell whether sequences begin alike


class Scored(NamedTuple):
    """One sequence whose last tokens are to be scored."""

    tokens: list[int]
    """All of them, at most one more than the model's context."""
    start: int
    """The first that is scored; 1 or more."""


def score(
    run: RequestRunner, sequences: Sequence[Scored], on_prefill: Callable[[int, float], None] | None = None
) -> Iterator[tuple[int, list[TokenLogprob]]]:
    """The log-probabilities of the tokens that are asked for, with the likeliest token in the place of each.

    Sequences that differ in their last token alone (A, B, C or D) are one request.

    Args:
        run: Answers requests.
        sequences: What to score.
        on_prefill: Called with the index of a sequence and the share of it that the model has seen, after each chunk
            of a long one.

    Yields:
        The index of a sequence and its tokens' log-probabilities, in the order in which they come.
    """
    together: dict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    for index, (tokens, start) in enumerate(sequences):
        together[(*tokens[:-1],), start].append(index)
    groups = list(together.values())
    order = reading_order([sequences[group[0]] for group in groups])
    groups = [groups[place] for place in order]
    requests = []
    for first, *others in groups:
        tokens, start = sequences[first]
        alternatives = [sequences[other].tokens[-1] for other in others]
        request = Request(tokens, 0, logprobs=1, score_from=start, alternatives=alternatives)
        request.reports_prefill = on_prefill is not None
        requests.append(request)

    def take(index: int, output: Output) -> tuple[tuple[int, Output], bool]:
        return (index, output), False

    for place, output in run(requests, take):
        first, *others = groups[place]
        if output.num_prefilled is not None:
            assert on_prefill is not None
            on_prefill(first, output.num_prefilled / requests[place].num_to_prefill)
            continue
        logprobs = output.prompt_logprobs
        count = len(sequences[first].tokens) - sequences[first].start
        yield first, logprobs[:count]
        for other, last in zip(others, logprobs[count:], strict=True):
            yield other, [*logprobs[: count - 1], last]


def reading_order(sequences: Sequence[Scored]) -> list[int]:
    """The places of some sequences in the order in which they are best read.

    Those with the same context (all before the scored tokens) follow each other; contexts that begin alike, with the
    same examples, follow each other; otherwise the longest come first, so that those of a batch are alike in length,
    the time left is not underestimated, and too little memory shows at once.
    """
    contexts = [(*tokens[:start],) for tokens, start in sequences]
    shared = Counter(context[:BEGINNING] for context in set(contexts))

    def cluster(context: tuple[int, ...]) -> tuple[int, ...]:
        beginning = context[:BEGINNING]
        return beginning if len(beginning) == BEGINNING and shared[beginning] > 1 else ()

    longest: dict[tuple[int, ...], int] = defaultdict(int)
    for context in contexts:
        longest[cluster(context)] = max(longest[cluster(context)], len(context))

    def key(place: int) -> tuple:
        context = contexts[place]
        return -longest[cluster(context)], cluster(context), -len(context), context, -len(sequences[place].tokens)

    return sorted(range(len(sequences)), key=key)
