"""What the other files of a checkpoint say about its tokens: special ones, and those that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litgpt.cli.untrusted import is_count, read_json_object, shown
from litgpt.tokenizer.backend import MAX_ID, damaged

TOKEN_FLAGS = ("lstrip", "rstrip", "single_word")  # of an added token: the white space that it swallows


def read_side_file(file: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no such file."""
    try:
        return read_json_object(file, remedy="Fetch it again from the model's repository.")
    except FileNotFoundError:
        return {}


def generation_settings(file: Path) -> dict[str, Any]:
    """generation_config.json or config.json, where the ids of tokens are what they should be."""
    settings = read_side_file(file)
    for holder in (settings, settings.get("text_config") or {}):
        if not isinstance(holder, dict):
            raise damaged(file, ValueError(f"text_config is {shown(holder)}"))
        for name in ("bos_token_id", "eos_token_id"):
            ids = holder.get(name)
            if not all(is_count(token_id, MAX_ID) for token_id in id_list(ids)):
                raise damaged(file, ValueError(f"{name} is {shown(ids)}"))
    return settings


def special_token_settings(directory: Path) -> dict[str, Any]:
    """What special_tokens_map.json and, with the last word, tokenizer_config.json say about special tokens.

    Each `*_token` becomes {"content": ..., flags...} or None where the file says null; `added_tokens` maps the tokens
    of `added_tokens_decoder` to their ids.
    """
    config = read_side_file(directory / "tokenizer_config.json")
    merged = {**read_side_file(directory / "special_tokens_map.json"), **config}
    settings: dict[str, Any] = {}
    for name, value in merged.items():
        if name.endswith("_token") and not name.startswith("add_"):
            settings[name] = {"content": value} if isinstance(value, str) else value
            if isinstance(value, dict) and not _is_token(value):
                raise damaged(
                    directory / "tokenizer_config.json", ValueError(f"{name} is not a token with its content")
                )
    for name in ("add_bos_token", "add_eos_token", "legacy", "add_prefix_space", "tokenizer_class"):
        if name in config:
            settings[name] = config[name]
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(map(_is_token, decoder.values())) or not all(map(_is_id, decoder)):
        error = ValueError("added_tokens_decoder does not say the content of each token by its id")
        raise damaged(directory / "tokenizer_config.json", error)
    settings["added_tokens"] = {token["content"]: int(token_id) for token_id, token in decoder.items()}
    return {name: value for name, value in settings.items() if not isinstance(value, dict) or value}


def _is_token(value: Any) -> bool:
    """Whether it is a token with its flags, as the JSON files write it."""
    flags = (value.get(flag, False) for flag in TOKEN_FLAGS) if isinstance(value, dict) else [None]
    return all(isinstance(flag, bool) for flag in flags) and isinstance(value.get("content"), str)


def _is_id(text: str) -> bool:
    return text.isdecimal() and len(text) < 10 and int(text) <= MAX_ID


def named_tokens(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """("bos_token", {"content": "<s>", flags...}) and so on, of the tokens that have a name."""
    return [(name, token) for name, token in settings.items() if name.endswith("_token") and isinstance(token, dict)]


def id_list(value: int | list[int] | None) -> list[int]:
    """Ids that are given one alone, in a list, or not; -1 is none, as in some configurations."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    return [token_id for token_id in ids if type(token_id) is not int or token_id >= 0]
