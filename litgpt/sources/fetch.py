"""A checkpoint from the Hugging Face Hub: whether it is supported, then its files."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.catalog import KnownCheckpoint, find_known
from litgpt.cli.secret import Secret
from litgpt.cli.untrusted import parse_json_object
from litgpt.hub import (
    ADAPTER_CONFIG,
    HubError,
    Repository,
    adapter_files,
    open_repository,
    tokenizer_files,
    weight_files,
)

if TYPE_CHECKING:
    from litgpt.config import Config


def download(
    repo_id: str,
    *,
    access_token: Secret | str | None = None,
    tokenizer_only: bool = False,
    checkpoint_dir: Path = Path("checkpoints"),
    model_name: str | None = None,
    revision: str | None = None,
    convert: bool = False,
    dtype: str | None = None,
) -> Path:
    """Fetch a repository's files into `checkpoint_dir/org/name` and return that directory.

    Whether the model is supported is told from its `config.json` before any of its weights is fetched. Of a repository
    that holds only an adapter of PEFT's, that is fetched; the model that it belongs to is another repository's.

    Args:
        repo_id: `org/name`, or the short name of a known checkpoint.
        access_token, tokenizer_only, checkpoint_dir, model_name, revision: As for `litgpt download`.
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
    adapter = adapter_files(repository.files)
    if tokenizer_only and names:
        return repository.fetch(names, directory)
    if tokenizer_only and not adapter:
        raise HubError(f"{repo_id} has no tokenizer files.")
    if adapter:  # whose tokenizer may be its model's
        given = {"`model_name`": model_name, "`dtype`": dtype}
        check_adapter(repository, directory, [option for option, value in given.items() if value is not None])
        return repository.fetch([*names, *adapter], directory)
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
    from litgpt.formats.hf_config import config_from_hf  # imports torch

    try:
        config_json = without_stale_method(fetch_config_json(repository), repository)
        return config_from_hf(config_json, model_name or repository.repo_id), None
    except HubError:
        raise
    except ValueError as error:
        known = known_instead(repository, model_name)
        if known is None:
            raise HubError(
                f"{repository.repo_id} is not downloaded: {error} `litgpt download {repository.repo_id} "
                "--tokenizer_only true` fetches its tokenizer alone; if it is the same model as a known one (`litgpt "
                "download list`), name that there as `--model_name NAME`."
            ) from None
        print(f"The figures of {known.name} are used in place of config.json.", file=sys.stderr)
        return Config.from_name(known.name), known


def fetch_config_json(repository: Repository) -> dict[str, Any]:
    """The repository's `config.json`. Raises `ValueError` if it has none, or none that describes a model."""
    if "config.json" not in repository.files:
        raise ValueError("it has no config.json.")
    from litgpt.formats.config_json import parse_config_json  # imports torch

    return parse_config_json(repository.read("config.json"), f"{repository.repo_id}/config.json")


def without_stale_method(config_json: dict[str, Any], repository: Repository) -> dict[str, Any]:
    """A `config.json` without a way of quantisation that is not supported and that the weights do not have, as the
    headers of their files show: then they load, as from a directory."""
    from litgpt.formats.quantised_weights import check_method, is_stale
    from litgpt.formats.recognition import text_model
    from litgpt.formats.safetensors_file import described

    text = text_model(config_json)
    try:
        check_method(text)
    except ValueError:
        names = weight_files(repository.repo_id, repository.files, repository.read)
        shards = [name for name in names if not name.endswith(".index.json")]
        if all(name.endswith(".safetensors") for name in shards):
            try:
                tensors = (described(partial(repository.beginning, name)) for name in shards)
                if all(is_stale(text, shard) for shard in tensors):
                    return {key: value for key, value in text.items() if key != "quantization_config"}
            except HubError:
                raise
            except ValueError:  # of a damaged header
                pass
    return config_json


def check_adapter(repository: Repository, directory: Path, given: list[str]) -> None:
    """Says which model an adapter of PEFT's belongs to, and refuses options that only a model has.

    Raises:
        HubError: an option has no effect; its description is damaged; or another model is there in its place.
    """
    name = f"{repository.repo_id}/{ADAPTER_CONFIG}"
    try:
        base = parse_json_object(repository.read(ADAPTER_CONFIG), name).get("base_model_name_or_path")
    except HubError:
        raise
    except ValueError as error:
        raise HubError(str(error)) from None
    if given:
        raise HubError(
            f"{repository.repo_id} holds only an adapter (PEFT), which is taken as it is: {' and '.join(given)} would "
            "have no effect. Leave it out."
        )
    check_not_hidden(directory)
    belongs = f" It belongs to {base}." if isinstance(base, str) and base else ""
    print(f"{repository.repo_id} holds only an adapter (PEFT).{belongs}", file=sys.stderr, flush=True)


def known_instead(repository: Repository, model_name: str | None) -> KnownCheckpoint | None:
    """The known checkpoint whose figures stand in for a `config.json` that is missing or cannot be used."""
    if model_name:
        return find_known(model_name)
    return find_known(repository.repo_id) if "config.json" not in repository.files else None


def write_config_json(config: Config, architecture: str, directory: Path) -> None:
    """Describes a known model to every command that will load its files."""
    from litgpt.checkpoint import atomic_file
    from litgpt.formats.hf_config import config_to_hf

    # Whether the head is tied, the weights show: a head of its own is found there.
    content = config_to_hf(config, architecture) | {"tie_word_embeddings": True}
    with atomic_file(directory / "config.json") as path:
        path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def check_not_hidden(directory: Path) -> None:
    """Refuses to put weights next to a `lit_model.pth`, which may be another revision's and would be loaded instead."""
    converted = directory / "lit_model.pth"
    if converted.exists():
        raise HubError(
            f"'{converted}' exists, and every command would load it instead of what convert_checkpoint=false "
            "downloads. Remove it, or choose another `checkpoint_dir`."
        )


def converted_size(config: Config, weight_bytes: int, dtype: str | None) -> int:
    """Bytes of a model's `lit_model.pth`, where its downloaded weights have this many."""
    from litgpt.devices.dtypes import dtype_from_name
    from litgpt.sources.meta import shapes_of
    from litgpt.sources.source import HEAD

    shapes = {name: like for name, like in shapes_of(config).items() if not (config.tie_embeddings and name == HEAD)}
    parameters = sum(like.numel() for like in shapes.values())
    target = dtype_from_name(dtype)
    # Quantised weights have fewer bytes than two a parameter, and become bfloat16.
    original = 4 if weight_bytes > 3 * parameters else 2
    return parameters * (target.itemsize if target else original)
