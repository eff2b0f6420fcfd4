"""Function calls in the text of answers: the forms in which models write them, both read and enforced.

The checkpoint's chat template shows the model's form: Hermes and Qwen `<tool_call>{"name", "arguments"}</tool_call>`,
Mistral `[TOOL_CALLS][{"name", "arguments"}]` or `[TOOL_CALLS]name[ARGS]{...}`, Llama 3 `{"name", "parameters"}`.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from litgpt.generation.text import overlap
from litgpt.prompts import ChatTemplate, PromptStyle
from litgpt.serving.constraint import json_rule
from litgpt.tokenizer.tokenizer import Tokenizer

LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True)
class ToolFunction:
    """A function that the model may call."""

    name: str
    parameters: dict[str, Any]
    """JSON schema of its arguments."""


@dataclass(frozen=True)
class Call:
    """One call."""

    id: str
    name: str
    arguments: str
    """JSON."""

    def to_dict(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ToolForm:
    """How a model writes calls."""

    opener: str
    closer: str = ""
    """Nothing where calls reach to the end of the answer."""
    arguments: str = "arguments"
    """The key of the arguments."""
    starts_bare: bool = False
    """An answer that begins with a brace or a bracket is a call, too."""
    as_list: bool = False
    """The calls are a JSON list."""
    arguments_marker: str = ""
    """Stands between name and arguments, where they are no JSON object."""

    def new_id(self) -> str:
        """Mistral's templates take ids of nine letters only."""
        mistral = self.opener == "[TOOL_CALLS]"
        return ("" if mistral else "call_") + "".join(secrets.choice(LETTERS) for _ in range(9 if mistral else 24))

    def shown(self, tokenizer: Tokenizer) -> list[int]:
        """Control tokens of the form."""
        return [
            token_id
            for text in (self.opener, self.closer, self.arguments_marker, "[CALL_ID]")
            if (token_id := _control_token(tokenizer, text)) is not None
        ]

    def rules(self, tokenizer: Tokenizer, functions: Sequence[ToolFunction], parallel: bool) -> str:
        """Grammar rules for one call or more; that of the whole is `calls`."""

        def literal(text: str) -> str:
            token_id = _control_token(tokenizer, text)
            return f"<[{token_id}]>" if token_id is not None else json.dumps(text)

        rules, opener = [], literal(self.opener)
        for index, function in enumerate(functions):
            # A rule of its own for the arguments: references within a function's schema are to that schema.
            rules.append(f"arguments_{index}: {json_rule(function.parameters)}")
            if self.arguments_marker:
                call = f"{opener} {json.dumps(function.name)} {literal(self.arguments_marker)} arguments_{index}"
            else:
                start = f'{{"name": {json.dumps(function.name)}, "{self.arguments}": '
                call = f'{json.dumps(start)} arguments_{index} "}}"'
            rules.append(f"call_{index}: {call}")
        rules.append(f"call: {' | '.join(f'call_{index}' for index in range(len(functions)))}")
        if self.arguments_marker:
            rules.append(f"calls: call{'+' if parallel else ''}")
        elif self.as_list:
            more = ' (", " call)*' if parallel else ""
            rules.append(f'calls: {opener} "[" call{more} "]"')
        elif self.starts_bare:
            rules.append("calls: call")
        else:
            more = ' ("\\n" block)*' if parallel else ""
            rules.append(f'block: {opener} "\\n" call "\\n" {literal(self.closer)}')
            rules.append(f"calls: block{more}")
        return "\n".join(rules)


HERMES = ToolForm("<tool_call>", "</tool_call>")
MISTRAL = ToolForm("[TOOL_CALLS]", as_list=True)
MISTRAL_ARGS = ToolForm("[TOOL_CALLS]", arguments_marker="[ARGS]")
LLAMA = ToolForm("<|python_tag|>", arguments="parameters", starts_bare=True)


def tool_form(style: PromptStyle) -> ToolForm | None:
    """How a model writes calls, None where its prompt format has no place for tools."""
    if not isinstance(style, ChatTemplate):
        return None
    text = style.source_for(tools=True)
    if not re.search(r"\btools\b", text):
        return None
    if "[TOOL_CALLS]" in text:
        return MISTRAL_ARGS if "[ARGS]" in text else MISTRAL
    return HERMES if "<tool_call>" in text else LLAMA


