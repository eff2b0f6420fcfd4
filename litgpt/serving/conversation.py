"""A chat request's messages and tools as the model's chat template takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litgpt.cli.untrusted import ExcessError, parse_json
from litgpt.prompts import ChatTemplate
from litgpt.serving.errors import ApiError, prompt_error
from litgpt.serving.schemas import ChatMessage, ChatRequest, TextPart, ToolCall
from litgpt.serving.served import ServedModel

TAKEN = ("self", "tokenizer", "messages", "tools", "room", "add_generation_prompt")  # not for chat_template_kwargs


def encode(model: ServedModel, request: ChatRequest, tools: Sequence[dict[str, Any]]) -> list[int]:
    """The prompt's token ids.

    Raises:
        ApiError: the model's prompt format cannot write the conversation, or it does not fit the context.
    """
    variables = template_variables(model, request)
    if tools:
        variables["tools"] = list(tools)
    try:
        messages = [_message(message) for message in request.messages]
        return model.codec.encode(messages, room=model.context, variables=variables)
    except ValueError as error:
        raise prompt_error(error, "messages") from None


def template_variables(model: ServedModel, request: ChatRequest) -> dict[str, Any]:
    """What the request gives the chat template besides messages and tools."""
    variables = dict(request.chat_template_kwargs or {})
    for name in TAKEN:
        if name in variables:
            raise ApiError(400, f"chat_template_kwargs.{name} is not valid.", param="chat_template_kwargs")
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    if variables and not isinstance(model.codec.style, ChatTemplate):
        name = "chat_template_kwargs" if request.chat_template_kwargs else "reasoning_effort"
        raise ApiError(
            400, f"{name} has no effect here: this model has no chat template.", param=name, code="unsupported_value"
        )
    return variables


def _message(message: ChatMessage) -> dict[str, Any]:
    """With the keys that the client gave, and texts for what has parts: templates ask whether a key is there."""
    role = "system" if message.role == "developer" else message.role
    written: dict[str, Any] = {"role": role, "content": _text(message.content)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            written[name] = value
    if message.tool_calls:
        written["tool_calls"] = [_call(call) for call in message.tool_calls]
    return written


def _text(content: str | list[TextPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join((part.refusal if part.type == "refusal" else part.text) or "" for part in content)


def _call(call: ToolCall) -> dict[str, Any]:
    """Templates take the arguments as an object, OpenAI's clients send its JSON."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments or "{}")
        except ValueError as error:
            why = f" that can be taken: {error}" if isinstance(error, ExcessError) else ""
            message = f"The arguments of the call of {call.function.name[:100]!r} are no JSON{why}."
            raise ApiError(400, message, param="messages", code="invalid_value") from None
    written = {"type": "function", "function": {"name": call.function.name, "arguments": arguments}}
    return {"id": call.id, **written} if call.id is not None else written
