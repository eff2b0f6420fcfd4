"""Two real processes (gloo) train as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litgpt.training.arguments import EvalArgs
from litgpt.training.metrics import read_metrics
from tests.training.conftest import weights

RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from litgpt.cli import ConfigOverrides
from litgpt.commands import pretrain
from litgpt.data import TextFiles
from litgpt.training.arguments import EvalArgs
from tests.training.conftest import SHAPE

text, out_dir, strategy = sys.argv[1:4]
train = replace(pretrain.TRAIN, global_batch_size=8, micro_batch_size=2, lr_warmup_steps=5, max_steps=int(sys.argv[4]),
                save_interval=6, tie_embeddings=strategy == "fsdp")
pretrain.setup("tiny", ConfigOverrides(SHAPE), out_dir=Path(out_dir), devices=2, strategy=strategy, train=train,
               data=TextFiles(train_data_path=Path(text), num_workers=0), eval=EvalArgs(interval=4, max_iters=3),
               tokenizer_vocab_size=300, logger_name="csv", resume=sys.argv[5])
"""


def two_ranks(text: Path, out_dir: Path, strategy: str, steps: int, resume: str = "false") -> str:
    script = out_dir.parent / "run.py"
    script.write_text(RUN)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(script), str(text), str(out_dir), strategy, str(steps), resume]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_close_runs(one: Path, other: Path, steps: range) -> None:
    first = read_metrics(one / "metrics.csv")[steps[0] - 1 :]
    second = read_metrics(other / "metrics.csv")
    assert [int(row["step"]) for row in first] == [int(row["step"]) for row in second] == list(steps)
    for a, b in zip(first, second, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5), a["step"]
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-4), a["step"]
        assert (a["tokens"], a["epoch"], a["learning_rate"]) == (b["tokens"], b["epoch"], b["learning_rate"])
        assert bool(a["val_loss"]) == bool(b["val_loss"]) == (int(a["step"]) % 4 == 0)
        if a["val_loss"]:
            assert float(a["val_loss"]) == pytest.approx(float(b["val_loss"]), rel=1e-5), a["step"]
    single, double = weights(one / "final"), weights(other / "final")
    assert single.keys() == double.keys()
    for name, expected in single.items():
        torch.testing.assert_close(double[name], expected, rtol=1e-3, atol=1e-4, msg=name)


EVALUATION = EvalArgs(interval=4, max_iters=3)  # 3 batches for 2 ranks: one of them runs out


def test_two_ranks_with_ddp_equal_one(train, text, tmp_path):
    train(tmp_path / "one", max_steps=12, eval=EVALUATION, micro_batch_size=2, save_interval=6)
    output = two_ranks(text, tmp_path / "two", "ddp", 12)
    assert output.count("Training time") == 1  # only one rank talks
    assert "2 x CPU process" in output
    assert_close_runs(tmp_path / "one", tmp_path / "two", range(1, 13))


def test_two_ranks_with_fsdp_go_on_from_what_one_wrote(train, text, tmp_path):
    """Sharded loading, training, clipping, validation and saving; with tied embeddings, which need care in each."""
    options = {"micro_batch_size": 2, "save_interval": 6, "tie_embeddings": True, "eval": EVALUATION}
    train(tmp_path / "one", max_steps=12, **options)
    two_ranks(text, tmp_path / "two", "fsdp", 12, resume=str(tmp_path / "one/step-00000006"))
    assert_close_runs(tmp_path / "one", tmp_path / "two", range(7, 13))
    tied = weights(tmp_path / "two/final")
    assert tied["lm_head.weight"].data_ptr() == tied["transformer.wte.weight"].data_ptr()
    # What two ranks wrote is whole again: one goes on from it.
    train(tmp_path / "one", max_steps=16, resume=tmp_path / "one/final", **options)
    train(tmp_path / "two", max_steps=16, resume=tmp_path / "two/final", **options)
    assert_close_runs(tmp_path / "one", tmp_path / "two", range(7, 17))
