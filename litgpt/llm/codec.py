"""From messages to the token ids of a prompt, and from the ids of an answer to its text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from litgpt.config import Config
from litgpt.generation.request import Request
from litgpt.generation.sampling import Sampling
from litgpt.generation.text import TextStream
from litgpt.prompts import PromptStyle
from litgpt.prompts.styles import Message, with_input
from litgpt.tokenizer.tokenizer import Tokenizer

CONTINUATION = 256  # new tokens where a model has no format in which its answer ends


class Codec:
    """A model's tokenizer and the format of its prompts.

    Args:
        tokenizer: The model's.
        style: The format of its prompts; may be replaced.
        config: The model's shape.
    """

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle, config: Config) -> None:
        self.tokenizer, self.style, self.config = tokenizer, style, config

    @property
    def stops(self) -> list[list[int]]:
        """Token sequences that end an answer."""
        return self.style.stop_sequences(self.tokenizer)

    def encode(
        self,
        messages: Sequence[Message],
        input: str = "",
        *,
        room: int | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of a conversation, ready for the reply.

        Args:
            messages: The conversation.
            input: What the last question is about.
            room: A text that is far longer than that many tokens is not encoded; by default twice the model's context,
                as `chat` leaves the oldest turns out of what is a little too long.
            variables: Other values for the chat template, such as its tools.

        Raises:
            ValueError: The prompt format refuses the conversation, it is far too long, or the tokenizer is not this
                model's.
        """
        messages, fields = with_input(self.style, messages, input)
        room = 2 * self.config.block_size if room is None else room
        return self._known(self.style.encode(self.tokenizer, messages, room=room, **{**fields, **(variables or {})}))

    def encode_text(self, text: str, *, room: int | None = None) -> list[int]:
        """The token ids of a text as it is. What stands for control tokens becomes them: a prompt that its author has
        rendered is taken as such.

        Raises:
            ValueError: The text is far longer than `room`, or the tokenizer is not this model's.
        """
        return self._known(self.tokenizer.encode_ids(text, allow_special=True, room=room))

    def request(self, prompt: Sequence[int], max_new_tokens: int | None, sampling: Sampling) -> Request:
        """What to ask the engine for the answer to a prompt.

        Args:
            prompt: Token ids.
            max_new_tokens: An answer ends after that many, if the model does not end it before. None lets it go on to
                the end of the turn or of the context; where there are no turns, as in a model that was only
                pretrained, for 256 tokens.
            sampling: How tokens are sampled.
        """
        if max_new_tokens is None:
            room = max(1, self.config.block_size - len(prompt))
            max_new_tokens = min(room, CONTINUATION) if self.style.continues_text else room
        return Request(prompt, max_new_tokens, sampling, self.stops)

    def text(self, ids: Iterable[int], prompt: Sequence[int], joins: bool = False) -> Iterator[str]:
        """The answer's text as it comes. Where it `joins` the prompt's text, as after a bare prompt, it keeps the space
        between the two."""
        return self.tokenizer.decode_stream(ids, after=prompt if joins or self.style.continues_text else ())

    def text_stream(self, prompt: Sequence[int], stop: str | Sequence[str] = ()) -> TextStream:
        """What makes the text of the answer to a prompt, up to a stop text."""
        stops = list(stop) if isinstance(stop, Sequence) and not isinstance(stop, str) else [stop]
        return TextStream(self.tokenizer, stops, prompt if self.style.continues_text else ())

    def _known(self, ids: list[int]) -> list[int]:
        self.tokenizer.check_rows(max(ids, default=0), self.config.padded_vocab_size)
        return ids
