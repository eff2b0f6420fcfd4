"""Train a language model on text, from scratch or from a checkpoint."""

from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from litgpt import cli
from litgpt.catalog import find_known
from litgpt.checkpoint import copy_companion_files, save_model
from litgpt.cli import ConfigOverrides
from litgpt.cli.secret import Secret
from litgpt.config import Config
from litgpt.data.base import DataModule
from litgpt.data.tokenizer_training import train_tokenizer
from litgpt.devices.precision import PRECISIONS
from litgpt.formats.hf_config import save_config_json
from litgpt.generation.in_training import complete_in_training
from litgpt.generation.request import Request
from litgpt.generation.sampling import Sampling
from litgpt.model import GPT
from litgpt.parallel.fabric import precision_of
from litgpt.parallel.ranks import once_per_node
from litgpt.runs.job import Job, trained_parameters
from litgpt.runs.options import RunOptions
from litgpt.runs.plan import Plan, sequence_length
from litgpt.sources.door import open_merged
from litgpt.sources.find import find_tokenizer
from litgpt.sources.meta import meta_model
from litgpt.sources.source import Source
from litgpt.tokenizer.tokenizer import MODEL_FILES, Tokenizer
from litgpt.training.arguments import EvalArgs, TrainArgs
from litgpt.training.console import Console
from litgpt.training.criterion import choose_criterion
from litgpt.training.inputs import Inputs
from litgpt.training.loop import Generated
from litgpt.training.loss import LossModule, NextTokenLoss
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.run_directory import TOKENIZER_DIR
from litgpt.training.run_lock import unlocks_at_end

TRAIN = TrainArgs(
    global_batch_size=512,
    micro_batch_size=4,
    lr_warmup_steps=2000,
    max_tokens=3_000_000_000_000,
    max_norm=1.0,
    min_lr=4e-5,
)
OPTIMIZER = OptimizerSpec("torch.optim.AdamW", {"lr": 4e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]})
DEFAULTS = RunOptions(
    devices="auto",
    train=TRAIN,
    eval=EvalArgs(interval=1000),
    optimizer=OPTIMIZER,
    logger_name="tensorboard",
    seed=42,
)
SAMPLE_TOKENS = 64
NEEDS_LESS = "--train.micro_batch_size, --train.max_seq_length, --train.activation_checkpointing, --precision bf16-true"


