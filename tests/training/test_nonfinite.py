"""Gradients that are NaN or infinite: none reaches the weights, on any number of ranks, waited for or not."""

import math

import pytest
import torch
from lightning_fabric import Fabric

from litgpt.training import loop
from litgpt.training.gradients import Gradients
from litgpt.training.loop import TrainingDiverged
from litgpt.training.state import Progress, read_training_state
from tests.training.conftest import on_two_ranks, weights

BAD = "transformer.h.1.attn.proj.weight"


def break_gradients(patch: pytest.MonkeyPatch, *steps: int, rank: int = 0) -> list[dict[str, torch.Tensor]]:
    """Has the gradient of these steps, counted from 1 in this process, hold an infinity on one rank; gives the weights
    as they were before each of them."""
    real, calls, before = loop.accumulate_gradients, [], []

    def accumulate(fabric, model, *others):
        result = real(fabric, model, *others)
        calls.append(None)
        if len(calls) in steps:
            gpt = getattr(model, "module", model).gpt
            before.append({name: p.detach().clone() for name, p in gpt.named_parameters()})
            if fabric.global_rank == rank:
                gradient = gpt.get_parameter(BAD).grad
                getattr(gradient, "to_local", lambda: gradient)().view(-1)[0] = math.inf
        return result

    patch.setattr(loop, "accumulate_gradients", accumulate)
    return before


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_the_run_stops_before_the_optimizer(train, tmp_path, monkeypatch, max_norm):
    break_gradients(monkeypatch, 3)
    updates = []

    def step(optimizer, closure=None):
        if len(optimizer.param_groups[0]["params"]) > 1:  # no single stand-in, which is only asked what is kept of it
            updates.append(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(
        TrainingDiverged,
        match=r"The gradient of step 3 is not finite \(NaN or infinite\): in 1 of \d+ parameters, nearest to the loss in "
        rf"{BAD}\. The weights are as they were before it\. The last good checkpoint is .*step-00000002; resume .*"
        r"train\.skip_nonfinite=5",
    ):
        train(tmp_path, max_steps=6, max_norm=max_norm, save_interval=2, log_interval=5)
    assert len(updates) == 2


def test_some_steps_may_be_passed_over(train, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        break_gradients(patch, 3, 4, 6)
        train(tmp_path / "whole", max_steps=7, save_interval=1, skip_nonfinite=2)
    printed = capsys.readouterr().out
    where = rf"(in 1 of 17 parameters, nearest to the loss in {BAD})"
    for step, row, count in ((3, 1, 1), (4, 2, 2), (6, 1, 3)):
        line = f"step {step} | The gradient is not finite {where}: passed over, without an update. In a row: {row} "
        assert f"{line}(--train.skip_nonfinite 2), in all: {count}." in printed
    assert "Steps without an update, since their gradient was not finite: 3" in printed
    second, third, fourth, fifth = (tmp_path / f"whole/step-0000000{step}" for step in (2, 3, 4, 5))
    for other in (third, fourth):
        assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(second).items())
        states = [read_training_state(checkpoint)["optimizer"] for checkpoint in (second, other)]
        assert all(torch.equal(states[0][0][key], states[1][0][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert any(not torch.equal(tensor, weights(fifth)[name]) for name, tensor in weights(second).items())

    with monkeypatch.context() as patch:  # a resumed run goes on counting
        break_gradients(patch, 2)
        train(tmp_path / "parts", max_steps=7, save_interval=1, skip_nonfinite=2, resume=fourth)
    whole, parts = weights(tmp_path / "whole/final"), weights(tmp_path / "parts/final")
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert read_training_state(tmp_path / "parts/final")["progress"]["skipped"] == 3
    with monkeypatch.context() as patch:
        break_gradients(patch, 1)
        with pytest.raises(TrainingDiverged, match=r"The gradient of step 5 .*, as 2 in a row were before it"):
            train(tmp_path / "more", max_steps=7, skip_nonfinite=2, resume=fourth)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("allowed", [0, 1])
def test_a_device_leaves_the_update_out_by_itself(allowed, optimizer):
    """As on a GPU, where nobody waits to see whether the gradient is finite."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    fused = optimizer(model.parameters(), lr=0.1, fused=True)
    gradients = Gradients(Fabric(accelerator="cpu", devices=1), model, fused, allowed, Progress())
    gradients.waits = False
    seen = []
    for step, value in enumerate((1.0, math.nan, 1.0, math.inf, math.inf, 1.0), start=1):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.bias.grad[1] = value
        gradients.prepare(step, max_norm=1.0, wanted=False)
        before = model.weight.detach().clone()
        assert gradients.step(fused) is False
        seen.append(not torch.equal(before, model.weight))
    assert seen == [True, False, bool(allowed), False, False, False]
    ended_at = 5 if allowed else 2
    assert f"The gradient of step {ended_at} " in gradients.failure()
    assert "in 1 of 2 parameters, nearest to the loss in bias" in gradients.failure()


RUN = """
import sys
from dataclasses import replace
from pathlib import Path
import pytest
from litgpt.cli import ConfigOverrides
from litgpt.cli.flat import flattened
from litgpt.commands import pretrain
from litgpt.training import loop
from tests.training.ragged import Ragged
from tests.training.test_nonfinite import break_gradients
from tests.training.test_ragged import EVALUATION, MODEL

out_dir, strategy, waits = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
break_gradients(pytest.MonkeyPatch(), 2, 4, 5, rank=1 if strategy == "fsdp" else None)
real = loop.Gradients

class OnDevice(real):
    def __init__(self, *args):
        super().__init__(*args)
        self.waits = waits

loop.Gradients = OnDevice
train = replace(pretrain.TRAIN, global_batch_size=8, micro_batch_size=2, lr_warmup_steps=5, max_tokens=None,
                max_norm=1.0, max_steps=6, skip_nonfinite=1, save_interval=3, log_interval=10)
try:
    flattened(pretrain.setup)(model_name="tiny", model_config=ConfigOverrides(MODEL), out_dir=out_dir, devices=2, strategy=strategy, train=train,
                   data=Ragged(), eval=EVALUATION, logger_name="csv")
except loop.TrainingDiverged as error:
    print(f"{error}", flush=True)
"""


@pytest.mark.parametrize("waits", [True, False])
def test_sharded_ranks_agree(train, tmp_path, monkeypatch, waits):
    """An infinity in what one of two ranks has of a gradient, for an optimizer that waits and for one that does not."""
    printed = on_two_ranks(RUN, tmp_path, tmp_path / "two", "fsdp", waits)
    assert printed.count("The gradient of step 5 is not finite (NaN or infinite), as 1 in a row were before it") == 2
    assert printed.count(f"in 1 of 17 parameters, nearest to the loss in {BAD}") == 4  # two notes, the ranks' errors
    from tests.training.ragged import Ragged
    from tests.training.test_ragged import EVALUATION, MODEL

    break_gradients(monkeypatch, 2)
    options = {"shape": MODEL, "tokenizer_vocab_size": None, "eval": EVALUATION, "skip_nonfinite": 1}
    train(tmp_path / "one", module=Ragged(), micro_batch_size=2, max_steps=3, save_interval=3, **options)
    double = weights(tmp_path / "two/step-00000003")
    for name, expected in weights(tmp_path / "one/final").items():
        torch.testing.assert_close(double[name], expected, rtol=1e-3, atol=1e-4, msg=name)
