"""`tokenizer.json`, read by the `tokenizers` library."""

from __future__ import annotations

import re
import secrets
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.tokenizer.backend import MOST_COMPOSED, Backend, damaged
from litgpt.tokenizer.decoder_steps import flat_parts, from_byte_level, steps_of_decoder, token_to_bytes
from litgpt.tokenizer.library import load_library_tokenizer
from litgpt.tokenizer.token_settings import TOKEN_FLAGS, named_tokens

if TYPE_CHECKING:
    import tokenizers
from litgpt.cli.untrusted import is_slow, parse_json, shown

MAX_GROWTH = 64  # by how much replacements may lengthen a text
CUTTERS = ("Split", "ByteLevel", "Digits", "Metaspace")  # pre-tokenizers that need not drop anything


# How the vendors spell what their chat templates write. DeepSeek's files do not mark `<｜User｜>` as special.
MARKER = re.compile(r"<([|｜])[^|｜<>]+\1>")


class JsonBackend(Backend):
    """`tokenizer.json`, by the `tokenizers` library."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        import tokenizers

        try:
            with no_panic(file):
                self._tokenizer = load_library_tokenizer(file, settings)
        except Exception as error:  # the library raises bare Exception
            raise damaged(file, error) from error
        _check_parts(self._tokenizer, file)
        self._file = file
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.control = {}
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._declare_named_tokens(settings)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        special = {token_id: token for token_id, token in added.items() if token.special}
        self.control = {token.content: token_id for token_id, token in special.items()}
        self._declare_tokens_of_the_config(settings.get("added_tokens", {}))
        markers = {token_id: token for token_id, token in added.items() if MARKER.fullmatch(token.content)} | special
        self._declare_special(token for token_id, token in markers.items() if token_id not in special)
        self.markers = self.control | {token.content: token_id for token_id, token in markers.items()}
        self.strips_left = {token.content for token in markers.values() if token.lstrip}
        self.strips_right = {token.content for token in markers.values() if token.rstrip}
        self._surroundings = self._probe_post_processor()
        # From here on no control token is recognised in a text: `encode_segments` puts them in by id, each held by a
        # slot whose name nobody can guess.
        self._tokenizer.encode_special_tokens = True
        self._slot = f"\ufdd1{secrets.token_hex(8)}"
        self._tokenizer.add_tokens([tokenizers.AddedToken(self._slot, special=False, normalized=False)])
        self._slot_id = self._tokenizer.token_to_id(self._slot)
        self._steps, self.leading_space = steps_of_decoder(self._decoder_layout(), file)
        self._is_byte_level = from_byte_level in self._steps
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def encodes_words_apart(self) -> bool:
        """Byte-level BPE on what a regular expression cuts out, with no token that could lie across a cut."""
        import tokenizers

        if not isinstance(model := self._tokenizer.model, tokenizers.models.BPE) or model.dropout:
            return False
        normalizers = flat_parts(self._tokenizer.normalizer, "normalizers")
        parts = flat_parts(self._tokenizer.pre_tokenizer, "pretokenizers")
        cuts = any(part["type"] == "Split" or part.get("use_regex") for part in parts)
        byte_level = any(part["type"] == "ByteLevel" and not part["add_prefix_space"] for part in parts)
        kinds = {part["type"] for part in parts} <= {"Split", "ByteLevel", "Digits"}
        if not (cuts and byte_level and kinds) or any(part["type"] != "NFC" for part in normalizers):
            return False
        plain = [token for token in self._added.values() if token not in self.markers]
        flags = self._tokenizer.get_added_tokens_decoder().values()
        swallow = any(token.lstrip or token.rstrip or token.single_word for token in flags if not token.special)
        return not swallow and not any(re.search(r"\S\s", token) for token in plain)

    @cached_property
    def most_bytes(self) -> int | None:
        import tokenizers

        parts = flat_parts(self._tokenizer.pre_tokenizer, "pretokenizers")
        byte_level = any(part["type"] == "ByteLevel" for part in parts)
        is_complete = byte_level or getattr(self._tokenizer.model, "byte_fallback", False)
        drops = any(part["type"] not in CUTTERS or part.get("behavior") == "Removed" for part in parts)
        if not isinstance(self._tokenizer.model, tokenizers.models.BPE) or drops or not is_complete:
            return None
        shrinks = 1
        for part in flat_parts(self._tokenizer.normalizer, "normalizers"):
            if part["type"] in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase"):
                shrinks = MOST_COMPOSED
            elif part["type"] == "Replace":
                found = part["pattern"].get("String")
                if found is None or len(part["content"].encode()) < len(found.encode()):
                    return None
            elif part["type"] != "Prepend":
                return None
        tokens = self._tokenizer.get_vocab(with_added_tokens=False)
        longest = max(len(token) if byte_level else len(token.replace("▁", " ").encode()) for token in tokens)
        return shrinks * max([longest, *(len(token.encode()) for token in self._added.values())])

    def _decoder_layout(self) -> dict[str, Any] | None:
        """The decoder as tokenizer.json writes it; the state that it is pickled by (reading the whole file again takes
        as long as the library needs for it)."""
        decoder = self._tokenizer.decoder
        return None if decoder is None else parse_json(decoder.__getstate__())

    def _declare_named_tokens(self, settings: dict[str, Any]) -> None:
        """Tokens that tokenizer_config.json names as special are so, whatever tokenizer.json calls them."""
        import tokenizers

        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        named = {token["content"]: token for _, token in named_tokens(settings)}
        self._declare_special(
            tokenizers.AddedToken(content, **{key: token[key] for key in TOKEN_FLAGS if key in token})
            for content, token in named.items()
            if content not in known and self.token_to_id(content) is not None
        )

    def _declare_special(self, tokens: Iterable[tokenizers.AddedToken]) -> None:
        """Makes them tokens that a text cannot spell, the library's word for which is special."""
        import tokenizers

        self._tokenizer.add_special_tokens(
            [
                tokenizers.AddedToken(
                    token.content,
                    special=True,
                    normalized=False,
                    **{flag: getattr(token, flag) for flag in TOKEN_FLAGS},
                )
                for token in tokens
            ]
        )

    def _declare_tokens_of_the_config(self, added: dict[str, int]) -> None:
        """Some checkpoints (InternLM2) name their chat markers in tokenizer_config.json only, on unused ids."""
        missing = {token: token_id for token, token_id in added.items() if self.token_to_id(token) is None}
        self.control.update(missing)
        self._added.update({token_id: token for token, token_id in missing.items()})
        self.vocab_size = max(self.vocab_size, 1 + max(missing.values(), default=0))

    def _probe_post_processor(self) -> tuple[list[int], list[int]]:
        with no_panic(self._file):
            plain = self._tokenizer.encode("a", add_special_tokens=False).ids
            whole = self._tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    def token_to_id(self, token: str) -> int | None:
        return self.control.get(token, self._tokenizer.token_to_id(token))

    def id_to_token(self, token_id: int) -> str | None:
        return self._added.get(token_id) or self._tokenizer.id_to_token(token_id)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        with no_panic(self._file):
            encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_segments(self, segments: list[str | int]) -> list[int]:
        control_ids = iter([segment for segment in segments if isinstance(segment, int)])
        text = "".join(self._slot if isinstance(segment, int) else segment for segment in segments)
        [ids] = self.encode_batch([text])  # `encode` would keep the interpreter to itself
        return [next(control_ids) if token_id == self._slot_id else token_id for token_id in ids]

    def surroundings(self) -> tuple[list[int], list[int]]:
        return self._surroundings

    def decode(self, ids: list[int]) -> str:
        with no_panic(self._file):
            return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        if (known := self._bytes.get(token_id)) is not None:
            return known
        if (added := self._added.get(token_id)) is not None and (self._is_byte_level or added in self.control):
            value = added.encode()  # added tokens are not spelled in the alphabet of bytes
        elif (token := self._tokenizer.id_to_token(token_id)) is None or token_id == self._slot_id:
            value = b""  # an id of the padded part of the vocabulary
        else:
            value = token_to_bytes(token, self._steps)
        return self._bytes.setdefault(token_id, value)


