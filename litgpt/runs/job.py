"""A training run, step by step: what pretraining and all ways of finetuning do alike, in the order in which it happens.

    job = Job(...)          stores what was asked
    job.check()             everything that can be wrong with the settings is said
    job.open_directory()    locks out_dir, and finds the checkpoint to resume from
    job.launch()            one process for each device, seeded alike; lines go to the console and to logs.txt
    job.open_data(data)     downloads and tokenises what is not there yet, and opens the batches
    job.describe(gpt, ...)  says what the run will do, and the memory it needs: here a dry run ends
    job.set_up(loss)        brings the model, inside its loss, onto the devices
    job.build_optimizer()   over what is trained
    job.fit(...)            trains, validates, saves

The commands call them, and say between them what model it is and what is trained of it.
"""

from __future__ import annotations

import pprint
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from litgpt import cli
from litgpt.data.base import DataModule
from litgpt.devices.accelerator import count_devices
from litgpt.devices.memory import memory_used
from litgpt.devices.precision import PRECISIONS
from litgpt.devices.random_state import check_seed, seed_everything
from litgpt.model import GPT
from litgpt.parallel import launcher
from litgpt.parallel.fabric import describe_devices, make_fabric, peak_flops, precision_of
from litgpt.parallel.ranks import once_per_node, rank_from_environment
from litgpt.runs.memory_estimate import Usage
from litgpt.runs.options import RunOptions
from litgpt.runs.plan import Plan, choose_logger, memory_line, parameter_lines
from litgpt.training.activation_checkpointing import checkpoint_blocks
from litgpt.training.batches import BatchStream
from litgpt.training.compilers import Backend, choose_compiler, compile_blocks
from litgpt.training.console import Console
from litgpt.training.criterion import Criterion
from litgpt.training.inputs import Inputs
from litgpt.training.loggers import make_logger
from litgpt.training.loop import Generated, Outcome, Run, fit
from litgpt.training.loss import LossModule
from litgpt.training.metrics import flops_per_token
from litgpt.training.neftune import add_noise
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.recorder import Recorder
from litgpt.training.run_directory import LOGS_FILE, RunDirectory
from litgpt.training.state import Saved

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule

Save = Callable[[Path, dict[str, Tensor]], None]
"""Writes the weights of a checkpoint, and all that belongs to them, into an empty directory"""


# Settings that name what a run reads.
INPUTS = ("checkpoint_dir", "initial_checkpoint_dir", "tokenizer_dir")


def trained_parameters(gpt: GPT) -> list[tuple[str, nn.Parameter]]:
    """What is trained of a model, by name."""
    return [(name, p) for name, p in gpt.named_parameters() if p.requires_grad]


