"""Conversations into token ids, with what is to be learned marked: exactly what inference will feed and stop at."""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from litgpt.data.records import Conversation, Message
from litgpt.prompts import PromptStyle
from litgpt.prompts.styles import INPUT, places_input, protected, with_input
from litgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

# Words that no template changes: they tell where it puts a question, a reply and tools.
QUESTION, REPLY, TOOL = "vqxquestionqxv", "vqxreplyqxv", "vqxtoolqxv"
PROBE = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": REPLY},
    {"role": "user", "content": QUESTION},
]
CHUNK = 256  # conversations that a process encodes at a time
WORTH_PROCESSES = 4000  # from so many conversations on


class Encoded(NamedTuple):
    """One training sequence."""

    ids: list[int]
    targets: list[bool]
    """Which of the ids are to be predicted; never the first"""
    answer_start: int
    """Where the last reply begins: the ids before it are its prompt"""
    num_messages: int
    """How many of the conversation's messages it holds"""
    is_long: bool
    """Whether there was more than fits"""


class ConversationEncoder:
    """Makes training sequences of conversations.

    The ids before a reply are `style.encode(messages before it)`, what inference will feed. The reply follows as the
    prompt's own text would go on, unless that would change a token of the prompt; then it is encoded on its own. After
    it stands what ends a reply in this format. Where a later prompt does not begin with the ids so far (a template
    that drops earlier reasoning, a merge across the end of a turn), the conversation goes on in a new sequence: each
    reply is learned once, after exactly its own prompt.

    Args:
        tokenizer: The model's.
        style: The prompt format.
        mask_prompt: Learn the assistant's replies only; otherwise the prompts, too.
        max_tokens: Longest sequence; what is beyond it is cut off.
    """

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle, mask_prompt: bool, max_tokens: int | None) -> None:
        self.tokenizer, self.style = tokenizer, style
        self.mask_prompt, self.max_tokens = mask_prompt, max_tokens
        self.closing = closing_text(style)
        self.end = end_of_turn(tokenizer, style, self.closing)
        self.places_input, self.places_tools = places_input(style), places_tools(style)

    def encode(self, conversation: Conversation) -> list[Encoded]:
        """The sequences of one conversation; usually one."""
        messages, fields = self.placed(conversation)
        samples: list[Encoded] = []
        ids: list[int] = []
        targets: list[bool] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.style.encode(self.tokenizer, messages[:turn], **fields)
            if prompt[: len(ids)] == ids:
                if samples:
                    samples.pop()  # it goes on
            else:
                ids, targets = [], []
            targets = targets + [not self.mask_prompt] * (len(prompt) - len(ids))
            reply = self.reply_ids(messages[: turn + 1], prompt, fields) + self.end
            ids, targets = prompt + reply, targets + [True] * len(reply)
            targets[0] = False
            is_long = self.max_tokens is not None and len(ids) > self.max_tokens
            samples.append(Encoded(ids[: self.max_tokens], targets[: self.max_tokens], len(prompt), turn + 1, is_long))
            if is_long:
                break
        return samples

    def placed(self, conversation: Conversation) -> tuple[list[Message], dict[str, Any]]:
        """The messages, and the tools and the input for a style that has a place for them; where it has none for an
        input, that follows the instruction."""
        fields: dict[str, Any] = {}
        if conversation.tools:
            if not self.places_tools:
                raise ValueError("has tools, for which the prompt style has no place; take a chat template that has.")
            fields["tools"] = conversation.tools
        messages, beside = with_input(self.style, conversation.messages, conversation.input, self.places_input)
        return messages, {**fields, **beside}

    def reply_ids(self, messages: list[Message], prompt: list[int], fields: dict[str, Any]) -> list[int]:
        """The ids of the last message, a reply, after its prompt."""
        special = not self.style.continues_text
        if special:
            messages, fields = protected(self.tokenizer, messages), protected(self.tokenizer, fields)
        opened = self.style.render(messages[:-1], **fields)
        reply = self._reply_text(messages, opened, fields)
        bos = False if self.style.adds_bos else None
        whole = self.tokenizer.encode_ids(opened + reply, bos=bos, allow_special=special)
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return self.tokenizer.encode_ids(reply, bos=False, allow_special=special)

    def _reply_text(self, messages: list[Message], opened: str, fields: dict[str, Any]) -> str:
        """The reply as the format writes it: a template writes reasoning and tool calls, too."""
        whole = self.style.render(messages, add_generation_prompt=False, **fields)
        if not whole.startswith(opened):
            return messages[-1]["content"]
        return whole[len(opened) :].removesuffix(self.closing)

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.dir, "options": (self.style, self.mask_prompt, self.max_tokens)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Tokenizer(state["tokenizer"]), *state["options"])


