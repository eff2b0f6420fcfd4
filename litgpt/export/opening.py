"""The checkpoint to export, opened."""

from pathlib import Path

from litgpt.cli.secret import Secret
from litgpt.sources.adapted import AdapterSource
from litgpt.sources.door import open_model
from litgpt.sources.source import Source


def open_for_export(name_or_path: Path, access_token: Secret | str | None = None) -> Source:
    """As `open_model`: LoRA weights without merged ones beside them are merged while they are read.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it, or the model it belongs to, lacks something.
        ValueError: It is damaged, not supported, or holds an adapter, which no other format knows.
    """
    source = open_model(name_or_path, access_token)
    if isinstance(source, AdapterSource):
        raise ValueError(f"'{name_or_path}' holds an adapter, which cannot be merged. Give the model it belongs to.")
    return source