class Job:
    """A run. Making one only stores what was asked; its methods are the steps.

    Args:
        out_dir: Where the run's files go.
        options: What all commands take.
        settings: All settings of the command by their names, to be shown and compared on a resume.
        defaults: What `options` are when nobody sets them: what differs from these was given.
        dry_run: Whether it ends before it trains. It leaves `out_dir` as it is.

    Attributes:
        notes: What to say of the inputs once there is a console.
        precision: To train in; None chooses by the device.
    """

    # What the steps find out.
    world_size: int
    optimizer_spec: OptimizerSpec
    backend: Backend | None
    logger_name: str
    resume_from: Path | None
    fabric: Fabric
    console: Console
    batches: BatchStream
    val_batches: DataLoader | list
    plan: Plan
    flops_per_token: float
    loss: LossModule

    def __init__(
        self,
        out_dir: Path,
        options: RunOptions,
        settings: dict[str, Any],
        defaults: RunOptions,
        dry_run: bool = False,
    ) -> None:
        self.out_dir, self.defaults, self.dry_run = out_dir, defaults, dry_run
        self.options = replace(options, train=replace(options.train))  # `check` settles the batch
        self.settings = {**settings, "train": self.options.train}
        self.directory = RunDirectory(out_dir)
        self.precision = options.precision
        self.notes: list[str] = []

    @property
    def is_sharded(self) -> bool:
        """Whether each device has only a part of the weights."""
        return self.world_size > 1 and self.options.strategy != "ddp"

    def check(self) -> None:
        """Settle the batch, the optimizer, the compiler and the logger; ValueError where they do not go together."""
        options, train = self.options, self.options.train
        check_seed(options.seed)
        self.world_size = count_devices(options.devices, options.num_nodes)
        train.set_batch_by_accumulation(self.world_size, self.defaults.train.global_batch_size)
        train.accumulation(self.world_size)
        self.optimizer_spec = options.optimizer.with_train_args(train, default=self.defaults.optimizer)
        self.optimizer_spec.check_strategy(self.is_sharded)
        self.backend = choose_compiler(options.compile, options.compiler)
        default = self.defaults.logger_name
        self.logger_name = choose_logger(options.logger_name, train.logger_name, options.log, default)

    def open_directory(self) -> None:
        """Keep other runs out of `out_dir`, and find the checkpoint to resume from."""
        options = self.options
        if self.dry_run:  # a run that is here stays, and is no hindrance
            self.resume_from = self.directory.start(options.resume)
            return
        is_main = rank_from_environment() == 0
        if is_main:
            self.directory.lock()
        needed = [Path(str(self.settings[name])) for name in INPUTS if self.settings.get(name) is not None]
        self.resume_from = self.directory.prepare(options.resume, options.overwrite, needed, is_main=is_main)

    def launch(self) -> None:
        """Start a process for each device, all with one seed, and say what runs where."""
        options = self.options
        self.fabric = make_fabric(options.devices, options.num_nodes, self.precision, options.strategy)
        launcher.launch(self.fabric)
        self.resume_from = self.fabric.broadcast(self.resume_from)
        self.console = Console(self.fabric.global_rank == 0)
        if options.log.save_logs and not self.dry_run:
            self.console.save_to(self.out_dir / LOGS_FILE, append=self.resume_from is not None)
        described = cli.describe_settings(None if self.dry_run else self.out_dir)
        self.console.print(described or pprint.pformat(dict(sorted(self.settings.items()))))
        seed_everything(options.seed)
        self.console.print(f"Seed set to {options.seed}\n{describe_devices(self.fabric)}")
        for note in (*self.notes, *self.directory.notes):
            self.console.print(note)
        if self.resume_from is not None:
            self.console.print(f"Resuming from {str(self.resume_from)!r}")

    def open_data(self, data: DataModule) -> None:
        """Prepare the data in one process of each node, and open this rank's batches.

        Args:
            data: Connected: it knows the tokenizer and the length of a sequence.
        """
        fabric, train = self.fabric, self.options.train
        once_per_node(fabric, data.prepare_data)
        data.setup()
        self.batches = BatchStream(
            data.train_dataloader(),
            train.micro_batch_size,
            fabric.global_rank,
            fabric.world_size,
            seed=self.options.seed,
            epochs=train.epochs,
        )
        self.val_batches = data.val_dataloader()
        self.console.print(data.describe())

    def describe(self, gpt: GPT, plan: Plan, remedies: str) -> None:
        """Say what the run will do, and the memory that it needs.

        Args:
            gpt: The model as it is trained, on any device, in the type that its weights will have.
            plan: How long.
            remedies: Options that need less memory.
        """
        self.plan, self.flops_per_token = plan, flops_per_token(gpt, plan.tokens)
        options, (_, compute) = self.options, PRECISIONS[precision_of(self.fabric)]
        usage = Usage(
            trains=True,
            compute=compute,
            batch_size=options.train.micro_batch_size * plan.rows_per_sample,
            context=plan.tokens,
            device=self.fabric.device.type,
            devices=self.world_size if self.is_sharded else 1,
            optimizer_states=self.optimizer_spec.state_ratio(trained_parameters(gpt)),
            checkpointed=options.train.activation_checkpointing,
        )
        for line in (
            *parameter_lines(gpt),
            f"FLOPs per token: {self.flops_per_token:,.0f} (forward and backward pass)",
            *plan.lines(self.optimizer_spec),
            memory_line(gpt, usage, self.fabric.device, remedies),
        ):
            self.console.print(line)

    def set_up(self, loss: LossModule) -> _FabricModule:
        """Bring the model, inside its loss, onto the devices, with its blocks checkpointed and compiled as asked for.

        Returns:
            The module that `fit` trains. Sharding replaces the model's parameters.
        """
        self.loss, train = loss, self.options.train
        checkpoint_blocks(loss.gpt, train.activation_checkpointing)
        compile_blocks(loss.gpt, self.backend, self.console.print)
        add_noise(loss, train.neftune_noise_alpha)
        return self.fabric.setup_module(loss)

    def build_optimizer(self, parameters: Iterable[tuple[str, nn.Parameter] | dict[str, Any]]) -> Optimizer:
        """The optimizer, over parameters of the model as it is on the devices.

        Args:
            parameters: (name, parameter) pairs, or groups of parameters.
        """
        optimizer = self.fabric.setup_optimizers(self.optimizer_spec.build(parameters))
        assert isinstance(optimizer, Optimizer)  # Fabric's wrapper of one is of its class, too
        return optimizer

    def fit(
        self,
        model: _FabricModule,
        optimizer: Optimizer,
        save: Save,
        inputs: Inputs,
        *,
        saved: Saved = Saved(),  # noqa: B008 - it does not change
        generate: Callable[[], Generated] | None = None,
        criterion: Criterion = Criterion(),  # noqa: B008 - it does not change
        metrics: Sequence[str] = (),
    ) -> Outcome:
        """Train until the run's end, with a record of it in `out_dir`.

        Args:
            model: From `set_up`.
            optimizer: From `build_optimizer`.
            save: Writes a checkpoint.
            inputs: What the run works on, for a resumed one to be compared with.
            saved: Which weights the checkpoints hold.
            generate: Has the model write something after each validation; called on every rank.
            criterion: By which figure a checkpoint is the best.
            metrics: Names of what answers to the validation data are scored by.
        """
        options, fabric, console = self.options, self.fabric, self.console
        logger = None
        if fabric.global_rank == 0:
            cli.save_hyperparameters(self.out_dir)
            logs = self.directory.logs(self.logger_name)
            logger = make_logger(self.logger_name, logs, options.log, cli.resolved_settings() or {})
        recorder = Recorder(
            console,
            self.directory,
            logger,
            flops_per_token=self.flops_per_token,
            peak_flops=peak_flops(fabric),
            loss=self.loss,
            metrics=metrics,
        )
        run = Run(
            train=options.train,
            evaluation=options.eval,
            schedule=self.plan.schedule,
            total_steps=self.plan.total_steps,
            last_step=self.plan.last_step,
            directory=self.directory,
            recorder=recorder,
            save=save,
            generate=generate,
            criterion=criterion,
            resume=self.resume_from,
            saved=saved,
            inputs=inputs,
        )
        try:
            outcome = fit(fabric, model, optimizer, self.batches, self.val_batches, run)
            if logger is not None and options.log.log_model and not outcome.interrupted:
                name = options.log.checkpoint_name or self.loss.gpt.config.name or "litgpt"
                logger.log_checkpoint(outcome.checkpoint, name)
        finally:
            recorder.finish()
        console.print(f"Training time: {outcome.progress.seconds:.2f}s")
        console.print(f"Memory used: {memory_used(fabric.device) / 1e9:.2f} GB")
        if outcome.interrupted:
            stop_early(console, outcome)
        return outcome


def stop_early(console: Console, outcome: Outcome) -> None:
    """Say how to go on with a run that was interrupted; Ctrl-C ends the process with its exit code."""
    console.print(
        f"Stopped by {outcome.interrupted} after step {outcome.progress.step}. To go on, run the same command with "
        "--resume auto"
    )
    if outcome.interrupted == "Ctrl-C":
        raise SystemExit(130)
