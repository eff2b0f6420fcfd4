"""What a step and a validation are does not depend on how ragged samples are divided into batches and over ranks."""

import re

import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric

from litgpt.config import Config
from litgpt.model import GPT
from litgpt.training.arguments import EvalArgs
from litgpt.training.batches import MicroBatch, micro_batch
from litgpt.training.loop import LossWatch, TokenCount, TrainingDiverged
from litgpt.training.loss import NextTokenLoss
from litgpt.training.recorder import Recorder
from litgpt.training.run_directory import RunDirectory
from litgpt.training.state import Progress, saved_step
from litgpt.training.validation import validate
from tests.training.conftest import SHAPE, assert_close_runs, on_two_ranks
from tests.training.ragged import Ragged, ragged_samples

MODEL = {**SHAPE, "vocab_size": 300}
EVALUATION = EvalArgs(interval=2, max_iters=100)
OPTIONS = {"shape": MODEL, "tokenizer_vocab_size": None, "eval": EVALUATION, "max_steps": 6}

RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from litgpt.cli import ConfigOverrides
from litgpt.cli.flat import flattened
from litgpt.commands import pretrain
from tests.training.ragged import Ragged
from tests.training.test_ragged import EVALUATION, MODEL

out_dir, strategy, packed = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
train = replace(pretrain.TRAIN, global_batch_size=8, micro_batch_size=2, lr_warmup_steps=5, max_tokens=None,
                max_norm=1.0, max_steps=6, keep_best=True)
flattened(pretrain.setup)(model_name="tiny", model_config=ConfigOverrides(MODEL), out_dir=out_dir, devices=2, strategy=strategy, train=train,
               data=Ragged(packed), eval=EVALUATION, logger_name="csv")
