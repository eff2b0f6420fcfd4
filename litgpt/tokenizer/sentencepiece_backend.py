"""`tokenizer.model`, read by sentencepiece."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.tokenizer.backend import MAX_ID, MOST_COMPOSED, Backend, damaged
from litgpt.tokenizer.token_settings import read_side_file

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
from litgpt.cli.untrusted import is_count

# sentencepiece's ModelProto { normalizer_spec { add_dummy_prefix: false } }, serialised. A protobuf message takes what
# is appended to it as an amendment.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceBackend(Backend):
    """`tokenizer.model`, by sentencepiece, with what added_tokens.json and tokenizer_config.json add to it."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self._model = _load_sentencepiece(file)
        self._file = file
        added = read_side_file(file.parent / "added_tokens.json")
        if not all(is_count(token_id, MAX_ID) for token_id in added.values()):
            raise damaged(file.parent / "added_tokens.json", ValueError("it does not say the id of each token"))
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

    def id_to_token(self, token_id: int) -> str | None:
        piece = self._pieces[token_id] if token_id < len(self._pieces) else None
        return self._added_by_id.get(token_id) or piece

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
    def _model_without_prefix(self) -> SentencePieceProcessor:
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


def _load_sentencepiece(file: Path) -> SentencePieceProcessor:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except Exception as error:
        raise damaged(file, error) from error
