"""What is wrong with a checkpoint, all of it at once, without reading its weights into memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litgpt.adaptation.lora import LORA_WEIGHTS
from litgpt.checkpoint import (
    COMPANION_FILES,
    CONFIG,
    HYPERPARAMETERS,
    WEIGHTS,
    hf_weight_files,
    missing_files,
    read_state_dict,
)
from litgpt.checkpoint.weight_index import read_weight_index
from litgpt.config import Config
from litgpt.formats.hf_config import config_from_hf, differences
from litgpt.formats.safetensors_file import read_safetensors
from litgpt.prompts import PromptStyle, choose_prompt_style
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.fit import rows_at_once
from litgpt.sources.source import Source
from litgpt.sources.weight_stream import WeightProgress
from litgpt.tokenizer.tokenizer import MODEL_FILES, Tokenizer
from litgpt.untrusted import LARGE_BYTES, SETTINGS_BYTES, read_json_object, read_yaml_mapping

GROUPS = ("files", "config", "tokenizer", "weights")
LARGE_FILES = ("tokenizer.json", "tekken.json", "vocab.json")
JSON_FILES = tuple(name for name in COMPANION_FILES if name.endswith(".json"))
DECLARING_FILES = ("config.json", "generation_config.json")
GREETING = "Hello, world! How are you today?"


@dataclass(frozen=True)
class Problem:
    """Something wrong, and what to do about it."""

    group: str
    """One of GROUPS"""
    message: str
    fails: bool = True
    """False: a warning, the checkpoint works"""
    details: tuple[str, ...] = ()
    """Where it is one problem with many faces (keys and shapes), each of them"""


@dataclass
class Findings:
    """A checkpoint as far as it can be read, and what is wrong with it."""

    path: Path
    problems: list[Problem] = field(default_factory=list)
    config: Config | None = None
    source: Source | None = None
    tokenizer: Tokenizer | None = None
    style: PromptStyle | None = None

    @property
    def valid(self) -> bool:
        return not any(problem.fails for problem in self.problems)

    @property
    def unchecked(self) -> dict[str, str]:
        """Groups that could not be looked at, since something else is wrong: why."""
        if self.source is not None:
            return {}
        if self.path.is_file():
            return dict.fromkeys(GROUPS[1:], "the file cannot be read")
        wrong = [group for group in ("files", "config") if self.failed(group)]
        return {} if not wrong else {"weights": f"the errors of {' and '.join(wrong)} stand before them"}

    @property
    def kind(self) -> str:
        """Whose format the weights are in."""
        if self.path.is_file():
            return "GGUF"
        return "litgpt" if (self.path / WEIGHTS).exists() else "Hugging Face"

    def fail(self, group: str, message: str, details: Iterable[str] = ()) -> None:
        self.problems.append(Problem(group, message, True, tuple(details)))

    def warn(self, group: str, message: str) -> None:
        self.problems.append(Problem(group, message, False))

    def failed(self, *groups: str) -> bool:
        return any(problem.fails and problem.group in groups for problem in self.problems)

    @contextmanager
    def catching(self, group: str) -> Iterator[None]:
        """An error that a user can mend becomes a problem. Its indented lines are details."""
        try:
            yield
        except (ValueError, OSError) as error:
            lines = _message(error).splitlines()
            details = [line.strip() for line in lines if line.startswith("  ")]
            self.fail(group, " ".join(line for line in lines if not line.startswith("  ")), details)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: '{error.filename}'. Check its permissions, or download it again."
    return str(error)


def examine(path: Path, check_values: bool = False) -> Findings:
    """Checks a checkpoint directory of any kind, or a .gguf file.

    Args:
        path: Where it is; it may be incomplete.
        check_values: Read every weight once, too.
    """
    findings = Findings(path)
    if path.is_dir():
        _check_files(findings)
        with findings.catching("config"):
            findings.config = _read_config(findings)
    if not findings.failed("files", "config"):
        with findings.catching("weights" if path.is_dir() else "files"):
            findings.source = open_checkpoint(path)
            findings.config = findings.source.config
            _check_types(findings)
    files = findings.source.files if findings.source else path if path.is_dir() else None
    if files is not None:
        _check_tokenizer(findings, files)
    if check_values and findings.source:
        with findings.catching("weights"):
            _check_values(findings)
    return findings


# --- files -----------------------------------------------------------------------------------------------------------


def _check_files(findings: Findings) -> None:
    path = findings.path
    with findings.catching("files"):
        for missing in missing_files(path, weights=True):
            findings.fail("files", _missing_message(path, missing))
        files = {path / WEIGHTS} if (path / WEIGHTS).exists() else set(hf_weight_files(path))
        for file in sorted(_numbered_with(files) - files):
            if file.is_file():  # the index does not list it
                files.add(file)
            else:
                findings.fail("files", f"It lacks the weight file {file.name}. Download the checkpoint again.")
        names = {}
        for file in filter(Path.is_file, sorted(files)):
            with findings.catching("files"):
                names[file.name] = set(_names_in(file))
        if findings.kind == "Hugging Face":
            _check_index(findings, names)
    _check_json_files(findings)
    _check_lora(findings)
    with findings.catching("files"):
        _check_hyperparameters(path / HYPERPARAMETERS)
    for leftover in sorted(path.glob("*.incomplete")):
        findings.warn("files", f"'{leftover}' is what an interrupted download left. It may be deleted.")


def _numbered_with(files: Iterable[Path]) -> set[Path]:
    """All files of the series that some of these are of: `-00001-of-00003` says that there are three."""
    series = set()
    for file in files:
        if match := re.fullmatch(r"(.+)-\d+-of-(\d+)(\.\w+)", file.name):
            stem, total, end = match.groups()
            numbers = (f"{number:0{len(total)}}" for number in range(1, int(total) + 1))
            series.update(file.with_name(f"{stem}-{number}-of-{total}{end}") for number in numbers)
    return series


def _missing_message(path: Path, missing: str) -> str:
    if WEIGHTS in missing and (path / LORA_WEIGHTS).is_file():
        return f"It holds LoRA's matrices ({LORA_WEIGHTS}) only. Merge them with `litgpt merge_lora {path}`."
    return f"It lacks {missing}. Download or convert the checkpoint again."


def _names_in(file: Path) -> Iterable[str]:
    """Names of the tensors in a weight file. Raises `ValueError` where it is damaged."""
    return read_safetensors(file, check=False) if file.suffix == ".safetensors" else read_state_dict(file, check=False)


def _check_index(findings: Findings, names: dict[str, set[str]]) -> None:
    """The index must say of every tensor which file holds it."""
    index = next((path for path in _indices(findings.path) if path.is_file()), None)
    if index is None:
        return
    listed = read_weight_index(index)
    lost = [f"{name} is not in {file}" for name, file in listed.items() if file in names and name not in names[file]]
    extra = [f"{name} in {file} is not listed" for file, held in names.items() for name in sorted(held - listed.keys())]
    if lost:
        remedy = "Download the checkpoint again; index and weights are of different versions."
        findings.fail("files", f"'{index}' lists tensors that are not in their files. {remedy}", lost)
    if extra:
        findings.fail("files", f"'{index}' does not list all tensors. Download it again.", extra)


def _indices(path: Path) -> list[Path]:
    return [path / "model.safetensors.index.json", path / "pytorch_model.bin.index.json"]


def _check_json_files(findings: Findings) -> None:
    for name in COMPANION_FILES:
        file = findings.path / name
        if not file.is_file():
            continue
        with findings.catching("files"):
            with file.open("rb") as opened:
                start = opened.read(64)
            if start.startswith(b"version https://git-lfs"):
                raise ValueError(f"'{file}' is a Git LFS pointer, not the file itself. Fetch it with `git lfs pull`.")
            if name in JSON_FILES:
                _read_json(file)


def _read_json(file: Path) -> dict[str, Any]:
    return read_json_object(file, limit=LARGE_BYTES if file.name in LARGE_FILES else SETTINGS_BYTES)


def _check_lora(findings: Findings) -> None:
    file = findings.path / LORA_WEIGHTS
    if not file.is_file():
        return
    with findings.catching("files"):
        names = read_state_dict(file)
        if not any("lora_" in name for name in names):
            raise ValueError(f"'{file}' holds no LoRA matrices. Delete it, or train again.")


def _check_hyperparameters(file: Path) -> None:
    if not file.is_file():
        return
    read_yaml_mapping(file, remedy="Correct or delete it.")


# --- configuration ---------------------------------------------------------------------------------------------------


def _read_config(findings: Findings) -> Config | None:
    """The model's shape as its files say, None where there are none (that is said already)."""
    path = findings.path
    if findings.kind == "litgpt":
        if not (path / CONFIG).is_file():
            return None
        config = Config.from_checkpoint(path)
        _compare_configs(findings, config)
        return config
    if not (path / "config.json").is_file() or any("config.json" in p.message for p in findings.problems):
        return None
    content = _read_json(path / "config.json")
    content.pop("quantization_config", None)  # whether the weights are as it says, they show when they are opened
    return config_from_hf(content, f"{path.resolve().parent.name}/{path.resolve().name}")


