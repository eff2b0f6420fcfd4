"""What a record of instruction data says: its form, recognised by its keys, and the conversation in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from litgpt.cli.plural import counted
from litgpt.cli.untrusted import parse_json
from litgpt.data.tool_calls import present, read_calls, read_tools
from litgpt.data.wording import listed, value_kind

INSTRUCTION, COMPLETION = "instruction/input/output", "prompt/completion"
MESSAGES, CONVERSATIONS = "messages", "conversations (ShareGPT)"
SPOKEN_COMPLETION = "prompt/completion messages"
# The keys that a form needs and those that it may have; the first form whose keys are there is the record's.
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
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
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",  # OpenAI's older word
    "developer": "system",  # OpenAI's newer word
}
CALLERS = ("function_call", "tool_call")  # who speaks where the text is a call of a tool
WEIGHT = "weight"
"""Key of a message of the assistant that is not to be learned: its value there is 0."""
# What files say of whether a message is learned, and what the value is if it is not.
LEARNED_KEYS = {WEIGHT: 0, "train": 0, "training": 0, "loss": 0, "mask": 1, "masked": 1}
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
        messages: An optional system message, then whoever speaks; at least one message of the assistant. One that is
            not to be learned has the key `weight` with 0.
        form: Which form the record had.
        where: Where the record stands.
        input: What stands next to the instruction in the form that has such a field.
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
        return self.form in (MESSAGES, CONVERSATIONS, SPOKEN_COMPLETION)

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
    found: list[Recognised] = []
    errors: dict[str, list[str]] = {}  # what is wrong -> where
    for record in records:
        try:
            found.append(recognise_one(record, columns))
        except ValueError as error:
            errors.setdefault(str(error), []).append(record.where)
    if errors:
        shown = list(errors.items())[:SHOWN_ERRORS]
        lines = [
            f"{where}: {error}" + (f" ({counted(len(others), 'more such record')})" if others else "")
            for error, (where, *others) in shown
        ]
        if left := sum(map(len, errors.values())) - sum(len(places) for _, places in shown):
            lines.append(f"Something else is wrong with {counted(left, 'more record')}.")
        raise ValueError("\n".join(lines))
    return found


def recognise(record: Record, columns: Mapping[str, str] | None = None) -> Conversation:
    """The conversation of one record; ValueError where it fits no form."""
    values = keyed_values(record, columns)
    form = next((form for form, (needed, _) in FORMS.items() if all(key in values for key in needed)), None)
    if form is None:
        raise ValueError(_fits_none(values, record.values))
    if form == COMPLETION and not all(isinstance(values[key], str) for key in FORMS[form][0]):
        form = SPOKEN_COMPLETION
    if form == SPOKEN_COMPLETION:
        prompt, completion = (_spoken(values, key, role) for key, role in SPEAKERS_OF_COMPLETION)
        # As TRL does it: what the assistant said in the prompt is given, not learned.
        given = [{**message, WEIGHT: 0} if message["role"] == "assistant" else message for message in prompt]
        messages = [*given, *completion]
    elif form in (MESSAGES, CONVERSATIONS):
        messages = read_messages(values[FORMS[form][0][0]])
    else:
        question, answer = FORMS[form][0]
        messages = [
            {"role": "user", "content": text_of(values, question)},
            {"role": "assistant", "content": text_of(values, answer)},
        ]
    messages = with_system(messages, values)
    if not any(message["role"] == "assistant" for message in messages):
        place = "completion" if form == SPOKEN_COMPLETION else FORMS[form][0][0]
        raise ValueError(f"has nothing to learn: no message of the assistant in its {place}.")
    if not any(message["role"] == "assistant" and message.get(WEIGHT, 1) for message in messages):
        raise ValueError("has nothing to learn: every message of the assistant is marked as not to be learned.")
    beside = text_of(values, "input") if form == INSTRUCTION and values.get("input") else ""
    return Conversation(messages, form, record.where, beside, tools_of(values))


SPEAKERS_OF_COMPLETION = (("prompt", "user"), ("completion", "assistant"))


def _spoken(values: Mapping[str, Any], key: str, role: str) -> list[Message]:
    """The messages of a prompt or a completion; of a text, one by `role`."""
    value = values[key]
    return [{"role": role, "content": value}] if isinstance(value, str) else messages_of(key, value)


def keyed_values(record: Record, columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    """A record's values by the keys of a form, without those that are null; ValueError where it is no object or lacks a
    column."""
    values = record.values
    if not isinstance(values, Mapping):
        raise ValueError(f"a record is an object with keys such as instruction and output, not {value_kind(values)}.")
    if not columns:
        return present(values)
    missing = [source for source in columns.values() if source not in values]
    if missing:
        raise ValueError(f"has no {listed(missing)}; its keys are {listed(values)}.")
    renamed = {key: values[source] for key, source in columns.items()}
    return present({key: value for key, value in values.items() if key not in columns.values()} | renamed)


def with_system(messages: list[Message], values: Mapping[str, Any]) -> list[Message]:
    """Messages with the `system` text that may stand next to them, unless they begin with one of their own."""
    if values.get("system") and messages[0]["role"] != "system":
        return [{"role": "system", "content": text_of(values, "system")}, *messages]
    return messages


def messages_of(key: str, value: Any) -> list[Message]:
    """The messages under a key, where there may be one alone; errors name the key."""
    try:
        return read_messages([value] if isinstance(value, Mapping) else value)
    except ValueError as error:
        raise ValueError(f"in its {key!r}, {error}") from None


def read_messages(value: Any) -> list[Message]:
    """Messages {role, content}, ShareGPT's {from, value}, or texts of user and assistant in turn (LIMA)."""
    if isinstance(value, str):  # some files keep the list as JSON inside a text
        try:
            value = parse_json(value)
        except ValueError:
            raise ValueError("its messages are a text that is not JSON; a list of messages is expected.") from None
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"a list of messages is expected, not {value_kind(value)}.")
    if all(isinstance(entry, str) for entry in value):
        return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(value)]
    return [_message(number, entry) for number, entry in enumerate(value, start=1)]


