"""Files from the Hugging Face Hub: which ones a checkpoint needs, and fetching them.

The hub's address comes from `HF_ENDPOINT`, a token from `--access_token`, `HF_TOKEN` or the client's own login.
"""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

# Everything that a tokenizer, a prompt style and a converted checkpoint's description may need.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "tekken.json",
    "chat_template*",
    "generation_config.json",
    "config.json",
)
# Of the forms that weights come in, the first that a repository has: safetensors execute nothing and load by mmap.
WEIGHT_FORMS = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
INDEX = ".index.json"


class HubError(ValueError):
    """What was asked for cannot be had from the hub; the message says why and what to do."""


def download_files(
    repo_id: str,
    dir: Path,
    *,
    tokenizer_only: bool = False,
    access_token: str | None = None,
    revision: str | None = None,
) -> Path:
    """Fetch the files that a checkpoint needs, and nothing else of its repository.

    A new directory appears under its name only once it is complete; until then the files gather in a hidden sibling,
    where a second attempt finds the finished ones. In a directory that exists, files that are up to date stay.

    Args:
        repo_id: `org/name` on the hub.
        dir: The checkpoint's own directory.
        tokenizer_only: Leave out the weights.
        access_token: For gated and private repositories.
        revision: A branch, tag or commit; the newest commit of the main branch by default.

    Returns:
        `dir`.

    Raises:
        HubError: no such repository or revision, no access, no weights in a known form, or no connection.
    """
    from huggingface_hub import HfApi, hf_hub_download

    dir = Path(dir)
    gathering = dir if dir.exists() else dir.with_name(f".{dir.name}.partial")
    with clear_errors(repo_id, access_token):
        commit = HfApi(token=access_token).model_info(repo_id, revision=revision or "main").sha
        names = list(_file_names(repo_id, commit, access_token))

        def fetch(name: str) -> Path:
            return Path(hf_hub_download(repo_id, name, revision=commit, token=access_token, local_dir=gathering))

        wanted = tokenizer_files(names)
        if not tokenizer_only:
            weights = weight_files(repo_id, names)
            indexes = [name for name in weights if name.endswith(INDEX)]
            wanted += weights + [shard for index in indexes for shard in _shards(fetch(index), names)]
        elif not wanted:
            raise HubError(f"{repo_id} has no tokenizer files.")
        for name in dict.fromkeys(wanted):
            fetch(name)
        if gathering != dir:
            os.replace(gathering, dir)
    return dir


def _file_names(repo_id: str, commit: str | None, access_token: str | None) -> Iterator[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    for entry in HfApi(token=access_token).list_repo_tree(repo_id, revision=commit, recursive=True):
        if isinstance(entry, RepoFile):
            yield entry.path


def tokenizer_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those of the tokenizer, and the small ones that say how to use the model."""
    return [name for name in names if any(fnmatch(name, pattern) for pattern in TOKENIZER_FILES) and "/" not in name]


def weight_files(repo_id: str, names: Iterable[str]) -> list[str]:
    """Of a repository's files, those that hold the weights; for sharded weights, the index that lists the shards.

    Raises:
        HubError: no weights in a form that can be loaded.
    """
    names = [name for name in names if "/" not in name]
    for whole, index, pattern in WEIGHT_FORMS:
        if index in names:
            return [index]
        if whole in names:
            return [whole]
        others = [name for name in names if fnmatch(name, pattern)]
        if others:
            return others
    if any(name.endswith(".gguf") for name in names):
        raise HubError(
            f"{repo_id} holds GGUF files only. Download one of them and run `litgpt convert_to_litgpt FILE.gguf`."
        )
    raise HubError(f"{repo_id} holds no weights as .safetensors or pytorch_model.bin. It has: {', '.join(names[:20])}")


def _shards(index: Path, names: list[str]) -> list[str]:
    """The shards that an index lists."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (KeyError, ValueError, AttributeError):
        raise HubError(f"{index.name} of the repository is not an index of weights.") from None
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise HubError(f"{index.name} lists files that the repository lacks: {', '.join(missing)}")
    return shards


@contextmanager
def clear_errors(repo_id: str, access_token: str | None) -> Iterator[None]:
    """Turn the hub client's errors into messages that say what to do."""
    from huggingface_hub import constants, errors

    # Base of a lost connection's errors as well; which HTTP library it is from depends on the client's version.
    http_error = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    page = f"{constants.ENDPOINT}/{repo_id}"
    try:
        yield
    except errors.GatedRepoError:
        raise HubError(_gated(repo_id, page, access_token)) from None
    except errors.RepositoryNotFoundError as error:
        raise HubError(_not_found(repo_id, error.response.status_code, access_token)) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{repo_id} has no such revision. Its branches and tags: {page}/tree/main") from None
    except errors.HFValidationError:
        raise HubError(
            f"{repo_id!r} is no repository id: expected org/name, as `litgpt download list` shows."
        ) from None
    except errors.OfflineModeIsEnabled:
        raise HubError(f"{repo_id} is needed from the hub, but HF_HUB_OFFLINE is set. Unset it to download.") from None
    except errors.HfHubHTTPError as error:
        raise HubError(_refused(repo_id, page, error.response.status_code, access_token)) from None
    except (http_error, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise HubError(
            f"{repo_id} cannot be downloaded: no connection to {constants.ENDPOINT} ({_cause(error)}). Check the "
            "network (and HF_ENDPOINT, HTTPS_PROXY); the same command goes on where this one stopped."
        ) from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HubError(
                f"The disk is full: {repo_id} does not fit. Free some space and run the same command again, or choose "
                "another place with --checkpoint_dir."
            ) from None
        raise


def _gated(repo_id: str, page: str, access_token: str | None) -> str:
    steps = f"accept its terms on {page}, then pass a token of that account as --access_token or in HF_TOKEN."
    if access_token or os.environ.get("HF_TOKEN"):
        return f"{repo_id} is gated, and the account of this access token has no access: {steps}"
    return f"{repo_id} is gated: {steps}"


def _not_found(repo_id: str, status: int, access_token: str | None) -> str:
    from litgpt.models import known_checkpoints
    from litgpt.suggest import did_you_mean

    hint = did_you_mean(repo_id, known_checkpoints())
    private = "" if access_token else " If it is private, pass --access_token or set HF_TOKEN."
    return f"There is no repository {repo_id!r} on the hub (answer {status}).{hint}{private}"


def _refused(repo_id: str, page: str, status: int, access_token: str | None) -> str:
    if status in (401, 403):
        said = "does not accept this access token" if access_token else "wants an access token"
        return f"{repo_id}: the hub {said} (answer {status}). Pass a valid one as --access_token or in HF_TOKEN."
    return f"{repo_id} cannot be downloaded: the hub answers {status}. Try again later, or look at {page}."


def _cause(error: BaseException) -> str:
    """The innermost reason."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__
    return str(error) or type(error).__name__