def closing_text(style: PromptStyle) -> str:
    """What the format writes after a reply."""
    text = style.render(PROBE[:2], add_generation_prompt=False)
    return text.partition(REPLY)[2]


def end_of_turn(tokenizer: Tokenizer, style: PromptStyle, closing: str) -> list[int]:
    """The ids that a reply ends with, so that inference stops: what the format writes there, else EOS.

    Empty where the tokenizer has neither.
    """
    stops = style.stop_sequences(tokenizer)
    written = tokenizer.encode_ids(closing, bos=False, allow_special=True)
    for start in range(len(written)):
        for stop in stops:
            if written[start : start + len(stop)] == stop:
                return stop
    return [tokenizer.eos_id] if tokenizer.eos_id is not None else []


def style_identity(style: PromptStyle, tokenizer: Tokenizer) -> list[Any]:
    """What tells two formats apart: the class and its source, its settings, and how it writes a conversation (which
    may depend on the date)."""
    written = [style.encode(tokenizer, PROBE[:1]), style.encode(tokenizer, PROBE[:1], input=INPUT)]
    return [class_identity(type(style)), repr(sorted(vars(style).items())), written]


def places_tools(style: PromptStyle) -> bool:
    """Whether the format says which tools there are."""
    tool = {"type": "function", "function": {"name": TOOL, "description": TOOL, "parameters": {"type": "object"}}}
    return TOOL in style.render(PROBE[:1], tools=[tool])


def class_identity(kind: type) -> list[str]:
    """What tells two versions of a class apart: its name and its source, where there is one."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        source = ""
    return [f"{kind.__module__}.{kind.__qualname__}", source]


def encode_all(encoder: ConversationEncoder, conversations: Sequence[Conversation]) -> Iterator[list[Encoded]]:
    """The sequences of every conversation, in order; many of them on all cores.

    Raises:
        ValueError: A conversation that the format cannot write; the message says which.
    """
    chunks = [conversations[start : start + CHUNK] for start in range(0, len(conversations), CHUNK)]
    cores = os.cpu_count() or 1
    if len(conversations) < WORTH_PROCESSES or cores == 1 or not _can_travel(encoder):
        for chunk in chunks:
            yield from _encode_chunk(encoder, chunk)
        return
    with ProcessPoolExecutor(cores, initializer=_begin, initargs=(encoder,)) as pool:
        try:
            for encoded in pool.map(_encode_in_process, chunks):
                yield from encoded
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _encode_chunk(encoder: ConversationEncoder, chunk: Iterable[Conversation]) -> list[list[Encoded]]:
    encoded = []
    for conversation in chunk:
        try:
            encoded.append(encoder.encode(conversation))
        except ValueError as error:
            raise ValueError(f"{conversation.where}: {error}") from error
    return encoded


def _can_travel(encoder: ConversationEncoder) -> bool:
    """Whether other processes can have it: a style defined in a script or a notebook may not be importable there."""
    try:
        pickle.dumps(encoder)
    except Exception:
        return False
    return True


_encoder: ConversationEncoder | None = None  # of a process of the pool


def _begin(encoder: ConversationEncoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_in_process(chunk: Sequence[Conversation]) -> list[list[Encoded]]:
    return _encode_chunk(_encoder, chunk)
