"""Text to token ids and back, as the checkpoint's own tokenizer files say.

`tokenizer.json` is read by `tokenizers`, `tokenizer.model` by sentencepiece. Where a checkpoint has both, it is
`tokenizer.json`: that also holds the tokens added after training (chat markers), which `tokenizer.model` cannot. One
that has neither may have `vocab.json` and `merges.txt`.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.prompts import find_chat_template
from litgpt.tokenizer_parts import ADDED, LIBRARY, MERGES, VOCABULARY, load_library_tokenizer, usual_tokens
from litgpt.untrusted import is_count, is_slow, parse_json, read_json_object, shown

if TYPE_CHECKING:
    import torch

_FLAGS = ("lstrip", "rstrip", "single_word")  # of an added token: the white space that it swallows
MAX_ID = 2**24 - 1  # of a token; vocabularies are made lists of
MAX_GROWTH = 64  # by how much replacements may lengthen a text
CUTTERS = ("Split", "ByteLevel", "Digits", "Metaspace")  # pre-tokenizers that need not drop anything
MOST_COMPOSED = 3  # Hangul, for example: three letters of three bytes make up a syllable of three
LONG_WORD = 16  # characters: the beginning of a text that has so many for each token is hardly shorter than they
PROTECTED = "\ufdd0"  # a Unicode noncharacter: put inside a control token's text, it keeps it text
# How the vendors spell what their chat templates write. DeepSeek's files do not mark `<｜User｜>` as special.
MARKER = re.compile(r"<([|｜])[^|｜<>]+\1>")
MODEL_FILES = (LIBRARY, "tokenizer.model", VOCABULARY)
# sentencepiece's ModelProto { normalizer_spec { add_dummy_prefix: false } }, serialised. A protobuf message takes what
# is appended to it as an amendment.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    A *control token* is one that the checkpoint marks as special: BOS, EOS, chat markers. In `encode` the text of one
    is ordinary text unless `allow_special` is set, so that what a user types can never end a turn or open another;
    so is that of any other token spelled like a marker (`<|fim_prefix|>`), though `decode` shows those. Prompts
    rendered by a chat template are encoded with `allow_special=True`, after `protect` made the user's part safe.

    Attributes:
        bos_id, eos_id: ids, or None where the checkpoint names no such token.
        stop_ids: every id that ends a generation: EOS and the `eos_token_id` of generation_config.json and config.json.
        vocab_size: number of tokens, added ones included (a model's embedding may be padded beyond it).
        adds_bos, adds_eos: whether the checkpoint puts them around a text by itself.

    Raises:
        FileNotFoundError: the directory or the tokenizer's files are not there.
        ValueError: a file is damaged.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.dir = Path(checkpoint_dir)
        self._file = _tokenizer_file(self.dir)
        self._settings = _special_token_settings(self.dir)
        if self._file.name == VOCABULARY:
            self._settings = usual_tokens(self._settings) | self._settings
        self._backend = (
            _SentencePieceBackend(self._file, self._settings)
            if self._file.suffix == ".model"
            else _JsonBackend(self._file, self._settings)
        )
        self.vocab_size: int = self._backend.vocab_size
        self._generation = [_generation_settings(self.dir / name) for name in ("generation_config.json", "config.json")]
        self.bos_id = self._special_id("bos", self._backend.bos_id)
        self.eos_id = self._special_id("eos", self._backend.eos_id)
        self.stop_ids = self._stop_ids()
        self._prefix, self._suffix = self._surroundings()
        self.adds_bos, self.adds_eos = bool(self._prefix), bool(self._suffix)

    # -- text to ids

    def encode(
        self,
        text: str,
        *,
        device: torch.device | str | None = None,
        bos: bool | None = None,
        eos: bool | None = False,
        max_length: int = -1,
        allow_special: bool = False,
    ) -> torch.Tensor:
        """The ids of `text` as an int64 tensor of shape (T,); `max_length` > 0 keeps the first that many."""
        import torch

        ids = self.encode_ids(text, bos=bos, eos=eos, allow_special=allow_special)
        return torch.tensor(ids[:max_length] if max_length > 0 else ids, dtype=torch.int64, device=device)

    def encode_ids(
        self,
        text: str,
        *,
        bos: bool | None = None,
        eos: bool | None = False,
        allow_special: bool = False,
        room: int | None = None,
    ) -> list[int]:
        """The ids of `text`. The thread lets others run meanwhile.

        Args:
            text: any text; with `allow_special` a rendered prompt.
            bos: put BOS first; None does as the checkpoint says. A text that begins with it gets no other.
            eos: put EOS last; None does as the checkpoint says.
            allow_special: the text of a control token becomes that token, except where `protect` marked it.
            room: how many tokens the model's context holds. A text that is far too long for it is not encoded to its
                end, which may take minutes; one that is a little too long may be, and is given back whole.

        Raises:
            TextTooLongError: the text certainly has more tokens than there is room for.
        """
        if room is not None:
            self._refuse_too_long(text, room, allow_special)
        return self._surround(self._encode_plain_or_special(text, allow_special), bos, eos)

    def encode_batch_ids(
        self, texts: Sequence[str], *, bos: bool | None = None, eos: bool | None = False, allow_special: bool = False
    ) -> list[list[int]]:
        """`encode_ids` of many texts; with `tokenizer.json` on all cores."""
        if allow_special:
            return [self.encode_ids(text, bos=bos, eos=eos, allow_special=True) for text in texts]
        return [self._surround(ids, bos, eos) for ids in self._backend.encode_batch(list(map(_well_formed, texts)))]

    def protect(self, text: str) -> str:
        """`text`, marked so that `encode(..., allow_special=True)` reads the control tokens spelled in it as text."""
        text = text.replace(PROTECTED, "")
        return self._marker_pattern.sub(lambda match: match[0][0] + PROTECTED + match[0][1:], text)

    def token_to_id(self, token: str) -> int:
        """The id of one token; ValueError where the vocabulary has none of that name."""
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"The tokenizer in {self.dir} has no token {token!r}.")
        return token_id

    def is_control(self, token_id: int) -> bool:
        """Whether it is a control token, which `decode` leaves out."""
        return token_id in self._backend.control_ids

    def is_marker(self, token_id: int) -> bool:
        """Whether only `allow_special` makes it of its text: it is a control token, or spelled like one."""
        return token_id in self._backend.marker_ids

    def check_rows(self, largest: int, rows: int) -> None:
        """Raises `ValueError` where the largest id of some text is none of the `rows` of a model's embedding."""
        if largest >= rows:
            raise ValueError(
                f"The tokenizer in {self.dir} gives the token id {largest}, but the model's vocabulary ends at "
                f"{rows - 1}. They do not belong together: copy the model's own tokenizer there."
            )

    # -- ids to text

    def decode(self, ids: Iterable[int] | torch.Tensor, skip_special: bool = True) -> str:
        """The text of `ids`; control tokens are left out unless `skip_special` is False."""
        return "".join(self.decode_stream(_as_ints(ids), skip_special=skip_special))

    def decode_at_once(self, ids: Iterable[int] | torch.Tensor) -> str:
        """The text of `ids` as the tokenizer's library makes it of all of them together. It differs from `decode` where
        single bytes do not make up a character: each byte of such a run becomes U+FFFD, which no stream can know."""
        kept = [token_id for token_id in _as_ints(ids) if token_id not in self._backend.control_ids]
        return self._backend.decode(kept)

    def decode_stream(
        self, ids: Iterable[int], *, skip_special: bool = True, after: Sequence[int] = ()
    ) -> Iterator[str]:
        """Text as the ids come, in pieces that never split a character; joined they equal `decode(ids)`.

        The cost of a token does not grow with the text before it. `after` are ids that stand before these: the pieces
        then continue their text, with the leading space that `decode(ids)` alone would drop (sentencepiece).
        """
        decoder = self.stream_decoder(skip_special=skip_special, after=after)
        yield from filter(None, map(decoder.push, ids))
        if rest := decoder.finish():
            yield rest

    def stream_decoder(
        self, *, skip_special: bool = True, after: Sequence[int] = (), shown: Sequence[int] = ()
    ) -> StreamDecoder:
        """The same where the ids do not come from one place: one at a time. The control tokens `shown` are kept."""
        skipped = self._backend.control_ids.difference(shown) if skip_special else frozenset()
        return StreamDecoder(self._backend, skipped, after)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for, possibly a part of a character; of a control token, its name."""
        return self._backend.token_bytes(token_id)

    # -- what else a checkpoint's tokenizer says

    @cached_property
    def chat_template(self) -> str | None:
        """The checkpoint's own Jinja chat template, if it has one."""
        return find_chat_template(self.dir)

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """The named control tokens, e.g. {"bos_token": "<s>", "eos_token": "</s>"}: variables of a chat template."""
        named = {name: token["content"] for name, token in _named_tokens(self._settings)}
        for name, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if name not in named and token_id is not None:
                named[name] = self._backend.id_to_token(token_id)
        return named

    @property
    def encodes_words_apart(self) -> bool:
        """Whether it may cut a text into words first, each of which becomes the same ids wherever it stands."""
        return self._backend.encodes_words_apart

    def fingerprint(self) -> str:
        """A hash that is the same exactly where texts become the same ids; for caches of tokenised text."""
        digest = hashlib.sha256(self._file.read_bytes())
        if self._file.name == VOCABULARY:
            for name in (MERGES, ADDED):
                digest.update((self.dir / name).read_bytes() if (self.dir / name).is_file() else b"")
        facts = [self.bos_id, self.eos_id, self._prefix, self._suffix, sorted(self._backend.markers.items())]
        if (adds := self._settings.get("add_prefix_space")) is not None:
            facts.append([self._settings.get("tokenizer_class"), adds])
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()

    # -- inside

    def _refuse_too_long(self, text: str, room: int, allow_special: bool) -> None:
        longest, size = self._backend.most_bytes, len(text)  # characters: at least as many bytes
        if longest is not None and size > longest * room:
            raise TextTooLongError(
                f"The text has {size:,} characters, and no {room:,} tokens, which are all that the model's context "
                f"holds, stand for more than {longest * room:,} bytes. Shorten it, or take a model with a longer "
                "context."
            )
        # Its beginning tells as well, but for a few tokens around the place where it is cut.
        sure, beginning = room + room // 16 + 64, LONG_WORD * room
        while beginning < size:
            if len(self._encode_plain_or_special(text[:beginning], allow_special)) > sure:
                raise TextTooLongError(
                    f"The first {beginning:,} characters of the text alone have more than {room:,} tokens, which are "
                    "all that the model's context holds. Shorten it, or take a model with a longer context."
                )
            beginning *= 4

    def _encode_plain_or_special(self, text: str, allow_special: bool) -> list[int]:
        text = _well_formed(text)
        if not allow_special:
            return self._backend.encode_batch([text])[0]
        segments: list[str | int] = []
        end = 0
        for match in self._marker_pattern.finditer(text):
            segments += [text[end : match.start()].replace(PROTECTED, ""), self._backend.markers[match[0].strip()]]
            end = match.end()
        segments.append(text[end:].replace(PROTECTED, ""))
        return self._backend.encode_segments([segment for segment in segments if segment != ""])

    @cached_property
    def _marker_pattern(self) -> re.Pattern[str]:
        """Matches the text of a marker, with the white space that the token is declared to swallow."""
        backend, longest_first = self._backend, sorted(self._backend.markers, key=len, reverse=True)
        alternatives = [
            (r"\s*" if token in backend.strips_left else "")
            + re.escape(token)
            + (r"\s*" if token in backend.strips_right else "")
            for token in longest_first
        ]
        return re.compile("|".join(alternatives) or r"(?!)")

    def _surround(self, ids: list[int], bos: bool | None, eos: bool | None) -> list[int]:
        prefix, suffix = self._prefix if bos is None else [], self._suffix if eos is None else []
        if bos:
            prefix = self._prefix or [self._required("bos")]
        if eos:
            suffix = self._suffix or [self._required("eos")]
        if ids[: len(prefix)] == prefix:
            prefix = []
        return prefix + ids + suffix

    def _required(self, which: str) -> int:
        token_id = self.bos_id if which == "bos" else self.eos_id
        if token_id is None:
            raise ValueError(f"The tokenizer in {self.dir} names no {which.upper()} token; pass `{which}=False`.")
        return token_id

    def _special_id(self, which: str, from_model: int | None) -> int | None:
        """The tokenizer's own word first (an explicit null included), then generation_config.json, config.json."""
        named = self._settings.get(f"{which}_token", "unsaid")
        if named is None:
            return None
        if isinstance(named, dict) and (token_id := self._backend.token_to_id(named["content"])) is not None:
            return token_id
        candidates = [from_model]
        for settings in self._generation:
            candidates += _id_list(settings.get(f"{which}_token_id"))
            candidates += _id_list((settings.get("text_config") or {}).get(f"{which}_token_id"))
        return next((token_id for token_id in candidates if token_id is not None), None)

    def _stop_ids(self) -> set[int]:
        stops = {self.eos_id} if self.eos_id is not None else set()
        for settings in self._generation:
            stops.update(_id_list(settings.get("eos_token_id")))
            stops.update(_id_list((settings.get("text_config") or {}).get("eos_token_id")))
        return stops

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """The ids that the checkpoint puts before and after a text.

        `add_bos_token` / `add_eos_token` of tokenizer_config.json decide; where they say nothing, the backend's rule:
        tokenizer.json's post-processor (which may put other tokens than BOS), or sentencepiece's BOS if it has one.
        """
        prefix, suffix = self._backend.surroundings()
        says_bos, says_eos = self._settings.get("add_bos_token"), self._settings.get("add_eos_token")
        if says_bos is not None and self.bos_id is not None:
            prefix = (prefix or [self.bos_id]) if says_bos else []
        if says_eos is not None and self.eos_id is not None:
            suffix = (suffix or [self.eos_id]) if says_eos else []
        return prefix, suffix