@unlocks_at_end
def setup(
    model_name: str,
    model_config: ConfigOverrides | None = None,
    out_dir: Path = Path("out/pretrain"),
    initial_checkpoint_dir: Path | None = None,
    tokenizer_dir: Path | None = None,
    tokenizer_vocab_size: int | None = None,
    dry_run: bool = False,
    options: Annotated[RunOptions, cli.Flat()] = DEFAULTS,
) -> None:
    """Train a model on text.

    Args:
        model_name: A known model's name (`litgpt pretrain list`), or a new one that model_config describes.
        model_config: Fields of the model's configuration that differ from the known model's.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
        initial_checkpoint_dir: Checkpoint (a directory, a .gguf file, a known name or a Hub id) whose weights training
            starts from.
        tokenizer_dir: Checkpoint (a directory, a .gguf file, a known name or a Hub id) whose tokenizer to use; by
            default that of initial_checkpoint_dir.
        tokenizer_vocab_size: Without a tokenizer_dir, train a byte-level BPE tokenizer of this size on the text.
        dry_run: Stop before training: show the model's size, the tokens of a step and the memory needed. The data is
            neither downloaded nor tokenised for that, and need not be there.
        data: What to train on, for example `--data TextFiles --data.train_data_path FOLDER`.
        devices: Devices per node; auto takes all (on a CPU, one process).
        seed: Decides the initial weights and all other random numbers.
        access_token: For downloading a gated model or its tokenizer.
    """
    job = Job(out_dir, options, cli.spread(setup, locals()), DEFAULTS, dry_run)
    job.check()
    data = check_for_pretraining(options, tokenizer_dir, tokenizer_vocab_size, dry_run)
    job.open_directory()
    source = None if initial_checkpoint_dir is None else open_merged(initial_checkpoint_dir, options.access_token)
    if source is not None and source.note_on_plain:
        job.notes.append(source.note_on_plain)
    if tokenizer_vocab_size is None:
        tokenizer_dir = choose_tokenizer(tokenizer_dir, source, data, options.access_token)
    job.launch()
    console, train, evaluation = job.console, job.options.train, options.eval

    # The tokenizer, and the shape of the model, which follows from it.
    if tokenizer_vocab_size is not None and not dry_run:
        tokenizer_dir = out_dir / TOKENIZER_DIR
        make_tokenizer(job, data, tokenizer_vocab_size, tokenizer_dir)
    tokenizer = Tokenizer(tokenizer_dir) if tokenizer_dir else None
    trained_size = None if tokenizer_vocab_size is None else tokenizer.vocab_size if tokenizer else tokenizer_vocab_size
    config = choose_config(model_name, dict(model_config or {}), source, tokenizer, trained_size)
    if train.tie_embeddings is not None:
        config.tie_embeddings = train.tie_embeddings
    elif source is not None:
        config.tie_embeddings = source.config.tie_embeddings
    tokens = sequence_length(train, config)

    # What it will take: told by a model without memory, before any weight is there.
    weights_dtype, _ = PRECISIONS[precision_of(job.fabric)]
    outline = meta_model(config).to(weights_dtype)
    if dry_run:
        job.describe(outline, Plan(train, job.world_size, tokens, batches=None), NEEDS_LESS)
        console.print("--dry_run: nothing was trained.")
        return
    data.connect(tokenizer, train.micro_batch_size, tokens)
    job.open_data(data)
    job.describe(outline, Plan(train, job.world_size, tokens, job.batches), NEEDS_LESS)

    # The model.
    gpt = GPT(config)
    if source is None:
        gpt.init_weights()
    else:
        source.load_into(gpt)
        warn_of_high_rate(console, job.optimizer_spec)
    loss = NextTokenLoss(gpt)
    model = job.set_up(loss)
    optimizer = job.build_optimizer(trained_parameters(gpt))

    # Training.
    def save(directory: Path, weights: dict[str, Tensor]) -> None:
        """Everything that chat needs, into an empty directory."""
        save_model(directory, weights, config)
        if tokenizer_dir is not None:
            copy_companion_files(tokenizer_dir, directory)
        save_config_json(config, directory)  # the tokenizer may come from another model, with its config.json
        cli.save_hyperparameters(directory)

    def sample() -> Generated:
        assert tokenizer is not None
        return Generated(write_sample(job, loss, tokenizer, evaluation.max_new_tokens or SAMPLE_TOKENS))

    content = {**data.content(), "seed": data.settings().get("seed")}
    spec, world_size = job.optimizer_spec, job.world_size
    length = {"the length of a sequence": tokens}
    inputs = Inputs.of(job.settings, content, config, tokenizer, spec, world_size, length)
    generate = sample if tokenizer and evaluation.max_new_tokens else None
    outcome = job.fit(model, optimizer, save, inputs, generate=generate)

    if tokenizer is not None and not outcome.interrupted:
        console.print(f"The model writes:\n{sample().text}\n")
        console.print(f"To talk with it, run:\nlitgpt chat {outcome.checkpoint}")


def check_for_pretraining(
    options: RunOptions, tokenizer_dir: Path | None, tokenizer_vocab_size: int | None, dry_run: bool
) -> DataModule:
    """What to train on; ValueError where it is missing, or an option is for finetuning alone."""
    if options.eval.metrics:
        raise ValueError(
            "--eval.metrics is for finetuning: it compares answers with replies, and pretraining data has none. Leave "
            "it out."
        )
    choose_criterion(options.eval.best_by, {})
    if options.eval.evaluate_example != "first":
        raise ValueError("--eval.evaluate_example is for finetuning: pretraining data has no examples. Leave it out.")
    if options.data is None and not dry_run:
        raise ValueError("--data is missing. For plain text: --data TextFiles --data.train_data_path FOLDER_OR_FILE.")
    if tokenizer_dir is not None and tokenizer_vocab_size is not None:
        raise ValueError("--tokenizer_dir and --tokenizer_vocab_size: use a tokenizer or train one, not both.")
    return DataModule() if options.data is None else options.data  # a dry run opens none


