"""How threads wait and how many there are, settled before torch is imported."""

import os
import subprocess
import sys

import pytest

from litgpt.devices import threads
from litgpt.devices.threads import SPINS, allowed_cores, settle_threads

# What imports torch, and with it OpenMP: the Python API, and the command line, whatever the command.
WAYS = {
    "import": "import litgpt, torch",
    "LLM": "from litgpt import LLM",
    "command": "from litgpt.__main__ import main; main(['generate', 'no/such/model'])",
    "training": "from litgpt.__main__ import main; main(['pretrain', 'no_such_model', '--data', 'TextFiles'])",
    "another process": "import litgpt.llm.replica",
}


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.setattr(os, "environ", environment := {})
    return environment


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "1600000 100000\n"}, None),  # more than there are
        ({"cpu.cfs_quota_us": "300000\n", "cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu.max": ""}, None),
        ({}, None),
    ],
)
def test_a_containers_share_of_the_cores(files, cores, tmp_path, monkeypatch, clean):
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 8)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    limits = [tmp_path / "cpu.max", tmp_path / "cpu.cfs_quota_us"]
    assert allowed_cores(limits) == cores
    settle_threads(limits)
    assert clean.get("OMP_NUM_THREADS") == (cores and str(cores))


@pytest.mark.parametrize("given", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "3"}])
def test_what_the_user_has_set_stays(given, tmp_path, clean):
    clean.update(given)
    (tmp_path / "cpu.max").write_text("100000 100000")
    settle_threads([tmp_path / "cpu.max"])
    assert given.items() <= clean.items()
    assert "OMP_WAIT_POLICY" not in given or "GOMP_SPINCOUNT" not in clean


@pytest.mark.parametrize("way", WAYS)
def test_openmp_hears_of_it(way):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", WAYS[way]],
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_" not in done.stderr:
        pytest.skip("this torch's OpenMP is not GNU's")
    assert f"GOMP_SPINCOUNT = '{SPINS}'" in done.stderr


def test_a_torch_that_is_there_already_is_left_alone():
    script = "import os, torch; before = dict(os.environ); import litgpt; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", script], check=True)
