"""What a resumed run says where its place in the data means other samples than when it was saved."""

import torch

from litgpt.training.state import STATE_FILE

NOTE = "does not go on exactly where it was in the data"


def test_another_order_of_samples_is_said(train, tmp_path, capsys):
    run = tmp_path / "run"
    train(run, max_steps=2)
    train(run, max_steps=3, resume=True)
    assert NOTE not in capsys.readouterr().out
    train(run, max_steps=4, resume=True, data={"seed": 1})
    out = capsys.readouterr().out
    assert NOTE in out
    assert "shuffled by seed 42 (version 2); now it is" in out
    train(run, max_steps=5, resume=True, data={"seed": 1})
    assert NOTE not in capsys.readouterr().out  # it was said once

    saved = torch.load(run / "final" / STATE_FILE, weights_only=True)
    del saved["progress"]["order"]  # as they were before the order was noted
    torch.save(saved, run / "final" / STATE_FILE)
    train(run, max_steps=6, resume=True, data={"seed": 1})
    out = capsys.readouterr().out
    assert "by an earlier version of litgpt" in out
    assert NOTE in out
