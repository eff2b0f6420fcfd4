"""Answers that keep to a grammar or a JSON schema, by llguidance (https://github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litgpt.serving.json_schema import allows_something
from litgpt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

# Models write JSON with these spaces. Free white space invites small ones to write nothing else.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_rule(schema: Mapping[str, Any]) -> str:
    """The right side of a rule that matches what a JSON schema describes.

    Raises:
        ValueError: that is nothing.
    """
    try:
        if not allows_something(schema):
            raise ValueError(
                "No value keeps to the schema: it refers to itself without a way out, or asks for one of nothing."
            )
    except RecursionError:
        raise ValueError("The schema is not valid: it is too deep.") from None
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})


class Grammars:
    """Makes constraints for one tokenizer.

    Args:
        tokenizer: The model's.
        stops: Token sequences that end an answer; single tokens may come where the grammar may end.

    Raises:
        ValueError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[Sequence[int]]) -> None:
        try:
            import llguidance
        except ModuleNotFoundError as error:
            raise ValueError(
                "Answers in a given form need the Python package 'llguidance' on the server: "
                "pip install 'litgpt[all]' or pip install llguidance"
            ) from error
        self.library = llguidance
        self.size = tokenizer.vocab_size
        self.ends = [stop[0] for stop in stops if len(stop) == 1 and stop[0] < self.size]
        vocabulary = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, self.ends))
        self._tokenizer = llguidance.LLTokenizer(vocabulary, eos_token=self.ends or None)

    def constraint(self, lark: str) -> GrammarConstraint:
        """A constraint for one answer.

        Args:
            lark: The grammar in llguidance's form of Lark.

        Raises:
            ValueError: the grammar, or a schema in it, is not valid.
        """
        grammar = self.library.LLMatcher.grammar_from_lark(lark)
        matcher = self.library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"The schema is not valid: {' '.join(matcher.get_error().split())[:500]}")
        constraint = GrammarConstraint(matcher, self.size, self.ends)
        trial = constraint.copy()
        trial.mask()
        if trial.error:
            raise ValueError("The schema is not valid: no answer keeps to it.")
        return constraint


class GrammarConstraint:
    """Follows one answer. It never raises: the engine's other requests must not suffer."""

    def __init__(self, matcher: LLMatcher, size: int, ends: list[int]) -> None:
        self._matcher, self._size, self._ends = matcher, size, ends
        self._length = 0
        self.complete_at: int | None = None
        """How many tokens make a whole answer that nothing can be added to, once there are this many."""
        self.error = ""
        """Why the answer could not be followed further: it is too complex for the library's limits, or nothing can
        follow."""

    def copy(self) -> GrammarConstraint:
        """The same for another answer."""
        return GrammarConstraint(self._matcher.deep_copy(), self._size, self._ends)

    def mask(self) -> Tensor:
        """(V,) bool."""
        if not self._matcher.is_stopped():
            allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) != 0
            if not self._matcher.is_error() and allowed.any():
                return allowed[: self._size]
            self.error = self.error or "nothing can follow what was written"
        self._note_error()
        only_ends = torch.zeros(self._size, dtype=torch.bool)
        only_ends[self._ends] = True
        return only_ends

    def accept(self, token: int) -> None:
        self._length += 1
        if self.complete_at is None and not self.error:
            self._matcher.consume_token(token)
            self._note_error()
            if self._matcher.is_stopped():
                self.complete_at = self._length

    def _note_error(self) -> None:
        if not self.error and self._matcher.is_error():
            self.error = " ".join(self._matcher.get_error().split())[:200] or "unknown"
            self.complete_at = self.complete_at or self._length


class _Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.special_token_ids = [i for i in range(tokenizer.vocab_size) if tokenizer.is_control(i)]
        self.bos_token_id = tokenizer.bos_id
        if not ends:  # the library needs one: a token that the model does not have
            self.tokens.append(b"")
            self.special_token_ids.append(tokenizer.vocab_size)
        self.eos_token_id = ends[0] if ends else tokenizer.vocab_size

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode_ids(text, bos=False)