class TextTooLongError(ValueError):
    """A text has more tokens than the model's context holds."""


class _Backend(ABC):
    """What both kinds of file offer.

    Attributes:
        control: text and id of each control token.
        markers: the same of every token that only `allow_special` makes of its text, the control tokens among them.
    """

    vocab_size: int
    control: dict[str, int]
    markers: dict[str, int]
    strips_left: set[str]
    strips_right: set[str]
    bos_id: int | None = None
    eos_id: int | None = None
    leading_space = 0  # how many spaces at the very beginning of a text are no part of it
    encodes_words_apart = False
    most_bytes: int | None = None
    """How many bytes of a text one token stands for, at most; None where that has no bound: an unknown word of any
    length is one token, or white space is dropped."""

    @cached_property
    def control_ids(self) -> frozenset[int]:
        return frozenset(self.control.values())

    @cached_property
    def marker_ids(self) -> frozenset[int]:
        return frozenset(self.markers.values())

    @abstractmethod
    def token_to_id(self, token: str) -> int | None: ...

    @abstractmethod
    def id_to_token(self, token_id: int) -> str: ...

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, control tokens spelled in it read as text, nothing put around it."""

    @abstractmethod
    def encode_segments(self, segments: list[str | int]) -> list[int]:
        """Ids of one text given as plain segments and the ids of the control tokens between them."""

    @abstractmethod
    def surroundings(self) -> tuple[list[int], list[int]]: ...

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for, possibly a part of a character."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Their text, by the library."""


