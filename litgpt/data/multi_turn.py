"""Data sets of conversations, of which by default the first exchange alone is used: Deita and LIMA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from litgpt.cli.secret import Secret
from litgpt.data.hub_data import HubData
from litgpt.data.records import Conversation


@dataclass(kw_only=True, repr=False)
class FirstExchanges(HubData):
    """Conversations that may be cut down to their first exchange."""

    include_multiturn_conversations: bool = False
    """Train on whole conversations; otherwise on the first question and answer of each, as an instruction"""

    def conversations(self, split: str) -> list[Conversation]:
        found = super().conversations(split)
        return found if self.include_multiturn_conversations else [one.first_exchange() for one in found]


@dataclass(repr=False)
class Deita(FirstExchanges):
    """Deita: 9,500 conversations chosen for complexity and quality (https://arxiv.org/abs/2312.15685)."""

    download_dir: Path = Path("data/deita")
    """Where the files are, or go"""
    repo_id: str = "HuggingFaceH4/deita-10k-v0-sft"
    """Data set on the Hub"""

    def splits(self) -> tuple[str, str | None]:
        return "train_sft", "test_sft"


@dataclass(repr=False)
class LIMA(FirstExchanges):
    """LIMA: 1,030 carefully written conversations (https://arxiv.org/abs/2305.11206). Access is granted on request."""

    val_split_fraction: float = 0.1
    """Part of the conversations held out for validation"""
    repo_id: str = "GAIR/lima"
    """Data set on the Hub"""
    access_token: Secret | None = None
    """Token of an account that has access, also taken from HF_TOKEN; it is not recorded"""
    download_dir: Path = Path("data/lima")
    """Where the files are, or go"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.access_token is not None:
            self.access_token = Secret(self.access_token)

    def token(self) -> Secret | None:
        return self.access_token
