"""Activations computed again: the same gradients, from less memory."""

import os
import re
import subprocess
import sys

import pytest
import torch

from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.training.activation_checkpointing import checkpoint_blocks
from litgpt.training.arguments import TrainArgs
from litgpt.training.loss import NextTokenLoss
from tests.training.conftest import SHAPE

MODEL = {**SHAPE, "n_layer": 5, "vocab_size": 300}


def loss_and_gradients(choice: str | int, lora: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[int]]:
    """Also the numbers of the blocks whose MLPs ran twice."""
    torch.manual_seed(0)
    gpt = GPT(Config(**MODEL))
    gpt.init_weights()
    if lora:
        apply_lora(gpt, LoRASettings(r=4, dropout=0.5, mlp=True))
        for name, parameter in gpt.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.1)
    runs = [0] * 5
    for number, block in enumerate(gpt.transformer.h):
        block.mlp.register_forward_pre_hook(lambda *args, number=number: runs.__setitem__(number, runs[number] + 1))
    checkpoint_blocks(gpt, choice)
    idx = torch.randint(0, 300, (2, 32))
    loss = NextTokenLoss(gpt)(idx, idx)
    loss.backward()
    gradients = {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}
    return loss, gradients, [number for number, count in enumerate(runs) if count == 2]


@pytest.mark.parametrize("lora", [False, True])  # with dropout, whose mask must be the same again
@pytest.mark.parametrize(("choice", "again"), [("full", [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (1, [0, 1, 2, 3, 4])])
def test_the_same_gradients(lora, choice, again):
    loss, gradients, twice = loss_and_gradients("none", lora)
    assert twice == []
    other_loss, other_gradients, twice = loss_and_gradients(choice, lora)
    assert twice == again
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, other_gradients[name]), name


def test_names_and_inference_stay():
    plain, checkpointed = GPT(Config(**MODEL)), GPT(Config(**MODEL))
    checkpoint_blocks(checkpointed, "full")
    assert plain.state_dict().keys() == checkpointed.state_dict().keys()
    checkpointed.load_state_dict(plain.state_dict())
    idx = torch.randint(0, 300, (1, 8))
    with torch.no_grad():
        assert torch.equal(plain(idx), checkpointed(idx))


def test_choices():
    assert TrainArgs(activation_checkpointing="3").activation_checkpointing == 3
    for wrong in ("some", 0, "-1"):
        with pytest.raises(ValueError, match=rf"activation_checkpointing='?{wrong}'? is not none, full or a number"):
            TrainArgs(activation_checkpointing=wrong)


MEMORY = """
import sys, torch
from litgpt.config import Config
from litgpt.devices.memory import memory_used
from litgpt.model import GPT
from litgpt.training.activation_checkpointing import checkpoint_blocks
from litgpt.training.loss import NextTokenLoss
from tests.training.test_activation_checkpointing import MODEL

torch.set_num_threads(1)
gpt = GPT(Config(**{**MODEL, "n_layer": 12, "n_embd": 128, "intermediate_size": 512, "block_size": 512}))
checkpoint_blocks(gpt, sys.argv[1])
idx = torch.zeros(16, 256, dtype=torch.int64)
NextTokenLoss(gpt)(idx, idx).backward()
print("peak", memory_used(torch.device("cpu")) / 1e6)
"""


def test_a_process_needs_less_memory():
    """12 blocks of 4,096 tokens; each keeps about 4 x 128 + 6 x 512 float32 values a token, or only its 128 inputs.

    What is freed goes back to the system: what the C library keeps of it by default differs from run to run.
    """
    command = [sys.executable, "-c", MEMORY]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    runs = [
        subprocess.Popen([*command, c], stdout=subprocess.PIPE, text=True, env=environment) for c in ("none", "full")
    ]
    everything, least = (float(re.search(r"peak ([\d.]+)", run.communicate()[0])[1]) for run in runs)
    assert everything - least > 350, (everything, least)