def _compare_configs(findings: Findings, config: Config) -> None:
    """Beside model_config.yaml there may be a config.json, which other programs go by."""
    file = findings.path / "config.json"
    try:
        other = config_from_hf(_read_json(file), config.name)
    except (OSError, ValueError):  # unreadable: said already; of an architecture that only we know: no matter
        return
    names = [name for name in differences(other, config) if name != "tie_embeddings"]
    if names:
        values = ", ".join(f"{name} ({getattr(config, name)!r} and {getattr(other, name)!r})" for name in names)
        remedy = f"{CONFIG} counts here; other programs go by config.json. Correct the wrong one."
        findings.warn("config", f"{CONFIG} and config.json disagree on {values}. {remedy}")


# --- tokenizer -------------------------------------------------------------------------------------------------------


def _check_tokenizer(findings: Findings, files: Path) -> None:
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
    return [token["id"] for token in _read_json(file).get("added_tokens") or []] if file.is_file() else []


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
        content = _read_json(file)
    except (OSError, ValueError):
        return {}
    declared = {}
    for name in ("bos", "eos", "pad"):
        value = content.get(f"{name}_token_id")
        ids = value if isinstance(value, list) else [value]
        declared[name] = [token_id for token_id in ids if isinstance(token_id, int) and token_id >= 0]
    return declared


