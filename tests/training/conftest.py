"""A tiny model on a little real text, trained by the command's own function; and what it means that two runs are equal.

Any command that trains through `fit` can be checked with `killed_in_step`, `on_two_ranks`, `assert_same_run` and
`assert_close_runs`.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from litgpt.checkpoint import WEIGHTS, read_state_dict
from litgpt.cli import ConfigOverrides
from litgpt.cli.flat import flattened
from litgpt.commands import pretrain
from litgpt.data import TextFiles
from litgpt.training import loop
from litgpt.training.arguments import EvalArgs, TrainArgs
from litgpt.training.metrics import read_metrics
from tests import shapes
from tests.training.two_ranks import TwoRanks

TEXT = Path(__file__).parents[2] / "config_hub/pretrain/data/shakespeare.txt"
SHAPE = {
    "block_size": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "intermediate_size": 64,
    **shapes.LLAMA,
}

TRAIN_FIELDS = TrainArgs.__dataclass_fields__.keys() - {"logger_name"}


@pytest.fixture(autouse=True)
def _one_thread_own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path) -> Path:
    """40 kB of Shakespeare in one file."""
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.read_bytes()[:40_000])
    return path


@pytest.fixture
def train(text):
    """Runs `litgpt pretrain`'s function with tiny settings; keyword arguments change them."""

    def run(out_dir: Path, *, data: dict | None = None, eval: EvalArgs | None = None, **options):
        settings = {k: options.pop(k) for k in list(options) if k in TRAIN_FIELDS}
        small = {
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "lr_warmup_steps": 5,
            "max_tokens": None,
            "max_norm": 1.0,
        }
        module = options.pop("module", None) or TextFiles(**{"train_data_path": text, "num_workers": 0, **(data or {})})
        flattened(pretrain.setup)(
            model_name="tiny",
            model_config=ConfigOverrides(options.pop("shape", SHAPE)),
            out_dir=out_dir,
            data=module,
            train=replace(pretrain.TRAIN, **{**small, **settings}),
            eval=eval or EvalArgs(interval=10, max_iters=4),
            **{"devices": 1, "tokenizer_vocab_size": 300, "logger_name": "csv", **options},
        )
        return read_metrics(out_dir / "metrics.csv")

    return run


def weights(checkpoint: Path, file: str = WEIGHTS) -> dict[str, torch.Tensor]:
    return read_state_dict(checkpoint / file)


def deterministic(rows: list[dict]) -> list[dict]:
    """What must be the same in two runs: all but the times."""
    return [{k: v for k, v in row.items() if k not in ("tokens_per_sec", "iter_time", "time", "mfu")} for row in rows]


def assert_same_run(one: Path, other: Path, rows: int, file: str = WEIGHTS) -> None:
    """Two runs in `one` and `other` wrote the same, bit for bit."""
    first, second = (deterministic(read_metrics(path / "metrics.csv")) for path in (one, other))
    assert len(first) == rows
    assert first == second
    expected, actual = weights(one / "final", file), weights(other / "final", file)
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name


def assert_close_runs(one: Path, other: Path, steps: range, file: str = WEIGHTS) -> None:
    """The run in `other` took these steps as the one in `one` did, on another number of ranks."""
    first = read_metrics(one / "metrics.csv")[steps[0] - 1 :]
    second = read_metrics(other / "metrics.csv")
    assert [int(row["step"]) for row in first] == [int(row["step"]) for row in second] == list(steps)
    for a, b in zip(first, second, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5), a["step"]
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-4), a["step"]
        assert (a["tokens"], a["epoch"], a["learning_rate"]) == (b["tokens"], b["epoch"], b["learning_rate"])
        assert bool(a["val_loss"]) == bool(b["val_loss"])
        if a["val_loss"]:
            assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=1e-5), a["step"]
    assert any(row["val_loss"] for row in first)
    single, double = weights(one / "final", file), weights(other / "final", file)
    assert single.keys() == double.keys()
    for name, expected in single.items():
        torch.testing.assert_close(double[name], expected, rtol=1e-3, atol=1e-4, msg=name)


@contextmanager
def compiling() -> Iterator[list[int]]:
    """What trains inside is compiled anew; afterwards, the list holds the number of graphs that were."""
    graphs: list[int] = []
    torch.compiler.reset()
    counters.clear()
    yield graphs
    graphs.append(counters["stats"]["unique_graphs"])
    torch.compiler.reset()


def assert_learns_compiled(plain: list[dict], compiled: list[dict], graphs: list[int]) -> None:
    """Two runs, one of them by `--compile true`, learned the same, as closely as on several ranks: compiled code adds in
    another order."""
    assert graphs[0] > 0, "nothing was compiled"
    assert [row["step"] for row in plain] == [row["step"] for row in compiled]
    for column, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        figures = [[float(row[column]) for row in rows] for rows in (plain, compiled)]
        assert figures[0] == pytest.approx(figures[1], rel=tolerance), column
    assert plain[0]["loss"] != plain[-1]["loss"]


class Killed(BaseException):
    """As good as a SIGKILL: nothing handles it."""


@contextmanager
def killed_in_step(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What trains inside dies before the gradient of its `step`-th step."""
    real, steps = loop.accumulate_gradients, []

    def accumulate_or_die(*args):
        steps.append(args)
        if len(steps) == step:
            raise Killed
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", accumulate_or_die)
        with pytest.raises(Killed):
            yield


two_ranks: TwoRanks | None = None


@pytest.fixture(scope="session", autouse=True)
def _two_ranks_end() -> Iterator[None]:
    yield
    if two_ranks is not None:
        two_ranks.close()


def on_two_ranks(script: str, directory: Path, *arguments: object, fresh: bool = False) -> str:
    """Run a program that trains with `devices=2`: two processes, gloo between them. Returns what it printed.

    `fresh` has the program start the second process itself, as a user's does. It takes longer.
    """
    global two_ranks
    path = directory / "on_two_ranks.py"
    path.write_text(script)
    if not fresh and hasattr(os, "fork"):
        two_ranks = two_ranks or TwoRanks()
        codes, output = two_ranks.run(path, *map(str, arguments))
        assert codes == [0, 0], output
        return output
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(path), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def bfloat16_on_every_cpu(monkeypatch):
    """Runs are in the precision that they ask for on a CPU without products in bfloat16, too: they are small."""
    monkeypatch.setattr("litgpt.devices.precision.multiplies_bf16", lambda: True)
