"""Finetuning data from the Hugging Face Hub: what its data sets have in common, and any of them by its id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litgpt.cli.secret import Secret
from litgpt.data.hub_dataset import Wanted, fetch_dataset, fetched
from litgpt.data.sft import SFTData


@dataclass(kw_only=True, repr=False)
class HubData(SFTData):
    """A data set of the Hub. A subclass has the fields `repo_id` and `download_dir`, and may have `access_token`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (token := getattr(self, "access_token", None)) is not None:
            self.access_token = Secret(token)

    def download(self) -> None:
        fetch_dataset(self.wanted(), self.folder(), getattr(self, "access_token", None))

    def files(self) -> tuple[list[Path], list[Path]]:
        splits = fetched(self.wanted(), self.folder())
        if splits is None:
            raise FileNotFoundError(f"The data set {self.repo_id} is not in '{self.folder()}'; prepare_data() gets it.")
        train, val = self.splits()
        return splits[train], splits[val] if val is not None else []

    def splits(self) -> tuple[str, str | None]:
        """The splits to train and to validate on; without the latter, some of the former is held out."""
        return "train", None

    def wanted(self) -> Wanted:
        """What to fetch."""
        return Wanted(self.repo_id, tuple(split for split in self.splits() if split is not None))

    def folder(self) -> Path:
        """Where the files are, or go."""
        return Path(self.download_dir)


@dataclass(repr=False)
class HFDataset(HubData):
    """Any data set of the Hub with instructions or conversations, read from its parquet or JSON files; where it has
    none, from the parquet files that the Hub makes of it."""

    repo_id: str | None = None
    """Data set on the Hub, org/name"""
    split: str = "train"
    """Split to train on"""
    val_split: str | None = None
    """Split to validate on; null holds out val_split_fraction of the training split"""
    val_split_fraction: float | None = None
    """Part of the training split held out for validation where there is no val_split; null takes 0.05"""
    name: str | None = None
    """Configuration of the data set; null takes the default one"""
    columns: dict[str, str] | None = None
    """What the data set calls the keys of a form, for example {instruction: question, output: answer}"""
    revision: str | None = None
    """Branch, tag or commit; null takes the main branch"""
    access_token: Secret | None = None
    """Token for a gated or private data set, also taken from HF_TOKEN; it is not recorded"""
    download_dir: Path | None = None
    """Where the files go; null takes data/ORG--NAME"""

    takes_template: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.repo_id:
            raise ValueError("HFDataset needs to know which data set: --data.repo_id ORG/NAME is missing.")
        if self.val_split is not None and self.val_split_fraction is not None:
            raise ValueError(
                f"--data.val_split {self.val_split} and --data.val_split_fraction {self.val_split_fraction}: the "
                "validation records come from the split. Give only one of them."
            )

    @property
    def key_names(self) -> dict[str, str]:
        return self.columns or {}

    def splits(self) -> tuple[str, str | None]:
        return self.split, self.val_split

    def wanted(self) -> Wanted:
        splits = tuple(split for split in self.splits() if split is not None)
        return Wanted(self.repo_id, splits, self.name, self.revision)

    def folder(self) -> Path:
        return Path(self.download_dir or Path("data") / self.repo_id.replace("/", "--"))
