"""The decode step as torch compiles it for an accelerator; and what is said about building and compiling."""

import torch

from litgpt.cli.notes import notes_wait, say_note
from litgpt.config import Config
from litgpt.generation.compiled import decoder
from litgpt.model import GPT
from tests import shapes

CONFIG = Config(
    block_size=256, n_layer=1, n_embd=64, n_head=4, padded_vocab_size=96, intermediate_size=96, **shapes.LLAMA
)


def test_notes_wait_for_the_end_of_an_answer(capsys):
    with notes_wait():
        print("The answer", end="")
        say_note("Compiling")
        print(" goes on")
        assert capsys.readouterr() == ("The answer goes on\n", "")
    assert capsys.readouterr() == ("", "Compiling\n")
    say_note("Compiled")
    assert capsys.readouterr().err == "Compiled\n"


def test_what_a_gpu_waits_for_is_said_once_for_each_number_of_rows(monkeypatch):
    """On a device of fake memory, with a compiler that does nothing."""
    model = GPT(CONFIG).eval().to("meta")
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda tokens, positions, *, cache: tokens)
    said: list[str] = []
    decode = decoder(model, said.append)
    for rows in (1, 4, 1, 4):
        decode(torch.ones(rows, 1), torch.zeros(rows, 1), cache=None)
    assert said == [
        "Compiling the writing of one answer at a time with torch.compile: its first tokens wait for that.",
        "Compiling the writing of 4 answers at a time with torch.compile: its first tokens wait for that.",
    ]