"""


@pytest.mark.parametrize(("packed", "strategy"), [(False, "ddp"), (True, "fsdp")])
def test_two_ranks_equal_one(train, tmp_path, packed, strategy):
    rows = train(tmp_path / "one", module=Ragged(packed), micro_batch_size=4, **OPTIONS)
    on_two_ranks(RUN, tmp_path, tmp_path / "two", strategy, packed)
    assert_close_runs(tmp_path / "one", tmp_path / "two", range(1, 7))
    assert sum(bool(row["val_loss"]) for row in rows) == 3
    best = min((float(row["val_loss"]), int(row["step"])) for row in rows if row["val_loss"])
    assert saved_step(tmp_path / "two/best") == best[1]


EPOCHS = (
    RUN.replace("max_steps=6", "epochs=1.5")
    .replace("global_batch_size=8", "global_batch_size=16")
    .replace("Ragged(packed)", "Ragged(packed, 17, 16)")
)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_last_step_of_an_epoch_is_smaller_on_two_ranks_as_on_one(train, tmp_path, capsys, strategy):
    """One sample is left for two ranks; and the run ends after a part of an epoch."""
    options = {**OPTIONS, "max_steps": None, "epochs": 1.5, "global_batch_size": 16}
    rows = train(tmp_path / "one", module=Ragged(False, 17, 16), micro_batch_size=2, **options)
    on_two_ranks(EPOCHS, tmp_path, tmp_path / "two", strategy, False)
    assert_close_runs(tmp_path / "one", tmp_path / "two", range(1, 4))
    samples = ragged_samples(17, seed=1)
    assert [float(row["epoch"]) for row in rows] == [16 / 17, 1, 26 / 17]
    assert int(rows[1]["tokens"]) == sum(len(sample.ids) - 1 for sample in samples)
    printed = capsys.readouterr().out
    assert "Steps: 3, the last of each epoch with 1 of 16 sequences" in printed
    assert re.findall(r"^Epoch (\d+) ", printed, re.MULTILINE) == ["1", "1", "2"]


def test_one_batch_of_eight_equals_eight_of_one(train, tmp_path):
    train(tmp_path / "one", module=Ragged(), micro_batch_size=8, **OPTIONS)
    rows = train(tmp_path / "eight", module=Ragged(), micro_batch_size=1, **OPTIONS)
    for row in rows:
        row["iter"] = str(int(row["iter"]) // 8)
    assert_close_runs(tmp_path / "one", tmp_path / "eight", range(1, 7))
    tokens = sum(len(sample.ids) - 1 for sample in ragged_samples(48, seed=1))
    assert int(rows[-1]["tokens"]) == tokens  # 6 steps of 8 samples are one epoch; padding is not counted


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_validation_is_the_mean_over_all_target_tokens(packed, batch_size):
    torch.manual_seed(0)
    gpt = GPT(Config(**MODEL))
    gpt.init_weights()
    data = Ragged(packed)
    data.connect(batch_size=batch_size)
    losses = []
    for sample in ragged_samples(9, seed=2):
        ids, targets = torch.tensor(sample.ids)[None], torch.tensor(sample.targets)
        losses.append(F.cross_entropy(gpt(ids[:, :-1])[0], ids[0, 1:], reduction="none")[targets[1:]])
    fabric = Fabric(accelerator="cpu", devices=1)
    [found] = validate(fabric, fabric.setup_module(NextTokenLoss(gpt)), data.val_dataloader(), 100)
    assert found == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


def val_batches(batch_size: int) -> list[MicroBatch]:
    """Samples 0, 1, ... in order."""
    data = Ragged()
    data.connect(batch_size=batch_size)
    return [micro_batch(batch) for batch in data.val_dataloader()]


def test_a_loss_that_is_no_number_names_its_samples(tmp_path):
    batches = val_batches(2)
    watch = LossWatch(Fabric(accelerator="cpu", devices=1))
    watch.see(torch.tensor([1.0, 2.0]), 1, batches[:2])
    watch.check(RunDirectory(tmp_path))
    assert watch.unchecked == []
    watch.see(torch.tensor([1.0, 2.0]), 2, batches[:2])
    watch.see(torch.tensor([3.0, float("nan"), 3.0]), 3, batches[1:4])
    watch.see(torch.tensor([float("inf"), 1.0]), 4, batches[:2])
    with pytest.raises(TrainingDiverged, match=r"at step 3, in the training sample\(s\) 4, 5\. There is no checkpoint"):
        watch.check(RunDirectory(tmp_path))


WATCH = """
import sys, torch
from pathlib import Path
from litgpt.parallel.fabric import make_fabric
from litgpt.training.loop import LossWatch, TrainingDiverged
from litgpt.training.run_directory import RunDirectory
from tests.training.test_ragged import val_batches

fabric = make_fabric(2, precision="32-true", strategy="ddp")
fabric.launch()
watch = LossWatch(fabric)
bad = [[1.0, 1.0, float("nan")], [1.0, float("inf"), 1.0]][fabric.global_rank]
watch.see(torch.tensor(bad), 5, val_batches(1)[fabric.global_rank : 6 : 2])
try:
    watch.check(RunDirectory(Path(sys.argv[1])))
except TrainingDiverged as error:
    print(f"rank {fabric.global_rank}: {error}", flush=True)
fabric.barrier()
"""


def test_all_ranks_say_whose_loss_was_the_first_that_is_no_number(tmp_path):
    output = on_two_ranks(WATCH, tmp_path, tmp_path)
    for rank in (0, 1):  # rank 1 had the samples 1, 3, 5, 7
        assert f"rank {rank}: The loss became NaN or infinite at step 5, in the training sample(s) 3. There" in output


def test_tokens_are_counted_without_padding(tmp_path):
    from litgpt.training.console import Console

    batches = val_batches(3)
    assert sum(batch.idx.numel() for batch in batches) > sum(batch.num_tokens for batch in batches)
    fabric, progress = Fabric(accelerator="cpu", devices=1), Progress(tokens=5)
    count = TokenCount(fabric, progress, Recorder(Console(), RunDirectory(tmp_path)))
    count.add(batches)
    assert progress.tokens == 5
    count.settle()
    count.settle()
    assert progress.tokens == 5 + sum(len(sample.ids) - 1 for sample in ragged_samples(9, seed=2))
    assert micro_batch(torch.zeros(2, 9, dtype=torch.int64)).num_tokens == 16