# --- weights ---------------------------------------------------------------------------------------------------------


def _check_types(findings: Findings) -> None:
    odd = [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in findings.source.layout().items()
        if not tensor.is_floating_point()
    ]
    if odd:
        findings.fail("weights", "Some weights are no fractions. Download the unquantised checkpoint.", odd)


def _check_values(findings: Findings) -> None:
    source = findings.source
    broken, zero = [], []
    previous: Tensor | None = None
    for name, tensor in WeightProgress(source, title="Checking")(source.weights()):
        if tensor is previous:  # a tied head
            continue
        previous = tensor
        finite, nothing = _look_at(tensor, source)
        if not finite:
            broken.append(name)
        elif nothing and tensor.dim() > 1:
            zero.append(name)
    if broken:
        findings.fail("weights", "Weights are NaN or infinite. Download or train the checkpoint again.", broken)
    if zero:
        message = "Whole matrices are zero, as a download with holes leaves them. Download the checkpoint again."
        findings.fail("weights", message, zero)


def _look_at(tensor: Tensor, source: Source) -> tuple[bool, bool]:
    """Whether all values are finite, and whether all are zero; a few megabytes at a time."""
    finite = nothing = True
    for part in tensor.split(rows_at_once(tensor)) if tensor.dim() else [tensor]:
        values = part.to(torch.float32) if part.dtype.itemsize == 1 else part
        finite = finite and bool(torch.isfinite(values).all())
        nothing = nothing and not values.any()
        source.release(part)
    return finite, nothing
