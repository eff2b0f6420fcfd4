"""What all ways of finetuning add to a run: a checkpoint to start from, samples with a mask, answers to look at."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from litgpt import cli
from litgpt.checkpoint import WEIGHTS, copy_companion_files
from litgpt.config import Config
from litgpt.data import Alpaca
from litgpt.data.base import DataModule
from litgpt.data.preferences import PreferenceData
from litgpt.data.sample_file import Sample
from litgpt.data.sft import SFTData
from litgpt.devices.precision import PRECISIONS
from litgpt.model import GPT, IGNORE_INDEX
from litgpt.parallel.fabric import precision_of, settled_precision
from litgpt.parallel.ranks import rank_from_environment
from litgpt.prompts import choose_prompt_style, format_of_options, save_prompt_style
from litgpt.quantization.layers import TRAINING_KINDS, check_quantize, same_form, without_mixing
from litgpt.runs.job import Job, Save
from litgpt.runs.options import FinetuneOptions
from litgpt.runs.plan import Plan, sequence_length
from litgpt.runs.validation_answers import ValidationAnswers
from litgpt.sources.door import open_merged
from litgpt.sources.load import kind_for, load_model
from litgpt.sources.source import Source
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.answer_metrics import AnswerMetrics
from litgpt.training.criterion import Criterion, choose_criterion
from litgpt.training.frozen_weights import store_frozen_matrices
from litgpt.training.inputs import Inputs, new_digest, sampled
from litgpt.training.loop import Generated, Outcome
from litgpt.training.preference import PreferenceLoss
from litgpt.training.state import Saved

if TYPE_CHECKING:
    from lightning_fabric.wrappers import _FabricModule

NEEDS_LESS = "--train.micro_batch_size, --train.max_seq_length, finetune_lora, --quantize"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
DIMMED = "what is not trained on dimmed" if sys.stdout.isatty() else "what is not trained on in <<...>>"


class Finetuning(Job):
    """A run that changes a checkpoint's model. Its steps are those of `Job`, some with more in them: `check`,
    `open_directory`, `open_checkpoint`, `launch`, `prepare_data`, `load_model`; the command changes the model;
    `announce`, `set_up`, `build_optimizer`, `train`.

    Args:
        checkpoint_dir: The model to finetune.
        out_dir: Where the run's files go.
        options: What all methods take.
        settings: All settings of the command, to be shown.
        quantize: How frozen weights are stored; by default as the checkpoint has them, if they can be trained on so.
        on_pairs: Whether it learns from pairs of replies, not from single ones.
        trains_all: Whether all weights are trained, so that none stays quantised.
    """

    # What the steps find out.
    data: SFTData
    metrics: AnswerMetrics
    criterion: Criterion
    source: Source
    config: Config
    tokenizer: Tokenizer
    tokens: int
    answers: ValidationAnswers
    base_digest: str

    def __init__(
        self,
        checkpoint_dir: Path,
        out_dir: Path,
        options: FinetuneOptions,
        settings: dict[str, Any],
        quantize: str | None = None,
        on_pairs: bool = False,
        trains_all: bool = False,
    ) -> None:
        super().__init__(out_dir, options, settings, FinetuneOptions(), options.dry_run)
        self.checkpoint_dir, self.chat_template, self.quantize = checkpoint_dir, options.chat_template, quantize
        self.on_pairs, self.trains_all = on_pairs, trains_all

    def check(self) -> None:
        """Say what is wrong with the settings before anything is read or written."""
        self.data = chosen_data(self.options.data, self.on_pairs)
        if self.chat_template is not None:
            self.data.take_checkpoints_style(f"chat_template={self.chat_template}")
        super().check()
        self._settled_precision = settled_precision(self.options.precision)
        self.precision = self._precision(self.quantize)
        evaluation = self.options.eval
        if evaluation.metrics and rank_from_environment() == 0:
            print("Loading torchmetrics", flush=True)  # it takes up to ten seconds
        self.metrics = AnswerMetrics(
            evaluation.metrics if isinstance(evaluation.metrics, list) else [],
            figures=PreferenceLoss.figures if self.on_pairs else (),
        )
        self.criterion = choose_criterion(evaluation.best_by, self.metrics.higher_is_better)

    def _precision(self, quantize: str | None) -> str:
        """What was asked for, or else what the device and the form of the frozen weights are made for."""
        precision = self._settled_precision
        if quantize is not None and self.options.precision is None:
            precision = without_mixing(precision)
        check_quantize(quantize, precision, training=True)
        return precision

    def open_checkpoint(self) -> None:
        """Find the model, or download it; its weights are not read yet."""
        self.source = open_merged(self.checkpoint_dir, self.options.access_token)
        self.config = self.source.config
        asked, self.quantize = self.quantize, None if self.trains_all else frozen_kind(self.source, self.quantize)
        note = self.source.note if self.quantize else self.source.note_on_plain
        self.notes += [note] if note else []
        if self.quantize != asked:
            self.precision = self._precision(self.quantize)
            self.notes.append(f"The frozen weights stay as they are in the checkpoint: {self.quantize}")
        self.tokenizer = Tokenizer(self.source.files)
        self.tokens = sequence_length(self.options.train, self.config)

    def prepare_data(self) -> None:
        """Make samples of the records, in the format that the model answers in, and batches of these."""
        train, data = self.options.train, self.data
        own_style = choose_prompt_style(
            self.source.files,
            explicit=format_of_options(None, self.chat_template),
            config=self.config,
            tokenizer=self.tokenizer,
        )
        data.connect(
            self.tokenizer,
            train.micro_batch_size,
            self.tokens,
            prompt_style=own_style,
            samples_per_step=train.global_batch_size,
        )
        self.open_data(data)
        largest = max(samples.largest_id for samples in (data.train_samples, data.val_samples))
        self.tokenizer.check_rows(largest, self.config.padded_vocab_size)
        self.answers = ValidationAnswers(
            self.fabric,
            self.console,
            data,
            self.tokenizer,
            self.options.eval,
            self.metrics,
            self.config.block_size,
        )
        if not data.pack:  # what no sample needs, no row has
            self.tokens = min(self.tokens, max(1, data.train_samples.summary.longest - 1))

    def load_model(self) -> GPT:
        """The checkpoint's model, in the precision of the run, quantised if that was asked for."""
        dtype, _ = PRECISIONS[precision_of(self.fabric)]
        # Quantising is work for the device; whole weights go there when they are sharded.
        device = self.fabric.device if self.quantize else "cpu"
        digest = new_digest()
        watch = partial(sampled, digest=digest)
        kind = self.quantize
        gpt = load_model(self.source, dtype=dtype, device=device, quantize=kind, plain=not kind, watch=watch)
        self.base_digest = digest.hexdigest()
        return gpt

    def announce(self, gpt: GPT) -> None:
        """Say what the run will do, with a sample as the model will see it.

        Args:
            gpt: The model, changed as the method wants; what requires gradients will be trained. In mixed precision,
                what does not is kept in the type that is computed in from here on.
        """
        store_frozen_matrices(gpt, precision_of(self.fabric))
        data, varies = self.data, not self.data.pack
        plan = Plan(self.options.train, self.world_size, self.tokens, self.batches, varies, data.rows_per_sample)
        self.describe(gpt, plan, NEEDS_LESS)
        if self.metrics.metrics:
            self.console.print(self.answers.describe())
        for name, sample in data.shown().items():
            self.console.print(f"{name}, {DIMMED}:\n{sample_in_words(sample, self.tokenizer)}\n")
        if self.dry_run:
            self.console.print("--dry_run: nothing was trained.")

    @property
    def learning_rate(self) -> float:
        """The peak of the schedule."""
        default = inspect.signature(self.optimizer_spec.load_class()).parameters["lr"].default
        return float(self.optimizer_spec.init_args.get("lr", default))

    def train(self, model: _FabricModule, optimizer: Optimizer, save_weights: Save, saved: Saved) -> Outcome:
        """Train, and have the model answer validation samples on the way.

        Args:
            model: From `set_up`.
            optimizer: From `build_optimizer`.
            save_weights: Writes the trained weights into a directory.
            saved: Which these are.
        """

        def save(directory: Path, weights: dict[str, Tensor]) -> None:
            """The weights, and everything that chat needs next to them."""
            save_weights(directory, weights)
            copy_companion_files(self.source.files, directory)
            self.config.save(directory)
            save_prompt_style(self.data.style, directory)
            cli.save_hyperparameters(directory)

        def answer() -> Generated:
            return self.answers.generate(self.loss, self.loss.gpt)

        return self.fit(
            model,
            optimizer,
            save,
            self._inputs(saved),
            saved=saved,
            generate=answer if self.answers.is_wanted else None,
            criterion=self.criterion,
            metrics=list(self.metrics.higher_is_better),
        )

    def _inputs(self, saved: Saved) -> Inputs:
        """What a resumed run must go on with, and what is said where it has changed."""
        # Weights that are trained are in the checkpoints, whatever they began as; but DPO compares with those.
        counts = saved.file != WEIGHTS or self.data.rows_per_sample > 1
        return Inputs.of(
            self.settings,
            {**self.data.content(), "seed": self.data.seed},
            self.config,
            self.tokenizer,
            self.optimizer_spec,
            self.world_size,
            {
                "the length of a packed row": self.tokens if self.data.pack else None,
                "the frozen weights": self.base_digest if counts else None,
            },
        )


