"""What is said while a large library is imported."""

import sys
import threading

from litgpt.cli import slow_imports
from litgpt.cli.slow_imports import Announcer


def test_a_slow_import_is_announced_and_a_quick_one_is_not(tmp_path, monkeypatch, capsys):
    said = threading.Event()
    (tmp_path / "slow_library.py").write_text("import sys\nsys.said.wait(60)\n")
    (tmp_path / "quick_library.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "said", said, raising=False)
    monkeypatch.setattr(slow_imports, "LARGE", {"slow_library": "Slow", "quick_library": "Quick"})
    timers = []

    class Timer(threading.Timer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            timers.append(self)

        def run(self):
            super().run()
            said.set()

    monkeypatch.setattr(threading, "Timer", Timer)
    monkeypatch.setattr(sys, "meta_path", [Announcer(0.01), *sys.meta_path])
    __import__("slow_library")  # goes on when something has been said
    monkeypatch.setattr(sys.meta_path[0], "patience", 0.2)
    __import__("quick_library")
    for timer in timers:
        timer.join()
    assert capsys.readouterr().err == "Starting: importing Slow ...\n"


def test_a_log_file_has_none_of_it(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = list(sys.meta_path)
    slow_imports.announce()  # pytest's stderr is no terminal
    assert sys.meta_path == before
