"""Preference data: pairs of a chosen and a rejected reply, from files of one's own or from the Hugging Face Hub."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import tee
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from litgpt.cli.plural import counted
from litgpt.data.hub_data import HFDataset
from litgpt.data.json_data import JSON
from litgpt.data.packing import Collate, PackedSample, Rows
from litgpt.data.preference_records import Preference, read_preferences
from litgpt.data.record_files import read_records
from litgpt.data.records import Conversation
from litgpt.data.sample_encoding import Encoded, ExampleEncoder
from litgpt.data.sample_file import Sample, SampleFile, nothing_to_learn
from litgpt.data.sft import SPLITS, SFTData

SUMMARY = "pairs.json"


class PairEncoder(ExampleEncoder[Preference]):
    """Makes two sequences of each pair: the prompt, which is what inference will feed, with either reply. What the
    assistant says in the prompt is not to be predicted."""

    def encode(self, pair: Preference, /) -> list[Encoded]:
        return [self._reply(conversation, pair.num_common) for conversation in (pair.chosen, pair.rejected)]

    def _reply(self, conversation: Conversation, num_common: int) -> Encoded:
        messages, fields = self.placed(conversation)
        start = len(self.prompt_ids(messages[:num_common], fields))
        *earlier, sequence = self.sequences(conversation)
        if any(other.num_messages > num_common for other in earlier):
            raise ValueError(
                "has several messages of the assistant after the prompt, and this style writes earlier ones otherwise "
                "than they were said. Let the pair differ in the last message alone."
            )
        targets = [target and place >= start for place, target in enumerate(sequence.targets)]
        return sequence._replace(targets=targets, answer_start=start)


@dataclass
class PairSummary:
    """What became of the records."""

    records: int = 0
    dropped: int = 0
    truncated: int = 0
    identical: int = 0
    """Pairs left out, since their replies are the same (perhaps once they were cut off)"""
    forms: dict[str, int] = field(default_factory=dict)
    """Records of each form"""


class PairCollate(Collate):
    """Pairs into a batch as `Collate` makes it, two rows a pair: chosen, rejected.

    `samples` holds the pairs' numbers, at their first rows. With `reference`, (rows of all pairs,) log-probabilities,
    the batch has `reference_log_probs` (B,).
    """

    reference: Tensor | None = None

    def __call__(self, pairs: list[list[PackedSample]]) -> dict[str, Tensor]:
        rows = [part for pair in pairs for part in pair]
        batch = super().__call__([[row] for row in rows])
        numbers = batch["samples"]  # (B, 1)
        if self.reference is not None:
            batch["reference_log_probs"] = self.reference[numbers[:, 0]]
        batch["samples"] = torch.where(numbers % 2 == 0, numbers // 2, -1)
        return batch


@dataclass(kw_only=True, repr=False)
class PreferenceData(SFTData):
    """Pairs of replies, tokenised once and cached: the samples 2 i and 2 i + 1 are the chosen and the rejected reply of
    pair i, each after the prompt. The forms of records are those of `litgpt.data.preference_records`.

    Pairs are written in the checkpoint's own style unless prompt_style says otherwise.
    """

    rows_per_sample: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pack:
            raise ValueError("pack=true: pairs are not packed. Leave it out; batches are grouped by length.")
        if self.mask_prompt is not None:
            raise ValueError(
                f"mask_prompt={str(self.mask_prompt).lower()}: of a pair, the replies alone are compared. Leave it out."
            )

    def pairs(self, split: str) -> list[Preference]:
        """The records of one of SPLITS as pairs."""
        return read_preferences(read_records(self.files()[SPLITS.index(split)], split), self.keys())

    def prepare_data(self) -> None:
        self.prepare_samples(self.pairs, PairEncoder, self._write_pairs)

    def setup(self, stage: str = "") -> None:
        super().setup(stage)
        self._summaries = [read_summary(samples) for samples in self._both()]
        multiple, longest = super()._collate(self._train).multiple, self._max_seq_length
        self._collates = {samples.directory: PairCollate(False, multiple, longest) for samples in self._both()}

    def shown(self) -> dict[str, Sample]:
        return {"One pair, the chosen reply": self._train[0], "The same, the rejected reply": self._train[1]}

    def all_batches(self) -> list[tuple[DataLoader, int]]:
        """Of the training and of the validation pairs: batches with each of them once, in order, and how many rows that
        are."""
        return [(self._in_order(samples), len(samples)) for samples in self._both()]

    def set_reference(self, log_probs: list[Tensor]) -> None:
        """Let batches bring the replies' log-probabilities under the reference, those of the training and of the
        validation rows; before the first batch is asked for."""
        for samples, values in zip(self._both(), log_probs, strict=True):
            self._collates[samples.directory].reference = values

    @property
    def identity(self) -> str:
        """What tells these samples from those of other records, or tokenised otherwise."""
        return self._directory().name

    def val_dataloader(self) -> DataLoader | list:
        return self._in_order(self._val) if len(self._val) else []

    def describe(self) -> str:
        train, val = (
            describe_pairs(summary, samples, self._limit_name())
            for summary, samples in zip(self._summaries, self._both(), strict=True)
        )
        held = "" if self.files()[1] else f"Held out: {self._fraction():.1%}. "
        lines = [f"Training data: {train}"]
        lines.append(f"Validation data: {held}{val}" if len(self._val) else "There is no validation data.")
        lines.append(f"Prompt style: {self.style_words()}.")
        if not self._choice.end:
            lines.append("Warning: the tokenizer has no end-of-text token, so replies are compared without their end.")
        return "\n".join(lines)

    # -- inside

    def _both(self) -> tuple[SampleFile, SampleFile]:
        return self._train, self._val

    def _why_empty(self) -> str:
        summary = read_summary(self._train)
        dropped, identical = summary.dropped, summary.identical
        reasons = [f"{counted(dropped, 'pair')} {'is' if dropped == 1 else 'are'} too long"] * bool(dropped)
        reasons += [f"of {identical:,} both replies are the same"] * bool(identical)
        return ", ".join(reasons) or "there are no records"

    def _in_order(self, samples: SampleFile) -> DataLoader:
        return DataLoader(self._rows(samples), self._batch_size, collate_fn=self._collate(samples))

    def _rows(self, samples: SampleFile) -> Rows:
        return Rows(samples, np.arange(len(samples)).reshape(-1, 2))

    def _collate(self, samples: SampleFile) -> Collate:
        return self._collates[samples.directory]

    def _write_pairs(
        self, directory: Path, pairs: list[Preference], encoded: Iterable[list[Encoded]], encoder: ExampleEncoder
    ) -> None:
        summary = PairSummary(len(pairs), forms=dict(Counter(pair.form for pair in pairs)))
        kept = self._kept(pairs, encoded, encoder, summary)
        conversations, sequences = tee(kept)  # read in step: nothing piles up
        SampleFile.write(directory, (c for c, _ in conversations), ([s] for _, s in sequences), encoder, False)
        (directory / SUMMARY).write_text(json.dumps(asdict(summary)), encoding="utf-8")

    def _kept(
        self,
        pairs: list[Preference],
        encoded: Iterable[list[Encoded]],
        encoder: ExampleEncoder,
        summary: PairSummary,
    ) -> Iterator[tuple[Conversation, Encoded]]:
        """The rows of the pairs that there is something to learn from; `summary` counts the others."""
        empty: list[tuple[str, int]] = []
        for pair, replies in zip(pairs, encoded, strict=True):
            is_long = any(reply.is_long for reply in replies)
            if is_long and self.on_long == "drop":
                summary.dropped += 1
                continue
            if not all(any(reply.targets) for reply in replies):
                empty.append((pair.where, replies[0].answer_start))
                continue
            if replies[0].ids == replies[1].ids:
                summary.identical += 1
                continue
            summary.truncated += is_long
            yield from zip((pair.chosen, pair.rejected), replies, strict=True)
        if empty:
            raise ValueError(nothing_to_learn(empty, summary.records, encoder.max_tokens))


@dataclass(repr=False)
class Preferences(PreferenceData, JSON):
    """Pairs of replies in a .json or .jsonl file (also .gz or .parquet), or a folder of them.

    A record has `prompt`, `chosen` and `rejected`: texts or messages. Without a prompt, chosen and rejected are whole
    conversations that begin alike.
    """


@dataclass(repr=False)
class HFPreferences(PreferenceData, HFDataset):
    """Any data set of the Hub with pairs of replies, read from its parquet or JSON files. The forms are those of
    Preferences; `columns` says what the data set calls prompt, chosen and rejected."""


def read_summary(samples: SampleFile) -> PairSummary:
    """What became of the records that the samples are of."""
    return PairSummary(**json.loads((samples.directory / SUMMARY).read_text(encoding="utf-8")))


def describe_pairs(summary: PairSummary, samples: SampleFile, limit: str) -> str:
    """One line on what became of the records."""
    several = len(summary.forms) > 1
    forms = ", ".join(f"{count:,} x {form}" if several else form for form, count in summary.forms.items())
    rows = samples.summary
    parts = [
        f"{counted(len(samples) // 2, 'pair')} of {counted(summary.records, 'record')} ({forms}); "
        f"{counted(rows.tokens, 'token')}, "
        f"{rows.targets:,} of them in replies; {rows.longest:,} the longest prompt with its reply."
    ]
    if summary.truncated:
        parts.append(f"Truncated to {limit}: {summary.truncated:,}.")
    if summary.dropped:
        parts.append(f"Dropped, longer than {limit}: {summary.dropped:,}.")
    if summary.identical:
        parts.append(f"Left out, since both replies are the same: {summary.identical:,}.")
    if rows.inputs_appended:
        parts.append("This style has no place for an input: it follows the prompt after an empty line.")
    return " ".join(parts)
