"""Finetune a model with LLaMA-Adapter: learned prompts beside frozen weights."""

from functools import partial
from pathlib import Path

from litgpt import distributed
from litgpt.adapter import ADAPTER_WEIGHTS, apply_adapter, is_adapter, save_adapter
from litgpt.commands.finetuning import EVAL, LOGGER, OPTIMIZER, TRAIN, Finetuning, Options
from litgpt.data.base import DataModule
from litgpt.memory import Usage
from litgpt.training.arguments import EvalArgs, LogArgs, TrainArgs
from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.state import Saved


def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/adapter"),
    precision: str | None = None,
    quantize: str | None = None,
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: distributed.Strategy = "auto",
    resume: bool | str | Path = False,
    overwrite: bool = False,
    adapter_prompt_length: int = 10,
    adapter_start_layer: int = 2,
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
    """Finetune a model with LLaMA-Adapter (https://arxiv.org/abs/2303.16199): the later layers get a prompt each.

    Args:
        checkpoint_dir: The model to finetune: a checkpoint directory, a known name, or a Hub id, downloaded if need be.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
        precision: 32-true, bf16-true, bf16-mixed or 16-mixed; by default mixed on a GPU and 32-true elsewhere.
        quantize: Keep the frozen weights in 4 or 8 bits: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or bnb.int8-training.
        devices: Devices per node; auto takes all.
        num_nodes: Machines.
        strategy: Over several devices, fsdp shards the model (auto is fsdp), ddp copies it.
        resume: true continues from the newest checkpoint in out_dir; auto does so where there is one and starts afresh
            otherwise; a path continues from that checkpoint.
        overwrite: Delete the run that out_dir holds.
        adapter_prompt_length: Places of each layer's prompt.
        adapter_start_layer: The first layer that has one, counted from 0.
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
    job = Finetuning(Options(**{name: settings[name] for name in Options.__dataclass_fields__}), settings)
    gpt = job.load_model()
    apply_adapter(gpt, adapter_prompt_length, adapter_start_layer)
    saved = Saved(ADAPTER_WEIGHTS, is_adapter)
    usage = Usage("lora" if quantize is None else "qlora")  # about as many parameters are trained
    outcome = job.train(gpt, usage, saved, partial(save_adapter, base=str(checkpoint_dir)))
    if outcome is not None and not outcome.interrupted:
        job.console.print(f"Saved adapter weights to {str(outcome.checkpoint / saved.file)!r}")
