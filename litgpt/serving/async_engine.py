"""Requests on their way through the engine, seen from the event loop: pieces of text as they come."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from litgpt.generation.request import Output, Request, TokenLogprob
from litgpt.generation.text import TextStream
from litgpt.generation.worker import Ticket
from litgpt.serving.constraint import GrammarConstraint
from litgpt.serving.errors import ApiError, bad_request, engine_error
from litgpt.serving.request_log import count_tokens
from litgpt.serving.served import ServedModel
from litgpt.serving.service import Service
from litgpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """What is new of one answer."""

    index: int
    """Which of the answers."""
    text: str
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens whose text begins in this piece or before it."""
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the prompt's tokens from the second on, where they are asked for; with the first piece."""
    stop_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of the tokens that ended it, which have no text."""


class Answers:
    """Some answers that are generated together: the choices of one request.

    Args:
        service: The server's state.
        model: What answers.
        requests: One for each answer.
        prompts: How many different prompts they have, whose tokens count once for each.
        stops: Texts that end an answer.
        joins: The answer's text continues the prompt's.
        shown: Control tokens that are part of the text.
        param: The request's field that holds the prompt.
    """

    def __init__(
        self,
        service: Service,
        model: ServedModel,
        requests: Sequence[Request],
        *,
        prompts: int = 1,
        stops: Sequence[str] = (),
        joins: bool = False,
        shown: Sequence[int] = (),
        param: str = "prompt",
    ) -> None:
        self.service, self.model, self.requests, self.param = service, model, requests, param
        joins = joins or model.codec.style.continues_text
        self._texts = [
            AnswerText(model.codec.tokenizer, grammar_of(request), stops, request.prompt if joins else (), shown)
            for request in requests
        ]
        each = len(requests) // prompts
        self.prompt_tokens = sum(len(request.prompt) for request in requests[::each])
        self.cached_tokens = 0
        self.generated_tokens = 0
        self._each = each

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What comes, until all answers are finished. Closing it ends those that are not.

        Raises:
            ApiError: the request cannot be served, the queue is full, the time is up, or the engine failed.
        """
        service, loop = self.service, asyncio.get_running_loop()
        outputs: asyncio.Queue[tuple[int, Output | Exception]] = asyncio.Queue()
        began = time.monotonic()
        for request in self.requests:
            try:
                self.model.check(request)
            except ValueError as error:
                code = "context_length_exceeded" if len(request.prompt) >= self.model.context else "invalid_value"
                raise bad_request(error, self.param, code) from None
        service.enter(len(self.requests))
        left = len(self.requests)
        running: dict[int, Ticket] = {}

        def stop(error: ApiError) -> None:
            """Ends what is not finished, and says so after what has come."""
            _cancel(running)
            outputs.put_nowait((-1, error))

        # Not a bound on each wait: what has come before the end is given out, however slowly the client reads.
        end = loop.call_later(service.timeout, lambda: stop(self._time_is_up)) if service.timeout else None
        service.stops.add(stop)
        try:
            for index, request in enumerate(self.requests):
                deliver = _deliverer(loop, outputs, index)
                if request.does_nothing:
                    running[index] = Ticket(self.model.worker)
                    deliver(Output(-1, [], "length"))
                else:
                    running[index] = self.model.worker.submit(request, deliver)
            while running:
                index, output = await outputs.get()
                if isinstance(output, ApiError):
                    raise output
                if isinstance(output, Exception):
                    running.pop(index, None)
                    raise engine_error(output) from output
                if index not in running:
                    continue  # it was ended here, and the engine did not know yet
                self._count(index, output, began)
                piece = self._texts[index].take(output, index)
                if piece.finish_reason is not None:
                    ticket = running.pop(index)
                    if output.finish_reason is None:
                        ticket.cancel()
                    left -= 1
                    service.leave()
                    service.metrics.answers.labels(piece.finish_reason).inc()
                    service.metrics.duration.observe(time.monotonic() - began)
                if piece.text or piece.logprobs or piece.prompt_logprobs or piece.finish_reason:
                    yield piece
        except RuntimeError as error:  # the engine was shut down before all were handed in
            raise engine_error(error) from error
        finally:
            if end is not None:
                end.cancel()
            service.stops.discard(stop)
            _cancel(running)
            service.leave(left)

    @property
    def _time_is_up(self) -> ApiError:
        message = (
            f"The answer was not complete after {self.service.timeout:g} seconds, the server's limit for a request. "
            "Ask for fewer tokens, or try again when it is less busy."
        )
        return ApiError(504, message, code="timeout")

    def _count(self, index: int, output: Output, began: float) -> None:
        metrics, text = self.service.metrics, self._texts[index]
        if not text.begun:
            text.begun = True
            metrics.first_token.observe(time.monotonic() - began)
            if index % self._each == 0:
                self.cached_tokens += output.cached_tokens
                metrics.cached_tokens.inc(output.cached_tokens)
                metrics.prompt_tokens.inc(len(self.requests[index].prompt))
                count_tokens(prompt=len(self.requests[index].prompt))
        self.generated_tokens += len(output.token_ids)
        metrics.generated_tokens.inc(len(output.token_ids))
        count_tokens(generated=len(output.token_ids))


