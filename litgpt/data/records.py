"""What a record of instruction data says: its form, recognised by its keys, and the conversation in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

INSTRUCTION, COMPLETION = "instruction/input/output", "prompt/completion"
MESSAGES, CONVERSATIONS = "messages", "conversations (ShareGPT)"
# The keys that a form needs and those that it may have; the first form whose keys are there is the record's.
FORMS = {
    MESSAGES: (("messages",), ("system",)),
    CONVERSATIONS: (("conversations",), ("system",)),
    COMPLETION: (("prompt", "completion"), ("system",)),
    INSTRUCTION: (("instruction", "output"), ("input", "system")),
}
# What data sets call those who speak.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
SHOWN_ERRORS = 3

Message = dict[str, Any]
Recognised = TypeVar("Recognised")


class Record(NamedTuple):
    """One record as it stands in a file."""

    where: str
    """File and line (or number in the list), for messages"""
    values: Any


@dataclass(frozen=True)
class Conversation:
    """What a record says.

    Attributes:
        messages: An optional system message, then whoever speaks; at least one message of the assistant.
        form: Which form the record had.
        where: Where the record stands.
        input: What stands beside the instruction in the form that has such a field.
        tools: What the assistant may call, as chat templates take it.
    """

    messages: list[Message]
    form: str
    where: str
    input: str = ""
    tools: list[dict[str, Any]] | None = None

    @property
    def is_chat(self) -> bool:
        """Whether it comes from data of conversations, not of instructions."""
        return self.form in (MESSAGES, CONVERSATIONS)

    def first_exchange(self) -> Conversation:
        """Only the first question and its answer, as an instruction."""
        user = next((i for i, m in enumerate(self.messages) if m["role"] == "user"), None)
        answered = user is not None and user + 1 < len(self.messages)
        if not answered or self.messages[user + 1]["role"] != "assistant":
            raise ValueError(f"{self.where}: the first message of the user has no answer.")
        return replace(self, messages=self.messages[: user + 2], form=f"first exchange of {self.form}")


def read_conversations(records: Iterable[Record], columns: Mapping[str, str] | None = None) -> list[Conversation]:
    """The conversation of every record; see `recognise_all`."""
    return recognise_all(records, recognise, columns)


def recognise_all(
    records: Iterable[Record],
    recognise_one: Callable[[Record, Mapping[str, str] | None], Recognised],
    columns: Mapping[str, str] | None = None,
) -> list[Recognised]:
    """What every record says.

    Args:
        records: The records.
        recognise_one: Reads one.
        columns: Key of a form -> what the records call it.

    Raises:
        ValueError: Records that fit no form; the message names the first of them, and what is missing.
    """
    found, errors = [], []
    for record in records:
        try:
            found.append(recognise_one(record, columns))
        except ValueError as error:
            errors.append(f"{record.where}: {error}")
    if errors:
        more = f" ({len(errors) - SHOWN_ERRORS:,} more such records)" if len(errors) > SHOWN_ERRORS else ""
        raise ValueError("\n".join(errors[:SHOWN_ERRORS]) + more)
    return found


def recognise(record: Record, columns: Mapping[str, str] | None = None) -> Conversation:
    """The conversation of one record; ValueError where it fits no form."""
    values = keyed_values(record, columns)
    form = next((form for form, (needed, _) in FORMS.items() if all(key in values for key in needed)), None)
    if form is None:
        raise ValueError(_fits_none(values))
    if form in (MESSAGES, CONVERSATIONS):
        messages = read_messages(values[FORMS[form][0][0]])
    else:
        question, answer = FORMS[form][0]
        messages = [
            {"role": "user", "content": text_of(values, question)},
            {"role": "assistant", "content": text_of(values, answer)},
        ]
    messages = with_system(messages, values)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"has nothing to learn: no message of the assistant in its {FORMS[form][0][0]}.")
    beside = text_of(values, "input") if form == INSTRUCTION and values.get("input") else ""
    return Conversation(messages, form, record.where, beside, tools_of(values))


def keyed_values(record: Record, columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    """A record's values by the keys of a form; ValueError where it is no object or lacks a column."""
    values = record.values
    if not isinstance(values, Mapping):
        raise ValueError(f"a record is an object with keys such as instruction and output, not {kind_of(values)}.")
    if not columns:
        return values
    missing = [source for source in columns.values() if source not in values]
    if missing:
        raise ValueError(f"has no {listed(missing)}; its keys are {listed(values)}.")
    renamed = {key: values[source] for key, source in columns.items()}
    return {key: value for key, value in values.items() if key not in columns.values()} | renamed


