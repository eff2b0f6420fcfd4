"""Tokenised samples in a directory, memory-mapped: any number of processes share them, and a later run finds them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from litgpt.data.cache_sums import sum_of
from litgpt.data.records import Conversation, Message
from litgpt.data.sample_encoding import Encoded, ExampleEncoder
from litgpt.model import IGNORE_INDEX

TOKENS, TARGETS, STARTS, ANSWERS = "tokens.bin", "targets.bin", "starts.npy", "answers.npy"
MESSAGES, MESSAGE_STARTS, SUMMARY = "messages.jsonl", "message_starts.npy", "summary.json"


class Sample(NamedTuple):
    """One training sequence of T tokens."""

    messages: list[Message]
    """The conversation up to the last reply in it; an `input` stands next to the instruction"""
    input_ids: Tensor
    """(T,) int64"""
    labels: Tensor
    """(T,) int64, in place: the id itself where it is to be predicted, -100 elsewhere"""


@dataclass
class Summary:
    """What became of the records."""

    records: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    longest: int = 0
    """Tokens of the longest sample"""
    truncated: int = 0
    dropped: int = 0
    divided: int = 0
    """Conversations that gave more than one sample"""
    inputs_appended: int = 0
    """Records whose input follows the instruction, since the style has no place for it"""
    forms: dict[str, int] = field(default_factory=dict)
    """Records of each form"""


class SampleFile:
    """The samples in a directory that `write` made."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.summary = Summary(**json.loads((directory / SUMMARY).read_text(encoding="utf-8")))
        size = (directory / TOKENS).stat().st_size
        if size != self.summary.tokens * 4:
            raise ValueError(
                f"The cached samples in {directory.parent} are damaged: {TOKENS} has {size} bytes, not "
                f"{self.summary.tokens * 4}. Delete the directory; it will be made again."
            )

    @classmethod
    def write(
        cls,
        directory: Path,
        conversations: Iterable[Conversation],
        encoded: Iterable[list[Encoded]],
        encoder: ExampleEncoder,
        drop_long: bool,
    ) -> SampleFile:
        """Write the samples of `conversations`.

        Args:
            directory: An empty directory.
            conversations: What the samples say.
            encoded: The sequences of each.
            encoder: What made them.
            drop_long: Leave out sequences that were too long, instead of keeping their beginning.

        Raises:
            ValueError: Samples without anything to learn.
        """
        directory.mkdir(parents=True, exist_ok=True)
        summary, forms = Summary(), Counter()
        starts, message_starts, answers = [0], [0], []
        empty: list[tuple[str, int]] = []
        with (
            open(directory / TOKENS, "wb") as tokens,
            open(directory / TARGETS, "wb") as targets,
            open(directory / MESSAGES, "wb") as texts,
        ):
            for conversation, sequences in zip(conversations, encoded, strict=True):
                summary.records += 1
                forms[conversation.form] += 1
                summary.divided += len(sequences) > 1
                summary.inputs_appended += bool(conversation.input) and not encoder.places_input
                for sequence in sequences:
                    if sequence.is_long and drop_long:
                        summary.dropped += 1
                        continue
                    summary.truncated += sequence.is_long
                    if not any(sequence.targets):
                        empty.append((conversation.where, sequence.answer_start))
                        continue
                    tokens.write(np.asarray(sequence.ids, dtype="<i4").tobytes())
                    targets.write(np.asarray(sequence.targets, dtype=np.uint8).tobytes())
                    texts.write(_as_line(conversation, sequence, encoder))
                    starts.append(starts[-1] + len(sequence.ids))
                    message_starts.append(texts.tell())
                    answers.append(sequence.answer_start)
                    summary.targets += sum(sequence.targets)
                    summary.longest = max(summary.longest, len(sequence.ids))
        if empty:
            raise ValueError(nothing_to_learn(empty, summary.records, encoder.max_tokens))
        summary.samples, summary.tokens, summary.forms = len(answers), starts[-1], dict(forms)
        for name, values in ((STARTS, starts), (MESSAGE_STARTS, message_starts), (ANSWERS, answers)):
            np.save(directory / name, np.asarray(values, dtype=np.int64))
        (directory / SUMMARY).write_text(json.dumps(asdict(summary)), encoding="utf-8")
        return cls(directory)

    def digest(self) -> str:
        """The same where the samples are: where they begin and end, their ids, and which of these are learned."""
        return sum_of([self.directory / name for name in (TOKENS, TARGETS, STARTS)])

    def __len__(self) -> int:
        return self.summary.samples

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        ids, targets = self.tokens_of(index)
        input_ids = torch.from_numpy(ids.astype(np.int64))
        labels = torch.from_numpy(np.where(targets, ids, IGNORE_INDEX).astype(np.int64))
        return Sample(self.messages_of(index), input_ids, labels)

    def tokens_of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a sample, and which of them are to be predicted: int32 (T,), uint8 (T,)."""
        start, end = self._span(self._starts, index)
        return self._tokens[start:end], self._targets[start:end]

    def messages_of(self, index: int) -> list[Message]:
        """The conversation of a sample."""
        start, end = self._span(self._message_starts, index)
        with open(self.directory / MESSAGES, "rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))

    def prompt_of(self, index: int) -> list[int]:
        """The ids before the last reply of a sample (of a truncated one, what is left of them)."""
        return self.tokens_of(index)[0][: self._answers[index]].tolist()

    def reply_of(self, index: int) -> list[int]:
        """The ids of the last reply of a sample, with what ends it (of a truncated one, what is left of them)."""
        return self.tokens_of(index)[0][self._answers[index] :].tolist()

    @property
    def largest_id(self) -> int:
        """The largest id in all samples; 0 where there are none."""
        return int(self._tokens.max(initial=0))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, int64 (number of samples,)."""
        return np.diff(self._starts)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.load(self.directory / STARTS, mmap_mode="r")

    @cached_property
    def _message_starts(self) -> np.ndarray:
        return np.load(self.directory / MESSAGE_STARTS, mmap_mode="r")

    @cached_property
    def _answers(self) -> np.ndarray:
        return np.load(self.directory / ANSWERS, mmap_mode="r")

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.memmap(self.directory / TOKENS, "<i4", mode="r") if len(self) else np.empty(0, "<i4")

    @cached_property
    def _targets(self) -> np.ndarray:
        return np.memmap(self.directory / TARGETS, np.uint8, mode="r") if len(self) else np.empty(0, np.uint8)

    def _span(self, starts: np.ndarray, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return int(starts[index]), int(starts[index + 1])

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker process maps the files itself.
        return {"directory": self.directory, "summary": self.summary}


def _as_line(conversation: Conversation, sequence: Encoded, encoder: ExampleEncoder) -> bytes:
    messages, fields = encoder.placed(conversation)
    messages = [dict(message) for message in messages[: sequence.num_messages]]
    for message in messages:
        if message["role"] == "user" and "input" in fields:
            message["input"] = fields["input"]
    return json.dumps(messages, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def nothing_to_learn(empty: list[tuple[str, int]], records: int, max_tokens: int | None) -> str:
    """What is wrong with records that leave nothing to predict: where each stands, and the tokens of its prompt."""
    where, prompt = empty[0]
    if max_tokens is None or prompt < max_tokens:
        return f"{len(empty):,} of {records:,} records have nothing to learn; the first is {where}: its reply is empty."
    return (
        f"{len(empty):,} of {records:,} records have nothing to learn within "
        f"train.max_seq_length={max_tokens - 1}: their prompts alone fill it. The first is {where}, whose prompt has "
        f"{prompt} tokens. Set a larger `train.max_seq_length`, or leave such records out with on_long=drop."
    )