class AnswerText:
    """The text of one answer, with the log-probabilities of the tokens that are part of it."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        constraint: GrammarConstraint | None,
        stops: Sequence[str],
        after: Sequence[int],
        shown: Sequence[int],
    ) -> None:
        self.begun = False
        self._stream = TextStream(tokenizer, stops, after, shown)
        self._constraint = constraint
        self._tokens = 0
        self._length = 0  # characters given out
        self._waiting: list[tuple[int, TokenLogprob]] = []  # with the place where the token's text begins

    def take(self, output: Output, index: int) -> Piece:
        """The piece that the engine's output makes."""
        text, reason = "", output.finish_reason
        for place, token in enumerate(output.token_ids):
            start = self._length + len(text) + len(self._stream.held)
            text += self._stream.push([token])
            self._tokens += 1
            if self._stream.stopped:
                reason = "stop"
                break
            if output.logprobs:
                self._waiting.append((start, output.logprobs[place]))
            if self._constraint is not None and self._constraint.complete_at == self._tokens:
                reason = "stop"
                break
        if reason is not None and self._constraint is not None and self._constraint.error:
            message = f"The answer cannot keep to the schema: {self._constraint.error}."
            raise ApiError(400, message, param="response_format", code="invalid_value")
        if reason is not None:
            text += self._stream.finish()
            if self._stream.stopped:
                reason = "stop"
        self._length += len(text)
        whole = reason is not None and not self._stream.stopped
        known = [logprob for start, logprob in self._waiting if whole or start < self._length]
        self._waiting = [(start, logprob) for start, logprob in self._waiting if not whole and start >= self._length]
        return Piece(index, text, known, reason, output.prompt_logprobs, output.stop_logprobs)


def grammar_of(request: Request) -> GrammarConstraint | None:
    """What the answer keeps to: to an engine any constraint, in the server always a grammar."""
    assert request.constraint is None or isinstance(request.constraint, GrammarConstraint)
    return request.constraint


def several(request: Request, count: int) -> list[Request]:
    """The request this many times, each with a seed and a constraint of its own."""
    seed, grammar = request.sampling.seed, grammar_of(request)
    return [
        replace(
            request,
            sampling=request.sampling if seed is None else replace(request.sampling, seed=(seed + index) % 2**63),
            constraint=grammar and grammar.copy(),
        )
        for index in range(count)
    ]


def _cancel(running: Mapping[int, Ticket]) -> None:
    for ticket in running.values():
        ticket.cancel()


def _deliverer(
    loop: asyncio.AbstractEventLoop, outputs: asyncio.Queue[tuple[int, Output | Exception]], index: int
) -> Callable[[Output | Exception], None]:
    def deliver(output: Output | Exception) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
            loop.call_soon_threadsafe(outputs.put_nowait, (index, output))

    return deliver
