"""Finetune a model on pairs of replies, of which one is preferred (DPO and its variants)."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from litgpt import cli
from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.checkpoint import atomic_file, save_model
from litgpt.checkpoint.sums import check_archive
from litgpt.data.preferences import PreferenceData
from litgpt.runs.finetuning import Finetuning
from litgpt.runs.job import trained_parameters
from litgpt.runs.lora_finetuning import train_lora
from litgpt.runs.options import TRAIN, FinetuneOptions
from litgpt.training.preference import PreferenceLoss, PreferenceSettings, reference_log_probs
from litgpt.training.run_lock import unlocks_at_end
from litgpt.training.state import Saved

# One pass: replies that come again and again are soon told apart by heart.
TRAIN = replace(TRAIN, epochs=1, lr_warmup_steps=10, min_lr=0.0, max_norm=1.0)
# Far below what finetuning takes: the model already answers, and is only to prefer (DPO's paper: 1e-6, Zephyr: 5e-7,
# for billions of weights; smaller models stand more). LoRA's best rate is about ten times that of full training
# (https://thinkingmachines.ai/blog/lora/).
LEARNING_RATES = {"lora": 5e-5, "full": 5e-6}
REFERENCE_FILE = "reference.pth"

Method = Literal["lora", "full"]


@unlocks_at_end
def setup(
    checkpoint_dir: Path,
    out_dir: Path = Path("out/finetune/dpo"),
    method: Method = "lora",
    dpo: Annotated[PreferenceSettings, cli.Flat("dpo_")] = PreferenceSettings(),  # noqa: B008
    quantize: str | None = None,
    lora: Annotated[LoRASettings, cli.Flat("lora_")] = LoRASettings(),  # noqa: B008
    lora_plus_ratio: float | None = None,
    options: Annotated[FinetuneOptions, cli.Flat()] = FinetuneOptions(train=TRAIN),  # noqa: B008
) -> None:
    """Finetune a model on pairs of a chosen and a rejected reply: direct preference optimisation (DPO), or IPO.

    The model learns to prefer the chosen replies more than the model that it started from, the reference, does. With
    LoRA, the reference is the model without the updates. With `--method full`, the reference's log-probabilities of all
    replies are computed once, before training: there is no second copy of the model either way.

    Args:
        checkpoint_dir: The model to finetune, one that already follows instructions: a directory, also of LoRA weights
            (they are merged as they are read), a .gguf file, a known name or a Hub id.
        out_dir: Where checkpoints, metrics.csv, logs.txt and loss.png go.
        method: lora trains small matrices alongside frozen weights, full all weights.
        quantize: With lora, keep the frozen weights in 4 or 8 bits: bnb.nf4, bnb.nf4-dq, bnb.fp4, bnb.fp4-dq or
            bnb.int8-training.
        lora_plus_ratio: Let the second matrix learn this many times as fast as the first (LoRA+).
        data: Pairs to train on: `--data Preferences --data.json_path FILE`, or `--data HFPreferences --data.repo_id
            ORG/NAME`.
        optimizer: A torch.optim class or your own, and its arguments; the learning rate (--optimizer.lr) is 5e-5 with
            lora and 5e-6 with full unless given.
    """
    options = with_learning_rate(options, method)
    if method == "full":
        refuse_lora_options(quantize, lora, lora_plus_ratio)
    settings = cli.spread(setup, locals())
    job = Finetuning(checkpoint_dir, out_dir, options, settings, quantize, on_pairs=True, trains_all=method == "full")
    job.check()
    job.open_directory()
    job.open_checkpoint()
    job.launch()
    job.prepare_data()

    gpt = job.load_model()
    if method == "lora":
        apply_lora(gpt, lora)
    else:
        gpt.requires_grad_(True)
    job.announce(gpt)
    if options.dry_run:
        return
    loss = PreferenceLoss(gpt, dpo)
    if method == "lora":
        train_lora(job, loss, lora, lora_plus_ratio)
        return

    def save(directory: Path, weights: dict[str, Tensor]) -> None:
        save_model(directory, weights, job.config)

    model = job.set_up(loss)
    optimizer = job.build_optimizer(trained_parameters(gpt))
    bring_reference(job, model)
    outcome = job.train(model, optimizer, save, Saved())
    if not outcome.interrupted:
        job.console.print(f"To talk with it, run:\nlitgpt chat {outcome.checkpoint}")


def with_learning_rate(options: FinetuneOptions, method: Method) -> FinetuneOptions:
    """The options with the method's own learning rate, unless they say one."""
    if options.train.learning_rate is not None or "lr" in options.optimizer.init_args:
        return options
    init_args = {**options.optimizer.init_args, "lr": LEARNING_RATES[method]}
    return replace(options, optimizer=replace(options.optimizer, init_args=init_args))


def refuse_lora_options(quantize: str | None, lora: LoRASettings, lora_plus_ratio: float | None) -> None:
    """ValueError where something is set that training all weights has no use for."""
    given = {"quantize": quantize, "lora_plus_ratio": lora_plus_ratio}
    given |= {f"lora_{f.name}": getattr(lora, f.name) for f in fields(lora) if getattr(lora, f.name) != f.default}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"--{name} {value} is for --method lora; with --method full, leave it out.")


def bring_reference(job: Finetuning, model: nn.Module) -> None:
    """Let the batches bring the log-probabilities of their replies under the model as it is before training.

    They are computed once, and kept in `out_dir` for a run that is resumed.
    """
    data = job.data
    assert isinstance(data, PreferenceData)
    path, belongs_to = job.out_dir / REFERENCE_FILE, {"base": str(job.checkpoint_dir), "data": data.identity}
    found: list[Tensor] | None = None
    if job.fabric.global_rank == 0 and job.resume_from is not None and path.is_file():
        try:
            check_archive(path)
            saved = torch.load(path, weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            job.console.print(f"{path} is damaged ({str(error).partition(chr(10))[0]}); it is made again.")
            saved = {}
        if {key: saved.get(key) for key in belongs_to} == belongs_to:
            found = saved["log_probs"]
    found = job.fabric.broadcast(found)
    if found is None:
        sizes = [rows for _, rows in data.all_batches()]
        job.console.print(f"Computing the reference's log-probabilities of {sum(sizes):,} replies, once")
        found = [reference_log_probs(job.fabric, model, *part) for part in data.all_batches()]
        if job.fabric.global_rank == 0:
            with atomic_file(path) as temporary:
                torch.save({**belongs_to, "log_probs": found}, temporary)
    data.set_reference(found)
