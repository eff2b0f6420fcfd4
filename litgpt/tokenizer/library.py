"""The `tokenizers` library's tokenizer of a checkpoint: read from tokenizer.json, or made of vocab.json and merges.txt.

What tokenizer_config.json says beyond these files acts as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.cli.untrusted import read_json_object

if TYPE_CHECKING:
    import tokenizers

LIBRARY, VOCABULARY, MERGES, ADDED = "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"
# How a byte-level tokenizer without a tokenizer.json cuts a text into words: by its class. Others are GPT-2's.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_CLASSES = ("GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer", "")
QWEN_CLASSES = ("Qwen2Tokenizer",)
GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "")  # they take tokenizer.json as it is
END_OF_TEXT = "<|endoftext|>"
# What these classes call their control tokens where the checkpoint says nothing.
USUAL_TOKENS = {
    "": {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT},
    "Qwen2Tokenizer": {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT},
}
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def load_library_tokenizer(file: Path, settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        file: tokenizer.json; or vocab.json, next to which merges.txt lies.
        settings: `tokenizer_class` and `add_prefix_space` of tokenizer_config.json.

    Raises:
        Exception: A file is damaged; the library raises bare ones.
        ValueError: The tokenizer's class is not known, so neither is how it cuts a text into words.
    """
    import tokenizers

    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    found = tokenizers.Tokenizer.from_file(str(file)) if file.name == LIBRARY else _of_vocabulary(file, kind)
    adds = settings.get("add_prefix_space")
    if isinstance(adds, bool) and kind not in GENERIC_CLASSES:
        return _with_prefix_space(found, adds)
    return found


def usual_tokens(settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The named control tokens of a checkpoint without a tokenizer.json that names none itself."""
    kind = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    usual = USUAL_TOKENS[kind if kind in USUAL_TOKENS else ""]
    return {name: {"content": content} for name, content in usual.items()}


def _of_vocabulary(file: Path, kind: str) -> tokenizers.Tokenizer:
    """A byte-level BPE made of vocab.json and merges.txt, as GPT-2's files are."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if kind not in (*GPT2_CLASSES, *QWEN_CLASSES):
        raise ValueError(
            f"a tokenizer of the class {kind} cannot be made of {VOCABULARY} and {MERGES} alone; its {LIBRARY} is "
            "needed, which transformers writes: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    tokenizer = Tokenizer(models.BPE.from_file(str(file), str(file.with_name(MERGES))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind in QWEN_CLASSES:
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
        bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, file.parent)
    return tokenizer


def _add_tokens(tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
    """Adds the tokens of added_tokens.json and tokenizer_config.json under the ids that these say."""
    from tokenizers import AddedToken

    config, named, added = (
        read_json_object(directory / name) if (directory / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json", ADDED)
    )
    special = {
        token["content"] if isinstance(token, dict) else str(token)
        for settings in (config, named)
        for token in settings.get("additional_special_tokens") or ()
    }
    tokens = {int(i): AddedToken(text, special=text in special, normalized=False) for text, i in added.items()}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        tokens[int(i)] = AddedToken(token["content"], **{flag: token[flag] for flag in FLAGS if flag in token})
    for i, token in sorted(tokens.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != i:
            raise ValueError(
                f"the added token {token.content!r} has the id {i}, and {VOCABULARY} leaves it only "
                f"{tokenizer.token_to_id(token.content)}"
            )


def _with_prefix_space(tokenizer: tokenizers.Tokenizer, adds: bool) -> tokenizers.Tokenizer:
    """The same that puts a space before a text which begins with none, or does not."""
    changed = {}
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        component = getattr(tokenizer, name)
        before = None if component is None else json.loads(component.__getstate__())
        if before is not None and (after := _prefixed(before, adds)) != before:
            changed[name] = after
    if not changed:
        return tokenizer
    return type(tokenizer).from_str(json.dumps(json.loads(tokenizer.to_str()) | changed))


def _prefixed(part: dict[str, Any], adds: bool) -> dict[str, Any] | None:
    """A component as tokenizer.json writes it, with that space or without; None where nothing is left of it."""
    kind = part["type"]
    if kind == "Sequence":
        inside = next(name for name in ("normalizers", "pretokenizers", "decoders") if name in part)
        return {**part, inside: [kept for each in part[inside] if (kept := _prefixed(each, adds)) is not None]}
    if kind == "ByteLevel" and "use_regex" in part:
        return {**part, "add_prefix_space": adds}
    if kind == "Metaspace" and adds == (part.get("prepend_scheme") == "never"):
        return {**part, "prepend_scheme": "first" if adds else "never"}
    return None if not adds and kind in ("Prepend", "Strip") else part
