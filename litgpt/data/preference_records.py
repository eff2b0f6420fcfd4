"""What a record of preference data says: a prompt and two replies, of which the chosen one is the better."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from litgpt.data.records import (
    Conversation,
    Message,
    Record,
    keyed_values,
    messages_of,
    recognise_all,
    text_of,
    tools_of,
    with_system,
)
from litgpt.data.wording import listed, value_kind

REPLIES = ("chosen", "rejected")
# What stands before the replies; the first that is there.
PROMPT_KEYS = ("prompt", "instruction", "question", "conversations", "messages")
TEXTS, WHOLE, MESSAGES, TRANSCRIPTS = (
    "prompt/chosen/rejected",
    "chosen/rejected conversations",
    "prompt messages/chosen/rejected",
    "chosen/rejected transcripts",
)
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ ]?")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Preference:
    """Two conversations that differ in what the assistant says at their end.

    Attributes:
        chosen: The better one.
        rejected: The other one.
        num_common: How many messages they share, from the first on: the prompt.
    """

    chosen: Conversation
    rejected: Conversation
    num_common: int

    is_chat = True
    """It is written in the checkpoint's own style unless told otherwise"""

    @property
    def where(self) -> str:
        return self.chosen.where

    @property
    def form(self) -> str:
        return self.chosen.form


def read_preferences(records: Iterable[Record], columns: Mapping[str, str] | None = None) -> list[Preference]:
    """The pair of every record; see `recognise_all`."""
    return recognise_all(records, recognise_preference, columns)


def recognise_preference(record: Record, columns: Mapping[str, str] | None = None) -> Preference:
    """The pair in one record; ValueError where it fits no form.

    `chosen` and `rejected` are texts or messages. They are the replies alone, to a prompt (a text, with perhaps an
    `input`, or messages) that stands next to them; or conversations that begin alike, as messages or, as texts, in
    turns of "Human:" and "Assistant:". A `system` text may stand next to them.
    """
    values = keyed_values(record, columns)
    missing = [key for key in REPLIES if key not in values]
    if missing:
        raise ValueError(
            f"has no {listed(missing)}; a pair has a prompt, chosen and rejected. Its keys are {listed(values)}."
        )
    form, conversations = _conversations(values)
    conversations = [with_system(messages, values) for messages in conversations]
    common = _common_length(*conversations)
    for reply, messages in zip(REPLIES, conversations, strict=True):
        _check(reply, messages, common)
    beside = text_of(values, "input") if form == TEXTS and values.get("input") else ""
    chosen, rejected = (Conversation(m, form, record.where, beside, tools_of(values)) for m in conversations)
    return Preference(chosen, rejected, common)


def _conversations(values: Mapping[str, Any]) -> tuple[str, list[list[Message]]]:
    """The form, and both conversations as a whole."""
    replies = [values[key] for key in REPLIES]
    prompt_key = next((key for key in PROMPT_KEYS if values.get(key)), None)
    if all(isinstance(reply, str) for reply in replies):
        if prompt_key is None:
            return TRANSCRIPTS, [_turns(key, values[key]) for key in REPLIES]
        tails = [[{"role": "assistant", "content": reply}] for reply in replies]
    else:
        tails = [messages_of(key, values[key]) for key in REPLIES]
        if not all(tail[0]["role"] == "assistant" for tail in tails):
            return WHOLE, tails  # a prompt next to them says again what they begin with
        if prompt_key is None:
            raise ValueError(f"has replies without a prompt ({listed(PROMPT_KEYS)}). Its keys are {listed(values)}.")
    if isinstance(values[prompt_key], str):
        return TEXTS, [[{"role": "user", "content": values[prompt_key]}, *tail] for tail in tails]
    prompt = messages_of(prompt_key, values[prompt_key])
    return MESSAGES, [[*prompt, *tail] for tail in tails]


def _turns(key: str, text: str) -> list[Message]:
    """The messages of a text in turns (https://huggingface.co/datasets/Anthropic/hh-rlhf)."""
    before, *pieces = TURN.split(text)
    if not pieces or before.strip():
        raise ValueError(
            f'has a {key!r} without a prompt next to it ({listed(PROMPT_KEYS)}) or in it, as "Human: ...", '
            f'"Assistant: ...".'
        )
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": SPEAKERS[speaker], "content": text.strip()} for speaker, text in turns]


def _common_length(one: list[Message], other: list[Message]) -> int:
    """Messages that two conversations share from the first on; of equal ones, all but the last."""
    most = min(len(one), len(other))
    common = next((i for i in range(most) if one[i] != other[i]), most)
    return min(common, most - 1)


def _check(reply: str, messages: list[Message], common: int) -> None:
    roles = [message["role"] for message in messages]
    if common == 0:
        raise ValueError(f"has a {reply!r} that does not begin as the other: they share no prompt.")
    if roles[common] != "assistant" or roles[-1] != "assistant":
        raise ValueError(
            f"has a {reply!r} that differs from the other from message {common + 1} on, of the {roles[common]}, and "
            f"ends with one of the {roles[-1]}; both have to be the assistant's."
        )
    if not isinstance(messages[-1]["content"], str):
        raise ValueError(f"has a {reply!r} that is {value_kind(messages[-1]['content'])}, not a text.")
