"""From what a user names to an opened checkpoint: found here or downloaded, with what was finetuned on it."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path

from litgpt.adaptation.lora import LORA_WEIGHTS
from litgpt.checkpoint import WEIGHTS, hf_weight_files, resolve_checkpoint_dir
from litgpt.cli.secret import Secret
from litgpt.formats.peft import is_peft_alone
from litgpt.sources.adapted import adapt, base_of, holds_adaptation, is_lora
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.fetch import download
from litgpt.sources.source import Source


def find_checkpoint(
    name_or_path: Path | str,
    access_token: Secret | str | None = None,
    tokenizer_only: bool = False,
    incomplete: bool = False,
) -> Path:
    """As `resolve_checkpoint_dir`; what is not on this machine is downloaded.

    Raises:
        FileNotFoundError: There is no such checkpoint, here or on the Hub, or it lacks something.
        HubError: It cannot be downloaded.
    """

    def fetch(repo_id: str) -> Path:
        print(f"Downloading {repo_id}", file=sys.stderr, flush=True)
        return download(repo_id, access_token=access_token, tokenizer_only=tokenizer_only)

    return resolve_checkpoint_dir(name_or_path, download=fetch, incomplete=incomplete, tokenizer_only=tokenizer_only)


def expect_checkpoint(name_or_path: Path | str) -> None:
    """Refuses what is neither here nor a name on the Hub, for commands that do other things before they open it.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it lacks something.
    """

    class OnHub(Exception):
        pass

    def fetch(repo_id: str) -> Path:
        raise OnHub

    with contextlib.suppress(OnHub):
        resolve_checkpoint_dir(name_or_path, download=fetch)


def open_model(name_or_path: Path | str, access_token: Secret | str | None = None) -> Source:
    """Opens the checkpoint that a user means.

    A directory of LoRA or adapter weights beside which there are no merged ones, also of PEFT's, is opened on the model
    that it says it belongs to.

    Raises:
        FileNotFoundError: There is no such checkpoint, or it, or the model it belongs to, lacks something.
        ValueError: A file is damaged, or the model is not supported.
    """
    path = find_checkpoint(name_or_path, access_token)
    if holds_adaptation(path) and not (path / WEIGHTS).is_file() and not hf_weight_files(path):
        command = "merge_lora DIR --pretrained_checkpoint_dir" if is_lora(path) else "generate_adapter"
        if is_peft_alone(path):
            command = f"convert {path} --to litgpt --pretrained_checkpoint_dir"
        remedy = f"If it is elsewhere, `litgpt {command}` takes its place."
        return adapt(open_base(base_of(path), None, path, remedy, access_token), path)
    return open_checkpoint(path)


def open_base(
    recorded: str | None,
    given: Path | None,
    adapter: Path,
    remedy: str = "Give it with --pretrained_checkpoint_dir.",
    access_token: Secret | str | None = None,
) -> Source:
    """The model that an adapter belongs to: the one given, or the one recorded with it.

    Args:
        recorded: What the adapter's file says.
        given: What the user says.
        adapter: The file or directory of the adapter.
        remedy: What to do where the recorded one is not there.
        access_token: For a model that has to be downloaded first.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: None is recorded.
    """
    find = partial(find_checkpoint, access_token=access_token)
    if given is not None:
        return open_checkpoint(find(given))
    if recorded is None:
        raise ValueError(f"'{adapter}' does not say which model it belongs to. {remedy}")
    try:
        found = find(_recorded_path(recorded, adapter))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{error} It is the model that '{adapter}' belongs to. {remedy}") from None
    return open_checkpoint(found)


def _recorded_path(recorded: str, adapter: Path) -> Path | str:
    """What is recorded; a path from the adapter's own directory where it is one, and none from here."""
    near = (adapter if adapter.is_dir() else adapter.parent) / recorded
    here = (Path(recorded).expanduser(), Path("checkpoints") / recorded)
    return near if near.exists() and not any(path.exists() for path in here) else recorded


def find_lora(path: Path) -> Path:
    """The file of LoRA weights that a user means by a directory or file, also below `checkpoints/`.

    `final_lora.pth` in a directory where there is none means the one that is there under the usual name.
    """
    for candidate in (path.expanduser(), Path("checkpoints") / path):
        if candidate.is_file():
            return candidate
        directory = candidate.parent if candidate.suffix == ".pth" else candidate
        if (directory / LORA_WEIGHTS).is_file():
            return directory / LORA_WEIGHTS
        if candidate.is_dir():
            raise FileNotFoundError(
                f"'{candidate}' holds no {LORA_WEIGHTS}. Give a directory that `litgpt finetune_lora` has written, as "
                "out/finetune/lora/final."
            )
    raise FileNotFoundError(f"There is no '{path}'. Give a directory or file that `litgpt finetune_lora` has written.")
