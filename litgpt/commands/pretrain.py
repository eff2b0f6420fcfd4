"""Train a language model on text, from scratch or from a checkpoint."""

import pprint
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt import cli
from litgpt.catalog import find_known
from litgpt.checkpoint import copy_companion_files, save_model
from litgpt.cli import ConfigOverrides
from litgpt.config import Config
from litgpt.data.base import DataModule
from litgpt.data.tokenizer_training import train_tokenizer
from litgpt.devices.accelerator import count_devices
from litgpt.devices.memory import memory_used
from litgpt.devices.precision import PRECISIONS
from litgpt.devices.random_state import seed_everything
from litgpt.formats.hf_config import save_config_json
from litgpt.generation.in_training import complete
from litgpt.generation.request import Request
from litgpt.generation.sampling import Sampling
from litgpt.model import GPT
from litgpt.parallel import launcher
from litgpt.parallel.fabric import Strategy, describe_devices, make_fabric, peak_flops, precision_of
from litgpt.parallel.ranks import once_per_node, rank_from_environment
from litgpt.parallel.sharding import is_sharded
from litgpt.runs.plan import LOGGER, choose_logger, plan_lines, sequence_length, stop_early
from litgpt.sources.door import open_merged
from litgpt.sources.find import find_tokenizer
from litgpt.sources.source import Source
from litgpt.tokenizer.tokenizer import MODEL_FILES, Tokenizer
from litgpt.training.activation_checkpointing import checkpoint_blocks
from litgpt.training.arguments import EvalArgs, LogArgs, TrainArgs
from litgpt.training.batches import BatchStream
from litgpt.training.compilers import choose_compiler, compile_blocks
from litgpt.training.console import Console
from litgpt.training.criterion import choose_criterion
from litgpt.training.inputs import Inputs
from litgpt.training.loggers import make_logger
from litgpt.training.loop import Generated, Run, fit
from litgpt.training.loss import NextTokenLoss
from litgpt.training.metrics import flops_per_token
from litgpt.training.neftune import add_noise
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.recorder import Recorder
from litgpt.training.run_directory import LOGGERS_DIR, LOGS_FILE, TOKENIZER_DIR, RunDirectory
from litgpt.training.run_lock import unlocks_at_end
from litgpt.training.schedule import Schedule

TRAIN = TrainArgs(
    global_batch_size=512,
    micro_batch_size=4,
    lr_warmup_steps=2000,
    max_tokens=3_000_000_000_000,
    max_norm=1.0,
    min_lr=4e-5,
)
OPTIMIZER = OptimizerSpec("torch.optim.AdamW", {"lr": 4e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]})
SAMPLE_TOKENS = 64