def frozen_kind(source: Source, quantize: str | None) -> str | None:
    """How frozen weights are stored: as is asked for, or else as in the checkpoint, if they can be trained on so.

    Raises:
        ValueError: The checkpoint is quantised in another way.
    """
    kind = kind_for(source, quantize)
    return next((known for known in TRAINING_KINDS if kind and same_form(known, kind)), None)


def chosen_data(given: DataModule | None, on_pairs: bool) -> SFTData:
    """What to train on; ValueError where it is data of another kind than the command learns from."""
    data = Alpaca() if given is None and not on_pairs else given
    name = type(data).__name__
    if on_pairs and not isinstance(data, PreferenceData):
        problem = "`data` is missing" if data is None else f"data={name} holds no pairs of replies"
        raise ValueError(
            f"{problem}: a chosen and a rejected one to a prompt. Give data=Preferences data.json_path=FILE, or "
            "data=HFPreferences data.repo_id=ORG/NAME."
        )
    if not isinstance(data, SFTData):
        raise ValueError(
            f"data={name} is for pretraining: it holds no conversations. For your own: data=JSON data.json_path=FILE."
        )
    if not on_pairs and isinstance(data, PreferenceData):
        raise ValueError(f"data={name} holds pairs of replies, from which `litgpt finetune_dpo` learns.")
    return data


def sample_in_words(sample: Sample, tokenizer: Tokenizer) -> str:
    """A training sample as the model will see it, with the part that no loss is on set apart."""
    before, after = (DIM, PLAIN) if sys.stdout.isatty() else ("<<", ">>")
    pieces: list[tuple[bool, list[int]]] = []
    for token, label in zip(sample.input_ids.tolist(), sample.labels.tolist(), strict=True):
        masked = label == IGNORE_INDEX
        if not pieces or pieces[-1][0] != masked:
            pieces.append((masked, []))
        pieces[-1][1].append(token)
    texts = [(masked, tokenizer.decode(ids, skip_special=False)) for masked, ids in pieces]
    return "".join(f"{before}{text}{after}" if masked else text for masked, text in texts)
