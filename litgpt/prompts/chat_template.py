"""A checkpoint's own Jinja chat template, rendered as `transformers` renders it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

from litgpt.cli.suggest import did_you_mean
from litgpt.cli.untrusted import FETCH_AGAIN, read_json_object, read_text
from litgpt.prompts.call_form import CallForm, find_call_form
from litgpt.prompts.rendering import check_template, render_template, rendered_ahead
from litgpt.prompts.styles import Message, PromptStyle, Tokenizer

DEFAULT = "default"
END_MARK = "\ufdd2 "  # a Unicode noncharacter and a space: tells where a message ends in the text of a conversation
ANSWER = "vqxanswerqxv"  # a word that no template changes
# What a message calls its reasoning: templates read the first, gpt-oss's the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"  # NAME.jinja of the others


class ChatTemplate(PromptStyle):
    """The template that a checkpoint brings along.

    Args:
        template: the Jinja source, or several by name, of which `default` is used, `tool_use` where tools are given.
        special_tokens: what the template may use, e.g. {"bos_token": "<s>"}.
        chosen: the name of the one to use, whether tools are given or not.

    Raises:
        ValueError: the template is not valid Jinja.
    """

    adds_bos = True  # the template writes BOS or means that there is none

    def __init__(
        self,
        template: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        chosen: str | None = None,
    ) -> None:
        self.templates = {DEFAULT: template} if isinstance(template, str) else dict(template)
        self.special_tokens = dict(special_tokens or {})
        self.chosen = chosen
        for source in self.templates.values():
            check_template(source)

    def named(self, name: str) -> ChatTemplate:
        """The same with one of its templates, whether tools are given or not.

        Raises:
            ValueError: There is none of that name.
        """
        if name not in self.templates:
            raise ValueError(
                f"The checkpoint has no chat template {name!r}.{did_you_mean(name, self.templates)} It has "
                f"{', '.join(map(repr, self.templates))}."
            )
        return ChatTemplate(self.templates, self.special_tokens, name)

    @property
    def template(self) -> str:
        return self.source_for(None)

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **fields: Any) -> str:
        if fields.get("input"):
            prompt = f"{prompt}\n\n{fields['input']}"
        system = [{"role": "system", "content": sys_prompt}] if sys_prompt is not None else []
        return self.render([*system, {"role": "user", "content": prompt}])

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """As in the base class; `kwargs` (`tools`, `documents`, `enable_thinking`) are variables of the template.

        Args:
            messages: The conversation.
            add_generation_prompt: Write what opens the reply too.
            continue_final_message: The last message is the beginning of a reply: the text ends with it.
            kwargs: Variables of the template.

        Raises:
            ValueError: The template refuses the conversation, or does not write its last message as it is.
        """
        if continue_final_message:
            *before, last = messages
            marked = self.render([*before, {**last, "content": last["content"] + END_MARK}], False, **kwargs)
            text, mark, after = marked.rpartition(END_MARK.strip())
            if not mark or last["content"].strip() not in text:
                raise ValueError("The checkpoint's chat template does not write the reply that is to be continued.")
            keeps_spaces = after.startswith(END_MARK[len(mark) :])  # many templates trim what a message ends with
            return text if keeps_spaces else text.rstrip()
        return render_template(*self._request(messages, add_generation_prompt, kwargs))

    def ahead(self, texts: Iterable[tuple[Sequence[Message], bool]], **kwargs: Any) -> AbstractContextManager[None]:
        return rendered_ahead(self._request(messages, opens, kwargs) for messages, opens in texts)

    def _request(
        self, messages: Sequence[Message], add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> tuple[str, dict[str, Any]]:
        """The template that writes a conversation, and its variables."""
        source = self.source_for(variables.get("tools"))
        messages = [_without_nulls(message) for message in messages]
        if any(message.get("tool_calls") for message in messages):
            messages = _call_form(source, tuple(self.special_tokens.items())).apply(messages)
        return source, _variables(messages, add_generation_prompt, {**self.special_tokens, **variables})

    def reply_end(self) -> str:
        return _closing(self.source_for(None), tuple(self.special_tokens.items()))

    def source_for(self, tools: Any) -> str:
        """The template that is used with some tools, or with none."""
        if self.chosen is not None:
            return self.templates[self.chosen]
        if tools and "tool_use" in self.templates:
            return self.templates["tool_use"]
        return self.templates.get(DEFAULT) or next(iter(self.templates.values()))

    @classmethod
    def from_directory(cls, directory: Path, tokenizer: Tokenizer | None = None) -> ChatTemplate | None:
        """The template of a checkpoint directory, None where it has none."""
        templates = find_chat_templates(directory)
        if not templates:
            return None
        return cls(templates, tokenizer.special_tokens if tokenizer else _special_tokens(directory))


def find_chat_templates(directory: Path) -> dict[str, str]:
    """The templates of a checkpoint by name, the usual one being "default".

    `chat_template.jinja` and additional_chat_templates/NAME.jinja win over `chat_template.json`, that over
    `tokenizer_config.json`, where `chat_template` is one text or a list of {name, template}.
    """
    files = {DEFAULT: directory / TEMPLATE_FILE} if (directory / TEMPLATE_FILE).is_file() else {}
    files |= {file.stem: file for file in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))}
    if files:
        return {name: read_text(file) for name, file in files.items()}
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _read_json(directory / name).get("chat_template")
        if isinstance(template, str):
            return {DEFAULT: template}
        if template:
            return _named_templates(template, directory / name)
    return {}


def _named_templates(value: Any, file: Path) -> dict[str, str]:
    """An object of templates by name, or a list of {name, template}."""
    if isinstance(value, list) and all(isinstance(each, dict) for each in value):
        value = {str(each.get("name")): each.get("template") for each in value}
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise ValueError(f"{file} is damaged (its chat_template is neither a text nor texts by name). {FETCH_AGAIN}")
    return value


def write_chat_templates(templates: Mapping[str, str], directory: Path) -> None:
    """Writes templates where `find_chat_templates` and transformers find them.

    Raises:
        ValueError: A name that is not a file's.
    """
    for name, template in templates.items():
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"The chat template {name!r} cannot be written: its name cannot be that of a file.")
        file = directory / (TEMPLATE_FILE if name == DEFAULT else f"{TEMPLATE_FOLDER}/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, encoding="utf-8")


def _special_tokens(directory: Path) -> dict[str, str]:
    named = {**_read_json(directory / "special_tokens_map.json"), **_read_json(directory / "tokenizer_config.json")}
    tokens = {}
    for name, value in named.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def _read_json(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


# -- what a template writes


def _without_nulls(message: Message) -> dict[str, Any]:
    """A message as transformers gives it to a template: null means absent, and reasoning has every name in use."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, REASONING[0]: reasoning}


def _variables(
    messages: Sequence[Message], add_generation_prompt: bool, variables: Mapping[str, Any]
) -> dict[str, Any]:
    given = {"messages": [dict(message) for message in messages], "add_generation_prompt": add_generation_prompt}
    return {"tools": None, "documents": None, **variables, **given}


@lru_cache
def _call_form(source: str, special_tokens: tuple[tuple[str, str], ...]) -> CallForm:
    """How a template takes calls of tools."""
    return find_call_form(lambda messages: render_template(source, _variables(messages, False, dict(special_tokens))))


@lru_cache
def _closing(source: str, special_tokens: tuple[tuple[str, str], ...]) -> str:
    """What a template writes after a reply; nothing where it refuses a question and an answer."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = render_template(source, _variables(messages, False, dict(special_tokens)))
    except ValueError:
        return ""
    return text.rpartition(ANSWER)[2]
