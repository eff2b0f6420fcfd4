"""Data modules: where training and validation batches come from. They are imported on first use."""

import importlib
from typing import Any

_PLACES = {
    "DataModule": "litgpt.data.base",
    "LengthGroupedSampler": "litgpt.data.base",
    "StreamSampler": "litgpt.data.base",
    "stream_loader": "litgpt.data.base",
    "TextFiles": "litgpt.data.text_files",
    "SFTData": "litgpt.data.sft",
    "JSON": "litgpt.data.json_data",
    "Alpaca": "litgpt.data.alpaca",
    "Alpaca2k": "litgpt.data.alpaca",
    "AlpacaGPT4": "litgpt.data.alpaca",
    "Deita": "litgpt.data.multi_turn",
    "Dolly": "litgpt.data.dolly",
    "FLAN": "litgpt.data.flan",
    "HFDataset": "litgpt.data.hub_data",
    "HFPreferences": "litgpt.data.preferences",
    "LIMA": "litgpt.data.multi_turn",
    "LitData": "litgpt.data.litdata_module",
    "LongForm": "litgpt.data.longform",
    "MicroLlama": "litgpt.data.micro_llama",
    "OpenWebText": "litgpt.data.open_web_text",
    "Preferences": "litgpt.data.preferences",
    "TinyLlama": "litgpt.data.tiny_llama",
    "TinyStories": "litgpt.data.tiny_stories",
}
__all__ = [
    "FLAN",
    "JSON",
    "LIMA",
    "Alpaca",
    "Alpaca2k",
    "AlpacaGPT4",
    "DataModule",
    "Deita",
    "Dolly",
    "HFDataset",
    "HFPreferences",
    "LengthGroupedSampler",
    "LitData",
    "LongForm",
    "MicroLlama",
    "OpenWebText",
    "Preferences",
    "SFTData",
    "StreamSampler",
    "TextFiles",
    "TinyLlama",
    "TinyStories",
    "stream_loader",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'litgpt.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
