"""Two real processes (gloo) train as one does, which holds all activations while they compute theirs again."""

import re
from pathlib import Path

import pytest

from litgpt.devices.accelerator import count_devices
from litgpt.training.arguments import EvalArgs
from tests.training.conftest import assert_close_runs, on_two_ranks, weights

RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from litgpt.cli import ConfigOverrides
from litgpt.cli.flat import flattened
from litgpt.commands import pretrain
from litgpt.data import TextFiles
from litgpt.training.arguments import EvalArgs
from tests.training.conftest import SHAPE

text, out_dir, strategy = sys.argv[1:4]
train = replace(pretrain.TRAIN, global_batch_size=8, micro_batch_size=2, lr_warmup_steps=5, max_steps=int(sys.argv[4]),
                save_interval=6, tie_embeddings=strategy == "fsdp",
                activation_checkpointing="full" if strategy == "fsdp" else 2)
flattened(pretrain.setup)(model_name="tiny", model_config=ConfigOverrides(SHAPE), out_dir=Path(out_dir), devices=2, strategy=strategy, train=train,
               data=TextFiles(train_data_path=Path(text), num_workers=0), eval=EvalArgs(interval=4, max_iters=3),
               tokenizer_vocab_size=300, logger_name="csv", resume=sys.argv[5])
"""


def two_ranks(text: Path, out_dir: Path, strategy: str, steps: int, resume: str = "false", fresh: bool = False) -> str:
    return on_two_ranks(RUN, out_dir.parent, text, out_dir, strategy, steps, resume, fresh=fresh)


EVALUATION = EvalArgs(interval=4, max_iters=3)  # 3 batches for 2 ranks: one of them runs out


def test_two_ranks_with_ddp_equal_one(train, text, tmp_path):
    train(tmp_path / "one", max_steps=12, eval=EVALUATION, micro_batch_size=2, save_interval=6)
    output = two_ranks(text, tmp_path / "two", "ddp", 12, fresh=True)
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


SAMPLES = RUN.replace("interval=4, max_iters=3", "interval=4, max_iters=3, initial_validation=True, max_new_tokens=12")


def test_a_sharded_model_writes_samples(train, text, tmp_path):
    """While it is trained and at the end, also of a run that had ended before; it begins with what one process begins."""
    evaluation = EvalArgs(interval=4, max_iters=3, initial_validation=True, max_new_tokens=12)
    train(tmp_path / "one", max_steps=4, micro_batch_size=2, tie_embeddings=True, eval=evaluation)
    for resume in ("false", "auto"):
        on_two_ranks(SAMPLES, tmp_path, text, tmp_path / "two", "fsdp", 4, resume)
    one, two = ((tmp_path / run / "logs.txt").read_text() for run in ("one", "two"))
    first = re.compile(r"^step 0 \| loss val.*? s\n(.+?)\nEpoch 1", re.DOTALL | re.MULTILINE)
    assert first.search(one)[1] == first.search(two)[1]
    texts = re.findall(r"The model writes:\n(.+?)\n\n", two, re.DOTALL)
    assert len(texts) == 2
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1"}, "a batch script runs on the first node alone"),
        ({"SLURM_JOB_ID": "1", "TORCHELASTIC_RUN_ID": "x"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "4"}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS_PER_NODE": "1"}, "SLURM has 1 tasks per node"),
        ({"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0"}, "an unknown number of tasks per node"),
    ],
)
def test_processes_that_slurm_does_not_start_are_not_waited_for(monkeypatch, environment, message):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NTASKS_PER_NODE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if message is None:
        assert count_devices(4, 2, "cpu") == 8
        return
    with pytest.raises(ValueError, match=message) as error:
        count_devices(4, 2, "cpu")
    assert "srun --ntasks-per-node=4 litgpt" in str(error.value)
    assert count_devices(4, 1, "cpu") == 4


SLOW_WORK = """
import sys, time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
import os, torch
from litgpt.parallel.ranks import once_per_node

rank = int(os.environ["LOCAL_RANK"])
torch.distributed.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=2))
fabric, file = SimpleNamespace(local_rank=rank, world_size=2), Path(sys.argv[1])
once_per_node(fabric, lambda: (time.sleep(5), file.write_text(f"by rank {rank}")))
print(f"seen {file.read_text()}")  # written at once: both ranks write to one pipe
"""


def test_the_others_wait_for_work_that_outlasts_the_time_limit_of_collectives(tmp_path):
    assert on_two_ranks(SLOW_WORK, tmp_path, tmp_path / "made").count("seen by rank 0") == 2
