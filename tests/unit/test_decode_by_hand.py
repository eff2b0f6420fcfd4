"""tutorials/examples/decode_by_hand.py says what the engine says."""

import sys
from pathlib import Path

import pytest
import torch

from litgpt import GPT, LLM, Config
from litgpt.generation.engine import Engine
from litgpt.generation.request import Request
from litgpt.generation.sampling import Sampling
from tests import checkpoint_files

EXAMPLES = Path(__file__).parents[2] / "tutorials/examples"
PROMPT = list(range(1, 30))
WINDOWS = {"sliding_window_size": 8, "sliding_window_indices": [1, 0]}


@pytest.fixture
def decode_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import decode_by_hand

    yield decode_by_hand
    del sys.modules["decode_by_hand"]


def model_of(**changes) -> GPT:
    config = {"block_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_query_groups": 2, "padded_vocab_size": 97}
    torch.manual_seed(0)
    model = GPT(Config(name="tiny", vocab_size=97, **{**config, **changes})).eval()
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the next token depends on what was read
    return model


@pytest.mark.parametrize("changes", [{}, WINDOWS], ids=["full", "windows"])
def test_it_decodes_the_engines_greedy_tokens(decode_by_hand, changes):
    model = model_of(**changes)
    (expected,) = Engine(model).complete([Request(PROMPT, 20, Sampling(temperature=0))])
    assert len(set(expected)) > 5
    assert list(decode_by_hand.generate(model, PROMPT, 20)) == expected
    stop = expected[10]
    until = expected.index(stop)
    assert list(decode_by_hand.generate(model, PROMPT, 20, stops={stop})) == expected[:until]


def test_it_ends_with_the_context(decode_by_hand):
    model = model_of()
    (expected,) = Engine(model).complete([Request(PROMPT, 64 - len(PROMPT), Sampling(temperature=0))])
    assert list(decode_by_hand.generate(model, PROMPT, 1000)) == expected


def test_it_draws_by_probability(decode_by_hand):
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 2.0, -torch.inf, 1.0])
    drawn = torch.tensor([decode_by_hand.sample(logits, temperature=0.5) for _ in range(2000)])
    shares = drawn.bincount(minlength=4) / len(drawn)
    assert torch.allclose(shares, torch.softmax(logits / 0.5, dim=-1), atol=0.04)


def test_it_prints_the_answer_of_the_python_api(decode_by_hand, tmp_path, capsys):
    checkpoint = checkpoint_files.chat_model(tmp_path / "model")
    answer = LLM.load(checkpoint, precision="32-true").generate("Hello", top_k=1, max_new_tokens=12)
    capsys.readouterr()
    decode_by_hand.main(str(checkpoint), "Hello", max_new_tokens=12)
    assert capsys.readouterr().out == f"{answer}\n"
    assert answer
