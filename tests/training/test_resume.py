"""A resumed run equals an uninterrupted one, bit for bit."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from litgpt.commands import pretrain
from litgpt.training.arguments import EvalArgs
from litgpt.training.metrics import read_metrics
from litgpt.training.run_directory import RunDirectory
from litgpt.training.signals import StopSignals, shield_workers
from litgpt.training.state import saved_step
from tests.data_damage import flip
from tests.training.conftest import SHAPE, assert_same_run, killed_in_step


@pytest.mark.parametrize(("settings", "workers"), [({}, 0), ({"tie_embeddings": True}, 2)])
def test_resumed_at_20_equals_40_in_one_go(train, tmp_path, monkeypatch, settings, workers):
    data = {"num_workers": workers}
    train(tmp_path / "whole", max_steps=40, data=data, **settings)

    with killed_in_step(23, monkeypatch):
        train(tmp_path / "parts", max_steps=40, save_interval=10, data=data, **settings)
    # The killed run has logged steps that no checkpoint knows of.
    assert [int(r["step"]) for r in read_metrics(tmp_path / "parts/metrics.csv")][-1] == 22
    torch.manual_seed(7)  # a new process has other random numbers
    train(tmp_path / "parts", max_steps=40, save_interval=10, data=data, resume="auto", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rows=40)


def test_a_second_resume_goes_on_with_the_data_where_the_first_left_off(train, tmp_path, monkeypatch):
    train(tmp_path / "whole", max_steps=12)
    settings = {"max_steps": 12, "save_interval": 2, "resume": "auto"}
    for dies_in_step in (5, 4):  # of the steps of that process: 5, and 8 of all
        with killed_in_step(dies_in_step, monkeypatch):
            train(tmp_path / "parts", **settings)
    assert saved_step(tmp_path / "parts/step-00000006") == 6
    train(tmp_path / "parts", **settings)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rows=12)


SUBPROCESS_SHAPE = {
    **{"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32},
    **{"parallel_residual": False, "bias": False},
}
COMMAND = """
import sys
sys.path.insert(0, {root!r})
from litgpt.__main__ import main
sys.exit(main(sys.argv[1:]))
"""

ON_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that nohup started have it ignored, and would hand that on
os.execv(sys.argv[1], sys.argv[1:])
"""


