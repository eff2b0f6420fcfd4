"""Conversations into token ids, with what is to be learned marked: exactly what inference will feed and stop at."""

from __future__ import annotations

import inspect
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from litgpt.data.records import WEIGHT, Conversation
from litgpt.prompts import ChatTemplate, Message, PromptStyle
from litgpt.prompts.styles import INPUT, places_input, protected, with_input
from litgpt.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterable

# Words that no template changes: they tell where it puts a question, a reply and tools.
QUESTION, REPLY, TOOL, SAID = "vqxquestionqxv", "vqxreplyqxv", "vqxtoolqxv", "vqxsaidqxv"
PROBE = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": REPLY},
    {"role": "user", "content": QUESTION},
]
CHUNK = 256  # conversations that a process encodes at a time
WORTH_PROCESSES = 4000  # from this many conversations on


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


class Example(Protocol):
    """What is written as one training sequence or several, wherever it stands."""

    @property
    def where(self) -> str: ...

    @property
    def is_chat(self) -> bool: ...


T = TypeVar("T", bound=Example)


class ExampleEncoder(ABC, Generic[T]):
    """Makes training sequences of examples, in which there are conversations.

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
        self._written_roles = {"user": True, "assistant": True}

    @abstractmethod
    def encode(self, example: T, /) -> list[Encoded]:
        """The sequences of one example."""

    def sequences(self, conversation: Conversation) -> list[Encoded]:
        """The sequences of one conversation."""
        messages, fields = self.placed(conversation)
        with self.style.ahead(self._texts(messages), **protected(self.tokenizer, fields)):
            return self._sequences(conversation, messages, fields)

    def _texts(self, messages: Sequence[Message]) -> Iterator[tuple[Sequence[Message], bool]]:
        """What is to be rendered: the conversation before each reply, and with it."""
        messages = protected(self.tokenizer, messages)
        for turn, message in enumerate(messages):
            if message["role"] == "assistant":
                if turn:
                    yield messages[:turn], True
                yield messages[: turn + 1], False

    def _sequences(
        self, conversation: Conversation, messages: Sequence[Message], fields: dict[str, Any]
    ) -> list[Encoded]:
        samples: list[Encoded] = []
        ids: list[int] = []
        targets: list[bool] = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                self._check_role(turn, message)
                continue
            prompt = self.prompt_ids(messages[:turn], fields)
            if prompt[: len(ids)] == ids:
                if samples:
                    samples.pop()  # it goes on
            else:
                ids, targets = [], []
            targets = targets + [not self.mask_prompt] * (len(prompt) - len(ids))
            reply = self.reply_ids(messages[: turn + 1], prompt, fields) + self.end
            is_learned = conversation.messages[turn].get(WEIGHT, 1) != 0
            ids, targets = prompt + reply, targets + [is_learned] * len(reply)
            targets[0] = False
            is_long = self.max_tokens is not None and len(ids) > self.max_tokens
            samples.append(Encoded(ids[: self.max_tokens], targets[: self.max_tokens], len(prompt), turn + 1, is_long))
            if is_long:
                break
        return samples

    def placed(self, conversation: Conversation) -> tuple[Sequence[Message], dict[str, Any]]:
        """The messages, and the tools and the input for a style that has a place for them; where it has none for an
        input, that follows the instruction."""
        fields: dict[str, Any] = {}
        if conversation.tools:
            if not self.places_tools:
                raise ValueError("has tools, for which the prompt style has no place; take a chat template that has.")
            fields["tools"] = conversation.tools
        messages = [{key: value for key, value in m.items() if key != WEIGHT} for m in conversation.messages]
        messages, beside = with_input(self.style, messages, conversation.input, self.places_input)
        return messages, {**fields, **beside}

    def prompt_ids(self, messages: Sequence[Message], fields: dict[str, Any]) -> list[int]:
        """The ids before a reply, up to what opens it; of a conversation that begins with one, what a template writes
        before its first message."""
        if messages:
            return self.style.encode(self.tokenizer, messages, **fields)
        opened = self._opened([], protected(self.tokenizer, fields))
        bos = False if self.style.adds_bos else None
        return self.tokenizer.encode_ids(opened, bos=bos, allow_special=not self.style.continues_text)

    def reply_ids(self, messages: Sequence[Message], prompt: list[int], fields: dict[str, Any]) -> list[int]:
        """The ids of the last message, a reply, after its prompt."""
        special = not self.style.continues_text
        if special:
            messages, fields = protected(self.tokenizer, messages), protected(self.tokenizer, fields)
        opened = self._opened(messages[:-1], fields)
        reply = self._reply_text(messages, opened, fields)
        bos = False if self.style.adds_bos else None
        whole = self.tokenizer.encode_ids(opened + reply, bos=bos, allow_special=special)
        if whole[: len(prompt)] == prompt:
            return whole[len(prompt) :]
        return self.tokenizer.encode_ids(reply, bos=False, allow_special=special)

    def _opened(self, messages: Sequence[Message], fields: dict[str, Any]) -> str:
        """The text before a reply, up to what opens it."""
        return self.style.render(messages, **fields) if messages else self._before_reply([], fields)

    def _before_reply(self, messages: Sequence[Message], fields: dict[str, Any]) -> str:
        """The text before a reply in a conversation that ends with it, which some templates write otherwise."""
        whole = self.style.render([*messages, {"role": "assistant", "content": REPLY}], False, **fields)
        return whole.rpartition(REPLY)[0]

    def _reply_text(self, messages: Sequence[Message], opened: str, fields: dict[str, Any]) -> str:
        """The reply as the format writes it: a template writes reasoning and tool calls, too."""
        whole, reply = self.style.render(messages, add_generation_prompt=False, **fields), messages[-1]
        before = opened if whole.startswith(opened) else self._before_reply(messages[:-1], fields)
        text = reply["content"]
        if before and whole.startswith(before):
            text = whole[len(before) :].removesuffix(self.closing)
        for call in reply.get("tool_calls", ()):
            if (name := call["function"]["name"]) not in text:
                raise ValueError(
                    f"message {len(messages)} calls {name!r}, which the prompt style does not write; take a chat "
                    "template that does."
                )
        return text

    def _check_role(self, turn: int, message: Message) -> None:
        """Raises ValueError for a message that the checkpoint's chat template leaves out."""
        if message["content"] and not self._writes(message["role"]):
            raise ValueError(
                f"message {turn + 1} is from {message['role']!r}, which the checkpoint's chat template leaves out: "
                "nothing of it would be seen. Take another prompt style."
            )

    def _writes(self, role: str) -> bool:
        """Whether a template writes what somebody says; one that refuses it says so itself."""
        if role not in self._written_roles:
            self._written_roles[role] = writes_role(self.style, role)
        return self._written_roles[role]

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer.dir, "options": (self.style, self.mask_prompt, self.max_tokens)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(Tokenizer(state["tokenizer"]), *state["options"])


