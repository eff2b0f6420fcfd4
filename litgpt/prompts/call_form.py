"""How a chat template takes calls of tools: templates differ in what they want where a message only calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

NAME = "vqxcallqxv"  # a word that no template changes
CALL = {"id": "call00001", "type": "function", "function": {"name": NAME, "arguments": {"a": 1}}}
PROBE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]


class CallForm(NamedTuple):
    """What a template is given of a call whose arguments are an object.

    Attributes:
        content: Of a message that says nothing but calls. DeepSeek's template wants null there; others write it out.
        arguments_as_text: Whether the arguments are JSON text, as OpenAI's clients send them.
        needs_ids: Whether the template refuses calls without an id (Mistral's).
    """

    content: str | None = ""
    arguments_as_text: bool = False
    needs_ids: bool = False

    def apply(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the template takes them."""
        given, open_ids, count = [], [], 0
        for message in map(dict, messages):
            if message.get("tool_calls"):
                first, count = count + 1, count + len(message["tool_calls"])
                calls = [self._call(call, f"call{n:05}") for n, call in enumerate(message["tool_calls"], first)]
                open_ids += [call["id"] for call in calls if isinstance(call, Mapping) and "id" in call]
                message["tool_calls"] = calls
                message["content"] = message.get("content") or self.content
            elif message.get("role") == "tool" and self.needs_ids and open_ids:
                answered = open_ids.pop(0)
                message.setdefault("tool_call_id", answered)
            given.append(message)
        return given

    def _call(self, call: Any, fallback: str) -> Any:
        if not isinstance(call, Mapping) or not isinstance(function := call.get("function"), Mapping):
            return call  # a form of the caller's own
        arguments = function.get("arguments")
        if self.arguments_as_text and isinstance(arguments, Mapping):
            call = {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        return {"id": fallback, **call} if self.needs_ids else dict(call)


def find_call_form(render: Callable[[list[dict[str, Any]]], str]) -> CallForm:
    """The first form in which a template writes a call.

    Args:
        render: Gives the text of messages that are what the template takes; ValueError where it refuses them.
    """
    for form in (CallForm(), CallForm(None), CallForm(arguments_as_text=True), CallForm(None, True)):
        if _writes(render, form.apply(PROBE)):
            break
    else:
        return CallForm()
    without_id = [PROBE[0], {**PROBE[1], "tool_calls": [{key: CALL[key] for key in ("type", "function")}]}]
    return form._replace(needs_ids=not _writes(render, form.apply(without_id)))


def _writes(render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]]) -> bool:
    try:
        return NAME in render(messages)
    except ValueError:
        return False
