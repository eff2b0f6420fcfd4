"""What MicroLlama was trained on: SlimPajama alone."""

from __future__ import annotations

from dataclasses import dataclass

from litgpt.data.chunk_data import DataSource, FolderData
from litgpt.data.object_store import join_address
from litgpt.data.tiny_llama import slimpajama


@dataclass(repr=False)
class MicroLlama(FolderData):
    """SlimPajama (627 billion tokens), prepared beforehand in data_path/slimpajama with `litgpt prepare_dataset`."""

    data_path: str = "data"
    """Folder or address with the prepared data set slimpajama"""

    def roots(self) -> list[str]:
        return [join_address(self.data_path, "slimpajama")]

    def sources(self) -> list[DataSource]:
        return slimpajama(self.data_path, use_starcoder=False)
