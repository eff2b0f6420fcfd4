"""LongForm: long texts with the instructions that they could answer (https://arxiv.org/abs/2304.08460)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litgpt.data.sft import SFTData
from litgpt.data.url_file import fetch_url

URL = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"


@dataclass(repr=False)
class LongForm(SFTData):
    """LongForm: 23,652 long texts, each with the instruction that it could answer."""

    download_dir: Path = Path("data/longform")
    """Where the files are, or go"""

    single_turn_style: ClassVar[str] = "longform"
    key_names: ClassVar[dict[str, str]] = {"instruction": "input", "output": "output"}

    def download(self) -> None:
        for path in self.files()[0] + self.files()[1]:
            fetch_url(f"{URL}/{path.name}", path)

    def files(self) -> tuple[list[Path], list[Path]]:
        return [Path(self.download_dir) / "train.json"], [Path(self.download_dir) / "val.json"]
