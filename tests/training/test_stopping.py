"""Ctrl-C in a long step: answered at once; again, and it stops there. And the bar moves within a step."""

import io
import os
import signal

import pytest
from tqdm import tqdm

from litgpt.training.console import Console
from litgpt.training.loss import NextTokenLoss
from litgpt.training.signals import StopSignals

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
    with StopSignals() as signals:
        os.kill(os.getpid(), getattr(signal, name))
        os.kill(os.getpid(), getattr(signal, name))
    assert signals.received == name
    error = capfd.readouterr().err
    assert said in error
    assert error.count("finishing") == bool(said)
    with StopSignals(answers=False):  # one of several processes answers
        os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""


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
