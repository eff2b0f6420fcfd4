"""OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models (https://platform.openai.com/docs/api-reference)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from litgpt.generation.request import Request as EngineRequest
from litgpt.generation.sampling import Sampling
from litgpt.serving import conversation, tools
from litgpt.serving.async_engine import Answers, several
from litgpt.serving.bodies import json_route
from litgpt.serving.constraint import GrammarConstraint, json_rule
from litgpt.serving.errors import ApiError, prompt_error
from litgpt.serving.event_stream import Stream, begun, event, unless_gone, with_errors
from litgpt.serving.openai_response import ChatResponse, OpenAIResponse, TextResponse
from litgpt.serving.schemas import ChatRequest, CompletionRequest, NamedTool, OpenAIRequest, SamplingFields
from litgpt.serving.served import ServedModel
from litgpt.serving.service import Service

if TYPE_CHECKING:
    from typing_extensions import TypeIs

MOST_LOGPROBS = 2**18  # in a response: about 50 MB, which take a second
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
    service: Service, request: Request, body: OpenAIRequest, prepare: Callable[[], OpenAIResponse[Any]]
) -> Response:
    service.model(body.model)
    response = await unless_gone(request, service.aside(prepare, request.state.size))
    if not body.stream:
        return JSONResponse(await unless_gone(request, response.whole()))
    events = await begun(request, response.events(body.includes_usage))
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


def prepare_chat(service: Service, body: ChatRequest) -> ChatResponse:
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
    return ChatResponse(model, answers, body, readers)


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


def prepare_completion(service: Service, body: CompletionRequest) -> TextResponse:
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
    return TextResponse(model, answers, body, [text.encode("utf-8", "replace").decode() for text in echo])


def _is_token_ids(prompt: list[int] | list[str] | list[list[int]]) -> TypeIs[list[int]]:
    """Whether a list is one prompt, and not several."""
    return bool(prompt) and isinstance(prompt[0], int)


def _described(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "litgpt",
        "max_model_len": model.context,
    }
