"""Databricks Dolly: 15,011 instructions written by people (https://huggingface.co/datasets/databricks/databricks-dolly-15k)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litgpt.data.hub_data import HubData


@dataclass(repr=False)
class Dolly(HubData):
    """Databricks Dolly: 15,011 instructions written by people, some with a text that they are about."""

    val_split_fraction: float = 0.1
    """Part of the records held out for validation"""
    download_dir: Path = Path("data/dolly")
    """Where the files are, or go"""
    repo_id: str = "databricks/databricks-dolly-15k"
    """Data set on the Hub"""

    key_names: ClassVar[dict[str, str]] = {"input": "context", "output": "response"}