class ConversationEncoder(ExampleEncoder[Conversation]):
    """Makes training sequences of conversations."""

    def encode(self, conversation: Conversation, /) -> list[Encoded]:
        """The sequences of one conversation, without those that hold nothing but what is not to be learned; usually
        one."""
        sequences = self.sequences(conversation)
        if all(message.get(WEIGHT, 1) for message in conversation.messages):
            return sequences
        return [one for one in sequences if any(one.targets)] or sequences[-1:]


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


def writes_role(style: PromptStyle, role: str) -> bool:
    """Whether a chat template writes what is said by somebody other than user and assistant; other formats do, or
    refuse it."""
    if not isinstance(style, ChatTemplate):
        return True
    said = {"role": role, "content": SAID}
    if role == "system":
        messages = [said, PROBE[0]]
    else:
        call = {"id": "call00001", "type": "function", "function": {"name": TOOL, "arguments": {}}}
        calls = {"role": "assistant", "content": "", "tool_calls": [call]}
        messages = [PROBE[0], calls, {**said, "tool_call_id": call["id"], "name": TOOL}]
    try:
        return SAID in style.render(messages)
    except ValueError:
        return True  # it refuses the conversation itself


def class_identity(kind: type) -> list[str]:
    """What tells two versions of a class apart: its name and its source, where there is one."""
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):
        source = ""
    return [f"{kind.__module__}.{kind.__qualname__}", source]


def encode_all(encoder: ExampleEncoder[T], examples: Sequence[T]) -> Iterator[list[Encoded]]:
    """The sequences of every example, in order; many of them on all cores.

    Raises:
        ValueError: A conversation that the format cannot write; the message says which.
    """
    chunks = [examples[start : start + CHUNK] for start in range(0, len(examples), CHUNK)]
    cores = os.cpu_count() or 1
    if len(examples) < WORTH_PROCESSES or cores == 1 or not _can_travel(encoder):
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


def _encode_chunk(encoder: ExampleEncoder[T], chunk: Iterable[T]) -> list[list[Encoded]]:
    encoded = []
    for example in chunk:
        try:
            encoded.append(encoder.encode(example))
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from error
    return encoded


def _can_travel(encoder: ExampleEncoder) -> bool:
    """Whether other processes can have it: a style defined in a script or a notebook may not be importable there."""
    try:
        pickle.dumps(encoder)
    except Exception:
        return False
    return True


_encoder: ExampleEncoder  # of a process of the pool


def _begin(encoder: ExampleEncoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_in_process(chunk: Sequence[Example]) -> list[list[Encoded]]:
    return _encode_chunk(_encoder, chunk)
