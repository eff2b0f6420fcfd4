"""Prompt styles: how a conversation becomes the one text that a model was taught to continue."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import yaml

from litgpt.cli.own_code import find_named
from litgpt.cli.suggest import did_you_mean

if TYPE_CHECKING:
    from litgpt.config import Config

STYLES_FILE = Path(__file__).with_name("styles.yaml")
OUR_STYLES = "litgpt.prompts."  # where each of them is a class
INPUT = "vqxinputqxv"  # a word that no template changes: it tells where one puts an input
Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant" | ..., "content": str, ...}


class Tokenizer(Protocol):
    """What a style asks of `litgpt.tokenizer.tokenizer.Tokenizer`, which stands above this module."""

    eos_id: int | None
    stop_ids: set[int]

    @property
    def special_tokens(self) -> dict[str, str]: ...

    def token_to_id(self, token: str) -> int: ...

    def is_marker(self, token_id: int) -> bool: ...

    def protect(self, text: str) -> str: ...

    def encode_ids(
        self, text: str, *, bos: bool | None = None, allow_special: bool = False, room: int | None = None
    ) -> list[int]: ...


class PromptStyle(ABC):
    """One prompt format. A style of one's own derives from this and defines `apply`; `render` then follows from it."""

    adds_bos: bool = False
    """The rendered text begins with BOS already (or says by itself that there is none)."""
    continues_text: bool = False
    """The bare prompt: the model goes on writing the text, there are no turns."""
    end: str = ""
    """What closes a reply before the next turn."""

    @abstractmethod
    def apply(self, prompt: str, *, sys_prompt: str | None = None, **fields: Any) -> str:
        """One prompt as the model is to read it. `fields` are a data sample's other fields (`input`), for styles that
        use them."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """A conversation as one text, up to where the next reply begins.

        Args:
            messages: an optional system message, then user and assistant in turn.
            add_generation_prompt: write what opens the reply too (always done by a style that only defines `apply`).
            kwargs: variables of a chat template; fields for `apply` otherwise.

        Raises:
            ValueError: roles that the format does not know, or in an order that it cannot write.
        """
        system, turns = split_turns(messages)
        parts = []
        for user, reply in turns:
            parts.append(self.apply(user, sys_prompt=system, **kwargs))
            system = None
            if reply is not None:
                parts.append(reply + self.end)
        return "".join(parts)

    def stop_tokens(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token sequences that end a reply: EOS, and what the format adds."""
        return [[tokenizer.eos_id]] if tokenizer.eos_id is not None else []

    def stop_sequences(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Everything that ends a reply: `stop_tokens`, the checkpoint's own stop ids, and the marker that closes one in
        this format (`<|im_end|>`)."""
        sequences = [*self.stop_tokens(tokenizer), *([token_id] for token_id in sorted(tokenizer.stop_ids))]
        if (closing := self.closing_token(tokenizer)) is not None:
            sequences.append([closing])
        return [list(sequence) for sequence in dict.fromkeys(map(tuple, sequences))]

    def reply_end(self) -> str:
        """What is written after a reply: `end`, unless the format finds it in another way."""
        return self.end

    def closing_token(self, tokenizer: Tokenizer) -> int | None:
        """The marker that closes a reply in this format; None where other text does."""
        closing = tokenizer.encode_ids(self.reply_end().strip(), bos=False, allow_special=True)[:1]
        return closing[0] if closing and tokenizer.is_marker(closing[0]) else None

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, room: int | None = None, **kwargs: Any
    ) -> list[int]:
        """The conversation's token ids. Control tokens spelled in a message, a tool or a document stay text.

        Args:
            tokenizer: The model's.
            messages: As for `render`.
            room: How many tokens the model's context holds: a text that is far too long for it is not encoded.
            kwargs: As for `render`.

        Raises:
            ValueError: As `render`; or the text has more tokens than there is room for.
        """
        bos = False if self.adds_bos else None
        if self.continues_text:  # no control token is read there, so nothing needs protection
            return tokenizer.encode_ids(self.render(messages, **kwargs), bos=bos, room=room)
        text = self.render(protected(tokenizer, messages), **protected(tokenizer, kwargs))
        return tokenizer.encode_ids(text, bos=bos, allow_special=True, room=room)

    def ahead(self, texts: Iterable[tuple[Sequence[Message], bool]], **kwargs: Any) -> AbstractContextManager[None]:
        """Within this, these conversations, to be rendered with an opening of the next reply or without, are rendered
        sooner than one by one; `kwargs` as for `render`. Where one costs little, nothing is done."""
        return nullcontext()

    @staticmethod
    def from_name(name: str) -> PromptStyle:
        """The style called `name` in styles.yaml (either of its names, any case)."""
        return style_class(name)()

    @staticmethod
    def from_config(config: Config | None) -> PromptStyle:
        """The style that a known checkpoint's name stands for; the bare prompt for an unknown one."""
        from litgpt.catalog import find_known

        known = find_known(config.name) if config is not None and config.name else None
        return style_class(known.prompt_style if known else "Default")()


def protected(tokenizer: Tokenizer, value: Any) -> Any:
    """What is given to a template, a text or anything that holds some, with the control tokens in it made harmless."""
    if isinstance(value, str):
        return tokenizer.protect(value)
    if isinstance(value, Mapping):
        return {protected(tokenizer, key): protected(tokenizer, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [protected(tokenizer, part) for part in value]
    return value


def places_input(style: PromptStyle) -> bool:
    """Whether the format has a place of its own for a record's input."""
    return INPUT in style.render([{"role": "user", "content": "x"}], input=INPUT)


def with_input(
    style: PromptStyle, messages: Sequence[Message], input: str, is_placed: bool | None = None
) -> tuple[Sequence[Message], dict[str, str]]:
    """A conversation whose last question is about an `input`, and the fields to render it with: where the format has
    no place for an input, that follows the question. `is_placed` is what `places_input` says, where it is known."""
    if not input:
        return messages, {}
    if places_input(style) if is_placed is None else is_placed:
        return messages, {"input": input}
    user = max(index for index, message in enumerate(messages) if message["role"] == "user")
    question = {**messages[user], "content": f"{messages[user]['content']}\n\n{input}"}
    return [*messages[:user], question, *messages[user + 1 :]], {}


def split_turns(messages: Sequence[Message]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """The system message, and each user's message with its reply (None for the last).

    Raises:
        ValueError: Roles are not in turn, or a message is no text.
    """
    system: str | None = None
    turns: list[tuple[str, str | None]] = []
    expected = "user"
    for number, message in enumerate(messages, 1):
        role, text = message.get("role"), message.get("content")
        if not isinstance(text, str | None) or "content" not in message:
            shown = f"the content {text!r}" if "content" in message else "no content"
            raise ValueError(f"This prompt style writes messages of text; message {number} has {shown}.")
        if role == "system" and number == 1:
            system = text
        elif role != expected:
            raise ValueError(
                f"This prompt style writes an optional system message, then user and assistant in turn; message "
                f"{number} has the role {role!r} where {expected!r} is due."
            )
        elif role == "user":
            turns.append((text or "", None))
            expected = "assistant"
        else:
            turns[-1] = (turns[-1][0], text)
            expected = "user"
    return system, turns


@dataclass(frozen=True)
class Format:
    """One entry of styles.yaml; the head of that file explains the fields."""

    name: str
    user: str
    start: str = ""
    default: str | None = None
    system: str | None = None
    assistant: str = ""
    end: str = ""
    input: dict[str, str] | None = None
    stop: tuple = ()
    holds_bos: bool = True
    """Whether `start` holds BOS."""


class WrittenStyle(PromptStyle):
    """A style whose format is data."""

    format: ClassVar[Format]

    def __init__(self) -> None:
        self.adds_bos = bool(self.format.start) and self.format.holds_bos
        self.end = self.format.end
        self.continues_text = self.format.user == "{user}" and not self.format.assistant

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **fields: Any) -> str:
        return self._opening(prompt, sys_prompt, **fields) + self.format.assistant

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        system, turns = split_turns(messages)
        parts: list[str] = []
        for index, (user, reply) in enumerate(turns):
            parts.append(self._turn(user) if index else self._opening(user, system, **kwargs))
            if reply is not None:
                parts += [self.format.assistant, reply, self.format.end]
        if add_generation_prompt and turns and turns[-1][1] is None:
            parts.append(self.format.assistant)
        return "".join(parts)

    def stop_tokens(self, tokenizer: Tokenizer) -> list[list[int]]:
        sequences = super().stop_tokens(tokenizer)
        for names in self.format.stop:
            try:
                ids = [name if isinstance(name, int) else tokenizer.token_to_id(name) for name in names]
            except ValueError:
                continue  # the style is used with another model's tokenizer: it cannot write that sequence
            if ids not in sequences:
                sequences.append(ids)
        return sequences

    def _opening(self, prompt: str, system: str | None, **fields: Any) -> str:
        """Everything up to the end of the first user's turn."""
        form, user, default = self.format, self.format.user, self.format.default
        if form.input is not None and fields.get("input"):
            user, default = form.input["user"], form.input["default"]
        system, block = default if system is None else system, ""
        if system and form.system is None:
            prompt = f"{system}\n\n{prompt}"
        elif system and form.system is not None:
            block = _fill(form.system, system=system)
        if "{system}" in user:
            return form.start + _fill(user, system=block, user=prompt, input=fields.get("input", ""))
        return form.start + block + _fill(user, user=prompt, input=fields.get("input", ""))

    def _turn(self, prompt: str) -> str:
        return _fill(self.format.user, system="", user=prompt)


def _fill(template: str, **values: str) -> str:
    """Puts the values into their {slots}, once: braces in a value stay as they are."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda match: values[match[0][1:-1]], template)


@lru_cache
def written_styles() -> dict[str, type[WrittenStyle]]:
    """The styles of styles.yaml, by class name."""
    entries: dict[str, dict[str, Any]] = yaml.safe_load(STYLES_FILE.read_text(encoding="utf-8"))
    allowed = {field.name for field in fields(Format)}
    styles = {}
    for key, own in entries.items():
        entry = {**entries[own["based_on"]], **own} if "based_on" in own else own
        form = Format(**{name: value for name, value in entry.items() if name in allowed})
        doc = f"The prompt style {form.name!r} of styles.yaml."
        styles[key] = type(key, (WrittenStyle,), {"format": form, "__module__": "litgpt.prompts", "__doc__": doc})
    return styles


def find_written_style(name: str) -> type[WrittenStyle] | None:
    """The class of one of our own styles, by its name, its class name or its dotted path; imports nothing."""
    short = name.removeprefix(OUR_STYLES).lower()
    return next((s for key, s in written_styles().items() if short in (key.lower(), s.format.name.lower())), None)


def style_class(name: str) -> type[PromptStyle]:
    """The class of a style, by its name, its class name or a dotted path to a class of one's own.

    Raises:
        ValueError: no such style; with the names that come close.
    """
    if (found := find_written_style(name)) is not None:
        return found
    if "." in name and not name.startswith(OUR_STYLES) and (found := _import_class(name)) is not None:
        return found
    styles = written_styles()
    names = [style.format.name for style in styles.values()]
    raise ValueError(
        f"There is no prompt style {name!r}.{did_you_mean(name, [*names, *styles])} "
        f"The styles are: {', '.join(names)}. A class of your own is given as package.module.Class, "
        "a chat template as the path of a .jinja file."
    )


def _import_class(dotted: str) -> type[PromptStyle] | None:
    module_name, _, class_name = dotted.rpartition(".")
    found = getattr(find_named(module_name), class_name, None)
    if found is None:
        return None
    if not (isinstance(found, type) and issubclass(found, PromptStyle)):
        raise ValueError(f"{dotted} is not a prompt style: derive it from litgpt.prompts.PromptStyle.")
    return found