def with_system(messages: list[Message], values: Mapping[str, Any]) -> list[Message]:
    """Messages with the `system` text that may stand beside them, unless they begin with one of their own."""
    if values.get("system") and messages[0]["role"] != "system":
        return [{"role": "system", "content": text_of(values, "system")}, *messages]
    return messages


def read_messages(value: Any) -> list[Message]:
    """Messages {role, content}, ShareGPT's {from, value}, or texts of user and assistant in turn (LIMA)."""
    if isinstance(value, str):  # some files keep the list as JSON inside a text
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError("its messages are a text that is not JSON; a list of messages is expected.") from None
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"a list of messages is expected, not {kind_of(value)}.")
    if all(isinstance(entry, str) for entry in value):
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(value)]
    return [_message(number, entry) for number, entry in enumerate(value, start=1)]


def _message(number: int, entry: Any) -> Message:
    if not isinstance(entry, Mapping):
        raise ValueError(f"message {number} is {kind_of(entry)}; {{role, content}} is expected.")
    role_key, text_key = ("from", "value") if "from" in entry else ("role", "content")
    if role_key not in entry or (text_key not in entry and not entry.get("tool_calls")):
        missing = role_key if role_key not in entry else text_key
        raise ValueError(f"message {number} has no {missing!r}; its keys are {listed(entry)}.")
    role = str(entry[role_key]).lower()
    role = ROLES.get(role, role)
    if role not in ("system", "developer", "user", "assistant", "tool", "function", "ipython"):
        raise ValueError(f"message {number} is from {entry[role_key]!r}; expected user, assistant, system or tool.")
    further = {k: v for k, v in entry.items() if k not in (role_key, text_key) and v is not None}
    return {"role": role, "content": _content(number, entry.get(text_key)), **(further if role_key == "role" else {})}


def _content(number: int, content: Any) -> str:
    """A message's text; a list of parts is joined, as long as all are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "".join(part["text"] for part in content)
    raise ValueError(f"message {number} holds {kind_of(content)}; only text can be trained on.")


def tools_of(values: Mapping) -> list[dict[str, Any]] | None:
    """The list of tools beside messages; some files keep it as JSON inside a text."""
    tools = values.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise ValueError("its 'tools' are a text that is not JSON; a list is expected.") from None
    if tools and not isinstance(tools, list):
        raise ValueError(f"its 'tools' are {kind_of(tools)}; a list is expected.")
    return tools or None


def text_of(values: Mapping, key: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise ValueError(f"its {key!r} is {kind_of(value)}, not a text.")
    return value


def _fits_none(values: Mapping) -> str:
    """Which key is missing for the form that comes closest."""
    form = max(FORMS, key=lambda form: (sum(key in values for key in FORMS[form][0]), form == INSTRUCTION))
    missing = [key for key in FORMS[form][0] if key not in values]
    others = ", ".join(other for other in FORMS if other != form)
    return f"has no {listed(missing)} for the form {form} (others: {others}). Its keys are {listed(values)}."


def listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(str(name)) for name in names) or "none"


def kind_of(value: Any) -> str:
    names = {dict: "an object", list: "an empty list" if value == [] else "a list", str: "a text", type(None): "null"}
    return names.get(type(value), f"{value!r}"[:40])
