"""Prompt styles and chat templates."""

from __future__ import annotations

import json
from pathlib import Path


def find_chat_template(checkpoint_dir: Path) -> str | None:
    """The checkpoint's own Jinja chat template: chat_template.jinja, or the one in tokenizer_config.json."""
    file = checkpoint_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = checkpoint_dir / "tokenizer_config.json"
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default") or next(iter(named.values()), None)
    return template