def start(
    root: Path, out_dir: Path, text: Path, cache: Path, *more: str, terminal: int | None = None
) -> subprocess.Popen:
    """A run in a session of its own, on a terminal if one is given."""
    command = [sys.executable, "-c", COMMAND.format(root=str(root)), "pretrain", "tiny", f"--out_dir={out_dir}"]
    command += [f"--model_config.{k}={str(v).lower()}" for k, v in SUBPROCESS_SHAPE.items()]
    command += ["--data=TextFiles", f"--data.train_data_path={text}", "--data.num_workers=2", "--devices=1"]
    command += ["--tokenizer_vocab_size=300", "--train.global_batch_size=8", "--train.micro_batch_size=4"]
    command += ["--train.lr_warmup_steps=5", "--logger_name=csv", "--eval.interval=50", "--eval.max_iters=4", *more]
    environment = {**os.environ, "LITGPT_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    if terminal is not None:
        command = [sys.executable, "-c", ON_TERMINAL, *command]
        return subprocess.Popen(
            command, env=environment, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
        )
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for_step(process: subprocess.Popen, out_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not (rows := read_metrics(out_dir / "metrics.csv")) or int(rows[-1]["step"]) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigkill_and_sigterm_lose_nothing(train, text, tmp_path):
    root, cache = Path(__file__).parents[2], tmp_path / "cache"
    options = ["--train.max_steps=120", "--train.save_interval=20"]
    run = start(root, tmp_path / "parts", text, cache, *options)
    wait_for_step(run, tmp_path / "parts", 25)
    workers = psutil.Process(run.pid).children(recursive=True)
    assert len(workers) == min(2, os.cpu_count())
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "parts/final").exists()

    run = start(root, tmp_path / "parts", text, cache, *options, "--resume=auto")
    wait_for_step(run, tmp_path / "parts", 55)
    workers += psutil.Process(run.pid).children(recursive=True)
    # To all processes, as SLURM and systemd send it: without the workers the run would have no data to finish its step.
    os.killpg(run.pid, signal.SIGTERM)
    output = run.communicate()[0]
    assert run.returncode == 0, output
    assert "Resuming from" in output
    assert "Stopped by SIGTERM after step" in output
    assert "--resume auto" in output
    assert "Traceback" not in output
    stopped_at = int(read_metrics(tmp_path / "parts/metrics.csv")[-1]["step"])
    assert (tmp_path / f"parts/step-{stopped_at:08d}/training_state.pth").exists()

    assert psutil.wait_procs(workers, timeout=120)[1] == []
    same = {"max_steps": 120, "eval": EvalArgs(interval=50, max_iters=4), "shape": SUBPROCESS_SHAPE}
    train(tmp_path / "parts", resume=True, **same)
    train(tmp_path / "whole", **same)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rows=120)


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="this system does not say who has sent a signal")
def test_workers_end_by_nobody_but_their_process():
    loader = DataLoader(
        torch.arange(1000), num_workers=2, worker_init_fn=lambda _: get_worker_info().dataset.add_(1000)
    )
    for _ in range(2):
        shield_workers(loader)
    batches = iter(loader)
    numbers = [int(next(batches)), int(next(batches))]  # one of each worker: they have begun
    workers = [psutil.Process(process.pid) for process in multiprocessing.active_children()]
    assert len(workers) == 2
    for name in ("TERM", "INT", "HUP", "INT", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    numbers += [int(next(batches)) for _ in range(100)]
    assert numbers == [*range(1000, 1102)]  # the workers live, and what else they were to do at their start is done
    assert psutil.wait_procs(workers, timeout=0.2)[0] == []
    for worker in workers:
        worker.terminate()
    assert psutil.wait_procs(workers, timeout=120)[1] == []


def test_resume_of_a_finished_run_changes_nothing(train, tmp_path, capsys):
    train(tmp_path / "run", max_steps=4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/final").iterdir()}
    train(tmp_path / "run", max_steps=4, resume="auto")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run/final").iterdir()} == before
    train(tmp_path / "run", max_steps=6, resume=tmp_path / "run/final")  # goes on from there
    assert [int(r["step"]) for r in read_metrics(tmp_path / "run/metrics.csv")] == [1, 2, 3, 4, 5, 6]


def test_resume_with_another_optimizer_is_refused(train, tmp_path):
    from litgpt.training.optimizers import OptimizerSpec

    train(tmp_path / "run", max_steps=2)
    with pytest.raises(ValueError, match="trained with AdamW"):
        train(tmp_path / "run", max_steps=4, resume=True, optimizer=OptimizerSpec("SGD", {"lr": 0.1}))


def test_a_resume_on_something_else_is_refused(train, text, tmp_path):
    """All that differs is named at once, and nothing of the run is touched."""
    run = tmp_path / "run"
    train(run, max_steps=2)
    before = (run / "final/training_state.pth").read_bytes()
    text.write_text(text.read_text().replace("J", "j", 1))
    others = {
        "`seed`: 42 then, 43 now": {"seed": 43},
        "`data.seed`: 42 then, 7 now": {"data": {"seed": 7}},
        r"the training data: (?P<as_many>[\d,]+ tokens) \(\w+\) then, (?P=as_many) \(\w+\) now": {},
        "the tokenizer: another": {"tokenizer_vocab_size": None, "tokenizer_dir": bigger_tokenizer(tmp_path)},
        "model_config.norm_eps: 1e-05 then, 0.0001 now": {"shape": {**SHAPE, "norm_eps": 1e-4}},
        "model_config.n_embd: 32 then, 64 now": {"shape": {**SHAPE, "n_embd": 64}},
        "the length of a sequence: 32 then, 16 now": {"max_seq_length": 16},
    }
    for line, changed in others.items():
        with pytest.raises(ValueError, match=rf"run/final was started with something else:\n(.*\n)*  {line}"):
            train(run, max_steps=4, resume="auto", **changed)
    with pytest.raises(ValueError, match=r"(?s)`data.seed`: .*`seed`: .*the training data: .*another run"):
        train(run, max_steps=4, resume="auto", data={"seed": 7}, seed=43)
    assert (run / "final/training_state.pth").read_bytes() == before


def test_what_may_change_is_said_once(train, text, tmp_path, capsys):
    from litgpt.training.optimizers import OptimizerSpec

    train(tmp_path / "run", max_steps=2)
    train(tmp_path / "run", max_steps=3, resume=True, save_interval=1000)
    out = capsys.readouterr().out
    assert "with other settings than it was saved with:\n  --train.max_steps: 2 then, 3 now\n" in out
    moved = tmp_path / "moved.txt"  # where the text is, is no matter
    text.rename(moved)
    slower = OptimizerSpec("AdamW", {**pretrain.OPTIMIZER.init_args, "lr": 1e-5})
    changed = {"optimizer": slower, "micro_batch_size": 2, "max_norm": None, "log_interval": 2, "lr_warmup_steps": 1}
    for step in (4, 5):
        train(tmp_path / "run", max_steps=step, resume=True, data={"train_data_path": moved}, **changed)
        lines = capsys.readouterr().out.partition("saved with:\n")[2].splitlines()[:6]
        said = [line.strip() for line in lines if line.startswith("  --")]
        assert said == [
            *(["--optimizer.lr: 0.0004 then, 1e-05 now"] if step == 4 else []),
            *(["--train.log_interval: 1 then, 2 now"] if step == 4 else []),
            *(["--train.lr_warmup_steps: 5 then, 1 now", "--train.max_norm: 1.0 then, none now"] if step == 4 else []),
            f"--train.max_steps: {step - 1} then, {step} now",
            *(["--train.micro_batch_size: 4 then, 2 now"] if step == 4 else []),
        ]


# Settings by their options' names, and what a resume may not change in them; all others it may.
FIXED = {
    **{"seed": 1, "quantize": None, "method": "lora", "lora_r": 8, "lora_dora": False},
    **{"adapter_prompt_length": 10, "adapter_start_layer": 2, "dpo_beta": 0.1, "dpo_loss": "sigmoid"},
}
FREE = {
    "precision": "32-true",
    "train": {"lr_warmup_steps": 5, "max_steps": 10, "max_norm": None},
    "eval": {"interval": 3},
}


def inputs_of(settings=None, data=None, config=None, init_args=None, devices=1, parts=None):
    from litgpt.config import Config
    from litgpt.training.inputs import Inputs
    from litgpt.training.optimizers import OptimizerSpec

    return Inputs.of(
        {**FIXED, **FREE, "out_dir": "a", **(settings or {})},
        {"train": "10 tokens (a)", "val": "2 tokens (b)", "seed": 3, **(data or {})},
        Config(**{**SHAPE, **(config or {})}),
        None,
        OptimizerSpec("AdamW", {"lr": 1e-3, "weight_decay": 0.1, **(init_args or {})}),
        devices,
        {"the frozen weights": "abc", "the length of a sequence": 32, **(parts or {})},
    )


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        *[({"settings": {name: "other"}}, f"`{name}`") for name in FIXED],
        ({"data": {"train": "10 tokens (c)"}}, "the training data"),
        ({"data": {"seed": 4}}, "`data.seed`"),
        ({"config": {"norm_eps": 1e-4}}, "model_config.norm_eps"),
        ({"parts": {"the frozen weights": "abd"}}, "the frozen weights"),
        ({"parts": {"the length of a sequence": 16}}, "the length of a sequence"),
    ],
)
def test_each_input_that_must_stay_is_compared(changed, name):
    with pytest.raises(ValueError, match=f"\n  {name}: (.*then, .* now|another)\n"):
        inputs_of(**changed).compare(inputs_of().saved(), Path("run"))


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"data": {"val": "2 tokens (d)"}}, "the validation data: 2 tokens (b) then, 2 tokens (d) now"),
        ({"devices": 2}, "the number of devices: 1 then, 2 now"),
        ({"init_args": {"lr": 0.01}}, "--optimizer.lr: 0.001 then, 0.01 now"),
        ({"init_args": {"weight_decay": 0.0}}, "--optimizer.weight_decay: 0.1 then, 0.0 now"),
        ({"settings": {"precision": "bf16-true"}}, "--precision: 32-true then, bf16-true now"),
        *[
            ({"settings": {"train": {**FREE["train"], name: 7}}}, f"--train.{name}: {value or 'none'!s} then, 7 now")
            for name, value in FREE["train"].items()
        ],
    ],
)
def test_each_input_that_may_change_is_said(changed, line):
    said = inputs_of(**changed).compare(inputs_of().saved(), Path("run"))
    assert said == f"Note: the run goes on with other settings than it was saved with:\n  {line}"


