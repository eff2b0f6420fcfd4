"""What chat and text completions answer in OpenAI's API: whole, or as server-sent events."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from litgpt.generation.request import TokenLogprob
from litgpt.serving import tools
from litgpt.serving.async_engine import Answers, Piece
from litgpt.serving.event_stream import DONE, event
from litgpt.serving.schemas import ChatRequest, CompletionRequest, OpenAIRequest
from litgpt.serving.served import ServedModel

LEAST_LOGPROB = -9999.0  # JSON has no infinity
LONG = 1000  # tokens with log-probabilities, whose response takes a while to write


@dataclass
class PendingChoice:
    """One answer while it is gathered."""

    text: list[str] = field(default_factory=list)
    calls: list[tools.Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    stop_logprobs: list[TokenLogprob] = field(default_factory=list)


Body = TypeVar("Body", bound=OpenAIRequest)


class OpenAIResponse(Generic[Body]):
    """What chat and text completions differ in: the form of their parts.

    Args:
        model: What answers.
        answers: Its answers.
        body: The request.
    """

    prefix, whole_object, part_object = "", "", ""

    def __init__(self, model: ServedModel, answers: Answers, body: Body) -> None:
        self.model, self.answers, self.body = model, answers, body
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model.name}

    @property
    def usage(self) -> dict[str, Any]:
        prompt, generated = self.answers.prompt_tokens, self.answers.generated_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self.answers.cached_tokens},
        }

    async def whole(self) -> dict[str, Any]:
        """The response, when everything is there."""
        choices = [PendingChoice() for _ in self.answers.requests]
        async with contextlib.aclosing(self.parts()) as parts:
            async for index, new in parts:
                choice = choices[index]
                choice.text += new.text
                choice.calls += new.calls
                choice.logprobs += new.logprobs
                choice.prompt_logprobs += new.prompt_logprobs
                choice.stop_logprobs += new.stop_logprobs
                choice.finish_reason = new.finish_reason
        size = sum(len(choice.logprobs) + len(choice.prompt_logprobs) for choice in choices)
        if size < LONG:
            return self._whole(choices)
        return await self.answers.service.aside(lambda: self._whole(choices), size)

    def _whole(self, choices: Sequence[PendingChoice]) -> dict[str, Any]:
        return {
            **self.head,
            "object": self.whole_object,
            "choices": [self.choice(index, choice) for index, choice in enumerate(choices)],
            "usage": self.usage,
        }

    async def events(self, includes_usage: bool) -> AsyncGenerator[str, None]:
        """The response as server-sent events."""
        head = {**self.head, "object": self.part_object}
        usage = {"usage": None} if includes_usage else {}
        seen: set[int] = set()
        async with contextlib.aclosing(self.parts()) as parts:
            async for index, new in parts:
                for choice in self.deltas(index, new, index not in seen):
                    yield event({**head, "choices": [choice], **usage})
                seen.add(index)
        if includes_usage:
            yield event({**head, "choices": [], "usage": self.usage})
        yield DONE

    async def parts(self) -> AsyncGenerator[tuple[int, PendingChoice], None]:
        """What is new of which answer."""
        async with contextlib.aclosing(self.answers.pieces()) as pieces:
            async for piece in pieces:
                yield piece.index, self.part(piece)

    def part(self, piece: Piece) -> PendingChoice:
        text = [piece.text] if piece.text else []
        return PendingChoice(text, [], piece.logprobs, piece.finish_reason, piece.prompt_logprobs, piece.stop_logprobs)

    def choice(self, index: int, choice: PendingChoice) -> dict[str, Any]:
        """A whole choice."""
        raise NotImplementedError

    def deltas(self, index: int, new: PendingChoice, first: bool) -> list[dict[str, Any]]:
        """The choices of the events that say what is new."""
        raise NotImplementedError


class ChatResponse(OpenAIResponse[ChatRequest]):
    """A chat completion; `readers` find the calls in each answer, and are none where there are no tools."""

    prefix, whole_object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(
        self, model: ServedModel, answers: Answers, body: ChatRequest, readers: list[tools.CallReader]
    ) -> None:
        super().__init__(model, answers, body)
        self.readers = readers
        self.only_one = body.parallel_tool_calls is False

    def part(self, piece: Piece) -> PendingChoice:
        part = super().part(piece)
        if not self.readers:
            return part
        reader = self.readers[piece.index]
        had = reader.count
        found = [*reader.push(piece.text), *(reader.finish() if piece.finish_reason else ())]
        part.text = [one for one in found if isinstance(one, str)]
        part.calls = [one for one in found if isinstance(one, tools.Call)]
        if self.only_one:
            part.calls = part.calls[: max(0, 1 - had)]
        if part.finish_reason == "stop" and reader.count:
            part.finish_reason = "tool_calls"
        return part

    def choice(self, index: int, choice: PendingChoice) -> dict[str, Any]:
        content = "".join(choice.text)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            message["content"] = content or None
            message["tool_calls"] = [call.to_dict() for call in choice.calls]
        logprobs = {"logprobs": self._logprobs(choice.logprobs)}
        return {"index": index, "message": message, **logprobs, "finish_reason": choice.finish_reason}

    def deltas(self, index: int, new: PendingChoice, first: bool) -> list[dict[str, Any]]:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}] if first else []
        deltas += [{"content": text} for text in new.text]
        start = self.readers[index].count - len(new.calls) if new.calls else 0
        deltas += [{"tool_calls": [{"index": start + place, **call.to_dict()}]} for place, call in enumerate(new.calls)]
        choices: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if new.logprobs:
            if not choices or (first and len(choices) == 1):
                choices.append({"index": index, "delta": {"content": ""}, "finish_reason": None})
            choices[-1]["logprobs"] = self._logprobs(new.logprobs)
        if new.finish_reason:
            choices.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": new.finish_reason})
        return choices

    def _logprobs(self, logprobs: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        content = [
            {
                **self._token(one.token, one.logprob),
                "top_logprobs": [self._token(token, logprob) for token, logprob in one.top_logprobs],
            }
            for one in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.model.codec.tokenizer.token_bytes(token)
        return {
            "token": data.decode("utf-8", "replace"),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(data),
        }


class TextResponse(OpenAIResponse[CompletionRequest]):
    """A text completion; `echo` is what stands before each answer."""

    prefix, whole_object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: ServedModel, answers: Answers, body: CompletionRequest, echo: list[str]) -> None:
        super().__init__(model, answers, body)
        self.echo = echo
        self.offsets = [0] * len(echo)

    def choice(self, index: int, choice: PendingChoice) -> dict[str, Any]:
        return self._choice(index, choice, True)

    def deltas(self, index: int, new: PendingChoice, first: bool) -> list[dict[str, Any]]:
        return [self._choice(index, new, first)]

    def _choice(self, index: int, choice: PendingChoice, first: bool) -> dict[str, Any]:
        text = (self.echo[index] if first else "") + "".join(choice.text)
        logprobs = self._logprobs(index, choice, first) if self.body.logprobs is not None else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _logprobs(self, index: int, choice: PendingChoice, first: bool) -> dict[str, Any]:
        written: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

        def write(token: int, width: int, known: TokenLogprob | None) -> None:
            written["tokens"].append(self._text(token))
            written["token_logprobs"].append(None if known is None else max(known.logprob, LEAST_LOGPROB))
            written["top_logprobs"].append(None if known is None else self._likeliest(known))
            written["text_offset"].append(self.offsets[index])
            self.offsets[index] += width

        if first and self.body.echo:
            echo, prompt = self.echo[index], self.answers.requests[index].prompt
            for token, known in zip(prompt, [None, *choice.prompt_logprobs], strict=True):
                text = self._text(token)
                # What a tokenizer puts before a text is no part of it.
                is_seen = not self.model.codec.tokenizer.is_control(token) or echo.startswith(text, self.offsets[index])
                write(token, len(text) if is_seen else 0, known)
            self.offsets[index] = len(echo)
        for known in choice.logprobs:
            write(known.token, len(self._text(known.token)), known)
        for known in choice.stop_logprobs:
            write(known.token, 0, known)
        return written

    def _likeliest(self, known: TokenLogprob) -> dict[str, float]:
        """With the token itself, which need not be one of them; of tokens of one text the likeliest."""
        found: dict[str, float] = {}
        for token, logprob in (*known.top_logprobs, (known.token, known.logprob)):
            found.setdefault(self._text(token), max(logprob, LEAST_LOGPROB))
        return found

    def _text(self, token: int) -> str:
        return self.model.codec.tokenizer.token_bytes(token).decode("utf-8", "replace")
