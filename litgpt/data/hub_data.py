"""Finetuning data from the Hugging Face Hub: what its data sets have in common, and any of them by its id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litgpt.cli.secret import Secret
from litgpt.data.hub_dataset import Wanted, fetch_dataset, fetched
from litgpt.data.sft import SFTData


@dataclass(kw_only=True, repr=False)
class HubFiles(SFTData):
    """Files of a data set of the Hub."""

    def wanted(self) -> Wanted:
        """What to fetch."""
        raise TypeError(f"{type(self).__name__} has no wanted(): it must say what of which data set to fetch.")

    def folder(self) -> Path:
        """Where the files are, or go."""
        raise TypeError(f"{type(self).__name__} has no folder(): it must say where the files go.")

    def splits(self) -> tuple[str, str | None]:
        """The splits to train and to validate on; without the latter, some of the former is held out."""
        return "train", None

    def token(self) -> Secret | None:
        """The token to fetch with, for data sets that may need one."""
        return None

    def download(self) -> None:
        fetch_dataset(self.wanted(), self.folder(), self.token())

    def files(self) -> tuple[list[Path], list[Path]]:
        wanted, folder = self.wanted(), self.folder()
        found = fetched(wanted, folder)
        if found is None:
            raise FileNotFoundError(f"The data set {wanted.repo_id} is not in '{folder}'; prepare_data() gets it.")
        train, val = self.splits()
        return found[train], found[val] if val is not None else []


@dataclass(kw_only=True, repr=False)
class HubData(HubFiles):
    """A data set of the Hub that is known: a subclass gives its id, and where it goes."""

    download_dir: Path
    """Where the files are, or go"""
    repo_id: str
    """Data set on the Hub"""

    def wanted(self) -> Wanted:
        return Wanted(self.repo_id, tuple(split for split in self.splits() if split is not None))

    def folder(self) -> Path:
        return Path(self.download_dir)


@dataclass(repr=False)
class HFDataset(HubFiles):
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
        self._repo_id()
        if self.val_split is not None and self.val_split_fraction is not None:
            raise ValueError(
                f"val_split={self.val_split} and val_split_fraction={self.val_split_fraction}: the "
                "validation records come from the split. Give only one of them."
            )
        if self.access_token is not None:
            self.access_token = Secret(self.access_token)

    def keys(self) -> Mapping[str, str]:
        return self.columns or {}

    def splits(self) -> tuple[str, str | None]:
        return self.split, self.val_split

    def token(self) -> Secret | None:
        return self.access_token

    def wanted(self) -> Wanted:
        splits = tuple(split for split in self.splits() if split is not None)
        return Wanted(self._repo_id(), splits, self.name, self.revision)

    def folder(self) -> Path:
        return Path(self.download_dir or Path("data") / self._repo_id().replace("/", "--"))

    def _repo_id(self) -> str:
        if not self.repo_id:
            raise ValueError("HFDataset needs to know which data set: repo_id=ORG/NAME is missing.")
        return self.repo_id