def test_the_same_inputs_say_nothing():
    """Nor does what no number follows from."""
    other = inputs_of(settings={"out_dir": "b"}, config={"name": "other"})
    assert other.compare(inputs_of().saved(), Path("run")) is None
    assert other.compare(None, Path("run")) is None


def bigger_tokenizer(tmp_path: Path) -> Path:
    from litgpt.data.tokenizer_training import train_tokenizer

    train_tokenizer(["some text"], 300, tmp_path / "bigger")
    return tmp_path / "bigger"


def test_damaged_state_is_named(train, tmp_path):
    train(tmp_path / "run", max_steps=2)
    state = tmp_path / "run/final/training_state.pth"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"training_state.pth is damaged"):
        train(tmp_path / "run", max_steps=4, resume=tmp_path / "run/final")


def damage(file: Path) -> None:
    """A bit in the middle of the file, where the values are."""
    flip(file, file.stat().st_size // 2)


def test_auto_goes_back_to_the_newest_whole_checkpoint(train, tmp_path, capsys):
    settings = {"max_steps": 13, "save_interval": 3}
    train(tmp_path / "whole", **settings)
    train(tmp_path / "run", **settings)
    run = tmp_path / "run"
    damage(run / "final/training_state.pth")
    damage(run / "step-00000012/lit_model.pth")
    (run / "step-00000009/training_state.pth").write_bytes(b"cut off")
    with pytest.raises(
        ValueError, match=r"final/training_state.pth is damaged .*another checkpoint of the run: .*step"
    ):
        train(run, **settings, resume=run / "final")
    capsys.readouterr()
    train(run, **settings, resume="auto")
    out = capsys.readouterr().out
    for name in ("final/training_state.pth", "step-00000012/lit_model.pth", "step-00000009/training_state.pth"):
        assert any(line.startswith("Warning: ") and name in line and "damaged" in line for line in out.splitlines())
    assert f"Resuming from '{run / 'step-00000006'}'" in out
    assert_same_run(tmp_path / "whole", run, rows=13)

    for checkpoint in RunDirectory(run).checkpoints():
        damage(checkpoint / "training_state.pth")
    for resume in ("auto", True, run):
        with pytest.raises(ValueError, match=r"step-00000003.* is damaged[^$]*No checkpoint .* whole.*overwrite"):
            train(run, **settings, resume=resume)


def test_a_state_without_sums_is_taken(train, tmp_path):
    train(tmp_path / "run", max_steps=2)
    state = tmp_path / "run/final/training_state.pth"
    content = torch.load(state, weights_only=True)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, state)
    finally:
        torch.serialization.set_crc32_options(True)
    assert len(train(tmp_path / "run", max_steps=4, resume="auto")) == 4


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_an_ignored_hangup_stays_ignored():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, received in ((signal.SIG_IGN, None), (signal.SIG_DFL, "SIGHUP")):
            signal.signal(signal.SIGHUP, handler)
            with StopSignals() as signals:
                os.kill(os.getpid(), signal.SIGHUP)
                assert signals.received == received
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no terminals to close")
def test_a_closed_terminal_saves_first(text, tmp_path):
    """The terminal's end sends SIGHUP to all processes of the run, and every line to it is an error from then on."""
    outside, inside = os.openpty()
    run = start(
        Path(__file__).parents[2], tmp_path / "run", text, tmp_path / "cache", "--train.max_steps=100000",
        terminal=inside,
    )  # fmt: skip
    os.close(inside)
    closing = threading.Event()
    reader = threading.Thread(target=read_all, args=(outside, closing), daemon=True)
    reader.start()
    try:
        wait_for_step(run, tmp_path / "run", 5)
        workers = psutil.Process(run.pid).children(recursive=True)
        assert len(workers) == min(2, os.cpu_count())
        closing.set()
        reader.join()
        os.close(outside)
        assert run.wait(120) == 0
    finally:
        run.kill()
    steps = [int(row["step"]) for row in read_metrics(tmp_path / "run/metrics.csv")]
    assert saved_step(tmp_path / f"run/step-{steps[-1]:08d}") == steps[-1]
    assert f"Stopped by SIGHUP after step {steps[-1]}." in (tmp_path / "run/logs.txt").read_text()
    assert psutil.wait_procs(workers, timeout=120)[1] == []


def read_all(terminal: int, until: threading.Event) -> None:
    """What is written to a terminal that nobody reads soon has no room."""
    while not until.is_set():
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 1 << 16)
