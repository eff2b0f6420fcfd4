"""Supervised finetuning data: what every data set of instructions or conversations has in common."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from litgpt.checkpoint import atomic_directory
from litgpt.cli.plural import counted
from litgpt.cli.resources import cache_directory
from litgpt.data.base import DataModule, LengthGroupedSampler, StreamSampler, stream_loader
from litgpt.data.cache_sums import is_whole, write_sums
from litgpt.data.packing import Collate, Rows, pack
from litgpt.data.record_files import content_hash, read_records
from litgpt.data.records import Conversation, Message, read_conversations
from litgpt.data.sample_encoding import (
    ConversationEncoder,
    Encoded,
    ExampleEncoder,
    T,
    class_identity,
    encode_all,
    style_identity,
)
from litgpt.data.sample_file import Sample, SampleFile, Summary
from litgpt.devices.random_state import check_seed
from litgpt.model import IGNORE_INDEX
from litgpt.prompts import ChatTemplate, PromptStyle, choose_prompt_style

if TYPE_CHECKING:
    from litgpt.tokenizer.tokenizer import Tokenizer

CACHE_FORMAT = 2  # raise it when the same records and settings would give other samples
GPU_MULTIPLE = 8  # matrix products on GPUs like such sizes
HELD_OUT = 0.05  # part of the records held out for validation unless told otherwise
TRAIN, VAL, CHOICE = "train", "val", "choice.json"
SPLITS = (TRAIN, VAL)
CHECKPOINT = "checkpoint"  # what prompt_style calls the checkpoint's own style


class CachedChoice(NamedTuple):
    """How the samples in a cache were made."""

    is_chat: bool
    """Whether one of the records is a conversation"""
    mask_prompt: bool
    end: list[int]
    """The ids that a reply ends with"""


@dataclass(kw_only=True, repr=False)
class SFTData(DataModule):
    """Records of instructions or conversations, tokenised once and cached.

    A subclass says in `files` where its records are (and gets them there in `download`); if they have another form than
    those of `litgpt.data.records`, it makes conversations of them in `conversations`. Where nothing is said of them,
    instructions take the style `single_turn_style` and train on the prompt, too; conversations take the checkpoint's
    own style and train on the assistant's replies only. So do instructions of a class with `takes_template`, where the
    checkpoint has a chat template.
    """

    prompt_style: str | None = None
    """Prompt style's name, a class package.module.Class, a .jinja file, or checkpoint for the checkpoint's own; null
    takes the checkpoint's for conversations, and for your own instructions where it has a chat template, else the data
    set's own"""
    mask_prompt: bool | None = None
    """Train on the replies only, not on the prompts; null does so wherever null takes the checkpoint's prompt style"""
    pack: bool = False
    """Put several samples into one row, none seeing another, instead of padding; rows then count as sequences"""
    on_long: Literal["truncate", "drop"] = "truncate"
    """What becomes of samples longer than train.max_seq_length"""
    ignore_index: int = IGNORE_INDEX
    """Label of what is not to be predicted; the loss knows -100 alone"""
    seed: int = 42
    """Decides the order of the samples, and which are held out for validation"""
    num_workers: int = 4
    """Processes that load batches, at most one per CPU core; 0 loads them in the training process"""

    single_turn_style: ClassVar[str] = "alpaca"
    takes_template: ClassVar[bool] = False
    """Whether instructions, too, take a chat template that the checkpoint has"""
    rows_per_sample: ClassVar[int] = 1
    """Rows of a batch that one sample takes"""
    key_names: ClassVar[dict[str, str]] = {}
    """Key of a form (see `litgpt.data.records`) -> what this data set calls it"""

    def __post_init__(self) -> None:
        self._tokenizer: Tokenizer | None = None
        if self.ignore_index != IGNORE_INDEX:
            raise ValueError(f"ignore_index={self.ignore_index}: the loss ignores {IGNORE_INDEX} alone. Leave it out.")
        if self.on_long not in ("truncate", "drop"):
            raise ValueError(f"on_long={self.on_long!r} is neither truncate nor drop.")
        fraction = getattr(self, "val_split_fraction", None)
        if fraction is not None and not 0 <= fraction < 1:
            raise ValueError(f"val_split_fraction={fraction} is not in [0, 1).")

    # -- what a data set says of itself

    def download(self) -> None:
        """Gets the files, where they are not there yet; runs in one process per node."""

    def files(self) -> tuple[list[Path], list[Path]]:
        """The files with the training records and those with the validation records; of the latter there may be none,
        and `val_split_fraction` is held out. Called after `download`."""
        raise TypeError(f"{type(self).__name__} has no files(): a data module must say where its records are.")

    def conversations(self, split: str) -> list[Conversation]:
        """The records of one of SPLITS as conversations."""
        records = read_records(self.files()[SPLITS.index(split)], split)
        return read_conversations(records, self.keys())

    def keys(self) -> Mapping[str, str]:
        """Key of a form (see `litgpt.data.records`) -> what this data set calls it."""
        return self.key_names

    # -- what a command calls

    def take_checkpoints_style(self, option: str) -> None:
        """Write all samples in the checkpoint's own style, as an option of the command says.

        Raises:
            ValueError: `prompt_style` says otherwise.
        """
        if self.prompt_style not in (None, CHECKPOINT):
            raise ValueError(
                f"{option} and prompt_style={self.prompt_style} both say how prompts are written. Give only one "
                "of them."
            )
        self.prompt_style = CHECKPOINT

    def connect(
        self,
        tokenizer: Tokenizer | None = None,
        batch_size: int = 1,
        max_seq_length: int | None = None,
        prompt_style: PromptStyle | None = None,
        samples_per_step: int | None = None,
    ) -> None:
        """Take what is known only once the model and the training settings are.

        Args:
            tokenizer: Tokenizer of the model.
            batch_size: Sequences per batch on one device.
            max_seq_length: Most tokens that go into the model at once; a sample may have one more, the last to predict.
            prompt_style: The checkpoint's own style.
            samples_per_step: Sequences per optimizer step over all devices; lets batches be grouped by length.
        """
        if tokenizer is None:
            raise ValueError(f"data={type(self).__name__} needs a tokenizer, and the model has none next to it.")
        self._tokenizer, self._batch_size, self._max_seq_length = tokenizer, batch_size, max_seq_length
        self._samples_per_step = samples_per_step
        self._checkpoint_style = prompt_style or choose_prompt_style(tokenizer.dir, tokenizer=tokenizer)
        self._single_style = self._named_style(self.prompt_style or self.single_turn_style)
        if self.pack and max_seq_length is None:
            raise ValueError("pack=true fills rows of `train.max_seq_length` tokens: set that, too.")

    def prepare_data(self) -> None:
        self.prepare_samples(self.conversations, ConversationEncoder, self._write)

    def prepare_samples(
        self,
        read: Callable[[str], list[T]],
        encoder_class: type[ExampleEncoder[T]],
        write: Callable[[Path, list[T], Iterable[list[Encoded]], ExampleEncoder[T]], None],
    ) -> None:
        """Make the samples of both splits, where they are not in the cache yet.

        Args:
            read: Gives the examples in the records of a split, whose name it takes.
            encoder_class: Makes token ids of them.
            write: Writes a split: its directory, the examples, the sequences of each, and what made them.
        """
        self.download()
        directory = self._directory()
        if is_whole(directory, CHOICE, "sample cache"):
            return
        splits = self._split(read)
        is_chat = any(example.is_chat for split in splits.values() for example in split)
        mask_prompt = is_chat or self._takes_own() if self.mask_prompt is None else self.mask_prompt
        encoder = encoder_class(self._connected(), self._style_for(is_chat), mask_prompt, self._max_tokens())
        directory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(directory, overwrite=True) as temporary:
            for name, examples in splits.items():
                encoded = tqdm(
                    encode_all(encoder, examples),
                    desc=f"Tokenising the {name} records",
                    total=len(examples),
                    delay=2,
                    disable=None,
                )
                write(temporary / name, examples, encoded, encoder)
            choice = CachedChoice(is_chat, mask_prompt, encoder.end)._asdict()
            (temporary / CHOICE).write_text(json.dumps(choice), encoding="utf-8")
            write_sums(temporary)

    def setup(self, stage: str = "") -> None:
        directory = self._directory()
        self._choice = CachedChoice(**json.loads((directory / CHOICE).read_text(encoding="utf-8")))
        self._packed: dict[Path, list[list[int]]] = {}
        self._train, self._val = (SampleFile(directory / name) for name in SPLITS)
        if not len(self._train):
            raise ValueError(f"data={type(self).__name__} leaves nothing to train on: {self._why_empty()}.")

    @property
    def train_samples(self) -> SampleFile:
        """What is trained on."""
        return self._train

    @property
    def val_samples(self) -> SampleFile:
        """What is validated on; may be empty."""
        return self._val

    @property
    def style(self) -> PromptStyle:
        """The prompt style in effect."""
        return self._style_for(self._choice.is_chat)

    @property
    def num_examples(self) -> int:
        """How many validation conversations there are."""
        return len(self._val) // self.rows_per_sample

    def shown(self) -> dict[str, Sample]:
        """What is shown of the training data before a run, by what it is."""
        return {"One training sample": self._train[0]}

    def example(self, index: int) -> list[Message]:
        """Validation conversation number `index` without its last reply."""
        return self._val.messages_of(self._row_of(index))[:-1]

    def example_prompt(self, index: int) -> list[int]:
        """The token ids that the last reply of validation conversation number `index` follows in training."""
        return self._val.prompt_of(self._row_of(index))

    def example_reply(self, index: int) -> list[int] | None:
        """The token ids of the last reply of validation conversation number `index` (of a pair, of the chosen one),
        without what ends it; None where the reply was cut off."""
        row, end = self._row_of(index), self._choice.end
        reply = self._val.reply_of(row)
        if not end:
            return None if self._val.lengths[row] == self._max_tokens() else reply
        return reply[: -len(end)] if reply[-len(end) :] == end else None

    def train_dataloader(self) -> DataLoader:
        rows = self._rows(self._train)
        sampler: StreamSampler | None = None
        if not self.pack and self._samples_per_step:
            lengths = self._train.lengths.reshape(-1, self.rows_per_sample).max(axis=1)
            sampler = LengthGroupedSampler(lengths, self._batch_size, self._samples_per_step, seed=self.seed)
        return stream_loader(
            rows,
            self._batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=self._collate(self._train),
            sampler=sampler,
        )

    def val_dataloader(self) -> DataLoader | list:
        if not len(self._val):
            return []
        return DataLoader(self._rows(self._val), batch_size=self._batch_size, collate_fn=self._collate(self._val))

    def content(self) -> dict[str, str]:
        return {
            name: f"{len(samples):,} samples, {samples.summary.tokens:,} tokens ({samples.digest()})"
            for name, samples in zip(SPLITS, (self._train, self._val), strict=True)
        }

    def describe(self) -> str:
        """What is trained and validated on, and how."""
        lines = [f"Training data: {describe_samples(self._train.summary, self._limit_name())}"]
        if self.pack:
            rows = len(self._rows(self._train))
            fill = self._train.summary.tokens / (rows * self._row_tokens())
            lines.append(
                f"Packed into {counted(rows, 'row')} of {counted(self._row_tokens(), 'token')}, {fill:.0%} full."
            )
        if len(self._val):
            held = "" if self.files()[1] else f"Held out: {self._fraction():.1%}. "
            lines.append(f"Validation data: {held}{describe_samples(self._val.summary, self._limit_name())}")
        else:
            lines.append("There is no validation data.")
        learned = "the replies only" if self._choice.mask_prompt else "prompts and replies (mask_prompt false)"
        lines.append(f"Prompt style: {self.style_words()}. The loss is on {learned}.")
        if self.prompt_style is None and not self._choice.is_chat and self._takes_own():
            lines.append(
                "The checkpoint has a chat template, so it is trained and used in that; for another prompt style: "
                f"--data.prompt_style {self.single_turn_style}."
            )
        if self._train.summary.inputs_appended:
            lines.append("This style has no place for an input: it follows the instruction after an empty line.")
        if not self._choice.end:
            lines.append("Warning: the tokenizer has no end-of-text token, so the model does not learn to stop.")
        return "\n".join(lines)

    def style_words(self) -> str:
        """What a reader knows the prompt style in effect by."""
        if not isinstance(self.style, ChatTemplate):
            return style_name(self.style)
        owner = "the checkpoint's" if self.style is self._checkpoint_style else "a"
        return f"{owner} chat template" + (f" {self.style.chosen!r}" if self.style.chosen else "")

    # -- inside

    def _named_style(self, name: str) -> PromptStyle:
        if name == CHECKPOINT:
            return self._checkpoint_style
        try:
            return choose_prompt_style(self._connected().dir, explicit=name, tokenizer=self._tokenizer)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"prompt_style={name}: {error}") from error

    def _style_for(self, is_chat: bool) -> PromptStyle:
        takes_checkpoints = self._takes_own() or (is_chat and self.prompt_style is None)
        return self._checkpoint_style if takes_checkpoints else self._single_style

    def _takes_own(self) -> bool:
        """Whether the checkpoint's chat template is for instructions, too."""
        takes = self.takes_template and self.prompt_style in (None, CHECKPOINT)
        return takes and isinstance(self._checkpoint_style, ChatTemplate)

    def _connected(self) -> Tokenizer:
        """The tokenizer, which `connect` brings."""
        if self._tokenizer is None:
            raise ValueError(f"{type(self).__name__} is used before connect() was called.")
        return self._tokenizer

    def _row_tokens(self) -> int:
        """Tokens of a packed row."""
        if self._max_seq_length is None:
            raise ValueError(f"{type(self).__name__} is packed without connect(max_seq_length=...).")
        return self._max_seq_length + 1

    def _max_tokens(self) -> int | None:
        return None if self._max_seq_length is None else self._max_seq_length + 1

    def _limit_name(self) -> str:
        return f"train.max_seq_length {self._max_seq_length}"

    def _fraction(self) -> float:
        fraction = getattr(self, "val_split_fraction", None)
        return HELD_OUT if fraction is None else fraction

    def _split(self, read: Callable[[str], list[T]]) -> dict[str, list[T]]:
        """The training and the validation records, some of the former held out where there are none of the latter."""
        train = read(TRAIN)
        if self.files()[1]:
            return {TRAIN: train, VAL: read(VAL)}
        return dict(zip(SPLITS, hold_out_samples(train, self._fraction(), self.seed), strict=True))

    def _write(
        self,
        directory: Path,
        conversations: list[Conversation],
        encoded: Iterable[list[Encoded]],
        encoder: ExampleEncoder,
    ) -> None:
        """Write the samples of a split."""
        SampleFile.write(directory, conversations, encoded, encoder, self.on_long == "drop")

    def _why_empty(self) -> str:
        """Why there are no training samples."""
        dropped = self._train.summary.dropped
        if not dropped:
            return "there are no records"
        return f"all {dropped:,} samples are too long" if dropped > 1 else "the only sample is too long"

    def _directory(self) -> Path:
        """Where the samples are cached: what decides them is in its name."""
        tokenizer = self._connected()
        held_out = None if self.files()[1] else [self._fraction(), self.seed]
        elsewhere = ("prompt_style", "seed", "num_workers", "pack", "val_split_fraction", "download_dir")
        options = {name: value for name, value in self.settings().items() if name not in elsewhere}
        facts = [
            *(CACHE_FORMAT, class_identity(type(self)), options, held_out, self._max_seq_length),
            self.prompt_style is not None,
            *(tokenizer.fingerprint(), sorted(tokenizer.stop_ids)),
            *(style_identity(style, tokenizer) for style in (self._checkpoint_style, self._single_style)),
            *([content_hash(path) for path in paths] for paths in self.files()),
        ]
        digest = hashlib.sha256(json.dumps(facts, default=str, sort_keys=True).encode())
        return cache_directory() / "samples" / digest.hexdigest()[:32]

    def _rows(self, samples: SampleFile) -> Rows:
        if not self.pack:
            return Rows(samples, OneSamplePerRow(len(samples)))
        if samples.directory not in self._packed:
            self._packed[samples.directory] = pack(samples.lengths, self._row_tokens(), self.seed)
        return Rows(samples, self._packed[samples.directory])

    def _collate(self, samples: SampleFile) -> Collate:
        multiple = GPU_MULTIPLE if torch.accelerator.is_available() else 1
        return Collate(self.pack, multiple, self._max_seq_length)

    def _row_of(self, index: int) -> int:
        """Where validation conversation number `index` stands among the samples; of a pair, the chosen reply."""
        if not 0 <= index < self.num_examples:
            raise ValueError(f"There is no validation example {index}: there are {self.num_examples}, counted from 0.")
        return self.rows_per_sample * index