class CallReader:
    """Finds the calls in an answer's text as it comes.

    Args:
        form: How they are written.
        names: Functions there are. What looks like a call to another is text.
    """

    def __init__(self, form: ToolForm, names: Sequence[str]) -> None:
        self.form, self.names = form, frozenset(names)
        self.count = 0
        """How many calls have been found."""
        self._text = ""  # held back
        self._inside = False
        self._begun = False  # some text has been given out
        self._pending = ""  # white space that may stand before a call

    def push(self, text: str) -> Iterator[str | Call]:
        """What is certain with more text: pieces of plain text, and calls."""
        self._text += text
        while True:
            if not self._inside:
                plain = self._before_opener()
                yield from self._plain(plain)
                if not self._inside:
                    return
            end = self._text.find(self.form.closer) if self.form.closer else -1
            if end < 0:
                return
            body, self._text = self._text[:end], self._text[end + len(self.form.closer) :]
            self._inside = False
            yield from self._calls(body, body)

    def finish(self) -> Iterator[str | Call]:
        """What was held back, as the answer ends."""
        body, self._text = self._text, ""
        if self._inside:
            yield from self._calls(body, body.removeprefix(self.form.opener))
        else:
            yield from self._plain(body)
        if self._pending and not self.count:
            yield self._pending

    def _before_opener(self) -> str:
        """Takes plain text off what is held back, up to where a call begins or may begin."""
        form, text = self.form, self._text
        stripped = text.lstrip()
        if form.starts_bare and not self._begun and (not stripped or stripped[0] in "{["):
            self._inside = bool(stripped)
            return ""
        place = text.find(form.opener)
        if place >= 0:
            self._inside = True
            self._text = text[place + len(form.opener) :]
            return text[:place]
        held = overlap(text, form.opener)
        self._text = text[len(text) - held :]
        return text[: len(text) - held]

    def _plain(self, text: str) -> Iterator[str]:
        """White space before and between calls is no text."""
        text = self._pending + text
        kept = text.rstrip()
        self._pending = text[len(kept) :]
        if kept:
            self._begun = True
            yield kept

    def _calls(self, raw: str, body: str) -> Iterator[str | Call]:
        calls = self._parsed(body)
        if calls is None:
            bare = self.form.starts_bare and raw.lstrip()[:1] in ("{", "[")
            closer = self.form.closer if not self._inside else ""
            yield self._pending + ("" if bare else self.form.opener) + raw + closer
            self._pending, self._begun = "", True
            return
        self._pending = ""
        for name, arguments in calls:
            self.count += 1
            yield Call(self.form.new_id(), name, json.dumps(arguments, ensure_ascii=False))

    def _parsed(self, body: str) -> list[tuple[str, dict[str, Any]]] | None:
        """Names and arguments; None where the text is no call."""
        try:
            found = list(self._named(body) if self.form.opener == "[TOOL_CALLS]" else self._objects(body))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return found if found and all(name in self.names for name, _ in found) else None

    def _objects(self, body: str) -> Iterator[tuple[str, dict[str, Any]]]:
        decoder, place = json.JSONDecoder(), 0
        while place < len(body):
            if body[place].isspace() or body[place] in ";,":
                place += 1
                continue
            if body.startswith(self.form.opener, place):
                place += len(self.form.opener)
                continue
            value, place = decoder.raw_decode(body, place)
            for call in value if isinstance(value, list) else [value]:
                call = call.get("function", call) if isinstance(call.get("function"), dict) else call
                arguments = call["arguments"] if "arguments" in call else call.get("parameters", {})
                arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
                if not isinstance(arguments, dict):
                    raise TypeError("arguments are an object")
                yield call["name"], arguments

    def _named(self, body: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Mistral's newer form: name, perhaps an id, the marker, JSON; or the older one."""
        if body.lstrip()[:1] in ("[", "{"):
            yield from self._objects(body)
            return
        decoder = json.JSONDecoder()
        for part in body.split(self.form.opener):
            name, _, rest = part.partition("{")
            name = name.partition("[")[0].strip()
            arguments, _ = decoder.raw_decode("{" + rest)
            yield name, arguments


def _control_token(tokenizer: Tokenizer, text: str) -> int | None:
    try:
        token_id = tokenizer.token_to_id(text) if text else -1
    except ValueError:
        return None
    return token_id if token_id >= 0 and tokenizer.is_control(token_id) else None
