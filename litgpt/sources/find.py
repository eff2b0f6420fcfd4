"""From what a user names to where it is: found on this machine, or downloaded from the Hub.

Nothing here waits for torch, except for the tokenizer of a `.gguf` file or of an adaptation.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from litgpt.catalog import find_known, known_checkpoints
from litgpt.checkpoint import WEIGHTS, holds_adaptation_alone, holds_tokenizer, missing_files
from litgpt.cli.secret import Secret
from litgpt.cli.suggest import did_you_mean, nearly
from litgpt.sources.fetch import download

CHECKPOINTS = Path("checkpoints")
# A name that ends so, begins so, or lies in a folder that commands write to, is a path and no id of the Hub. What
# begins so is not looked for below checkpoints/ either.
FILES = (".gguf", ".pth", ".lora", ".safetensors", ".bin", ".json", ".yaml")
PATHS = (".", "~", "/")
FOLDERS = ("out", "checkpoints")
MAX_DEPTH = 8
"""How many adaptations may be stacked on a model: their files say what they belong to, and might go on for ever."""


def find_checkpoint(
    name_or_path: Path | str,
    access_token: Secret | str | None = None,
    *,
    tokenizer_only: bool = False,
    incomplete: bool = False,
) -> Path:
    """Finds the checkpoint that a user means; what is not on this machine is downloaded.

    Args:
        name_or_path: An existing directory or `.gguf` file, a weight file inside such a directory, the same below
            `checkpoints/`, a known model name (`org/name` or the short name), or a Hub id.
        access_token: For a gated model that has to be downloaded.
        tokenizer_only: A tokenizer alone is enough.
        incomplete: Take a directory that is found as it is, whatever it lacks.

    Returns:
        A checkpoint directory (ours, Hugging Face's, or one of an adaptation) or a `.gguf` file.

    Raises:
        FileNotFoundError: Nothing is found, or a directory is found that lacks something; says what, and what to do.
        HubError: It cannot be downloaded.
    """
    found = find_here(name_or_path, tokenizer_only=tokenizer_only, incomplete=incomplete)
    if found is not None:
        return found
    repo_id = expected_on_hub(name_or_path)
    print(f"Downloading {repo_id}", file=sys.stderr, flush=True)
    return _complete(Path(download(repo_id, access_token=access_token, tokenizer_only=tokenizer_only)))


def find_here(name_or_path: Path | str, *, tokenizer_only: bool = False, incomplete: bool = False) -> Path | None:
    """As `find_checkpoint`, on this machine alone; None where nothing is, or a tokenizer without its model.

    Raises:
        FileNotFoundError: A directory is found that lacks something.
    """
    repo_id = _repo_id(str(name_or_path))
    for path in _places(str(name_or_path)):
        if path.is_file():
            if path.suffix == ".gguf":
                return path
            path = path.parent
        if path.is_dir():
            rest_is_on_hub = not tokenizer_only and repo_id is not None and path == CHECKPOINTS / repo_id
            if rest_is_on_hub and not incomplete and _is_tokenizer_alone(path):
                continue
            return path if incomplete else _complete(path)
    return None


def find_tokenizer(name_or_path: Path | str, access_token: Secret | str | None = None) -> Path:
    """A directory with the tokenizer's files of the checkpoint that a user means, whose weights are not needed.

    Those of a `.gguf` file are unpacked; an adaptation without a tokenizer of its own has that of its model.

    Raises:
        FileNotFoundError, HubError: As for `find_checkpoint`.
        ValueError: A file is damaged.
    """
    path = find_checkpoint(name_or_path, access_token, tokenizer_only=True)
    for _ in range(MAX_DEPTH):
        if path.is_dir() and (holds_tokenizer(path) or not holds_adaptation_alone(path)):
            return path
        if path.is_file():
            from litgpt.sources.checkpoint import open_checkpoint

            return open_checkpoint(path).files
        from litgpt.sources.adapted import base_of

        path = find_base(path, base_of(path), access_token, tokenizer_only=True)
    raise too_deep(path)


def find_base(
    adaptation: Path,
    recorded: str | None,
    access_token: Secret | str | None = None,
    remedy: str = "",
    tokenizer_only: bool = False,
) -> Path:
    """Where the model is that an adaptation belongs to.

    Args:
        adaptation: Its file or directory.
        recorded: What it says: a name as for `find_checkpoint`, or a path from its own directory where there is one,
            and none from here.
        access_token, tokenizer_only: As for `find_checkpoint`.
        remedy: What to do where the model is not there.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: None is recorded.
    """
    if recorded is None:
        raise ValueError(f"'{adaptation}' does not say which model it belongs to. {remedy}".rstrip())
    near = (adaptation if adaptation.is_dir() else adaptation.parent) / recorded
    meant = near if near.exists() and not any(path.exists() for path in _places(recorded)) else recorded
    try:
        return find_checkpoint(meant, access_token, tokenizer_only=tokenizer_only)
    except (OSError, ValueError) as error:
        text = f"{error} It is the model that '{adaptation}' belongs to. {remedy}".rstrip()
        raise FileNotFoundError(text) from None


def too_deep(path: Path) -> ValueError:
    """What to raise where adaptations belong to one another without end."""
    return ValueError(
        f"'{path}' belongs to a model that is an adaptation itself, and so on, more than {MAX_DEPTH} deep or in a "
        "circle. Merge the first of them into its model with `litgpt merge_lora DIR --pretrained_checkpoint_dir MODEL`."
    )


def expect_checkpoint(name_or_path: Path | str) -> None:
    """Refuses what is neither here nor a name on the Hub, for commands that do other things before they open it.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it lacks something.
    """
    if find_here(name_or_path) is None:
        expected_on_hub(name_or_path)


def expected_on_hub(name_or_path: Path | str) -> str:
    """The repository that a name means which is not on this machine.

    Raises:
        FileNotFoundError: It is a path, or nearly a name that is known.
    """
    name = str(name_or_path)
    repo_id, known = _repo_id(name), find_known(_model(name))
    meant = None if known else nearly(_model(name), known_checkpoints())
    if repo_id is not None and meant is None:
        return repo_id
    names = [repo_id if "/" in name else entry.name for repo_id, entry in known_checkpoints().items()]
    hint = did_you_mean(name, [*names, *_local_checkpoints()] if meant is None else [meant])
    looked = ", ".join(f"'{path}'" for path in _places(name))
    raise FileNotFoundError(
        f"No checkpoint '{name}' (looked for {looked}).{hint} Give the path of a checkpoint directory or .gguf file, "
        "or a name from `litgpt download list`."
    )


def _model(name: str) -> str:
    """What is named without the directory that a download goes to, which recipes name."""
    return name.removeprefix("checkpoints/")


def _repo_id(name: str) -> str | None:
    """The repository on the Hub that a name means, whether there is one or not; None for a path."""
    model = _model(name)
    if known := find_known(model):
        return known.repo_id
    return model if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model) and not _is_path(name) else None


def _is_path(name: str) -> bool:
    """Whether a name that looks like `org/name` is that of a file here: it ends like one, or begins in a directory that
    there is or that commands write to."""
    first = _model(name).partition("/")[0]
    return Path(name).suffix in FILES or first in FOLDERS or Path(first).is_dir()


def _places(name: str) -> list[Path]:
    """Where on this machine a name may mean something, in order."""
    places = [Path(name).expanduser()]
    if not name.startswith(PATHS):
        places.append(CHECKPOINTS / name)
    if known := find_known(_model(name)):
        places.append(CHECKPOINTS / known.repo_id)
    return list(dict.fromkeys(places))


def _local_checkpoints() -> list[str]:
    return [str(path.parent) for path in sorted(CHECKPOINTS.glob(f"*/*/{WEIGHTS}"))]


def _is_tokenizer_alone(path: Path) -> bool:
    """Whether a directory has a tokenizer and no weights of any kind, as `litgpt download --tokenizer_only true` leaves
    it."""
    return not missing_files(path) and bool(missing_files(path, weights=True)) and not holds_adaptation_alone(path)


def _complete(path: Path) -> Path:
    missing = missing_files(path)
    if missing:
        raise FileNotFoundError(
            f"The checkpoint directory '{path}' is incomplete; it lacks {' and '.join(missing)}. "
            "Download or convert the checkpoint again, or give another directory."
        )
    return path