class OneSamplePerRow:
    """Row i holds sample i alone."""

    def __init__(self, num_samples: int) -> None:
        self.samples = range(num_samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> list[int]:
        return [self.samples[row]]


def hold_out_samples(examples: list[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Splits off a random `fraction`, at least one and never all; both parts keep their order."""
    check_seed(seed)
    count = len(examples)
    held = 0 if fraction == 0 or count < 2 else min(max(1, round(fraction * count)), count - 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = set(order[:held].tolist())
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [example for i, example in enumerate(examples) if i in chosen]


def describe_samples(summary: Summary, limit: str) -> str:
    """One line on what became of the records."""
    several = len(summary.forms) > 1
    forms = ", ".join(f"{count:,} x {form}" if several else form for form, count in summary.forms.items())
    mean = summary.tokens / max(summary.samples, 1)
    parts = [
        f"{counted(summary.samples, 'sample')} of {counted(summary.records, 'record')} ({forms}); "
        f"{counted(summary.tokens, 'token')}, "
        f"{summary.targets:,} of them to predict; {mean:.0f} a sample, {summary.longest:,} the longest."
    ]
    if summary.truncated:
        parts.append(f"Truncated to {limit}: {summary.truncated:,}.")
    if summary.dropped:
        parts.append(f"Dropped, longer than {limit}: {summary.dropped:,}.")
    if summary.divided:
        parts.append(f"Divided, since the style does not write earlier turns as they were said: {summary.divided:,}.")
    return " ".join(parts)


def style_name(style: PromptStyle) -> str:
    """What a reader knows the style by."""
    written = getattr(style, "format", None)
    return written.name if written is not None else f"{type(style).__name__}"
