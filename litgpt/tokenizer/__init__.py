"""Text to token ids and back. See `Tokenizer`."""

from litgpt.tokenizer.stream import StreamDecoder
from litgpt.tokenizer.tokenizer import TextTooLongError, Tokenizer

__all__ = ["StreamDecoder", "TextTooLongError", "Tokenizer"]
