"""The help of a command is made once, and then answers without torch."""

import os
import subprocess
import sys

import pytest

from litgpt.cli import help_cache
from litgpt.cli.help_cache import cached_help


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def help_of(command: str, *path: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((*path, os.environ.get("PYTHONPATH", "")))}
    words = [sys.executable, "-m", "litgpt", command, "--help"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)


def test_the_second_time_it_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch is imported')")
    first = help_of("validate")
    assert first.returncode == 0
    assert "--check_values" in first.stdout
    assert help_of("validate", str(tmp_path)).stdout == first.stdout
    assert "torch is imported" in help_of("merge_lora", str(tmp_path)).stderr  # which was not asked for before


def test_it_is_made_again_where_anything_it_comes_from_has_changed(tmp_path, monkeypatch):
    package, made = tmp_path / "package", []

    def text() -> str:
        return cached_help("command", lambda: made.append(None) or print(f"made {len(made)} times"))

    (package / "commands").mkdir(parents=True)
    source = package / "commands/command.py"
    source.write_text("a = 1")
    monkeypatch.setattr(help_cache, "PACKAGE", package)
    assert text() == text() == "made 1 times\n"
    source.write_text("a = 22")
    assert text() == text() == "made 2 times\n"
    os.utime(source, ns=(0, 0))
    assert text() == text() == "made 3 times\n"
    monkeypatch.setattr(help_cache, "version", lambda library: "another")
    assert text() == text() == "made 4 times\n"
    monkeypatch.setenv("COLUMNS", "61")
    assert text() == text() == "made 5 times\n"


def test_where_it_cannot_be_kept_it_is_made_each_time(cache):
    cache.write_text("no directory")
    made = []
    for _ in range(2):
        assert cached_help("command", lambda: made.append(None) or print("text")) == "text\n"
    assert len(made) == 2
