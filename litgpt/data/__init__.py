"""Data modules: where training and validation batches come from. They are imported on first use."""

import importlib
from typing import Any

_PLACES = {
    "DataModule": "litgpt.data.base",
    "StreamSampler": "litgpt.data.base",
    "stream_loader": "litgpt.data.base",
    "TextFiles": "litgpt.data.text_files",
}
__all__ = ["DataModule", "StreamSampler", "TextFiles", "stream_loader"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'litgpt.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
