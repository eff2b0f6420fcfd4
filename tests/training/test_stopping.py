"""Ctrl-C in a long step: answered at once; again, and it stops there. All ranks stop after the same step. And the bar
moves within a step."""

import io
import os
import signal

import pytest
import torch
from tqdm import tqdm

from litgpt.training import last_step
from litgpt.training.console import Console
from litgpt.training.last_step import LastStep
from litgpt.training.loss import NextTokenLoss
from litgpt.training.signals import StopSignals
from tests.training.conftest import on_two_ranks

LONG = {"micro_batch_size": 1, "global_batch_size": 8, "max_steps": 3}  # 8 accumulations


@pytest.fixture
def interrupt(monkeypatch):
    """Has Ctrl-C come in these micro-batches, counted from 1; gives how many were begun."""

    def at(*numbers: int) -> list[None]:
        real, begun = NextTokenLoss.forward, []

        def forward(self, *args, **kwargs):
            begun.append(None)
            if len(begun) in numbers:
                os.kill(os.getpid(), signal.SIGINT)
            return real(self, *args, **kwargs)

        monkeypatch.setattr(NextTokenLoss, "forward", forward)
        return begun

    return at


def test_ctrl_c_in_a_step_is_answered_at_once_and_the_step_finished(train, tmp_path, interrupt, capfd, monkeypatch):
    seen: list[str] = []
    interrupt(3)
    monkeypatch.setattr(Console, "within_step", lambda self, step, done, of: seen.append(capfd.readouterr().err))
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", **LONG)
    assert stopped.value.code == 130
    answer = "\nCtrl-C: finishing this step, then saving a checkpoint. Ctrl-C again stops now, without one.\n"
    assert [number for number, text in enumerate(seen, start=1) if answer in text] == [3]
    assert len(seen) == 8
    assert (tmp_path / "run/step-00000001").is_dir()


def test_a_second_ctrl_c_stops_within_the_step(train, tmp_path, interrupt):
    begun = interrupt(3, 5)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", **LONG)
    assert len(begun) == 5
    assert not list((tmp_path / "run").glob("step-*"))


@pytest.mark.parametrize(("name", "said"), [("SIGTERM", "SIGTERM: finishing this step"), ("SIGHUP", "")])
def test_other_signals_are_answered_where_somebody_reads_it(name, said, capfd):
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # nohup has SIGHUP ignored, which is respected
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), getattr(signal, name))
            os.kill(os.getpid(), getattr(signal, name))
    finally:
        signal.signal(getattr(signal, name), before)
    assert signals.received == name
    error = capfd.readouterr().err
    assert said in error
    assert error.count("finishing") == bool(said)
    with StopSignals(answers=False):  # one of several processes answers
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


RUN = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from litgpt.cli import ConfigOverrides
from litgpt.cli.flat import flattened
from litgpt.commands import pretrain
from litgpt.training.recorder import Recorder
from tests.training.conftest import loop
from tests.training.ragged import Ragged
from tests.training.test_ragged import MODEL

out_dir, ranks, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
steps, real = [], loop.accumulate_gradients


def interrupted(fabric, *args):
    steps.append(args)
    if len(steps) == 3 and str(fabric.global_rank) in ranks:
        if name == "max_time":
            Recorder.seconds = property(lambda self: 100.0)
        else:
            os.kill(os.getpid(), getattr(signal, name))
    return real(fabric, *args)


loop.accumulate_gradients = interrupted
train = replace(pretrain.TRAIN, global_batch_size=8, micro_batch_size=2, max_tokens=None, max_steps=12, log_interval=10,
                max_time=50 if name == "max_time" else None)
try:
    flattened(pretrain.setup)(model_name="tiny", model_config=ConfigOverrides(MODEL), out_dir=out_dir, devices=2, train=train, data=Ragged(False),
                   logger_name="csv")
except SystemExit as stopped:
    assert stopped.code == 130, stopped.code
assert len(steps) in ((3, 4) if name == "max_time" else (3,)), len(steps)  # the clock is read between steps
"""


@pytest.mark.parametrize(("ranks", "name"), [("0", "SIGTERM"), ("1", "SIGINT"), ("01", "SIGINT"), ("1", "max_time")])
def test_all_ranks_stop_after_the_step_in_which_one_is_asked_to(tmp_path, ranks, name):
    """And not at the next log line, which is far; a terminal asks all of them, SLURM and torchrun perhaps one."""
    on_two_ranks(RUN, tmp_path, tmp_path / "run", ranks, name)
    assert [path.name for path in (tmp_path / "run").glob("step-*")] == ["step-00000003"] * (name != "max_time")
    assert (tmp_path / "run/final").is_dir() == (name == "max_time")


def test_ranks_that_are_not_in_the_same_step_stop_after_the_newest(monkeypatch):
    """On GPUs the host of one may be steps ahead."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(last_step, "store_of_ranks", lambda: store)
    monkeypatch.setattr(last_step, "_runs", iter([0, 0, 1]))
    ahead, behind = LastStep(5), LastStep(5)
    assert [ahead.begin(step) for step in (6, 7, 8)] == [None] * 3
    assert behind.begin(6) is None
    behind.ask_to_stop("SIGTERM")
    ahead.ask_to_stop("Ctrl-C")
    assert [behind.begin(step) for step in (7, 8, 9)] == [None, None, "SIGTERM"]
    assert ahead.begin(9) == "SIGTERM"
    assert LastStep(8).begin(9) is None  # another run of the same processes


def test_the_bar_moves_within_a_step():
    console = Console()
    console.within_step(0, 1, 4)  # no terminal, no bar
    screen = io.StringIO()
    console.bar = tqdm(total=10, initial=2, unit="step", file=screen, mininterval=0, miniters=0)
    places = []
    for done in (1, 2, 3, 4):
        console.within_step(2, done, 4)
        places.append(console.bar.n)
    assert places == [2.25, 2.5, 2.75, 2.75]
    assert "| 2.5/10 [" in screen.getvalue()
    console.step(3, "a line", loss="1.0")
    assert console.bar.n == 3
    assert "| 3/10 [" in screen.getvalue()
    assert "loss 1.0" in screen.getvalue()
    console.close_bar()
