"""Data sets on the Hugging Face Hub: which of their files hold a split, and fetching these."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from litgpt.checkpoint import atomic_file
from litgpt.cli.secret import Secret, reveal
from litgpt.cli.suggest import did_you_mean
from litgpt.cli.untrusted import parse_yaml
from litgpt.data.record_files import SUFFIXES, is_record_file
from litgpt.hub import HubError
from litgpt.hub.hub_error import clear_errors
from litgpt.hub.transfer import RemoteFile, Transfer

# The branch where the Hub keeps every data set as parquet: CONFIG/SPLIT/0000.parquet
CONVERTED = "refs/convert/parquet"
# What the files and folders of a split are called, after the rules of the Hub.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
DEFAULT_CONFIG = "default"
MAX_HEAD = 4 << 20  # characters of the YAML before a README
MANIFEST = ".source-{}.json"


@dataclass(frozen=True)
class DatasetFile(RemoteFile):
    """A file of a data set; `name` is the last part of its path."""

    path: str = ""


@dataclass(frozen=True)
class Wanted:
    """What of a data set is wanted."""

    repo_id: str
    splits: tuple[str, ...]
    """Names of splits, or patterns of paths such as train/*.jsonl"""
    config: str | None = None
    revision: str | None = None


def fetch_dataset(wanted: Wanted, directory: Path, access_token: Secret | str | None = None) -> dict[str, list[Path]]:
    """Gets the files of some splits into `directory`, where they are not there yet.

    Returns:
        The files of each split.

    Raises:
        HubError: No such data set, split or configuration, no access, no connection.
    """
    from huggingface_hub.utils import WeakFileLock

    if (found := fetched(wanted, directory)) is not None:
        return found
    directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(directory / ".lock"), _data_options():
        if (found := fetched(wanted, directory)) is not None:  # another process was quicker
            return found
        dataset = HubDataset(wanted.repo_id, wanted.revision, access_token)
        splits: dict[str, list[str]] = {}
        for split in wanted.splits:
            source, files = _find(dataset, split, wanted)
            source.fetch(files, directory)
            splits[split] = [file.path for file in files]
        manifest = {"wanted": _as_json(wanted), "splits": splits}
        with atomic_file(_manifest(wanted, directory)) as temporary:
            temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    return {split: [directory / path for path in paths] for split, paths in splits.items()}


def fetched(wanted: Wanted, directory: Path) -> dict[str, list[Path]] | None:
    """The files of each split that an earlier `fetch_dataset` got; None where there was none."""
    try:
        manifest = json.loads(_manifest(wanted, directory).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    splits = {split: [directory / path for path in paths] for split, paths in manifest["splits"].items()}
    return splits if all(path.is_file() for paths in splits.values() for path in paths) else None


class HubDataset:
    """A data set at one commit.

    Attributes:
        repo_id: `org/name`.
        commit: Its full hash.
        files: Its files by path.
    """

    def __init__(self, repo_id: str, revision: str | None, access_token: Secret | str | None) -> None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.hf_api import RepoFile

        self.repo_id, self.access_token = repo_id, access_token
        if constants.HF_HUB_OFFLINE:
            raise HubError(f"HF_HUB_OFFLINE is set, and the data set {repo_id} has not been downloaded yet.")
        revision = revision or "main"
        with clear_errors(f"datasets/{repo_id}", access_token, revision):
            api = HfApi(token=reveal(access_token))
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            self.commit = api.dataset_info(repo_id, revision=revision, timeout=timeout).sha
            tree = api.list_repo_tree(repo_id, recursive=True, revision=self.commit, repo_type="dataset")
            self.files = {
                entry.path: DatasetFile(
                    PurePosixPath(entry.path).name,
                    entry.size,
                    entry.lfs.sha256 if entry.lfs else entry.blob_id,
                    entry.path,
                )
                for entry in tree
                if isinstance(entry, RepoFile) and _is_safe(entry.path)
            }

    def fetch(self, files: Iterable[DatasetFile], directory: Path) -> None:
        """Gets files into a directory, each under its path; what is there and right already stays."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        files = list(files)
        headers = build_hf_headers(token=reveal(self.access_token), library_name="litgpt")
        total = sum(file.size for file in files)
        bar = tqdm(total=total, desc=self.repo_id, unit="B", unit_scale=True, delay=2, disable=None)

        def address(file: DatasetFile) -> str:
            return hf_hub_url(self.repo_id, file.path, repo_type="dataset", revision=self.commit)

        def obtain(file: DatasetFile) -> None:
            folder = (directory / file.path).parent
            folder.mkdir(parents=True, exist_ok=True)
            if not transfer.holds(folder, file):
                transfer.fetch(folder, file)

        with bar, clear_errors(f"datasets/{self.repo_id}", self.access_token):
            transfer = Transfer(address, headers, bar)
            transfer.each(obtain, files)

    def read(self, path: str) -> bytes:
        """The content of a small file."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.fetch([self.files[path]], Path(folder))
            return (Path(folder) / path).read_bytes()

    def of_split(self, split: str, config: str | None) -> list[DatasetFile]:
        """The files of a split: those of such a path, as the README declares, or by their names."""
        if "/" in split:
            return self._matching([split])
        declared = self._declared_configs()
        if declared:
            return self._matching(declared[self._choose(config, declared)].get(split, []))
        records = [path for path in self.files if is_record_file(path)]
        if config is not None:
            records = [path for path in records if config in PurePosixPath(path).parts[:-1]]
        named = {path: split_of(path) for path in records}
        found = [path for path, name in named.items() if name == split]
        if not found and split == "train" and not any(name == "train" for name in named.values()):
            found = [path for path, name in named.items() if name is None]  # files that name no split are for training
        return [self.files[path] for path in _one_kind(found)]

    def of_converted_split(self, split: str, config: str | None) -> list[DatasetFile]:
        """The files of a split in the branch of parquet files."""
        configs = {path.partition("/")[0] for path in self.files if path.endswith(".parquet")}
        if not configs:
            return []
        chosen = self._choose(config, dict.fromkeys(sorted(configs)))
        folders = (f"{chosen}/{split}/", f"{chosen}/partial-{split}/")
        return [file for path, file in sorted(self.files.items()) if path.startswith(folders)]

    def _declared_configs(self) -> dict[str, dict[str, list[str]]]:
        """The configurations that the README's head declares: patterns of paths by split."""
        if "README.md" not in self.files:
            return {}
        text = self.read("README.md").decode("utf-8", "replace")
        head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        try:
            content = parse_yaml(head[1], "README.md", "") if head and len(head[1]) < MAX_HEAD else None
            configs = (content.get("configs") if isinstance(content, dict) else None) or []
        except ValueError:
            return {}
        return {
            str(config.get("config_name", DEFAULT_CONFIG)): _patterns(config["data_files"])
            for config in configs
            if isinstance(config, dict) and "data_files" in config
        }

    def _choose(self, config: str | None, configs: dict[str, Any]) -> str:
        if config is None:
            return DEFAULT_CONFIG if DEFAULT_CONFIG in configs else next(iter(configs))
        if config not in configs:
            raise HubError(
                f"The data set {self.repo_id} has no configuration {config!r} (`name`)."
                f"{did_you_mean(config, configs)} It has: {', '.join(list(configs)[:20])}."
            )
        return config

    def _matching(self, patterns: list[str]) -> list[DatasetFile]:
        return [file for path, file in self.files.items() if any(_matches(path, pattern) for pattern in patterns)]


def split_of(path: str) -> str | None:
    """The split that a file's path names, the last part that does deciding; None for none."""
    for part in reversed(PurePosixPath(path).parts):
        stem = part.partition(".")[0]
        if shard := re.match(r"(\w+)-\d{5}-of-\d{5}", stem):
            return shard[1]
        words = re.split(r"[^a-z]+", stem.lower())
        for split, names in SPLIT_WORDS.items():
            if any(word in names for word in words):
                return split
    return None


def _find(dataset: HubDataset, split: str, wanted: Wanted) -> tuple[HubDataset, list[DatasetFile]]:
    """Where the files of a split are: in the data set itself, else in its branch of parquet files."""
    files = [file for file in dataset.of_split(split, wanted.config) if is_record_file(file.name)]
    if files:
        return dataset, files
    if "/" in split:
        raise HubError(f"The data set {wanted.repo_id} has no {split!r}.{did_you_mean(split, dataset.files)}")
    problem = f"The data set {wanted.repo_id} has no split {split!r} in files that can be read ({', '.join(SUFFIXES)})"
    if wanted.revision is not None:
        raise HubError(f"{problem} at revision {wanted.revision}.")
    try:
        converted = HubDataset(wanted.repo_id, CONVERTED, dataset.access_token)
    except HubError:
        raise HubError(f"{problem}, and no branch {CONVERTED}. It has: {_some(dataset.files)}.") from None
    files = converted.of_converted_split(split, wanted.config)
    if not files:
        splits = sorted({path.split("/")[1].removeprefix("partial-") for path in converted.files if "/" in path})
        raise HubError(f"{problem}.{did_you_mean(split, splits)} Its splits are: {', '.join(splits) or 'none'}.")
    return converted, files


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """README's `data_files`: one pattern, several, or {split, path} each."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    patterns: dict[str, list[str]] = {}
    for entry in entries:
        split, path = (entry.get("split"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        paths = path if isinstance(path, list) else [path]
        patterns.setdefault(str(split), []).extend(each for each in paths if isinstance(each, str))
    return patterns


def _matches(path: str, pattern: str) -> bool:
    return fnmatchcase(path, pattern) or fnmatchcase(path, pattern.replace("**/", ""))


def _one_kind(paths: list[str]) -> list[str]:
    """The same records may be there as parquet and as JSON: those of the first kind, parquet first."""
    for suffix in (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst"):
        if found := [path for path in paths if path.endswith(suffix)]:
            return sorted(found)
    return []


def _is_safe(path: str) -> bool:
    """Whether it names a file below a directory of ours."""
    parts = PurePosixPath(path).parts
    return not path.startswith("/") and ".." not in parts and not any("\\" in part or ":" in part for part in parts)


def _as_json(wanted: Wanted) -> dict[str, Any]:
    return {"repo_id": wanted.repo_id, "splits": wanted.splits, "config": wanted.config, "revision": wanted.revision}


def _manifest(wanted: Wanted, directory: Path) -> Path:
    """The note of what was fetched for such a wish; one directory may serve several."""
    digest = hashlib.sha256(json.dumps(_as_json(wanted), sort_keys=True).encode()).hexdigest()
    return directory / MANIFEST.format(digest[:12])


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


@contextmanager
def _data_options() -> Generator[None]:
    """The options that the hub's messages name are `--data.` options here."""
    try:
        yield
    except HubError as error:
        raise HubError(re.sub(r"\b(access_token|revision)(?=[`=])", r"data.\1", str(error))) from None
