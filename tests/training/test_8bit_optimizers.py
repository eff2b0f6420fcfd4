"""Optimizers whose state is in 8 bits, by their class path: they learn, and resume bit for bit."""

from importlib.util import find_spec

import pytest
import torch

from litgpt.training.optimizers import OptimizerSpec
from litgpt.training.state import read_training_state
from tests.training.conftest import SHAPE, deterministic, weights

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

WIDE = {**SHAPE, "n_embd": 64, "intermediate_size": 128}  # most matrices have the 4,096 values that 8 bits begin with


@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW", "Lion8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_resumed_run_equals_an_uninterrupted_one(train, tmp_path, name):
    settings = {"optimizer": OptimizerSpec(f"bitsandbytes.optim.{name}", {"lr": 1e-3}), "shape": WIDE}
    rows = train(tmp_path / "whole", max_steps=16, save_interval=8, **settings)
    assert float(rows[-1]["loss"]) < 0.97 * float(rows[0]["loss"])
    torch.manual_seed(7)
    again = train(tmp_path / "parts", max_steps=16, resume=tmp_path / "whole/step-00000008", **settings)
    assert deterministic(again) == deterministic(rows)[8:]
    expected, actual = weights(tmp_path / "whole/final"), weights(tmp_path / "parts/final")
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    types = {t.dtype for t in tensors(read_training_state(tmp_path / "parts/final")["optimizer"])}
    assert (torch.uint8 in types) == name.endswith("8bit")


def tensors(state):
    for value in state.values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors(value)