@unlocks_at_end
def setup(
    model_name: str,
    model_config: ConfigOverrides | None = None,
    out_dir: Path = Path("out/pretrain"),
    precision: str | None = None,
    initial_checkpoint_dir: Path | None = None,
    resume: bool | str | Path = False,
    overwrite: bool = False,
    data: DataModule | None = None,
    train: TrainArgs = TRAIN,
    eval: EvalArgs = EvalArgs(interval=1000),  # noqa: B008
    log: LogArgs = LogArgs(),  # noqa: B008
    optimizer: OptimizerSpec = OPTIMIZER,
    devices: int | str = "auto",
    num_nodes: int = 1,
    strategy: Strategy = "auto",
    compile: bool = False,
    compiler: str | None = None,
    tokenizer_dir: Path | None = None,
    tokenizer_vocab_size: int | None = None,
    logger_name: str = LOGGER,
    seed: int = 42,
) -> None:
    """Train a model on text.

    Args:
        model_name: A known model's name (`litgpt pretrain list`), or a new one that model_config describes.
        model_config: Fields of the model's configuration that differ from the known model's.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
        precision: 32-true, bf16-true, bf16-mixed or 16-mixed; by default mixed on a GPU and 32-true elsewhere.
        initial_checkpoint_dir: Checkpoint (a directory, a .gguf file, a known name or a Hub id) whose weights training
            starts from.
        resume: true continues from the newest checkpoint in out_dir; auto does so where there is one and starts afresh
            otherwise; a path continues from that checkpoint.
        overwrite: Delete the run that out_dir holds.
        data: What to train on, for example `--data TextFiles --data.train_data_path FOLDER`.
        train: How long, in which batches, with which schedule.
        eval: When to validate.
        log: For the loggers.
        optimizer: A torch.optim class or your own, and its arguments (--optimizer.lr 0.001).
        devices: Devices per node; auto takes all (on a CPU, one process).
        num_nodes: Machines.
        strategy: Over several devices, fsdp shards the model (auto is fsdp), ddp copies it.
        compile: Compile the model's blocks with torch.compile; the first step then takes long.
        compiler: What compiles the blocks; naming one implies --compile true: torch (the default), or thunder for
            Lightning Thunder (extensions/thunder).
        tokenizer_dir: Checkpoint (a directory, a .gguf file, a known name or a Hub id) whose tokenizer to use; by
            default that of initial_checkpoint_dir.
        tokenizer_vocab_size: Without a tokenizer_dir, train a byte-level BPE tokenizer of this size on the text.
        logger_name: csv, tensorboard, wandb, mlflow, or the dotted path of a logger class.
        seed: Decides the initial weights and all other random numbers.
    """
    settings = dict(sorted(locals().items()))

    # Everything that can be wrong with the settings is said before any work starts.
    world_size = count_devices(devices, num_nodes)
    train.set_batch_by_accumulation(world_size, TRAIN.global_batch_size)
    train.accumulation(world_size)
    optimizer = optimizer.with_train_args(train, default=OPTIMIZER)
    optimizer.check_strategy(sharded=world_size > 1 and strategy != "ddp")
    logger_name = choose_logger(logger_name, train.logger_name, log)
    if eval.metrics:
        raise ValueError(
            "--eval.metrics is for finetuning: it compares answers with replies, and pretraining data has none. Leave "
            "it out."
        )
    choose_criterion(eval.best_by, {})
    backend = choose_compiler(compile, compiler)
    if data is None:
        raise ValueError("--data is missing. For plain text: --data TextFiles --data.train_data_path FOLDER_OR_FILE.")
    if eval.evaluate_example != "first":
        raise ValueError("--eval.evaluate_example is for finetuning: pretraining data has no examples. Leave it out.")
    if tokenizer_dir is not None and tokenizer_vocab_size is not None:
        raise ValueError("--tokenizer_dir and --tokenizer_vocab_size: use a tokenizer or train one, not both.")
    if eval.max_new_tokens and world_size > 1 and strategy != "ddp":
        raise ValueError("--eval.max_new_tokens: a sharded model cannot write samples. Leave it out or --strategy ddp.")
    run_directory = RunDirectory(out_dir)
    is_main = rank_from_environment() == 0
    if is_main:
        run_directory.lock()
    checkpoint = run_directory.prepare(resume, overwrite, is_main=is_main)
    source = open_merged(initial_checkpoint_dir) if initial_checkpoint_dir is not None else None
    tokenizer_dir = choose_tokenizer(tokenizer_dir, source if tokenizer_vocab_size is None else None)
    if tokenizer_dir is None and tokenizer_vocab_size is None:
        tokenizer_dir = data.tokenizer_dir()

    fabric = make_fabric(devices, num_nodes, precision, strategy)
    launcher.launch(fabric)
    checkpoint = fabric.broadcast(checkpoint)
    console = Console(fabric.global_rank == 0)
    if log.save_logs:
        console.save_to(out_dir / LOGS_FILE, append=checkpoint is not None)
    console.print(cli.describe_settings(out_dir) or pprint.pformat(settings))
    seed_everything(seed)
    console.print(f"Seed set to {seed}\n{describe_devices(fabric)}")
    if source is not None and source.note_on_plain:
        console.print(source.note_on_plain)
    for note in run_directory.notes:
        console.print(note)
    if checkpoint is not None:
        console.print(f"Resuming from {str(checkpoint)!r}")

    # The tokenizer, the model's shape, the data.
    makes_tokenizer = tokenizer_dir is None and tokenizer_vocab_size is not None
    if makes_tokenizer:
        tokenizer_dir = out_dir / TOKENIZER_DIR
        make = partial(make_tokenizer, data, tokenizer_vocab_size, tokenizer_dir, checkpoint)
        once_per_node(fabric, make)
    tokenizer = Tokenizer(tokenizer_dir) if tokenizer_dir else None
    config = choose_config(model_name, dict(model_config or {}), source, tokenizer, makes_tokenizer)
    if train.tie_embeddings is not None:
        config.tie_embeddings = train.tie_embeddings
    elif source is not None:
        config.tie_embeddings = source.config.tie_embeddings
    tokens = sequence_length(train, config)
    data.connect(tokenizer, train.micro_batch_size, tokens)
    once_per_node(fabric, data.prepare_data)
    data.setup()
    batches = BatchStream(
        data.train_dataloader(),
        train.micro_batch_size,
        fabric.global_rank,
        fabric.world_size,
        seed=seed,
        epochs=train.epochs,
    )
    val_batches = data.val_dataloader()
    console.print(data.describe())

    # The model and its optimizer.
    gpt = GPT(config)
    if source is None:
        gpt.init_weights()
    else:
        source.load_into(gpt)
    console.print(f"Number of trainable parameters: {gpt.num_parameters(trainable_only=True):,}")
    console.print(f"Number of non-trainable parameters: {gpt.num_parameters() - gpt.num_parameters(True):,}")
    flops = flops_per_token(gpt, tokens)
    checkpoint_blocks(gpt, train.activation_checkpointing)
    compile_blocks(gpt, backend, console.print)
    loss = NextTokenLoss(gpt)
    add_noise(loss, train.neftune_noise_alpha)
    model = fabric.setup_module(loss)
    fabric_optimizer = fabric.setup_optimizers(optimizer.build(gpt.named_parameters()))

    # Training.
    total_steps = train.total_steps(tokens, batches.samples_per_epoch)
    schedule = Schedule.of(train, total_steps)
    for line in plan_lines(train, schedule, total_steps, tokens, batches, optimizer):
        console.print(line)
    if source is not None and optimizer.init_args.get("lr") == (scratch := OPTIMIZER.init_args["lr"]):
        console.print(
            f"Note: the peak learning rate, {scratch:g}, is the default for a model from scratch, and may undo what "
            f"this one has learned. A tenth is usual for going on: --optimizer.lr {scratch / 10:g}."
        )
    logger = None
    if fabric.global_rank == 0:
        cli.save_hyperparameters(out_dir)
        logger = make_logger(logger_name, out_dir / LOGGERS_DIR, log, cli.resolved_settings() or {})
    recorder = Recorder(console, run_directory, logger, flops_per_token=flops, peak_flops=peak_flops(fabric))
    write = partial(sample_text, gpt, tokenizer, precision=precision_of(fabric), seed=seed)

    def sample() -> Generated:
        return Generated(write(eval.max_new_tokens) if fabric.global_rank == 0 else "")

    run = Run(
        train=train,
        evaluation=eval,
        schedule=schedule,
        total_steps=total_steps,
        last_step=train.last_step(tokens, batches.samples_per_epoch),
        directory=run_directory,
        recorder=recorder,
        save=partial(save_checkpoint_files, config=config, tokenizer_dir=tokenizer_dir),
        generate=sample if tokenizer and eval.max_new_tokens else None,
        resume=checkpoint,
        inputs=Inputs.of(
            settings,
            {**data.content(), "seed": data.settings().get("seed")},
            config,
            tokenizer,
            optimizer,
            world_size,
            length_of_a_sequence=tokens,
        ),
    )
    try:
        outcome = fit(fabric, model, fabric_optimizer, batches, val_batches, run)
        if logger is not None and log.log_model and not outcome.interrupted:
            logger.log_checkpoint(outcome.checkpoint, log.checkpoint_name or config.name or "litgpt")
    finally:
        recorder.finish()

    console.print(f"Training time: {outcome.progress.seconds:.2f}s")
    console.print(f"Memory used: {memory_used(fabric.device) / 1e9:.2f} GB")
    if outcome.interrupted:
        return stop_early(console, outcome)
    if tokenizer is not None and fabric.global_rank == 0 and not is_sharded(gpt):
        console.print(f"The model writes:\n{write(eval.max_new_tokens or SAMPLE_TOKENS)}\n")
    if tokenizer is not None:
        console.print(f"To talk with it, run:\nlitgpt chat {outcome.checkpoint}")


