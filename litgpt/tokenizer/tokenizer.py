"""Text to token ids and back, as the checkpoint's own tokenizer files say.

`tokenizer.json` is read by `tokenizers`, `tokenizer.model` by sentencepiece. Where a checkpoint has both, it is
`tokenizer.json`: that also holds the tokens added after training (chat markers), which `tokenizer.model` cannot. One
that has neither may have `vocab.json` and `merges.txt`.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.prompts import find_chat_template
from litgpt.tokenizer.library import ADDED, LIBRARY, MERGES, VOCABULARY, usual_tokens

if TYPE_CHECKING:
    import torch
from litgpt.tokenizer.json_backend import JsonBackend
from litgpt.tokenizer.sentencepiece_backend import SentencePieceBackend
from litgpt.tokenizer.stream import StreamDecoder
from litgpt.tokenizer.token_settings import generation_settings, id_list, named_tokens, special_token_settings

LONG_WORD = 16  # characters: the beginning of a text that has this many for each token is hardly shorter than they
PROTECTED = "\ufdd0"  # a Unicode noncharacter: put inside a control token's text, it keeps it text
MODEL_FILES = (LIBRARY, "tokenizer.model", VOCABULARY)


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
        self._settings = special_token_settings(self.dir)
        if self._file.name == VOCABULARY:
            self._settings = usual_tokens(self._settings) | self._settings
        self._backend = (
            SentencePieceBackend(self._file, self._settings)
            if self._file.suffix == ".model"
            else JsonBackend(self._file, self._settings)
        )
        self.vocab_size: int = self._backend.vocab_size
        self._generation = [generation_settings(self.dir / name) for name in ("generation_config.json", "config.json")]
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
        named = {name: token["content"] for name, token in named_tokens(self._settings)}
        for name, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if name not in named and token_id is not None and (token := self._backend.id_to_token(token_id)):
                named[name] = token
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
        markers = sorted(self._backend.markers.items())
        facts: list[object] = [self.bos_id, self.eos_id, self._prefix, self._suffix, markers]
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
            candidates += id_list(settings.get(f"{which}_token_id"))
            candidates += id_list((settings.get("text_config") or {}).get(f"{which}_token_id"))
        return next((token_id for token_id in candidates if token_id is not None), None)

    def _stop_ids(self) -> set[int]:
        stops = {self.eos_id} if self.eos_id is not None else set()
        for settings in self._generation:
            stops.update(id_list(settings.get("eos_token_id")))
            stops.update(id_list((settings.get("text_config") or {}).get("eos_token_id")))
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


def _well_formed(text: str) -> str:
    """`text` with U+FFFD for each lone surrogate (half of a character, as JSON and file names can bring it)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


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


def _as_ints(ids: Iterable[int] | torch.Tensor) -> Iterable[int]:
    return ids.tolist() if hasattr(ids, "tolist") else map(operator.index, ids)
