"""What goes to PyPI: the files that users and type checkers look for are in the wheel and in the source archive."""

import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ("litgpt/py.typed", "litgpt/serving/static/index.html", "litgpt/__main__.py")
RECIPE = "config_hub/pretrain/quickstart.yaml"


@pytest.fixture
def build(monkeypatch):
    backend = pytest.importorskip("hatchling.build", reason="needs the build backend: pip install hatchling")
    monkeypatch.chdir(ROOT)
    return backend


def test_the_wheel_is_typed_and_whole(build, tmp_path):
    with zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))) as wheel:
        assert {*SHIPPED, f"litgpt/{RECIPE}"} <= set(wheel.namelist())


def test_the_source_archive_is_typed_and_whole(build, tmp_path):
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*SHIPPED, RECIPE, "pyproject.toml", "tests/unit/test_distribution.py"} <= names
