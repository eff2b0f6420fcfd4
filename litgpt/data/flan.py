"""FLAN: many tasks as instructions (https://arxiv.org/abs/2210.11416), one file for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litgpt.data.hub_data import HubFiles
from litgpt.data.hub_dataset import Wanted, fetched

ADDRESS = re.compile(r"https?://[^/]+/datasets/(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/?")
TRAIN, TEST = "train/*_train.jsonl", "test/*_test.jsonl"


@dataclass(repr=False)
class FLAN(HubFiles):
    """FLAN: 1,753,240 records of many tasks, of which some may be chosen."""

    download_dir: Path = Path("data/flan")
    """Where the files are, or go"""
    url: str = "https://huggingface.co/datasets/Muennighoff/flan/resolve/main"
    """The data set's files on the Hub, .../datasets/ORG/NAME/resolve/REVISION"""
    subsets: str | None = None
    """Names of tasks, separated by commas; null takes all"""

    single_turn_style: ClassVar[str] = "flan"
    key_names: ClassVar[dict[str, str]] = {"instruction": "inputs", "output": "targets"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._address()

    def wanted(self) -> Wanted:
        address = self._address()
        names = [name.strip() for name in self.subsets.split(",")] if self.subsets else ["*"]
        patterns = tuple(pattern.replace("*", name) for pattern in (TRAIN, TEST) for name in names)
        return Wanted(address["repo_id"], patterns, revision=address["revision"])

    def folder(self) -> Path:
        return Path(self.download_dir)

    def files(self) -> tuple[list[Path], list[Path]]:
        splits = fetched(self.wanted(), self.folder())
        if splits is None:
            raise FileNotFoundError(f"FLAN is not in '{self.download_dir}'; prepare_data() gets it.")
        half = len(splits) // 2
        train, test = list(splits.values())[:half], list(splits.values())[half:]
        return [path for paths in train for path in paths], [path for paths in test for path in paths]

    def _address(self) -> re.Match[str]:
        if (address := ADDRESS.fullmatch(self.url)) is None:
            raise ValueError(f"url={self.url}: expected https://huggingface.co/datasets/ORG/NAME/resolve/REVISION.")
        return address
