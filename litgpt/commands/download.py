"""Get a checkpoint from the Hugging Face Hub."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.hub import HubError, Repository, open_repository, tokenizer_files, weight_files
from litgpt.models import KnownCheckpoint, find_known, known_checkpoints

if TYPE_CHECKING:
    from litgpt.config import Config


def setup(
    repo_id: str,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    convert_checkpoint: bool = True,
    dtype: str | None = None,
    checkpoint_dir: Path = Path("checkpoints"),
    model_name: str | None = None,
    revision: str | None = None,
    keep_hf_files: bool = True,
) -> None:
    """Download a checkpoint's weights and tokenizer and convert the weights.

    Args:
        repo_id: `org/name` on the Hugging Face Hub, or the short name of a known checkpoint; `litgpt download list`
            shows them. Any other repository of a supported architecture works as well.
        access_token: Token of an account that may read the repository, for gated and private ones. HF_TOKEN works too.
        tokenizer_only: Leave out the weights: enough to pretrain from scratch with this tokenizer.
        convert_checkpoint: Write lit_model.pth beside the downloaded weights. Without it, every command loads the
            downloaded files as they are.
        dtype: Data type of the converted weights, such as bfloat16; by default that of the downloaded ones.
        checkpoint_dir: The checkpoint goes into CHECKPOINT_DIR/org/name.
        model_name: Name of the known model whose figures to use, where they cannot be told from config.json.
        revision: Branch, tag or commit; by default the newest commit of the main branch.
        keep_hf_files: False removes the downloaded weights after the converted ones have been compared with them, so
            that the disk holds them once.
    """
    check_options(tokenizer_only, convert_checkpoint, dtype, keep_hf_files)
    directory = download(
        repo_id,
        access_token=access_token,
        tokenizer_only=tokenizer_only,
        checkpoint_dir=checkpoint_dir,
        model_name=model_name,
        revision=revision,
        convert=convert_checkpoint,
        dtype=dtype,
    )
    if tokenizer_only:
        print(f"Saved the tokenizer to {directory}")
        return
    if convert_checkpoint:
        from litgpt.commands import convert_to_litgpt  # imports torch

        print("Converting checkpoint files to LitGPT format.")
        convert_to_litgpt.setup(directory, model_name=model_name, dtype=dtype)
        if not keep_hf_files:
            remove_originals(directory, model_name, dtype)
    else:
        print(f"Saved the checkpoint to {directory}")


def check_options(tokenizer_only: bool, convert_checkpoint: bool, dtype: str | None, keep_hf_files: bool) -> None:
    """Refuses what cannot act, before anything is downloaded.

    Raises:
        ValueError: an option needs the conversion, which is left out; or there is no such data type.
    """
    left_out = "--tokenizer_only true" if tokenizer_only else "--convert_checkpoint false"
    if dtype is not None:
        from litgpt.convert.options import dtype_from_name

        dtype_from_name(dtype)
    if convert_checkpoint and not tokenizer_only:
        return
    if dtype is not None:
        raise ValueError(f"--dtype {dtype} cannot act with {left_out}: nothing is converted. Leave one of them out.")
    if not keep_hf_files:
        raise ValueError(
            f"--keep_hf_files false cannot act with {left_out}: the downloaded files are all there will be. Leave one "
            "of them out."
        )


def download(
    repo_id: str,
    *,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    checkpoint_dir: Path = Path("checkpoints"),
    model_name: str | None = None,
    revision: str | None = None,
    convert: bool = False,
    dtype: str | None = None,
) -> Path:
    """Fetch a repository's files into `checkpoint_dir/org/name` and return that directory.

    Whether the model is supported is told from its `config.json` before any of its weights is fetched.

    Args:
        repo_id: `org/name`, or the short name of a known checkpoint.
        access_token, tokenizer_only, checkpoint_dir, model_name, revision: As for `setup`.
        convert: Whether the files will be converted: then the disk must have room for that as well.
        dtype: Data type of that conversion.

    Raises:
        HubError: the files cannot be had, or the model is not supported.
    """
    known = find_known(repo_id)
    repo_id = known.repo_id if known else repo_id
    repository = open_repository(repo_id, revision, access_token)
    directory = Path(checkpoint_dir) / repo_id
    names = tokenizer_files(repository.files)
    if tokenizer_only:
        if not names:
            raise HubError(f"{repo_id} has no tokenizer files.")
        return repository.fetch(names, directory)
    config, stand_in = supported_config(repository, model_name)
    weights = weight_files(repo_id, repository.files, repository.read)
    if not convert:
        check_not_hidden(directory)
    weight_bytes = sum(repository.files[name].size for name in weights)
    repository.fetch([*names, *weights], directory, converted_size(config, weight_bytes, dtype) if convert else 0)
    if stand_in:
        write_config_json(config, stand_in.architecture, directory)
    return directory


def supported_config(repository: Repository, model_name: str | None) -> tuple[Config, KnownCheckpoint | None]:
    """The shape of a repository's model, and the known checkpoint that says it where its `config.json` does not.

    Raises:
        HubError: the model is not supported; names the architecture or feature.
    """
    from litgpt.config import Config
    from litgpt.convert import config_from_hf  # imports torch

    try:
        return config_from_hf(read_config_json(repository), model_name or repository.repo_id), None
    except HubError:
        raise
    except ValueError as error:
        known = known_instead(repository, model_name)
        if known is None:
            raise HubError(
                f"{repository.repo_id} is not downloaded: {error} To have its tokenizer alone, add --tokenizer_only "
                "true; if it is the same model as a known one (`litgpt download list`), name that as --model_name."
            ) from None
        print(f"The figures of {known.name} are used in place of config.json.", file=sys.stderr)
        return Config.from_name(known.name), known


def read_config_json(repository: Repository) -> dict[str, Any]:
    """The repository's `config.json`. Raises `ValueError` if it has none, or none that describes a model."""
    if "config.json" not in repository.files:
        raise ValueError("it has no config.json.")
    try:
        content = json.loads(repository.read("config.json"))
    except json.JSONDecodeError as error:
        raise ValueError(f"its config.json is no valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError("its config.json describes no model: expected an object of settings.")
    return content


def known_instead(repository: Repository, model_name: str | None) -> KnownCheckpoint | None:
    """The known checkpoint whose figures stand in for a `config.json` that is missing or cannot be used."""
    if model_name:
        return find_known(model_name)
    return find_known(repository.repo_id) if "config.json" not in repository.files else None


def write_config_json(config: Config, architecture: str, directory: Path) -> None:
    """Describes a known model to every command that will load its files."""
    from litgpt.checkpoint import atomic_file
    from litgpt.convert import config_to_hf

    # Whether the head is tied, the weights show: a head of its own is found there.
    content = config_to_hf(config, architecture) | {"tie_word_embeddings": True}
    with atomic_file(directory / "config.json") as path:
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def check_not_hidden(directory: Path) -> None:
    """Refuses to put weights beside a `lit_model.pth`, which may be another revision's and would be loaded instead."""
    converted = directory / "lit_model.pth"
    if converted.exists():
        raise HubError(
            f"'{converted}' exists, and every command would load it instead of what --convert_checkpoint false "
            "downloads. Remove it, or choose another --checkpoint_dir."
        )


def converted_size(config: Config, weight_bytes: int, dtype: str | None) -> int:
    """Bytes of a model's `lit_model.pth`, where its downloaded weights have so many."""
    from litgpt.convert.options import dtype_from_name
    from litgpt.convert.source import HEAD, shapes_of

    shapes = {name: like for name, like in shapes_of(config).items() if not (config.tie_embeddings and name == HEAD)}
    parameters = sum(like.numel() for like in shapes.values())
    target = dtype_from_name(dtype)
    # Quantised weights have fewer bytes than two a parameter, and become bfloat16.
    original = 4 if weight_bytes > 3 * parameters else 2
    return parameters * (target.itemsize if target else original)


def remove_originals(directory: Path, model_name: str | None, dtype: str | None) -> None:
    """Removes the downloaded weights, once every converted tensor is found to be what they say.

    Raises:
        ValueError: one differs; then nothing is removed.
    """
    from litgpt.checkpoint import WEIGHTS, hf_weight_files, read_state_dict
    from litgpt.convert import open_checkpoint
    from litgpt.convert.options import Progress, dtype_from_name
    from litgpt.convert.source import same_values

    source = open_checkpoint(directory, model_name, converted=False)
    converted = read_state_dict(directory / WEIGHTS)
    left = set(converted)
    for name, tensor in Progress(source, dtype=dtype_from_name(dtype), title="Comparing")(source.weights()):
        if name not in converted or not same_values(tensor, converted[name], converted.release):
            left.add(name)
            break
        left.discard(name)
    if left:
        raise ValueError(
            f"'{directory / WEIGHTS}' differs from the downloaded weights ({sorted(left)[0]}), so that these are kept. "
            "Check the disk, and convert again with `litgpt convert_to_litgpt`."
        )
    files = [*directory.glob("*.index.json"), *hf_weight_files(directory)]
    freed = sum(file.stat().st_size for file in files)
    for file in files:
        file.unlink()
    print(f"Removed the downloaded weights ({freed / 1e9:,.2f} GB): {WEIGHTS} holds the same.")


def print_known_checkpoints() -> None:
    """Print the repository ids of all known checkpoints, one a line, sorted."""
    print("\n".join(sorted(known_checkpoints())))


def print_known_models() -> None:
    """Print the known models, one a line, sorted: the short name, as `pretrain` takes it, and the repository id."""
    known = known_checkpoints().values()
    width = max(len(checkpoint.name) for checkpoint in known)
    print("\n".join(sorted(f"{checkpoint.name:<{width}}  {checkpoint.repo_id}" for checkpoint in known)))
