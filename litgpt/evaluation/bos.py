"""What stands before a text, which figures depend on."""

from __future__ import annotations

from typing import Any

from litgpt.tokenizer.tokenizer import Tokenizer


def prefix_token(tokenizer: Tokenizer) -> int:
    """The token before a text that has no context: BOS, or EOS where there is none.

    Raises:
        ValueError: There is neither.
    """
    token_id = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if token_id is None:
        raise ValueError(
            f"The tokenizer in {tokenizer.dir} names neither a BOS nor an EOS token, and one has to stand before a "
            "text without context. Name one in its tokenizer_config.json."
        )
    return token_id


def bos_policy(tokenizer: Tokenizer) -> dict[str, Any]:
    """What is put before texts, as results record it."""
    return {
        "added_to_texts": tokenizer.decode(tokenizer.encode_ids("", bos=None), skip_special=False),
        "before_texts_without_context": tokenizer.decode([prefix_token(tokenizer)], skip_special=False),
    }
