"""A resumed run continues its data exactly, and says so where it cannot."""

import torch

from litgpt.data import LitData
from litgpt.training.arguments import EvalArgs
from litgpt.training.state import STATE_FILE
from tests.token_data import write_tokens
from tests.training.conftest import SHAPE, assert_close_runs, assert_same_run, on_two_ranks

NOTE = "does not go on exactly where it was in the data"


def test_another_order_of_samples_is_said(train, tmp_path, capsys):
    run = tmp_path / "run"
    train(run, max_steps=2)
    train(run, max_steps=3, resume=True)
    assert NOTE not in capsys.readouterr().out

    for step, before, seen in (
        (4, "8 samples shuffled by seed 1 (version 1)", "8 samples shuffled by seed 1 (version 1); now it is"),
        (6, None, "by an earlier version of litgpt"),  # as they were before it was noted
    ):
        saved = torch.load(run / "final" / STATE_FILE, weights_only=True)
        saved["progress"]["order"] = before
        if before is None:
            del saved["progress"]["order"], saved["progress"]["best_by"], saved["inputs"]
            saved["progress"]["best_val_loss"] = saved["progress"].pop("best_value")
        torch.save(saved, run / "final" / STATE_FILE)
        train(run, max_steps=step, resume=True)
        out = capsys.readouterr().out
        assert NOTE in out
        assert seen in out
        train(run, max_steps=step + 1, resume=True)
        assert NOTE not in capsys.readouterr().out  # it was said once


RUN = """
import sys
from dataclasses import replace
from pathlib import Path
from litgpt.cli import ConfigOverrides
from litgpt.cli.flat import flattened
from litgpt.commands import pretrain
from litgpt.data import LitData
from litgpt.training.arguments import EvalArgs
from tests.training.conftest import SHAPE, Killed, loop

first, second, out_dir, dies_in_step, resume = sys.argv[1:6]
steps, real = [], loop.accumulate_gradients


def accumulate_or_die(*args):
    steps.append(args)
    if len(steps) == int(dies_in_step):
        raise Killed
    return real(*args)


loop.accumulate_gradients = accumulate_or_die
train = replace(pretrain.TRAIN, global_batch_size=8, micro_batch_size=2, lr_warmup_steps=5, max_steps=10, save_interval=4)
shape = {**SHAPE, "vocab_size": 300, "padded_vocab_size": 300}
data = LitData([first, second], weights=[2.0, 1.0], num_workers=2, isolate_documents=False)
try:
    flattened(pretrain.setup)(model_name="tiny", model_config=ConfigOverrides(shape), out_dir=Path(out_dir), devices=2, strategy="ddp", train=train,
                   data=data, eval=EvalArgs(interval=5, max_iters=3), logger_name="csv", resume=resume)
except Killed:
    print("killed")
"""


def test_two_ranks_interrupted_and_resumed_equal_uninterrupted_and_one_goes_on(train, tmp_path, capsys):
    """A mixture, two ranks with two workers each, killed in step 7: bit for bit the run that was not. One rank goes on
    from there with the same samples in each step."""
    write_tokens(tmp_path / "a/train", [700, 900, 310, 1000, 20, 777])
    write_tokens(tmp_path / "a/val", [400], seed=1)
    write_tokens(tmp_path / "b", [500, 800], seed=2)
    folders = (tmp_path / "a", tmp_path / "b")

    on_two_ranks(RUN, tmp_path, *folders, tmp_path / "whole", 0, "false")
    assert "killed" in on_two_ranks(RUN, tmp_path, *folders, tmp_path / "parts", 7, "false")
    output = on_two_ranks(RUN, tmp_path, *folders, tmp_path / "parts", 0, "auto")
    assert "step-00000004" in output
    assert NOTE not in output
    assert_same_run(tmp_path / "whole", tmp_path / "parts", rows=10)

    capsys.readouterr()
    train(
        tmp_path / "one",
        module=LitData([str(folder) for folder in folders], weights=[2.0, 1.0], num_workers=0),
        shape={**SHAPE, "vocab_size": 300, "padded_vocab_size": 300},
        eval=EvalArgs(interval=5, max_iters=3),
        tokenizer_vocab_size=None,
        resume=str(tmp_path / "whole/step-00000004"),
        max_steps=10,
        save_interval=4,
        micro_batch_size=2,
    )
    assert NOTE not in capsys.readouterr().out
    assert_close_runs(tmp_path / "whole", tmp_path / "one", range(5, 11))