def choose_tokenizer(
    directory: Path | None, source: Source | None, data: DataModule, access_token: Secret | None
) -> Path | None:
    """Where the tokenizer's files are: of `directory` (or .gguf file), of the initial checkpoint, or with the data."""
    if directory is not None:
        return find_tokenizer(directory, access_token)
    if source is not None and any((source.files / name).is_file() for name in MODEL_FILES):
        return source.files
    return data.tokenizer_dir()


def make_tokenizer(job: Job, data: DataModule, vocab_size: int, directory: Path) -> None:
    """Train a tokenizer on the training text, once per node; a resumed run keeps the one it had."""

    def make() -> None:
        if job.resume_from is not None:
            copy_companion_files(job.resume_from, directory)
            return
        texts = data.training_texts()
        if texts is None:
            raise ValueError(
                f"--tokenizer_vocab_size: {type(data).__name__} has no text to train a tokenizer on. Give "
                "--tokenizer_dir."
            )
        train_tokenizer(texts, vocab_size, directory)

    once_per_node(job.fabric, make)


def choose_config(
    name: str,
    overrides: dict[str, Any],
    source: Source | None,
    tokenizer: Tokenizer | None,
    trained_vocab_size: int | None = None,
) -> Config:
    """The model's shape: that of a known name, of the initial checkpoint, or wholly given; then `overrides`.

    Args:
        name: Of the model.
        overrides: Fields of `Config`.
        source: The initial checkpoint.
        tokenizer: It must have a row of the embedding for each token.
        trained_vocab_size: Tokens of a tokenizer that is trained on the text, which the model then follows.
    """
    if trained_vocab_size is not None:
        given = overrides.get("vocab_size", trained_vocab_size)
        if given != trained_vocab_size:
            raise ValueError(
                f"--model_config.vocab_size {given}, but the tokenizer trained on the text has {trained_vocab_size} "
                "tokens, which the model follows. Leave model_config.vocab_size out."
            )
        # A small vocabulary has no need of a rich padding.
        overrides = {"padding_multiple": 64, "padded_vocab_size": None, **overrides, "vocab_size": trained_vocab_size}
    known = find_known(name)
    if source is not None and (known is None or source.config.name == known.name):
        config = Config(**{**source.config.to_dict(), **overrides})
    elif known is None and {"n_layer", "n_head", "n_embd"} <= overrides.keys():
        fields: dict[str, Any] = {"name": name, **overrides}
        config = Config(**fields)
    else:
        config = Config.from_name(name, **overrides)
    if tokenizer is not None and tokenizer.vocab_size > config.padded_vocab_size:
        raise ValueError(
            f"The tokenizer in {tokenizer.dir} has {tokenizer.vocab_size} tokens, more than the model's embedding "
            f"({config.padded_vocab_size}). Use the model's own tokenizer, or set --model_config.vocab_size "
            f"{tokenizer.vocab_size} --model_config.padded_vocab_size null."
        )
    return config


def warn_of_high_rate(console: Console, optimizer: OptimizerSpec) -> None:
    """Say so where a model that has learned something goes on at the rate that is meant for one from scratch."""
    scratch = OPTIMIZER.init_args["lr"]
    if optimizer.init_args.get("lr") == scratch:
        console.print(
            f"Note: the peak learning rate, {scratch:g}, is the default for a model from scratch, and may undo what "
            f"this one has learned. A tenth is usual for going on: --optimizer.lr {scratch / 10:g}."
        )


def write_sample(job: Job, loss: LossModule, tokenizer: Tokenizer, max_new_tokens: int) -> str:
    """What the model writes after BOS, or after a line break where there is no such token. Every rank must call this,
    also where the model is sharded; rank 0 has the text, the others have none."""
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else tokenizer.encode_ids("\n", bos=False)
    request = Request(start, max_new_tokens, Sampling(temperature=0.8, top_k=50, seed=job.options.seed))
    requests = [request] if job.fabric.global_rank == 0 else []
    _, autocast = PRECISIONS[precision_of(job.fabric)]
    answers = complete_in_training(loss.gpt, requests, within=loss, autocast=autocast)
    return "".join(map(tokenizer.decode, answers))