def choose_tokenizer(directory: Path | None, source: Source | None) -> Path | None:
    """Where the tokenizer's files are: those of `directory` (or .gguf file), else those of the initial checkpoint."""
    if directory is not None:
        return find_tokenizer(directory)
    has_one = source is not None and any((source.files / name).is_file() for name in MODEL_FILES)
    return source.files if has_one else None


def make_tokenizer(data: DataModule, vocab_size: int, directory: Path, checkpoint: Path | None) -> None:
    """Train a tokenizer on the training text; a resumed run keeps the one it had."""
    if checkpoint is not None:
        copy_companion_files(checkpoint, directory)
        return
    texts = data.training_texts()
    if texts is None:
        raise ValueError(
            f"--tokenizer_vocab_size: {type(data).__name__} has no text to train a tokenizer on. Give --tokenizer_dir."
        )
    train_tokenizer(texts, vocab_size, directory)


def choose_config(
    name: str, overrides: dict[str, Any], source: Source | None, tokenizer: Tokenizer | None, new_tokenizer: bool
) -> Config:
    """The model's shape: that of a known name, of the initial checkpoint, or wholly given; then `overrides`."""
    if new_tokenizer and tokenizer is not None:
        given = overrides.get("vocab_size", tokenizer.vocab_size)
        if given != tokenizer.vocab_size:
            raise ValueError(
                f"--model_config.vocab_size {given}, but the tokenizer trained on the text has {tokenizer.vocab_size} "
                "tokens, which the model follows. Leave model_config.vocab_size out."
            )
        # A small vocabulary has no need of a rich padding.
        overrides = {"padding_multiple": 64, "padded_vocab_size": None, **overrides, "vocab_size": tokenizer.vocab_size}
    known = find_known(name)
    if source is not None and (known is None or source.config.name == known.name):
        config = Config(**{**source.config.to_dict(), **overrides})
    elif known is None and {"n_layer", "n_head", "n_embd"} <= overrides.keys():
        config = Config(**{"name": name, **overrides})
    else:
        config = Config.from_name(name, **overrides)
    if tokenizer is not None and tokenizer.vocab_size > config.padded_vocab_size:
        raise ValueError(
            f"The tokenizer in {tokenizer.dir} has {tokenizer.vocab_size} tokens, more than the model's embedding "
            f"({config.padded_vocab_size}). Use the model's own tokenizer, or set --model_config.vocab_size "
            f"{tokenizer.vocab_size} --model_config.padded_vocab_size null."
        )
    return config


def save_checkpoint_files(
    directory: Path, weights: dict[str, Tensor], config: Config, tokenizer_dir: Path | None
) -> None:
    """Everything that chat needs, into an empty directory."""
    save_model(directory, weights, config)
    if tokenizer_dir is not None:
        copy_companion_files(tokenizer_dir, directory)
    save_config_json(config, directory)  # the tokenizer may come from another model, with its config.json
    cli.save_hyperparameters(directory)


def sample_text(gpt: GPT, tokenizer: Tokenizer, max_new_tokens: int, *, precision: str, seed: int) -> str:
    """What the model writes after BOS, or after a line break where there is no such token."""
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else tokenizer.encode_ids("\n", bos=False)
    _, autocast = PRECISIONS[precision]
    request = Request(start, max_new_tokens, Sampling(temperature=0.8, top_k=50, seed=seed))
    (answer,) = complete(gpt, [request], autocast=autocast)
    return tokenizer.decode(answer)
