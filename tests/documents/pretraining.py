"""The document about pretraining: on text of one's own, continued, resumed, and on other text."""

import yaml

from litgpt.checkpoint import WEIGHTS
from litgpt.config import Config
from tests.documents.place import PRETRAINING, TINY, Place
from tests.documents.table import Check, Row, makes, output, prints
from tests.documents.zero_to_litgpt import sorted_models
from tests.shell import Done

SHORT = f"{PRETRAINING} --train.max_seq_length 64"
HERE = "new_pretrained_checkpoint"


def saved(out: str, **expected: object) -> Check:
    """A run ended well with these settings, and its checkpoint is a whole one."""

    def check(place: Place, done: Done) -> None:
        final = place.directory / out / "final"
        assert (final / WEIGHTS).is_file()
        assert (final / "tokenizer.json").is_file()
        assert Config.from_checkpoint(final).n_layer == 2
        kept = yaml.safe_load((final / "hyperparameters.yaml").read_text())
        found = {name: kept["train"].get(name, kept["optimizer"]["init_args"].get(name)) for name in expected}
        assert found == expected

    return check


def gone_on(place: Place, done: Done) -> None:
    assert "Resuming from" in done.out
    assert "step 2" in done.out
    saved(HERE)(place, done)


ROWS = [
    Row("litgpt pretrain list", then=sorted_models),
    output("ValueError: Please specify --model_name <model_name>. Available values:"),
    Row(
        r"""litgpt pretrain pythia-14m \
   --config https://raw.githubusercontent.com/Lightning-AI/litgpt/main/config_hub/pretrain/debug.yaml""",
        extra=f"{TINY} {SHORT} --overwrite true",
        then=prints("Training time"),
        reason="Run with the address of a website on loopback in the place of GitHub's.",
        off="config_hub/pretrain/debug.yaml",
    ),
    Row(
        "~ ls -lh custom_pretraining_data",
        run="ls -lh custom_pretraining_data",
        then=prints("combined_1.txt", "combined_2.txt"),
        reason="A prompt stands before it.",
    ),
    output("total 3225M"),
    Row(
        r"""litgpt download EleutherAI/pythia-14m \
  --tokenizer_only true""",
        run="litgpt download EleutherAI/pythia-14m --tokenizer_only true --checkpoint_dir tokenizers",
        then=makes("tokenizers/EleutherAI/pythia-14m/tokenizer.json"),
    ),
    Row(
        r"""litgpt pretrain pythia-14m \
   --tokenizer_dir EleutherAI/pythia-14m \
   --data TextFiles \
   --data.train_data_path custom_pretraining_data \
   --train.lr_warmup_steps=200
   --optimizer.lr 0.005""",
        run="litgpt pretrain pythia-14m --tokenizer_dir EleutherAI/pythia-14m --data TextFiles "
        "--data.train_data_path custom_pretraining_data --train.lr_warmup_steps=200 --optimizer.lr 0.005",
        extra=f"{TINY} {SHORT} --overwrite true",
        then=saved("out/pretrain", lr_warmup_steps=200, lr=0.005),
        reason="A backslash is missing behind the line before the last. As typed, a shell runs it with the default "
        "learning rate.",
    ),
    Row("litgpt download EleutherAI/pythia-14m", then=makes("checkpoints/EleutherAI/pythia-14m/lit_model.pth")),
    Row(
        r"""litgpt pretrain pythia-160m \
   --initial_checkpoint_dir EleutherAI/pythia-160m \
   --tokenizer_dir EleutherAI/pythia-160m \
   --out_dir ./new_pretrained_checkpoint \
   --data TextFiles \
   --data.train_data_path custom_pretraining_data \
   --train.max_tokens 1_000_000""",
        extra=f"{SHORT} --overwrite true",
        then=saved(HERE, max_tokens=1_000_000),
    ),
    Row(
        r"""litgpt pretrain pythia-160m \
   --resume "auto" \
   --tokenizer_dir EleutherAI/pythia-160m \
   --out_dir ./new_pretrained_checkpoint \
   --data TextFiles \
   --data.train_data_path custom_pretraining_data \
   --train.max_tokens 1_000_000""",
        extra=f"{TINY} --model_config.vocab_size 704 --model_config.padded_vocab_size 704 {SHORT} --train.max_steps 2",
        needs=(f"{HERE}/final",),
        then=gone_on,
    ),
    Row(
        f"litgpt convert_pretrained_checkpoint ./{HERE}/final ./{HERE}_converted",
        run=f"rm -rf {HERE}_converted; litgpt convert_pretrained_checkpoint ./{HERE}/final ./{HERE}_converted",
        needs=(f"{HERE}/final",),
        then=makes(f"{HERE}_converted/lit_model.pth"),
    ),
    Row(
        r"""litgpt pretrain pythia-160m \
   --initial_checkpoint_dir ./new_pretrained_checkpoint_converted \
   --tokenizer_dir EleutherAI/pythia-160m \
   --out_dir ./new_pretrained_checkpoint_2 \
   --data TextFiles \
   --data.train_data_path custom_pretraining_data_2 \
   --train.max_tokens 1_000_000""",
        extra=f"{SHORT} --overwrite true",
        needs=(f"{HERE}_converted",),
        then=saved(f"{HERE}_2", max_tokens=1_000_000),
    ),
]
INLINE = {
    "litgpt pretrain": "a row",
    "litgpt pretrain list": "a row",
    'pip install "litgpt[all]"': "as in the other documents",
    "litgpt pretrain --data.help TextFiles": "run",
    "--data LitData": "its module's tests",
    "--data LitData --data.path path/to/your/data": "its module's tests",
    "--initial_checkpoint_dir": "a row",
    "--resume": "a row",
}
SPOKEN = [
    Row("litgpt pretrain --data.help TextFiles", then=prints("--data.train_data_path")),
    Row(
        "--data LitData --data.path path/to/your/data",
        "options",
        run="litgpt pretrain pythia-14m --data LitData --data.path data/pretrain --tokenizer_dir EleutherAI/pythia-14m",
        extra=f"{TINY} {SHORT} --overwrite true",
        needs=("data/pretrain",),
        then=saved("out/pretrain"),
        off="LitData",
    ),
]
