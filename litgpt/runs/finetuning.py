"""What all ways of finetuning have in common: before the model is changed, and once it is."""

from __future__ import annotations

import inspect
import pprint
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from litgpt import cli
from litgpt.checkpoint import WEIGHTS, copy_companion_files
from litgpt.cli.secret import Secret
from litgpt.config import Config
from litgpt.data import Alpaca
from litgpt.data.base import DataModule
from litgpt.data.preferences import PreferenceData
from litgpt.data.sample_file import Sample
from litgpt.data.sft import SFTData
from litgpt.devices.accelerator import count_devices
from litgpt.devices.memory import memory_present, memory_used
from litgpt.devices.precision import PRECISIONS, default_precision
from litgpt.devices.random_state import seed_everything
from litgpt.model import GPT, IGNORE_INDEX
from litgpt.parallel import launcher
from litgpt.parallel.fabric import Strategy, describe_devices, make_fabric, peak_flops, precision_of
from litgpt.parallel.ranks import once_per_node, rank_from_environment
from litgpt.prompts import choose_prompt_style, format_of_options, save_prompt_style
from litgpt.quantization.layers import TRAINING_KINDS, check_quantize, num_parameters, same_form, without_mixing
from litgpt.runs.memory_estimate import Usage, estimate_memory
from litgpt.runs.plan import choose_logger, plan_lines, sequence_length, stop_early
from litgpt.runs.validation_answers import ValidationAnswers
from litgpt.sources.door import open_merged
from litgpt.sources.load import kind_for, load_model
from litgpt.sources.source import Source
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.activation_checkpointing import checkpoint_blocks
from litgpt.training.answer_metrics import AnswerMetrics
from litgpt.training.arguments import EvalArgs, LogArgs, TrainArgs
from litgpt.training.batches import BatchStream
from litgpt.training.compilers import choose_compiler, compile_blocks
from litgpt.training.console import Console
from litgpt.training.criterion import choose_criterion
from litgpt.training.frozen_weights import store_frozen_matrices
from litgpt.training.inputs import Inputs, new_digest, sampled
from litgpt.training.loggers import make_logger
from litgpt.training.loop import Outcome, Run, fit
from litgpt.training.loss import LossModule, NextTokenLoss
from litgpt.training.metrics import flops_per_token
from litgpt.training.neftune import add_noise
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.recorder import Recorder
from litgpt.training.run_directory import LOGGERS_DIR, LOGS_FILE, TENSORBOARD_DIR, RunDirectory
from litgpt.training.schedule import Schedule
from litgpt.training.state import Saved

TRAIN = TrainArgs(
    save_interval=1000, global_batch_size=16, micro_batch_size=1, lr_warmup_steps=100, epochs=5, keep_best=True
)
EVAL = EvalArgs(interval=100, max_new_tokens=100)
OPTIMIZER = OptimizerSpec("torch.optim.AdamW", {})
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
DIMMED = "what is not trained on dimmed" if sys.stdout.isatty() else "what is not trained on in <<...>>"


@dataclass
class Options:
    """The options that every finetuning command takes."""

    precision: str | None = None
    """32-true, bf16-true, bf16-mixed or 16-mixed; by default mixed on a GPU and 32-true elsewhere."""
    devices: int | str = 1
    """Devices per node; auto takes all."""
    num_nodes: int = 1
    """Machines."""
    strategy: Strategy = "auto"
    """Over several devices, fsdp shards the model (auto is fsdp), ddp copies it."""
    resume: bool | str | Path = False
    """true continues from the newest checkpoint in out_dir; auto does so where there is one and starts afresh
    otherwise; a path continues from that checkpoint."""
    overwrite: bool = False
    """Delete the run that out_dir holds."""
    data: DataModule | None = None
    """What to train on, for example `--data JSON --data.json_path FILE`; by default Alpaca."""
    train: TrainArgs = field(default_factory=lambda: replace(TRAIN))
    """How long, in which batches, with which schedule."""
    eval: EvalArgs = field(default_factory=lambda: replace(EVAL))
    """When to validate."""
    log: LogArgs = field(default_factory=LogArgs)
    """For the loggers."""
    optimizer: OptimizerSpec = field(default_factory=lambda: OPTIMIZER)
    """A torch.optim class or your own, and its arguments (--optimizer.lr 0.001)."""
    compile: bool = False
    """Compile the model's blocks with torch.compile; the first step then takes long."""
    compiler: str | None = None
    """What compiles the blocks; naming one implies --compile true: torch (the default), or thunder for Lightning
    Thunder (extensions/thunder)."""
    logger_name: str = "csv"
    """csv, tensorboard, wandb, mlflow, or the dotted path of a logger class."""
    seed: int = 1337
    """Decides all random numbers."""
    access_token: Secret | None = None
    """For downloading a gated model."""
    chat_template: str | None = None
    """Name of the checkpoint's chat template to train with, where it has several; by default the usual one, and
    tool_use where a record has tools."""
    dry_run: bool = False
    """Stop before training: show what would be done, the memory needed and a training sample."""


