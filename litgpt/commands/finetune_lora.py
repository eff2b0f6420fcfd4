"""Finetune a model with low-rank adaptation (LoRA), on quantised weights too (QLoRA)."""

from functools import partial
from pathlib import Path

from litgpt import distributed
from litgpt.commands.finetuning import EVAL, LOGGER, OPTIMIZER, TRAIN, Finetuning, Options
from litgpt.commands.merge_lora import merge_into
from litgpt.data.base import DataModule
from litgpt.lora import LORA_WEIGHTS, LoRASettings, apply_lora, is_lora, parameter_groups, save_lora
from litgpt.memory import Usage
from litgpt.training.arguments import EvalArgs, LogArgs, TrainArgs
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.state import Saved


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/lora"),
    precision: str | None = None,
    quantize: str | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: distributed.Strategy = "auto",
    resume: bool | str | Path = False,
    overwrite: bool = False,
    lora_r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    lora_query: bool = True,
    lora_key: bool = False,
    lora_value: bool = True,
    lora_projection: bool = False,
    lora_mlp: bool = False,
    lora_head: bool = False,
    lora_dora: bool = False,
    lora_rs: bool = False,
    lora_plus_ratio: float | None = None,
    data: DataModule | None = None,
    train: TrainArgs = TRAIN,
    eval: EvalArgs = EVAL,
    log: LogArgs = LogArgs(),  # noqa: B008
    optimizer: OptimizerSpec = OPTIMIZER,
    compile: bool = False,
    logger_name: str = LOGGER,
    seed: int = 1337,
    access_token: str | None = None,
    dry_run: bool = False,
) -> None:
    """Finetune a model with LoRA: small matrices beside frozen weights.

    Args:
        checkpoint_dir: The model to finetune: a checkpoint directory, a known name, or a Hub id, downloaded if need be.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
        precision: 32-true, bf16-true, bf16-mixed or 16-mixed; by default mixed on a GPU and 32-true elsewhere.
        quantize: Keep the frozen weights in 4 or 8 bits (QLoRA): bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or
            bnb.int8-training.
        devices: Devices per node; auto takes all.
        num_nodes: Machines.
        strategy: Over several devices, fsdp shards the model (auto is fsdp), ddp copies it.
        resume: true continues from the newest checkpoint in out_dir; auto does so where there is one and starts afresh
            otherwise; a path continues from that checkpoint.
        overwrite: Delete the run that out_dir holds.
        lora_r: Rank of the update; its matrices grow with it.
        lora_alpha: The update is scaled by lora_alpha / lora_r.
        lora_dropout: Share of the adapted layers' inputs that is zeroed in training.
        lora_query: Adapt the attention's queries.
        lora_key: Adapt its keys.
        lora_value: Adapt its values.
        lora_projection: Adapt its output projection.
        lora_mlp: Adapt the MLPs, those of experts included.
        lora_head: Adapt the output head.
        lora_dora: Learn the length of each weight row beside its direction (DoRA).
        lora_rs: Scale by lora_alpha / sqrt(lora_r) (rank-stabilised).
        lora_plus_ratio: Let the second matrix learn this many times as fast as the first (LoRA+).
        data: What to train on, for example `--data JSON --data.json_path FILE`; by default Alpaca.
        train: How long, in which batches, with which schedule.
        eval: When to validate.
        log: For the loggers.
        optimizer: A torch.optim class or your own, and its arguments (--optimizer.lr 0.001).
        compile: Compile the model's blocks with torch.compile; the first step then takes long.
        logger_name: csv, tensorboard, wandb, mlflow, or the dotted path of a logger class.
        seed: Decides all random numbers.
        access_token: For downloading a gated model.
        dry_run: Stop before training: show what would be done, the memory needed and a training sample.
    """
    settings = dict(sorted(locals().items()))
    options = Options(**{name: settings[name] for name in Options.__dataclass_fields__})
    lora = LoRASettings(**{name: settings[f"lora_{name}"] for name in LoRASettings.__dataclass_fields__})

    job = Finetuning(options, settings)
    gpt = job.load_model()
    apply_lora(gpt, lora)
    method = "lora" if quantize is None else "qlora"
    usage = Usage(method, lora_r=lora.r, lora_targets=lora.targets, lora_dropout=lora.dropout > 0)
    groups = partial(parameter_groups, learning_rate=job.learning_rate, ratio=lora_plus_ratio)
    saved = Saved(LORA_WEIGHTS, is_lora)
    outcome = job.train(gpt, usage, saved, partial(save_lora, settings=lora, base=str(checkpoint_dir)), groups)

    if outcome is not None and not outcome.interrupted and job.fabric.global_rank == 0:
        job.console.print(f"Saved LoRA weights to {str(outcome.checkpoint / LORA_WEIGHTS)!r}")
        merge_into(outcome.checkpoint, job.source)
        job.console.print(f"Saved merged weights to {str(outcome.checkpoint / 'lit_model.pth')!r}")
        job.console.print(f"To talk with it, run:\nlitgpt chat {outcome.checkpoint}")
