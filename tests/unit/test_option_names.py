"""What the errors of library code name is what was typed, where a command shows them."""

import pytest

from litgpt.__main__ import main
from litgpt.adaptation.lora import LoRASettings
from litgpt.cli import option_names
from litgpt.cli.run_command import run
from litgpt.commands import finetune_dpo, finetune_lora
from litgpt.training.arguments import TrainArgs


def test_a_notebook_reads_of_fields():
    with pytest.raises(ValueError, match=r"^r=0: the rank must be at least 1\.$"):
        LoRASettings(r=0)
    with pytest.raises(ValueError, match=r"^train\.max_steps=0 is too small"):
        TrainArgs(max_steps=0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["finetune_lora", "x", "--lora_r", "0"], "--lora_r 0: the rank"),
        (["finetune_dpo", "x", "--dpo_beta", "0"], "--dpo_beta 0"),
        (["finetune", "x", "--train.max_steps", "0"], "--train.max_steps 0 is too small"),
        (
            ["finetune", "x", "--data", "JSON", "--data.json_path", "gone", "--data.val_split_fraction", "7"],
            "--data.val_split_fraction 7",
        ),
        (["finetune", "x", "--devices", "none"], "--devices none is not a number"),
    ],
)
def test_a_terminal_reads_of_options(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) in (1, 2)
    assert said in capsys.readouterr().err


@pytest.fixture
def as_lora():
    with pytest.raises(ValueError, match="rank"):
        run(finetune_lora.setup, ["x", "--lora_r", "0", "--data", "JSON"], "litgpt finetune_lora")


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("alpha=-1: must be positive", "--lora_alpha -1: must be positive"),
        ("`alpha` is missing, or json_path='a b'", "--lora_alpha is missing, or --data.json_path 'a b'"),
        ("Set `max_steps` or train.epochs=1 (seed=3)", "Set --train.max_steps or --train.epochs 1 (--seed 3)"),
        ("optimizer.lr=2, `optimizer.betas`", "--optimizer.lr 2, --optimizer.betas"),
        ("`model` and model=x are no options of this", "`model` and model=x are no options of this"),
        ("/data/seed=3/x?seed=4 'seed=5' HF_seed=1 --seed=2 train.nothing=3", None),
    ],
)
def test_fields_and_what_only_looks_like_them(as_lora, message, shown):
    assert option_names.on_command_line(message) == (shown or message)


def test_each_command_has_its_own(as_lora):
    with pytest.raises(ValueError, match="beta"):
        run(finetune_dpo.setup, ["x", "--dpo_beta", "0"], "litgpt finetune_dpo")
    assert option_names.on_command_line("beta=0, alpha=1") == "--dpo_beta 0, --lora_alpha 1"