class StreamDecoder:
    """Text as token ids come, in pieces that never split a character. Made by `Tokenizer.stream_decoder`."""

    def __init__(self, backend: _Backend, skipped: frozenset[int], after: Sequence[int]) -> None:
        self._backend = backend
        self._skipped = skipped
        self._spaces = backend.leading_space if all(token_id in self._skipped for token_id in after) else 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain with one more id, "" where it ends within a character."""
        if token_id in self._skipped:
            return ""
        piece = self._decoder.decode(self._backend.token_bytes(token_id))
        while piece and self._spaces:
            self._spaces -= 1
            if not piece.startswith(" "):
                self._spaces = 0
                break
            piece = piece[1:]
        return piece

    def finish(self) -> str:
        """What stands for the bytes of a character that was never completed."""
        return self._decoder.decode(b"", final=True)


class _JsonBackend(_Backend):
    """`tokenizer.json`, by the `tokenizers` library."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        import tokenizers

        try:
            with no_panic(file):
                self._tokenizer = load_library_tokenizer(file, settings)
        except Exception as error:  # the library raises bare Exception
            raise _damaged(file, error) from error
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
        self._steps, self.leading_space = _decoder_steps(self._decoder_layout(), file)
        self._is_byte_level = _from_byte_level in self._steps
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def encodes_words_apart(self) -> bool:
        """Byte-level BPE on what a regular expression cuts out, with no token that could lie across a cut."""
        import tokenizers

        if not isinstance(model := self._tokenizer.model, tokenizers.models.BPE) or model.dropout:
            return False
        normalizers = _flattened(self._tokenizer.normalizer, "normalizers")
        parts = _flattened(self._tokenizer.pre_tokenizer, "pretokenizers")
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

        parts = _flattened(self._tokenizer.pre_tokenizer, "pretokenizers")
        byte_level = any(part["type"] == "ByteLevel" for part in parts)
        is_complete = byte_level or getattr(self._tokenizer.model, "byte_fallback", False)
        drops = any(part["type"] not in CUTTERS or part.get("behavior") == "Removed" for part in parts)
        if not isinstance(self._tokenizer.model, tokenizers.models.BPE) or drops or not is_complete:
            return None
        shrinks = 1
        for part in _flattened(self._tokenizer.normalizer, "normalizers"):
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
        named = {token["content"]: token for _, token in _named_tokens(settings)}
        self._declare_special(
            tokenizers.AddedToken(content, **{key: token[key] for key in _FLAGS if key in token})
            for content, token in named.items()
            if content not in known and self.token_to_id(content) is not None
        )

    def _declare_special(self, tokens: Iterable[Any]) -> None:
        """Makes them tokens that a text cannot spell, the library's word for which is special."""
        import tokenizers

        self._tokenizer.add_special_tokens(
            [
                tokenizers.AddedToken(
                    token.content,
                    special=True,
                    normalized=False,
                    **{flag: getattr(token, flag) for flag in _FLAGS},
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

    def id_to_token(self, token_id: int) -> str:
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
            value = _token_to_bytes(token, self._steps)
        return self._bytes.setdefault(token_id, value)


class _SentencePieceBackend(_Backend):
    """`tokenizer.model`, by sentencepiece, with what added_tokens.json and tokenizer_config.json add to it."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._model = _load_sentencepiece(file)
        self._file = file
        added = _read_json(file.parent / "added_tokens.json")
        if not all(is_count(token_id, MAX_ID) for token_id in added.values()):
            raise _damaged(file.parent / "added_tokens.json", ValueError("it does not say the id of each token"))
        self._added = {**added, **settings.get("added_tokens", {})}
        self._added_by_id = {token_id: token for token, token_id in self._added.items()}
        size = self._model.get_piece_size()
        self.vocab_size = max(size, 1 + max(self._added_by_id, default=0))
        self._pieces = [self._model.id_to_piece(token_id) for token_id in range(size)]
        self.control = {piece: i for i, piece in enumerate(self._pieces) if self._model.is_control(i)}
        unknown = self._model.unk_id()
        if unknown >= 0:
            self.control[self._pieces[unknown]] = unknown
        self.control.update(self._added)
        self.markers = self.control
        self.strips_left = self.strips_right = set()
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None
        self._has_dummy_prefix = self._model.encode("x", out_type=str)[0].startswith("▁")
        if self._has_dummy_prefix and settings.get("add_prefix_space") is False:
            self._model, self._has_dummy_prefix = self._model_without_prefix, False
        self.leading_space = int(self._has_dummy_prefix)
        keeps_spaces = self._model.encode("x  x") != self._model.encode("x x")
        if keeps_spaces and any(self._model.is_byte(token_id) for token_id in range(size)):
            longest = max(len(self.token_bytes(token_id)) for token_id in range(self.vocab_size))
            self.most_bytes = MOST_COMPOSED * longest
        # `legacy` (transformers' word, true by default) puts the dummy space before every segment, not only the first.
        self._prefix_everywhere = settings.get("legacy", True) is not False

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        token_id = self._model.piece_to_id(token)
        return None if self._pieces[token_id] != token else token_id

    def id_to_token(self, token_id: int) -> str:
        return self._added_by_id.get(token_id) or self._pieces[token_id]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts))

    def encode_segments(self, segments: list[str | int]) -> list[int]:
        ids: list[int] = []
        for index, segment in enumerate(segments):
            if isinstance(segment, int):
                ids.append(segment)
            elif index == 0 or self._prefix_everywhere:
                ids += self._model.encode(segment)
            else:
                ids += self._model_without_prefix.encode(segment)
        return ids

    @cached_property
    def _model_without_prefix(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=self._file.read_bytes() + NO_DUMMY_PREFIX)

    def surroundings(self) -> tuple[list[int], list[int]]:
        return ([self.bos_id] if self.bos_id is not None else []), []

    def decode(self, ids: list[int]) -> str:
        return self._model.decode([token_id for token_id in ids if token_id < len(self._pieces)])

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added_by_id:
            return self._added_by_id[token_id].encode()
        if token_id >= len(self._pieces):
            return b""  # an id of the padded part of the vocabulary
        piece = self._pieces[token_id]
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


def _well_formed(text: str) -> str:
    """`text` with U+FFFD for each lone surrogate (half of a character, as JSON and file names can bring it)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# -- how tokenizer.json turns tokens into text

_Step = Callable[[str], "str | bytes"]


def _decoder_steps(decoder: dict[str, Any] | None, file: Path) -> tuple[list[_Step], int]:
    """The decoder of tokenizer.json as functions of one token, and how many leading spaces the whole text loses.

    Bytes come out where a token may be part of a character: joined before they are decoded, they make streaming exact.
    """
    steps: list[_Step] = []
    leading = 0
    for part in _flatten(decoder):
        kind = part["type"]
        if kind == "ByteLevel":
            steps.append(_from_byte_level)
        elif kind == "ByteFallback":
            steps.append(_from_byte_fallback)
        elif kind == "Replace" and "String" in part["pattern"]:
            steps.append(lambda token, old=part["pattern"]["String"], new=part["content"]: token.replace(old, new))
        elif kind == "Metaspace":
            steps.append(lambda token, old=part["replacement"]: token.replace(old, " "))
            leading = (
                0 if part.get("prepend_scheme", "always") == "never" or part.get("add_prefix_space") is False else 1
            )
        elif kind == "Strip" and part["content"] == " " and not part["stop"]:
            leading = part["start"]
        elif kind == "BPEDecoder":
            steps.append(lambda token, suffix=part["suffix"]: token.replace(suffix, " "))
        elif kind != "Fuse":
            raise ValueError(f"{file} has a decoder of type {kind!r}, which no causal language model is known to use.")
    return steps, leading


def _flattened(component: Any, parts: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer of the library, as tokenizer.json writes them."""
    layout = None if component is None else parse_json(component.__getstate__())
    return [] if layout is None else layout[parts] if layout["type"] == "Sequence" else [layout]


def _flatten(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _flatten(part)
    else:
        yield decoder


def _token_to_bytes(token: str, steps: list[_Step]) -> bytes:
    for step in steps:
        token = step(token)
        if isinstance(token, bytes):
            return token
    return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable Latin-1 stands for itself, the others for U+0100 and following, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_level_alphabet()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return token.encode()


def _from_byte_fallback(token: str) -> str | bytes:
    return bytes([int(token[3:5], 16)]) if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token) else token


# -- reading the files


@contextmanager
def no_panic(file: Path) -> Iterator[None]:
    """Makes an error of what the Rust library gives up with, which is no `Exception`: it may be caused by the file."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _damaged(file, ValueError(str(error).partition("\n")[0])) from None


def _check_parts(tokenizer: Any, file: Path) -> None:
    """That none of the parts of a tokenizer.json takes a time or makes a text out of all proportion to what it is
    given: an expression that backtracks, replacements that each make the text longer."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        component = getattr(tokenizer, name)
        layout = None if component is None else parse_json(component.__getstate__())
        growth = 1.0
        for part in _every_part(layout):
            pattern = part.get("Regex")
            if isinstance(pattern, str) and is_slow(pattern):
                raise _damaged(file, ValueError(f"the expression {shown(pattern)} could take for ever"))
            if part.get("type") == "Replace":
                found = part["pattern"].get("String")
                growth *= max(1.0, len(part["content"]) / max(1, len(found or "")))
                if growth > MAX_GROWTH or found == "":
                    raise _damaged(file, ValueError(f"the replacements of its {name} make a text ever longer"))


def _every_part(layout: Any) -> Iterator[dict[str, Any]]:
    if isinstance(layout, dict):
        yield layout
    for inner in layout.values() if isinstance(layout, dict) else layout if isinstance(layout, list) else ():
        yield from _every_part(inner)


def _tokenizer_file(directory: Path) -> Path:
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no checkpoint directory {str(directory)!r} to read a tokenizer from.")
    for name in MODEL_FILES:
        if (directory / name).is_file() and (name != VOCABULARY or (directory / MERGES).is_file()):
            return directory / name
    raise FileNotFoundError(
        f"{str(directory)!r} has no tokenizer: neither tokenizer.json nor tokenizer.model is there, nor vocab.json and "
        "merges.txt. Copy it from the model's repository, or fetch it with `litgpt download <repo_id> --tokenizer_only "
        "true`."
    )


def _load_sentencepiece(file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except Exception as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file} is damaged or not a tokenizer ({error}). Fetch it again from the model's repository.")


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    try:
        return read_json_object(file, remedy="Fetch it again from the model's repository.")
    except FileNotFoundError:
        return {}


def _generation_settings(file: Path) -> dict[str, Any]:
    """generation_config.json or config.json, where the ids of tokens are what they should be."""
    settings = _read_json(file)
    for holder in (settings, settings.get("text_config") or {}):
        if not isinstance(holder, dict):
            raise _damaged(file, ValueError(f"text_config is {shown(holder)}"))
        for name in ("bos_token_id", "eos_token_id"):
            ids = holder.get(name)
            if not all(is_count(token_id, MAX_ID) for token_id in _id_list(ids)):
                raise _damaged(file, ValueError(f"{name} is {shown(ids)}"))
    return settings


def _special_token_settings(directory: Path) -> dict[str, Any]:
    """What special_tokens_map.json and, with the last word, tokenizer_config.json say about special tokens.

    Each `*_token` becomes {"content": ..., flags...} or None where the file says null; `added_tokens` maps the tokens
    of `added_tokens_decoder` to their ids.
    """
    config = _read_json(directory / "tokenizer_config.json")
    merged = {**_read_json(directory / "special_tokens_map.json"), **config}
    settings: dict[str, Any] = {}
    for name, value in merged.items():
        if name.endswith("_token") and not name.startswith("add_"):
            settings[name] = {"content": value} if isinstance(value, str) else value
            if isinstance(value, dict) and not _is_token(value):
                raise _damaged(directory / "tokenizer_config.json", ValueError(f"{name} is no token with its content"))
    for name in ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space", "tokenizer_class"):
        if name in config:
            settings[name] = config[name]
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(map(_is_token, decoder.values())) or not all(map(_is_id, decoder)):
        error = ValueError("added_tokens_decoder does not say the content of each token by its id")
        raise _damaged(directory / "tokenizer_config.json", error)
    settings["added_tokens"] = {token["content"]: int(token_id) for token_id, token in decoder.items()}
    return {name: value for name, value in settings.items() if not isinstance(value, dict) or value}


def _is_token(value: Any) -> bool:
    """Whether it is a token with its flags, as the JSON files write it."""
    flags = (value.get(flag, False) for flag in _FLAGS) if isinstance(value, dict) else [None]
    return all(isinstance(flag, bool) for flag in flags) and isinstance(value.get("content"), str)


def _is_id(text: str) -> bool:
    return text.isdecimal() and len(text) < 10 and int(text) <= MAX_ID


def _named_tokens(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """("bos_token", {"content": "<s>", flags...}) and so on, of the tokens that have a name."""
    return [(name, token) for name, token in settings.items() if name.endswith("_token") and isinstance(token, dict)]


def _id_list(value: int | list[int] | None) -> list[int]:
    """Ids that are given one alone, in a list, or not; -1 is none, as in some configurations."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    return [token_id for token_id in ids if type(token_id) is not int or token_id >= 0]


def _as_ints(ids: Iterable[int] | torch.Tensor) -> Iterable[int]:
    return ids.tolist() if hasattr(ids, "tolist") else ids
