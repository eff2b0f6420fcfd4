"""What is wrong with a checkpoint's tokenizer, and its prompt format."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from litgpt.prompts import PromptStyle, choose_prompt_style
from litgpt.sources.file_checks import read_companion
from litgpt.sources.findings import Findings
from litgpt.tokenizer.tokenizer import MODEL_FILES, Tokenizer

DECLARING_FILES = ("config.json", "generation_config.json")
GREETING = "Hello, world! How are you today?"


def check_tokenizer(findings: Findings, files: Path) -> None:
    """Whether the tokenizer in a directory is the model's, and makes ids of a greeting and texts of ids."""
    with findings.catching("tokenizer"):
        findings.tokenizer = Tokenizer(files)
    tokenizer = findings.tokenizer
    if tokenizer is None:
        return
    rows = findings.config.padded_vocab_size if findings.config else None
    if rows is not None:
        _check_vocabulary(findings, tokenizer, rows)
    _check_special_tokens(findings, tokenizer, rows)
    with findings.catching("tokenizer"):
        findings.style = choose_prompt_style(files, config=findings.config, tokenizer=tokenizer)
        _check_prompt(findings.style, tokenizer, rows)
    back = tokenizer.decode(tokenizer.encode_ids(GREETING, bos=False))
    if back != GREETING:
        remedy = "Copy the model's own tokenizer files there again."
        findings.warn("tokenizer", f"{GREETING!r} becomes {back!r} when encoded and decoded. {remedy}")


def _check_prompt(style: PromptStyle, tokenizer: Tokenizer, rows: int | None) -> None:
    """A greeting must become ids that the model knows. Raises `ValueError`."""
    ids = style.encode(tokenizer, [{"role": "user", "content": GREETING}])
    style.stop_sequences(tokenizer)
    largest = max(ids, default=-1)
    if largest < 0 or (rows is not None and largest >= rows):
        made = "nothing" if largest < 0 else f"the id {largest}, for which the embedding has no row"
        raise ValueError(f"The prompt format makes {made} of a greeting. Correct the chat template.")


def _check_vocabulary(findings: Findings, tokenizer: Tokenizer, rows: int) -> None:
    beyond = {token for token in (*range(rows, tokenizer.vocab_size), *_added_ids(tokenizer.dir)) if token >= rows}
    message = f"The tokenizer has {tokenizer.vocab_size} tokens, the embedding {rows} rows"
    if any(not tokenizer.is_control(token) for token in beyond):
        findings.fail("tokenizer", f"{message}. Copy the model's own tokenizer files there.")
    elif beyond:  # no text becomes such a token; published checkpoints have some, for images
        message = f"The embedding has {rows} rows, and no text may hold the control tokens beyond"
        findings.warn("tokenizer", f"{message}: {', '.join(map(str, sorted(beyond)))}. Do without them.")
    elif tokenizer.vocab_size < rows / 2:
        findings.warn("tokenizer", f"{message}. Check that the tokenizer is this model's.")


def _added_ids(directory: Path) -> list[int]:
    """Ids of tokens that were added to a vocabulary; they may leave gaps before them."""
    file = directory / MODEL_FILES[0]
    return [token["id"] for token in read_companion(file).get("added_tokens") or []] if file.is_file() else []


def _check_special_tokens(findings: Findings, tokenizer: Tokenizer, rows: int | None) -> None:
    """What config.json and generation_config.json say about special tokens, against the tokenizer."""
    for name, token in tokenizer.special_tokens.items():
        try:
            tokenizer.token_to_id(token)
        except ValueError:
            remedy = "Correct tokenizer_config.json."
            findings.warn("tokenizer", f"The tokenizer names {token!r} as {name}, which it does not have. {remedy}")
    own = special_ids(tokenizer)
    for file in DECLARING_FILES:
        for name, ids in _declared_ids(tokenizer.dir / file).items():
            beyond = [token_id for token_id in ids if rows is not None and token_id >= rows]
            if beyond:
                message = f"{file} says {name}_token_id {beyond[0]}, but the embedding has {rows} rows"
                findings.fail("tokenizer", f"{message}. Correct {file}.")
            elif own[name] is not None and ids and own[name] not in ids:
                said = " and ".join(map(str, ids))
                effect = "an answer ends at any of them" if name == "eos" else "the tokenizer's counts"
                message = f"The {name} token is {own[name]} by the tokenizer and {said} by {file}: {effect}"
                findings.warn("tokenizer", f"{message}. Correct the wrong one.")


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """The ids of the tokens that begin, end and pad a text, as the tokenizer has them."""
    ids: dict[str, int | None] = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": None}
    if (pad := tokenizer.special_tokens.get("pad_token")) is not None:
        with suppress(ValueError):
            ids["pad"] = tokenizer.token_to_id(pad)
    return ids


def _declared_ids(file: Path) -> dict[str, list[int]]:
    """The ids in a JSON file by bos, eos and pad; negative ones mean that there is none."""
    try:
        content = read_companion(file)
    except (OSError, ValueError):
        return {}
    declared = {}
    for name in ("bos", "eos", "pad"):
        value = content.get(f"{name}_token_id")
        ids = value if isinstance(value, list) else [value]
        declared[name] = [token_id for token_id in ids if isinstance(token_id, int) and token_id >= 0]
    return declared
