"""Nothing of a run is lost: not to another run, not to a full disk."""

import os
import resource

import pytest

from litgpt.checkpoint import SaveError
from litgpt.training.metrics import read_metrics
from litgpt.training.run_directory import RunDirectory
from tests.training.conftest import weights


def test_a_run_is_never_overwritten_unasked(train, tmp_path):
    out_dir = tmp_path / "run"
    train(out_dir, max_steps=3, save_interval=2)
    (out_dir / "my_notes.txt").write_text("keep me")
    before = (out_dir / "final/lit_model.pth").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run") as error:
        train(out_dir, max_steps=3)
    for offer in ("resume=auto", "`out_dir`", "overwrite=true"):
        assert offer in str(error.value)
    assert (out_dir / "final/lit_model.pth").read_bytes() == before
    train(out_dir, max_steps=1, overwrite=True)
    assert [int(r["step"]) for r in read_metrics(out_dir / "metrics.csv")] == [1]
    assert not (out_dir / "step-00000002").exists()
    assert (out_dir / "my_notes.txt").read_text() == "keep me"


def test_resume_choices(train, tmp_path):
    out_dir = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match=r"resume=true: there is no checkpoint .*resume=auto"):
        RunDirectory(out_dir).prepare(True, False)
    assert RunDirectory(out_dir).prepare("auto", False) is None
    train(out_dir, max_steps=5, save_interval=2)
    run = RunDirectory(out_dir)
    assert run.prepare("auto", False) == run.prepare(True, False) == run.prepare("true", False) == out_dir / "final"
    assert run.prepare(out_dir / "step-00000002", False) == out_dir / "step-00000002"
    assert run.prepare(out_dir / "step-00000002/lit_model.pth", False) == out_dir / "step-00000002"
    assert RunDirectory(tmp_path / "new").prepare(out_dir, False) == out_dir / "final"
    (out_dir / "final").rename(tmp_path / "elsewhere")
    assert run.prepare("auto", False) == out_dir / "step-00000004"
    with pytest.raises(FileNotFoundError, match="initial_checkpoint_dir"):
        run.prepare(tmp_path / "cache", False)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        run.prepare(tmp_path / "nowhere", False)
    train(tmp_path / "other", max_steps=1)
    with pytest.raises(ValueError, match="other already holds a run"):
        RunDirectory(tmp_path / "other").prepare(out_dir, False)


def test_a_run_killed_before_its_first_checkpoint_starts_again(train, tmp_path):
    out_dir = tmp_path / "run"
    out_dir.mkdir()
    (out_dir / "metrics.csv").write_text("step,loss\n1,5.0\n")
    with pytest.raises(ValueError, match="already holds a run"):
        train(out_dir, max_steps=2)
    assert [r["step"] for r in train(out_dir, max_steps=2, resume="auto")] == ["1", "2"]


def test_a_run_refused_before_it_trained_is_not_in_the_way_of_the_next(train, tmp_path):
    out_dir = tmp_path / "run"
    with pytest.raises(ValueError, match=r"max_seq_length=64 is longer"):
        train(out_dir, max_seq_length=64)
    assert (out_dir / "logs.txt").exists()
    assert len(train(out_dir, max_steps=2)) == 2
    assert "max_seq_length=64" not in (out_dir / "logs.txt").read_text()


def test_a_checkpoint_that_cannot_be_written_loses_nothing(train, tmp_path, monkeypatch):
    from litgpt.commands import pretrain

    real, saved = pretrain.save_model, []

    def full_disk(directory, *args):
        saved.append(directory)
        if len(saved) == 2:
            (directory / "lit_model.pth").write_bytes(b"half of it")
            raise OSError(28, os.strerror(28))
        real(directory, *args)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "save_model", full_disk)
        with pytest.raises(SaveError, match="no space left"):
            train(tmp_path / "run", max_steps=6, save_interval=2, keep_last=1)
    assert [p.name for p in (tmp_path / "run").iterdir() if "step-" in p.name] == ["step-00000002"]
    assert len(weights(tmp_path / "run/step-00000002")) > 5
    rows = train(tmp_path / "run", max_steps=6, save_interval=2, keep_last=1, resume="auto")
    assert [r["step"] for r in rows] == ["1", "2", "3", "4", "5", "6"]


def test_a_file_that_does_not_fit_is_a_clean_error(train, tmp_path):
    """The system itself refuses to write more than 60 kB: less than the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        with pytest.raises(SaveError, match=r"Could not save .*run/final"):
            train(tmp_path / "run", max_steps=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "run/final").exists()
    assert [r["step"] for r in train(tmp_path / "run", max_steps=2, resume="auto")] == ["1", "2"]