def _message(number: int, entry: Any) -> Message:
    if not isinstance(entry, Mapping):
        raise ValueError(f"message {number} is {value_kind(entry)}; {{role, content}} is expected.")
    is_sharegpt = entry.get("from") is not None and entry.get("role") is None
    role_key, text_key = ("from", "value") if is_sharegpt else ("role", "content")
    calls = entry.get("tool_calls") or entry.get("function_call")  # the latter is OpenAI's older word
    if entry.get(role_key) is None or (text_key not in entry and not calls):
        missing = role_key if entry.get(role_key) is None else text_key
        raise ValueError(f"message {number} has no {missing!r}; its keys are {listed(entry)}.")
    speaker = str(entry[role_key]).lower()
    role = ROLES.get(speaker, speaker)
    if role not in ("system", "user", "assistant", "tool", "ipython"):
        raise ValueError(f"message {number} is from {entry[role_key]!r}; expected user, assistant, system or tool.")
    text = entry.get(text_key)
    if speaker in CALLERS and not calls:
        calls, text = text, ""
    taken = (role_key, text_key, "tool_calls", "function_call", *LEARNED_KEYS)
    further = {} if is_sharegpt else {key: value for key, value in present(entry).items() if key not in taken}
    message = {"role": role, "content": _content(number, text), **further}
    if calls:
        try:
            message["tool_calls"] = read_calls(calls)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    if role == "assistant" and not _is_learned(number, entry):
        message[WEIGHT] = 0
    return message


def _is_learned(number: int, entry: Mapping[str, Any]) -> bool:
    """Whether a message of the assistant is to be learned, by whichever key says so."""
    learned = True
    for key, value_if_not in LEARNED_KEYS.items():
        value = entry.get(key)
        if value is None:
            continue
        if value not in (0, 1):  # true and false are these, too
            raise ValueError(f"message {number} has {key!r}: {value!r}; 0 or 1, or false or true, is expected.")
        learned = learned and value != value_if_not
    return learned


def _content(number: int, content: Any) -> str:
    """A message's text; a list of parts is joined, as long as all are text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        for place, text in enumerate(texts, start=1):
            if text is not None and not isinstance(text, str):
                raise ValueError(f"message {number}, part {place}: its 'text' is {value_kind(text)}, not a text.")
        return "".join(text or "" for text in texts)
    raise ValueError(f"message {number} holds {value_kind(content)}; only text can be trained on.")


def tools_of(values: Mapping) -> list[dict[str, Any]] | None:
    """The tools given with messages, as chat templates take them."""
    return read_tools(values.get("tools") or values.get("functions"))  # the latter is OpenAI's older word


def text_of(values: Mapping, key: str) -> str:
    value = values[key]
    if not isinstance(value, str):
        raise ValueError(f"its {key!r} is {value_kind(value)}, not a text.")
    return value


def _fits_none(values: Mapping, written: Mapping) -> str:
    """Which key is missing for the form that comes closest, or null."""
    form = max(FORMS, key=lambda form: (sum(key in values for key in FORMS[form][0]), form == INSTRUCTION))
    missing = [key for key in FORMS[form][0] if key not in values]
    if null := [key for key in missing if key in written]:
        return f"its {null[0]!r} is null, not {'a list' if form in (MESSAGES, CONVERSATIONS) else 'a text'}."
    others = ", ".join(other for other in FORMS if other != form)
    return f"has no {listed(missing)} for the form {form} (others: {others}). Its keys are {listed(values)}."