@contextmanager
def no_panic(file: Path) -> Generator[None]:
    """Makes an error of what the Rust library gives up with, which is no `Exception`: it may be caused by the file."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise damaged(file, ValueError(str(error).partition("\n")[0])) from None


def _check_parts(tokenizer: tokenizers.Tokenizer, file: Path) -> None:
    """That none of the parts of a tokenizer.json takes a time or makes a text out of all proportion to what it is
    given: an expression that backtracks, replacements that each make the text longer."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        component = getattr(tokenizer, name)
        layout = None if component is None else parse_json(component.__getstate__())
        growth = 1.0
        for part in _every_part(layout):
            pattern = part.get("Regex")
            if isinstance(pattern, str) and is_slow(pattern):
                raise damaged(file, ValueError(f"the expression {shown(pattern)} could take for ever"))
            if part.get("type") == "Replace":
                found = part["pattern"].get("String")
                growth *= max(1.0, len(part["content"]) / max(1, len(found or "")))
                if growth > MAX_GROWTH or found == "":
                    raise damaged(file, ValueError(f"the replacements of its {name} make a text ever longer"))


def _every_part(layout: Any) -> Generator[dict[str, Any]]:
    if isinstance(layout, dict):
        yield layout
    for inner in layout.values() if isinstance(layout, dict) else layout if isinstance(layout, list) else ():
        yield from _every_part(inner)