def trained_parameters(gpt: GPT) -> list[tuple[str, torch.nn.Parameter]]:
    """What is trained of a model, by name."""
    return [(name, p) for name, p in gpt.named_parameters() if p.requires_grad]


class Finetuning:
    """A run from its settings on: `load_model`, then change the model, then `train`.

    Making one checks the settings, launches the devices and prepares the data; everything that can be wrong is said
    before the weights are read.

    Args:
        checkpoint_dir: The model to finetune.
        out_dir: Where the run's files go.
        options: What all methods take.
        settings: All settings of the command, to be shown.
        quantize: How frozen weights are stored; by default as the checkpoint has them, if they can be trained on so.
        on_pairs: Whether it learns from pairs of replies, not from single ones.
        trains_all: Whether all weights are trained, so that none stays quantised.
    """

    def __init__(
        self,
        checkpoint_dir: Path,
        out_dir: Path,
        options: Options,
        settings: dict[str, Any],
        quantize: str | None = None,
        on_pairs: bool = False,
        trains_all: bool = False,
    ) -> None:
        self.settings = settings
        self.options = options = replace(options, train=replace(options.train))  # the batch is settled below
        self.out_dir = out_dir
        self.data = chosen_data(options.data, on_pairs)
        if options.chat_template is not None:
            self.data.take_checkpoints_style(f"--chat_template {options.chat_template}")
        train = options.train
        self.world_size = count_devices(options.devices, options.num_nodes)
        train.set_batch_by_accumulation(self.world_size, TRAIN.global_batch_size)
        train.accumulation(self.world_size)
        self.optimizer = options.optimizer.with_train_args(train, default=OPTIMIZER)
        self.optimizer.check_strategy(sharded=self.world_size > 1 and options.strategy != "ddp")
        self.backend = choose_compiler(options.compile, options.compiler)
        self.logger_name = choose_logger(options.logger_name, train.logger_name, options.log, Options.logger_name)
        precision = options.precision or default_precision()
        if quantize is not None and options.precision is None:
            precision = without_mixing(precision)
        check_quantize(quantize, precision, training=True)
        self.directory = RunDirectory(self.out_dir)
        is_main = rank_from_environment() == 0
        if options.eval.metrics and is_main:
            print("Loading torchmetrics", flush=True)  # it takes up to ten seconds
        self.metrics = AnswerMetrics(options.eval.metrics or [])
        self.criterion = choose_criterion(options.eval.best_by, self.metrics.higher_is_better)
        if options.dry_run:  # a run that is here stays, and is no hindrance
            self.checkpoint = self.directory.start(options.resume)
        else:
            if is_main:
                self.directory.lock()
            self.checkpoint = self.directory.prepare(options.resume, options.overwrite, is_main=is_main)
        self.source: Source = open_merged(checkpoint_dir, options.access_token)
        self.config: Config = self.source.config
        self.quantize = None if trains_all else frozen_kind(self.source, quantize)
        if self.quantize != quantize:
            precision = options.precision or without_mixing(precision)
            check_quantize(self.quantize, precision, training=True)
        self.tokenizer = Tokenizer(self.source.files)
        self.tokens = sequence_length(train, self.config)

        self.fabric = make_fabric(options.devices, options.num_nodes, precision, options.strategy)
        launcher.launch(self.fabric)
        self.checkpoint = self.fabric.broadcast(self.checkpoint)
        self.console = Console(self.fabric.global_rank == 0)
        if options.log.save_logs and not options.dry_run:
            self.console.save_to(self.out_dir / LOGS_FILE, append=self.checkpoint is not None)
        described = cli.describe_settings(None if options.dry_run else self.out_dir)
        self.console.print(described or pprint.pformat(dict(sorted(settings.items()))))
        seed_everything(options.seed)
        self.console.print(f"Seed set to {options.seed}\n{describe_devices(self.fabric)}")
        note = self.source.note if self.quantize else self.source.note_on_plain
        if note:
            self.console.print(note)
        if self.quantize != quantize:
            self.console.print(f"The frozen weights stay as they are in the checkpoint: {self.quantize}")
        for line in self.directory.notes:
            self.console.print(line)
        if self.checkpoint is not None:
            self.console.print(f"Resuming from {str(self.checkpoint)!r}")
        self._prepare_data()

    def _prepare_data(self) -> None:
        train = self.options.train
        own_style = choose_prompt_style(
            self.source.files,
            explicit=format_of_options(None, self.options.chat_template),
            config=self.config,
            tokenizer=self.tokenizer,
        )
        self.data.connect(
            self.tokenizer,
            train.micro_batch_size,
            self.tokens,
            prompt_style=own_style,
            samples_per_step=train.global_batch_size,
        )
        once_per_node(self.fabric, self.data.prepare_data)
        self.data.setup()
        largest = max(samples.largest_id for samples in (self.data.train_samples, self.data.val_samples))
        self.tokenizer.check_rows(largest, self.config.padded_vocab_size)
        fabric = self.fabric
        self.batches = BatchStream(
            self.data.train_dataloader(),
            train.micro_batch_size,
            fabric.global_rank,
            fabric.world_size,
            seed=self.options.seed,
            epochs=train.epochs,
        )
        self.console.print(self.data.describe())
        self.answers = ValidationAnswers(
            fabric, self.console, self.data, self.tokenizer, self.options.eval, self.metrics, self.config.block_size
        )
        if not self.data.pack:  # what no sample needs, no row has
            self.tokens = min(self.tokens, max(1, self.data.train_samples.summary.longest - 1))

    @property
    def learning_rate(self) -> float:
        """The peak of the schedule."""
        default = inspect.signature(self.optimizer.load_class()).parameters["lr"].default
        return float(self.optimizer.init_args.get("lr", default))

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

    def _inputs(self, saved: Saved) -> Inputs:
        """What a resumed run must go on with, and what is said where it has changed."""
        # Weights that are trained are in the checkpoints, whatever they began as; but DPO compares with those.
        counts = saved.file != WEIGHTS or self.data.rows_per_sample > 1
        return Inputs.of(
            self.settings,
            {**self.data.content(), "seed": self.data.seed},
            self.config,
            self.tokenizer,
            self.optimizer,
            self.world_size,
            length_of_a_packed_row=self.tokens if self.data.pack else None,
            frozen_weights=self.base_digest if counts else None,
        )

    def train(
        self,
        gpt: GPT,
        saved: Saved,
        save: Callable[[Path, dict[str, Tensor]], None],
        parameters: Callable[[GPT], list[Any]] = trained_parameters,
        loss: Callable[[GPT], LossModule] = NextTokenLoss,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> Outcome | None:
        """Says what will happen, and does it.

        Args:
            gpt: The model, changed as the method wants; what requires gradients is trained.
            saved: Which weights the checkpoints hold.
            save: Writes these weights into a directory.
            parameters: Groups for the optimizer, from the model as it is on the devices (sharding replaces its
                parameters); by default all that is trained.
            loss: Makes the loss module of the model.
            prepare: Called with the loss module once it is on the devices, before anything is trained.

        Returns:
            How it ended; None after a dry run.
        """
        options, train, fabric, console = self.options, self.options.train, self.fabric, self.console
        store_frozen_matrices(gpt, precision_of(fabric))
        trained = gpt.num_parameters(trainable_only=True)
        everything = num_parameters(gpt)
        console.print(f"Number of trainable parameters: {trained:,} ({trained / everything:.2%} of all)")
        console.print(f"Number of non-trainable parameters: {everything - trained:,}")
        varies = not self.data.pack
        per_sample = self.tokens * self.data.rows_per_sample
        steps = train.total_steps(None if varies else per_sample, self.batches.samples_per_epoch)
        schedule = Schedule.of(train, steps)
        what = "sequences" if self.data.rows_per_sample == 1 else "pairs"
        for line in plan_lines(train, schedule, steps, per_sample, self.batches, self.optimizer, varies, what):
            console.print(line)
        console.print(self._memory_line(gpt))
        if self.metrics.metrics:
            console.print(self.answers.describe())
        for name, sample in self.data.shown().items():
            console.print(f"{name}, {DIMMED}:\n{sample_in_words(sample, self.tokenizer)}\n")
        if options.dry_run:
            console.print("--dry_run: nothing was trained.")
            return None

        flops = flops_per_token(gpt, self.tokens)
        checkpoint_blocks(gpt, train.activation_checkpointing)
        compile_blocks(gpt, self.backend, console.print)
        loss_module = loss(gpt)
        add_noise(loss_module, train.neftune_noise_alpha)
        model = fabric.setup_module(loss_module)
        optimizer = fabric.setup_optimizers(self.optimizer.build(parameters(gpt)))
        logger = None
        if fabric.global_rank == 0:
            cli.save_hyperparameters(self.out_dir)
            logs = self.out_dir / (TENSORBOARD_DIR if self.logger_name == "tensorboard" else LOGGERS_DIR)
            logger = make_logger(self.logger_name, logs, options.log, cli.resolved_settings() or {})
        recorder = Recorder(
            console,
            self.directory,
            logger,
            flops_per_token=flops,
            peak_flops=peak_flops(fabric),
            loss=loss_module,
            metrics=list(self.metrics.higher_is_better),
        )
        run = Run(
            train=train,
            evaluation=options.eval,
            schedule=schedule,
            total_steps=steps,
            last_step=train.last_step(None if varies else per_sample, self.batches.samples_per_epoch),
            directory=self.directory,
            recorder=recorder,
            save=partial(self._save, save),
            generate=partial(self.answers.generate, loss_module, gpt) if self.answers.is_wanted else None,
            criterion=self.criterion,
            resume=self.checkpoint,
            saved=saved,
            inputs=self._inputs(saved),
        )
        try:
            if prepare is not None:
                prepare(model)
            outcome = fit(fabric, model, optimizer, self.batches, self.data.val_dataloader(), run)
            if logger is not None and options.log.log_model and not outcome.interrupted:
                logger.log_checkpoint(outcome.checkpoint, options.log.checkpoint_name or self.config.name or "litgpt")
        finally:
            recorder.finish()
        console.print(f"Training time: {outcome.progress.seconds:.2f}s")
        console.print(f"Memory used: {memory_used(fabric.device) / 1e9:.2f} GB")
        if outcome.interrupted:
            stop_early(console, outcome)
        return outcome

    def _memory_line(self, gpt: GPT) -> str:
        """The estimate of the memory needed, beside what the device has."""
        train, (_, compute) = self.options.train, PRECISIONS[precision_of(self.fabric)]
        usage = Usage(
            trains=True,
            compute=compute,
            batch_size=train.micro_batch_size * self.data.rows_per_sample,
            context=self.tokens,
            device=self.fabric.device.type,
            devices=1 if self.options.strategy == "ddp" else self.world_size,  # ddp: a copy of all on each
            optimizer_states=self.optimizer.state_ratio(trained_parameters(gpt)),
            checkpointed=train.activation_checkpointing,
        )
        needed = sum(estimate_memory(gpt, usage).values())
        present = memory_present(self.fabric.device)
        line = f"Estimated memory: {needed / 1e9:.1f} GB at full length"
        if present is None:
            return line
        line += f"; the device has {present / 1e9:.1f} GB"
        if needed <= present:
            return line
        return f"{line}. To need less: --train.micro_batch_size, --train.max_seq_length, finetune_lora, --quantize"

    def _save(self, save: Callable, directory: Path, weights: dict[str, Tensor]) -> None:
        """A checkpoint of the run: the weights, and everything that chat needs beside them."""
        save(directory, weights)
        copy_companion_files(self.source.files, directory)
        self.config.save(directory)
        save_prompt_style(self.data.style, directory)
        cli.save_hyperparameters(directory)


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
        problem = "--data is missing" if data is None else f"--data {name} holds no pairs of replies"
        raise ValueError(
            f"{problem}: a chosen and a rejected one to a prompt. Give --data Preferences --data.json_path FILE, or "
            "--data HFPreferences --data.repo_id ORG/NAME."
        )
    if not isinstance(data, SFTData):
        raise ValueError(
            f"--data {name} is for pretraining: it holds no conversations. For your own: "
            "--data JSON --data.json_path FILE."
        )
    if not on_pairs and isinstance(data, PreferenceData):
        raise ValueError(f"--data {name} holds pairs of replies, from which `litgpt finetune_dpo` learns.")
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
