"""One run at a time in a directory, and nothing that a dead one leaves in the way."""

import errno
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt.training import run_lock
from litgpt.training.run_lock import LOCK_FILE, RunLock, unlocks_at_end

ROOT = Path(__file__).parents[2]
# Holds the lock; its child, as a loader's worker, lives on when it is killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from litgpt.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""
ATTEMPT = """
import sys
from pathlib import Path
from litgpt.training.run_lock import RunLock
try:
    RunLock(Path(sys.argv[1]))
except ValueError as error:
    print(error)
"""


def python(program: str, directory: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", program, str(directory)], env=environment, stdout=-1, text=True)


def attempt(directory: Path) -> str:
    """What another process is told that wants to write there, too."""
    return python(ATTEMPT, directory).communicate()[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_second_run_in_a_directory_is_refused_by_name_until_the_first_is_gone(train, tmp_path):
    holder = python(HOLDER, tmp_path / "run")
    child = int(holder.stdout.readline())
    try:
        for resume in (False, "auto"):
            with pytest.raises(ValueError, match=rf"run: another run writes there \(process {holder.pid} on ") as error:
                train(tmp_path / "run", max_steps=2, resume=resume)
        assert f"on {socket.gethostname()}, since 20" in str(error.value)
        assert os.listdir(tmp_path / "run") == [LOCK_FILE]

        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert len(train(tmp_path / "run", max_steps=2)) == 2
    finally:
        os.kill(child, signal.SIGKILL)
    assert LOCK_FILE not in os.listdir(tmp_path / "run")


def test_a_process_has_a_directory_once_and_keeps_it(tmp_path):
    lock = RunLock(tmp_path / "new/run")
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path / "new/run")
    assert f"process {os.getpid()} on" in attempt(tmp_path / "new/run")  # being refused has not let go of it
    lock.release()
    assert os.listdir(tmp_path) == []
    assert attempt(tmp_path / "run") == ""


def test_the_lock_ends_with_the_call_however_it_ends(tmp_path):
    @unlocks_at_end
    def fail():
        RunLock(tmp_path)
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()


def test_a_directory_that_cannot_be_written_to_is_named(train, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out_dir=.*file/run cannot be written to \(Not a directory\)"):
        train(tmp_path / "file/run", max_steps=2)
    with pytest.raises(ValueError, match=r"out_dir=.*file is a file"):
        train(tmp_path / "file", max_steps=2)


def test_where_there_are_no_locks_a_run_goes_on_and_says_so(train, tmp_path, monkeypatch, capsys):
    def no_locks(descriptor):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock, "_lock_file", no_locks)
    train(tmp_path / "run", max_steps=2)
    assert "has no locks (No locks available): a second run there would not be noticed" in capsys.readouterr().out
