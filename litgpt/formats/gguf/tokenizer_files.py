"""The tokenizer inside a GGUF file, written as a Hugging Face checkpoint would bring it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from litgpt.formats.gguf.splitting import SPLITTINGS, Splitting

Get = Callable[..., Any]
MAX_TOKEN = 1024


def write_tokenizer(get: Get, directory: Path, source: Path, context: int) -> dict[str, Any]:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json from a GGUF file's metadata.

    A `tokenizer.json` that lies next to the file is taken instead of the one that the metadata describe.

    Args:
        get: `get(key, default=None)` of the metadata.
        directory: Where to write.
        source: The GGUF file.
        context: The longest text in tokens.

    Returns:
        The token ids for `config.json`.

    Raises:
        ValueError: The tokenizer is of a kind that is not supported, or incomplete; says what to do.
    """
    tokens: list[str] | None = get("tokenizer.ggml.tokens")
    beside = source.with_name("tokenizer.json")
    if beside.is_file():
        shutil.copy(beside, directory / "tokenizer.json")
    elif tokens:
        try:
            tokenizer = build_tokenizer(get, tokens)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ValueError(
                f"The tokenizer in '{source}' cannot be used: {error}. "
                f"Put the model's own tokenizer.json next to the file to use that."
            ) from error
        tokenizer.save(str(directory / "tokenizer.json"))
    else:
        raise ValueError(f"'{source}' holds no tokenizer. Put the model's tokenizer.json next to it.")
    named = {name: get(f"tokenizer.ggml.{key}_token_id") for name, key in _NAMED.items()}
    ids = {name: None if token is None or token < 0 else token for name, token in named.items()}
    for name, token in ids.items():
        if tokens and token is not None and token >= len(tokens):
            reason = f"its {name} is number {token:,} of {len(tokens):,}"
            raise ValueError(f"'{source}' cannot be used: {reason}. Download it again.")
    _write_settings(get, directory, tokens, ids, context)
    generation = {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token") if ids[name] is not None}
    end_of_turn = get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and end_of_turn != ids["eos_token"]:
        generation["eos_token_id"] = [token for token in (ids["eos_token"], end_of_turn) if token is not None]
    text = json.dumps(generation, indent=2) + "\n"
    (directory / "generation_config.json").write_text(text, encoding="utf-8")
    return generation


_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _write_settings(
    get: Get, directory: Path, tokens: list[str] | None, ids: dict[str, int | None], context: int
) -> None:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(get),
        "add_eos_token": bool(get("tokenizer.ggml.add_eos_token", False)),
    }
    for name, token_id in ids.items():
        if token_id is not None and tokens:
            settings[name] = tokens[token_id]
    templates = {"default": get("tokenizer.chat_template")}
    templates |= {name: get(f"tokenizer.chat_template.{name}") for name in get("tokenizer.chat_templates") or []}
    named = [{"name": name, "template": text} for name, text in templates.items() if text]
    if named:
        settings["chat_template"] = templates["default"] if len(named) == 1 and templates["default"] else named
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _adds_bos(get: Get) -> bool:
    if get("tokenizer.ggml.bos_token_id") is None:
        return False
    if get("tokenizer.ggml.model") == "llama":
        usual = True
    else:
        usual = SPLITTINGS.get(get("tokenizer.ggml.pre", ""), Splitting()).adds_bos
    return bool(get("tokenizer.ggml.add_bos_token", usual))


def build_tokenizer(get: Get, tokens: list[str]) -> Tokenizer:
    """The tokenizer that metadata describe. Raises `ValueError` where they name what is not known."""
    kind = get("tokenizer.ggml.model")
    types = get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    # As many tokens as the embedding has rows: those that fill up are none, and stand for no text.
    count = next((i + 1 for i in reversed(range(len(types))) if types[i] != TokenType.UNUSED), len(tokens))
    tokens, types = tokens[:count], types[:count]
    if kind == "gpt2":
        tokenizer = _byte_level(get, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(get, tokens)
    else:
        raise ValueError(f"tokenizers of kind '{kind}' are not supported (only gpt2 and llama)")
    for token, number in zip(tokens, types, strict=True):
        if number in (TokenType.CONTROL, TokenType.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif number == TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    before, after = _adds_bos(get), bool(get("tokenizer.ggml.add_eos_token", False))
    if before or after:
        tokenizer.post_processor = _surrounding(get, tokens, before, after)
    return tokenizer


def _surrounding(get: Get, tokens: list[str], before: bool, after: bool) -> processors.TemplateProcessing:
    bos, eos = get("tokenizer.ggml.bos_token_id"), get("tokenizer.ggml.eos_token_id")
    first, last = [tokens[bos]] if before else [], [tokens[eos]] if after else []
    ids = {tokens[token]: token for token, used in ((bos, before), (eos, after)) if used}
    return processors.TemplateProcessing(
        single=[*first, "$A", *last], pair=[*first, "$A", *first, "$B:1", *last], special_tokens=list(ids.items())
    )


def _byte_level(get: Get, tokens: list[str]) -> Tokenizer:
    pre = get("tokenizer.ggml.pre") or "default"
    splitting = SPLITTINGS.get(pre)
    if splitting is None:
        raise ValueError(f"its way '{pre}' of splitting words is not known (known: {', '.join(sorted(SPLITTINGS))})")
    merges = [tuple(merge.split(" ", 1)) for merge in get("tokenizer.ggml.merges") or []]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=splitting.ignore_merges))
    if splitting.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(get: Get, tokens: list[str]) -> Tokenizer:
    """A sentencepiece BPE: it merges whichever pair gives the token of the best score, bytes where nothing fits."""
    scores = get("tokenizer.ggml.scores")
    if not scores:
        raise ValueError("its tokens have no scores")
    types = (get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens))[: len(tokens)]
    if max(map(len, tokens)) > MAX_TOKEN:  # every cut of a token is looked at
        raise ValueError(f"it has a token of over {MAX_TOKEN} characters")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    mergeable = {token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    merges = []
    for token in mergeable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                # The best score first; among the cuts of one token the longest left part, as sentencepiece, which goes
                # from left to right, would come to it (seen in runs of spaces).
                order = (-scores[vocabulary[token]], -cut, vocabulary[left], vocabulary[right])
                merges.append((order, (left, right)))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.UNKNOWN), None)
    model = models.BPE(
        vocabulary, [pair for _, pair in sorted(merges)], unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    prefix = get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        ([normalizers.Prepend("▁")] if prefix else []) + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    return tokenizer
