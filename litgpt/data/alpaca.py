"""Alpaca's 52,000 instructions: cleaned, a sample of 2,000, and answered by GPT-4."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from litgpt.data.hub_data import HubData
from litgpt.data.sft import SFTData
from litgpt.data.url_file import fetch_url


@dataclass(repr=False)
class Alpaca(SFTData):
    """Stanford Alpaca's instructions, cleaned: 51,759 records (https://github.com/tloen/alpaca-lora)."""

    val_split_fraction: float = 0.03865
    """Part of the records held out for validation; of all records, about 2,000"""
    download_dir: Path = Path("data/alpaca")
    """Where the file is, or goes"""
    file_url: str = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
    """Where it is downloaded from"""
    file_name: str = "alpaca_data_cleaned_archive.json"
    """What it is called in download_dir"""

    def download(self) -> None:
        fetch_url(self.file_url, self.files()[0][0])

    def files(self) -> tuple[list[Path], list[Path]]:
        return [Path(self.download_dir) / self.file_name], []


@dataclass(repr=False)
class AlpacaGPT4(Alpaca):
    """Alpaca's instructions answered by GPT-4: 52,002 records (https://arxiv.org/abs/2304.03277)."""

    val_split_fraction: float = 0.03847
    """Part of the records held out for validation; of all records, about 2,000"""
    download_dir: Path = Path("data/alpacagpt4")
    """Where the file is, or goes"""
    file_url: str = (
        "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"
    )
    """Where it is downloaded from"""
    file_name: str = "alpacagpt4_data_cleaned_archive.json"
    """What it is called in download_dir"""


@dataclass(repr=False)
class Alpaca2k(HubData):
    """2,000 records of Alpaca (https://huggingface.co/datasets/mhenrichsen/alpaca_2k_test)."""

    val_split_fraction: float = 0.05
    """Part of the records held out for validation; of all records, 100"""
    download_dir: Path = Path("data/alpaca2k")
    """Where the files are, or go"""
    repo_id: str = "mhenrichsen/alpaca_2k_test"
    """Data set on the Hub"""
