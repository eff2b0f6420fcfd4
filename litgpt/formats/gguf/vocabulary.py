"""A checkpoint's tokenizer as the metadata of a GGUF file: the way back of `tokenizer_files.py`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer as JsonTokenizer

from litgpt.cli.untrusted import LARGE_BYTES, read_json_object
from litgpt.formats.gguf.splitting import SPLITTINGS
from litgpt.formats.gguf.tokenizer_files import build_tokenizer
from litgpt.prompts import ChatTemplate, carried_templates
from litgpt.prompts.chat_template import DEFAULT
from litgpt.tokenizer.backend import MAX_ID
from litgpt.tokenizer.library import LIBRARY, VOCABULARY, load_library_tokenizer
from litgpt.tokenizer.tokenizer import Tokenizer

PREFIX = "tokenizer.ggml."
# Texts on which the known ways of splitting differ: words, numbers, contractions, spaces, lines, marks and scripts.
PROBES = (
    "The quick brown fox jumps over 13 lazy dogs, 3.14159 times; that's 1234567890 in all.",
    "don't DON'T I'LL we'Ve HeLLo camelCase snake_case CONSTANT_2 x=y+1;\n\tif (a[0] != b) { return -1; }\r\n\r\n",
    "  two  spaces,   three\n\n\nlines \n and\ttabs\t\t end  ",
    "naïve café Ünïcode Привет, мир! 你好,世界 こんにちは안녕하세요 สวัสดี नमस्ते مرحبا",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 $100 #tag @user 50% http://a.b/c?d=e 'quoted' \"double\" ..!",
)


def vocabulary(files: Path, rows: int) -> dict[str, Any]:
    """The metadata that describe a tokenizer, checked by reading them again.

    Args:
        files: A directory with the tokenizer's files.
        rows: Rows of the embedding; GGUF wants as many tokens.

    Raises:
        ValueError: GGUF cannot describe the tokenizer; says where.
        FileNotFoundError: There is none.
    """
    tokenizer = Tokenizer(files)
    is_sentencepiece = (files / "tokenizer.model").is_file() and not (files / LIBRARY).is_file()
    described = _of_sentencepiece if is_sentencepiece else _of_json
    metadata = described(files, tokenizer)
    tokens, types = metadata[PREFIX + "tokens"], metadata[PREFIX + "token_type"]
    if len(tokens) > rows:
        raise ValueError(f"The tokenizer in '{files}' has {len(tokens)} tokens, the model only {rows}.")
    unused = range(len(tokens), rows)
    tokens += [f"[PAD{number}]" for number in unused]
    types += [int(TokenType.UNUSED)] * len(unused)
    if PREFIX + "scores" in metadata:
        metadata[PREFIX + "scores"] += [0.0] * len(unused)
    metadata |= _special_tokens(files, tokenizer)
    _compare(metadata, tokenizer, files)
    return metadata


def _special_tokens(files: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    prefix, suffix = tokenizer.encode_ids("", bos=None, eos=None), []
    if tokenizer.adds_eos:
        suffix = [prefix.pop()]
    if prefix not in ([], [tokenizer.bos_id]) or suffix not in ([], [tokenizer.eos_id]):
        raise ValueError(
            f"The tokenizer in '{files}' puts tokens other than BOS and EOS around a text; a GGUF file cannot say so."
        )
    named = {name: tokenizer.token_to_id(token) for name, token in tokenizer.special_tokens.items()}
    templates, _ = carried_templates(files, tokenizer.adds_bos)
    closing = ChatTemplate(templates, tokenizer.special_tokens).closing_token(tokenizer) if templates else None
    if closing in (None, tokenizer.eos_id):
        closing = min(tokenizer.stop_ids - {tokenizer.eos_id}, default=None)
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        # The other token that ends a reply, of which GGUF has one: the template's, if there are more.
        "eot_token_id": closing if closing != tokenizer.eos_id else None,
        "unknown_token_id": named.get("unk_token"),
        "padding_token_id": named.get("pad_token"),
    }
    found: dict[str, Any] = {PREFIX + name: token for name, token in ids.items() if token is not None}
    found |= {PREFIX + "add_bos_token": tokenizer.adds_bos, PREFIX + "add_eos_token": tokenizer.adds_eos}
    if DEFAULT in templates:
        found["tokenizer.chat_template"] = templates.pop(DEFAULT)
    if templates:
        found["tokenizer.chat_templates"] = list(templates)
        found |= {f"tokenizer.chat_template.{name}": template for name, template in templates.items()}
    return found


def _of_json(files: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    content = _layout(files)
    model = content["model"]
    if model.get("type") != "BPE":
        raise ValueError(f"The tokenizer in '{files}' is of kind {model.get('type')}; a GGUF file takes BPE here.")
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    names = {number: token for token, number in model["vocab"].items()}
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    names |= {number: token["content"] for number, token in added.items()}
    count = max(names) + 1
    if count > MAX_ID:
        raise ValueError(f"The tokenizer in '{files}' has a token with the id {count - 1:,}, more than any model has.")
    tokens = [names.get(number, f"[PAD{number}]") for number in range(count)]
    types = [TokenType.NORMAL if number in names else TokenType.UNUSED for number in range(count)]
    for number in range(count):
        if tokenizer.is_control(number):
            types[number] = TokenType.CONTROL
        elif number in added:
            types[number] = TokenType.USER_DEFINED
    found: dict[str, Any] = {PREFIX + "tokens": tokens}
    if model.get("byte_fallback"):
        # What is merged first has the best score; what is not made by merging is never asked for its.
        ranks: dict[str, float] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, float(-rank))
        unknown = model.get("unk_token")
        for number, token in enumerate(tokens):
            if types[number] == TokenType.USER_DEFINED and "▁" in token and token in ranks:
                types[number] = TokenType.NORMAL  # Gemma's runs of spaces: no text has this letter, merging makes it
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[number] = TokenType.BYTE
            elif token == unknown:
                types[number] = TokenType.UNKNOWN
        prefix = tokenizer.token_bytes(tokenizer.encode_ids("x", bos=False)[0]).startswith(b" ")
        found |= {
            PREFIX + "model": "llama",
            PREFIX + "scores": [ranks.get(token, -1e6) for token in tokens],
            PREFIX + "add_space_prefix": prefix,
        }
    else:
        found |= {
            PREFIX + "model": "gpt2",
            PREFIX + "pre": _splitting(JsonTokenizer.from_str(json.dumps(content)), model, files),
            PREFIX + "merges": [" ".join(merge) for merge in merges],
        }
    return found | {PREFIX + "token_type": [int(kind) for kind in types]}


def _layout(files: Path) -> dict[str, Any]:
    """A tokenizer as tokenizer.json writes it."""
    if (files / LIBRARY).is_file():
        return read_json_object(files / LIBRARY, limit=LARGE_BYTES)
    settings = read_json_object(files / "tokenizer_config.json") if (files / "tokenizer_config.json").is_file() else {}
    return json.loads(load_library_tokenizer(files / VOCABULARY, settings).to_str())


def _splitting(tokenizer: JsonTokenizer, model: dict[str, Any], files: Path) -> str:
    """The name of the way in which a byte-level BPE cuts a text into words."""

    def words(pre_tokenizer: Any, text: str) -> list[str]:
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]

    ignores_merges = bool(model.get("ignore_merges"))
    wanted = [words(tokenizer.pre_tokenizer, text) for text in PROBES] if tokenizer.pre_tokenizer else None
    for name, splitting in SPLITTINGS.items():
        made = splitting.pre_tokenizer()
        if splitting.ignore_merges == ignores_merges and [words(made, text) for text in PROBES] == wanted:
            return name
    raise ValueError(
        f"The tokenizer in '{files}' cuts a text into words in a way that has no name in GGUF files "
        f"(known: {', '.join(sorted(SPLITTINGS))})."
    )


def _of_sentencepiece(files: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(files / "tokenizer.model"))
    size = model.get_piece_size()
    tokens = [model.id_to_piece(number) for number in range(size)]
    scores = [model.get_score(number) for number in range(size)]

    def kind(number: int) -> TokenType:
        if model.is_byte(number):
            return TokenType.BYTE
        if model.is_unknown(number):
            return TokenType.UNKNOWN
        if model.is_control(number):
            return TokenType.CONTROL
        return TokenType.UNUSED if model.is_unused(number) else TokenType.NORMAL

    types = [kind(number) for number in range(size)]
    for number in range(size, tokenizer.vocab_size):
        control = tokenizer.is_control(number)
        tokens.append(tokenizer.token_bytes(number).decode() if control else f"[PAD{number}]")
        types.append(TokenType.CONTROL if control else TokenType.UNUSED)
        scores.append(0.0)
    return {
        PREFIX + "model": "llama",
        PREFIX + "tokens": tokens,
        PREFIX + "scores": scores,
        PREFIX + "token_type": [int(kind) for kind in types],
        PREFIX + "add_space_prefix": model.encode("x", out_type=str)[0].startswith("▁"),
    }


def _compare(metadata: dict[str, Any], tokenizer: Tokenizer, files: Path) -> None:
    """Raises `ValueError` where what the metadata describe makes other tokens of a text."""
    again = build_tokenizer(metadata.get, metadata[PREFIX + "tokens"])
    for text in PROBES:
        wanted: Sequence[int] = tokenizer.encode_ids(text, bos=False)
        found = again.encode(text, add_special_tokens=False).ids
        if found != wanted:
            place = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), -1)
            raise ValueError(
                f"The tokenizer in '{files}' cannot be described in a GGUF file: from token {place} on {text!r} would "
                "be read as other tokens."
            )
