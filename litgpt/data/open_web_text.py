"""OpenWebText: web pages that Reddit linked to, after GPT-2's WebText."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from litgpt.data.downloaded_text import DownloadedText
from litgpt.data.hub_dataset import Wanted, fetch_dataset


@dataclass(repr=False)
class OpenWebText(DownloadedText):
    """OpenWebText: 8,013,769 documents, downloaded and tokenised on first use."""

    data_path: str = "data/openwebtext"
    """Folder where the data is, or goes; or the address of what was prepared"""
    val_split_fraction: float = 0.0005
    """Part of the documents held out for validation, decided when the data is tokenised"""
    repo_id: str = "openwebtext"
    """Where on the Hub it is"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.val_split_fraction < 1:
            raise ValueError(f"val_split_fraction={self.val_split_fraction} is not between 0 and 1.")

    def held_out(self) -> float | None:
        return self.val_split_fraction

    def download(self, folder: Path) -> dict[str, list[Path]]:
        return fetch_dataset(Wanted(self.repo_id, ("train",)), folder)
