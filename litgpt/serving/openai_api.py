"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from litgpt.generation.request import Request as EngineRequest
from litgpt.generation.request import TokenLogprob
from litgpt.generation.sampling import Sampling
from litgpt.serving import conversation, tools
from litgpt.serving.async_engine import Answers, Piece, several
from litgpt.serving.bodies import json_route
from litgpt.serving.constraint import GrammarConstraint, json_rule
from litgpt.serving.errors import ApiError, prompt_error
from litgpt.serving.event_stream import DONE, Stream, begun, event, unless_gone, with_errors
from litgpt.serving.schemas import ChatRequest, CompletionRequest, NamedTool, OpenAIRequest, SamplingFields
from litgpt.serving.served import ServedModel
from litgpt.serving.service import Service

if TYPE_CHECKING:
    from typing_extensions import TypeIs

LEAST_LOGPROB = -9999.0  # JSON has no infinity
MOST_LOGPROBS = 2**18  # in a response: about 50 MB, which take a second
LONG = 1000  # tokens with log-probabilities, whose response takes a while to write
ALL = 0  # top_k
MEDIA = "text/event-stream"


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=json_route(service))

    @routes.get("/models")
    async def models() -> JSONResponse:
        """What the field `model` of a request may be."""
        service.model()
        return JSONResponse({"object": "list", "data": [_described(model) for model in service.models]})

    @routes.get("/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        return JSONResponse(_described(service.model(name)))

    @routes.post("/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """A reply to a conversation."""
        return await _respond(service, request, body, lambda: prepare_chat(service, body))

    @routes.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """The continuation of a text."""
        return await _respond(service, request, body, lambda: prepare_completion(service, body))

    return routes


async def _respond(
    service: Service, request: Request, body: OpenAIRequest, prepare: Callable[[], Kind[Any]]
) -> Response:
    service.model(body.model)
    kind = await unless_gone(request, service.aside(prepare, request.state.size))
    if not body.stream:
        return JSONResponse(await unless_gone(request, kind.whole()))
    events = await begun(request, kind.events(body.includes_usage))
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx must not hold it back
    return Stream(with_errors(events, event), media_type=MEDIA, headers=headers)


# -- from a request to the engine


def sampling_of(body: SamplingFields, model: ServedModel) -> Sampling:
    """The settings of a request, with the server's defaults.

    Raises:
        ApiError: a token of logit_bias is not in the vocabulary.
    """
    fields = ("temperature", "top_k", "top_p", "min_p", "seed")
    fields += ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    given = {name: value for name in fields if (value := getattr(body, name, None)) is not None}
    if given.get("top_k", 1) <= ALL:
        given["top_k"] = None
    sampling = replace(model.defaults.sampling, **given)
    if (largest := max(sampling.logit_bias, default=0)) >= model.vocab_size:
        message = f"logit_bias: there is no token {largest}; the last is {model.vocab_size - 1}."
        raise ApiError(400, message, param="logit_bias", code="invalid_value")
    return sampling if sampling.temperature >= 1e-5 else replace(sampling, temperature=0.0)  # it would overflow


def engine_request(
    body: OpenAIRequest,
    model: ServedModel,
    prompt: Sequence[int],
    most: int,
    logprobs: int | None,
    constraint: GrammarConstraint | None = None,
) -> EngineRequest:
    stops = [] if body.ignore_eos else model.stops
    return EngineRequest(prompt, most, sampling_of(body, model), stops, logprobs, constraint)


def check_logprobs(model: ServedModel, requests: Sequence[EngineRequest], each: int | None) -> None:
    """Raises ApiError where a response might have more log-probabilities than are of use.

    Args:
        model: What answers.
        requests: Those that the response is to.
        each: How many of the likeliest are asked for with each token; None asks for none.
    """
    if each is None:
        return
    tokens = 0
    for request in requests:
        tokens += min(request.max_new_tokens, max(0, model.context - len(request.prompt)))
        tokens += len(request.prompt) if request.score_from is not None else 0
    if tokens * (1 + each) > MOST_LOGPROBS:
        message = (
            f"The response may have {tokens:,} tokens with {1 + each} log-probabilities each; {MOST_LOGPROBS:,} "
            "log-probabilities are the most. Ask for fewer tokens (max_tokens), answers or logprobs at a time."
        )
        raise ApiError(400, message, param="logprobs", code="invalid_value")


def prepare_chat(service: Service, body: ChatRequest) -> ChatKind:
    """Everything before the engine: the prompt, the tools, the constraint.

    Raises:
        ApiError: a field has a value that cannot be served.
    """
    model = service.model(body.model)
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true.", param="top_logprobs", code="invalid_value")
    functions, form = _functions(body, model)
    described = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if functions else []
    prompt = conversation.encode(model, body, described)
    try:
        grammar = _grammar(body, model, functions, form)
        constraint = model.grammars.constraint(grammar) if grammar else None
    except ValueError as error:
        param = "response_format" if body.response_format and body.response_format.type != "text" else "tools"
        raise ApiError(400, str(error), param=param, code="invalid_value") from None
    most = body.max_completion_tokens or body.max_tokens
    most = most or max(model.defaults.max_new_tokens, model.defaults.max_reply_tokens)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    service.check_size(body.n or 1)
    request = engine_request(body, model, prompt, most, logprobs, constraint)
    check_logprobs(model, [request] * (body.n or 1), logprobs)
    answers = Answers(
        service,
        model,
        several(request, body.n or 1),
        stops=body.stops,
        shown=form.shown(model.codec.tokenizer) if form else (),
        param="messages",
    )
    readers: list[tools.CallReader] = []
    if form:
        names = [function.name for function in functions]
        readers = [tools.CallReader(form, names) for _ in range(body.n or 1)]
    return ChatKind(model, answers, body, readers)


def _functions(body: ChatRequest, model: ServedModel) -> tuple[list[tools.ToolFunction], tools.ToolForm | None]:
    """The functions that may be called, and how the model writes calls."""
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if choice != "none" and not body.tools:
        raise ApiError(400, "tool_choice needs tools.", param="tool_choice", code="invalid_value")
    if choice == "none":
        return [], None
    form = tools.tool_form(model.codec.style)
    if form is None:
        message = f"The prompt format of {model.name} has no place for tools. Leave them out, or take another model."
        raise ApiError(400, message, param="tools", code="unsupported_value")
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    functions = [
        tools.ToolFunction(tool.function.name, tool.function.parameters or nothing) for tool in body.tools or ()
    ]
    if isinstance(choice, NamedTool) and choice.function.name not in {function.name for function in functions}:
        message = f"tool_choice names {choice.function.name[:100]!r}, which is not among the tools."
        raise ApiError(400, message, param="tool_choice", code="invalid_value")
    return functions, form


def _grammar(
    body: ChatRequest, model: ServedModel, functions: list[tools.ToolFunction], form: tools.ToolForm | None
) -> str | None:
    """What the answer must keep to, in Lark; None where it is free."""
    wanted = body.response_format
    schema = None
    if wanted is not None and wanted.type == "json_object":
        schema = {"type": "object"}
    elif wanted is not None and wanted.type == "json_schema":
        if wanted.json_schema is None or wanted.json_schema.schema_ is None:
            raise ApiError(
                422, "response_format.json_schema.schema is missing.", param="response_format.json_schema.schema"
            )
        schema = wanted.json_schema.schema_
    answer = f"answer: {json_rule(schema)}" if schema is not None else ""
    must_call = form is not None and (body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool))
    if not must_call and not answer:
        return None
    if form is None:
        return f"start: answer\n{answer}"
    if isinstance(body.tool_choice, NamedTool):
        functions = [function for function in functions if function.name == body.tool_choice.function.name]
    parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
    calls = form.rules(model.codec.tokenizer, functions, parallel)
    return f"start: calls\n{calls}" if must_call else f"start: calls | answer\n{calls}\n{answer}"


def prepare_completion(service: Service, body: CompletionRequest) -> CompletionKind:
    """The same for a text completion."""
    model = service.model(body.model)
    prompts: Sequence[str | list[int]]
    if isinstance(body.prompt, str) or _is_token_ids(body.prompt):
        prompts = [body.prompt]
    else:
        prompts = body.prompt
    if not prompts:
        raise ApiError(400, "prompt is an empty list.", param="prompt", code="invalid_value")
    service.check_size(len(prompts) * (body.n or 1))
    try:
        encoded = [model.encode_prompt(prompt) for prompt in prompts]
    except ValueError as error:
        raise prompt_error(error, "prompt") from None
    most = model.defaults.max_new_tokens if body.max_tokens is None else body.max_tokens
    requests = []
    for prompt in encoded:
        request = engine_request(body, model, prompt, most, body.logprobs)
        if body.echo and body.logprobs is not None and len(prompt) > 1:
            request.score_from = 1
        requests += several(request, body.n or 1)
    check_logprobs(model, requests, body.logprobs)
    answers = Answers(service, model, requests, prompts=len(encoded), stops=body.stops, joins=True)
    echo = [""] * len(requests)
    if body.echo:
        texts = [prompt if isinstance(prompt, str) else model.codec.tokenizer.decode(prompt) for prompt in prompts]
        echo = [text for text in texts for _ in range(body.n or 1)]
    return CompletionKind(model, answers, body, [text.encode("utf-8", "replace").decode() for text in echo])


def _is_token_ids(prompt: list[int] | list[str] | list[list[int]]) -> TypeIs[list[int]]:
    """Whether a list is one prompt, and not several."""
    return bool(prompt) and isinstance(prompt[0], int)


# -- from the engine to a response


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


class Kind(Generic[Body]):
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


class ChatKind(Kind[ChatRequest]):
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


class CompletionKind(Kind[CompletionRequest]):
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


def _described(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "litgpt",
        "max_model_len": model.context,
    }
