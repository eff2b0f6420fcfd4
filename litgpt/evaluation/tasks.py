"""The tasks that lm-evaluation-harness has, and those of one's own: their index, and what they consist of."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import re
import sys
from collections.abc import Generator, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from litgpt.cli.suggest import did_you_mean

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # written in Python: slower
    from yaml import SafeLoader

INSTALL = (
    "Evaluating on tasks needs EleutherAI's lm-evaluation-harness: pip install 'litgpt[all]' or pip install lm_eval"
)
OWN = "perplexity"  # our task, which needs no harness
# The lines of a task's file that say what it is called; all others are read when it is wanted.
NAMING = re.compile(r"^[\"']?(?:task|group|tag|class|include)[\"']?[ \t]*:.*(?:\n(?:[ \t#-].*|[ \t]*))*", re.MULTILINE)
PLAIN = re.compile(r"(\w+): ([A-Za-z_][\w./-]*)\s*")
NO_NAMES = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")  # to YAML
FAULTY = (yaml.YAMLError, ValueError, OSError, KeyError, TypeError)  # what a file that is not a task raises
FILE_FORMATS = ("json", "csv", "parquet", "arrow", "text")  # what `datasets` reads without the Hub
REACHABLE_WITHIN = 5  # seconds


def require_harness() -> None:
    """Sees to it that the harness is there.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ImportError(INSTALL) from None


class TaskList:
    """Every task by name.

    Args:
        include_path: Folders of tasks of one's own, which win over the harness's.
    """

    def __init__(self, include_path: Sequence[Path] = ()) -> None:
        require_harness()
        for folder in include_path:
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"include_path={folder}: there is no such folder.")
        self.include_path = [Path(folder) for folder in include_path]

    @cached_property
    def own(self) -> dict[str, Any]:
        """The entries of `include_path`."""
        return index_of(self.include_path)

    @cached_property
    def all(self) -> dict[str, Any]:
        """All entries; those of one's own win."""
        import lm_eval.tasks

        return index_of([Path(lm_eval.tasks.__file__).parent]) | self.own

    def chosen(self, names: Iterable[str]) -> tuple[list[str], dict[str, Any]]:
        """What the user names, patterns such as mmlu_* resolved, and the entries that are needed for it.

        Raises:
            ValueError: There is no such task.
        """
        from lm_eval.tasks._index import Kind

        names = list(names)
        kinds = {Kind.TASK, Kind.PY_TASK}
        if all(name in self.own and self.own[name].kind in kinds for name in names):
            return names, self.own  # the harness's 14,000 files need not be read
        chosen: list[str] = []
        unknown = []
        for name in names:
            if name in self.all or (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
                chosen.append(name)
            elif any(sign in name for sign in "*?[") and (matches := fnmatch.filter(sorted(self.all), name)):
                chosen += matches
            else:
                unknown.append(f"There is no task {name!r}.{did_you_mean(name, [*self.all, OWN])}")
        if unknown:
            raise ValueError(
                " ".join(unknown) + " `litgpt evaluate --tasks list` shows all of them (filter=WORD some), "
                "include_path=DIR adds tasks of your own."
            )
        return list(dict.fromkeys(chosen)), self.all

    def load(self, names: Iterable[str]) -> dict[str, Any]:
        """The tasks and groups, with their data sets: what `TaskManager.load` of the harness gives.

        Raises:
            ValueError: There is no such task, a file is faulty, or a data set cannot be had.
        """
        from lm_eval.tasks import TaskManager

        chosen, entries = self.chosen(names)
        if not all(map(_is_local, (entries.get(name) for name in chosen))):
            _stay_offline_if_so()
        manager = TaskManager(include_defaults=False)
        manager._index = dict(entries)
        built = []
        for name in chosen:
            with _explained(name):
                built.append(manager._load_spec(name))
        parts = [part for item in built for part in (item if isinstance(item, list) else [item])]
        return dict(manager.load(parts))

    def print(self, words: Sequence[str] = ()) -> None:
        """Prints the index: name, kind and file; only lines that contain all the words."""
        import lm_eval.tasks

        root = Path(lm_eval.tasks.__file__).parent
        rows = []
        for name in sorted(self.all):
            entry = self.all[name]
            kind = entry.kind.name.lower().replace("py_task", "task")
            place = entry.yaml_path
            if place is None:
                where = f"{len(entry.tags)} tasks"
            else:
                where = str(place.relative_to(root) if place.is_relative_to(root) else place)
            rows.append((name, kind, where))
        rows.append((OWN, "task", "needs --data, and no harness"))
        rows = [row for row in rows if all(word.lower() in " ".join(row).lower() for word in words)]
        width = max((len(name) for name, _, _ in rows), default=0)
        sys.stdout.write("".join(f"{name:<{width}}  {kind:<5}  {where}\n" for name, kind, where in rows))


def print_tasks() -> None:
    """Prints the known tasks."""
    TaskList().print()


def index_of(folders: Iterable[Path]) -> dict[str, Any]:
    """The entries of all files below some folders: what the harness's own `TaskIndex.build` finds, in a twentieth of
    the time, as only the lines with names are read."""
    from lm_eval.tasks._index import TaskIndex

    index: dict[str, Any] = {}
    known: dict[Path, dict[str, Any]] = {}
    log = logging.getLogger("lm_eval.tasks._index")
    level = log.level
    log.setLevel(logging.ERROR)  # of names that are there twice, the first counts
    try:
        for folder in folders:
            entries: dict[str, Any] = {}
            for file in TaskIndex._iter_yaml_files(folder):
                with contextlib.suppress(*FAULTY):  # not every file is a task, nor whole
                    TaskIndex.process_cfg(dict(_names(file, known)), file, entries)
            index |= entries
    finally:
        log.setLevel(level)
    return index


def _names(file: Path, known: dict[Path, dict[str, Any]], above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The naming settings of a file and of those that it includes."""
    if file in above:
        raise ValueError(f"{file} includes itself.")
    if file not in known:
        text = file.read_text(encoding="utf-8")
        settings = _parsed(NAMING.findall(text) or [text])  # or it is written in braces
        includes = settings.pop("include", [])
        merged: dict[str, Any] = {}
        for include in includes if isinstance(includes, list) else [includes]:
            merged |= _names(Path(os.path.normpath(file.parent / include)), known, (*above, file))
        known[file] = merged | settings
    return known[file]


def _parsed(blocks: Sequence[str]) -> dict[str, Any]:
    """The settings in some blocks of YAML."""
    plain = [PLAIN.fullmatch(block) for block in blocks]
    if all(match and match[2].lower() not in NO_NAMES for match in plain):  # so are most: ten times as fast
        return {match[1]: match[2] for match in plain if match}
    text = "".join(f"{block}\n" for block in blocks)
    # Only the harness's own loader knows this tag, and imports what it names.
    return yaml.load(text.replace("!function ", "!!str "), Loader=SafeLoader) or {}


def _is_local(entry: Any) -> bool:
    """Whether a task reads nothing but files of this machine."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if entry is None or entry.yaml_path is None:
        return False
    with contextlib.suppress(*FAULTY):
        settings = load_yaml(entry.yaml_path, resolve_func=False)
        path = str(settings.get("dataset_path") or "")
        return path in FILE_FORMATS or Path(path).exists() or "custom_dataset" in settings
    return False


def _stay_offline_if_so() -> None:
    """Has the Hub's libraries look only for what is here, if the Hub cannot be reached: each would try for minutes."""
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE"):
        return
    import urllib.error
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=REACHABLE_WITHIN).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError):
        print(f"{endpoint} cannot be reached: only data sets that are on this machine.", file=sys.stderr, flush=True)
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        for module, name in (("huggingface_hub.constants", "HF_HUB_OFFLINE"), ("datasets.config", "HF_HUB_OFFLINE")):
            if module in sys.modules:  # it has looked at the environment already
                setattr(sys.modules[module], name, True)


@contextlib.contextmanager
def _explained(task: str) -> Generator[None, None, None]:
    """Says of a task that cannot be loaded which it is, and what helps."""
    try:
        yield
    except (MemoryError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        raise ImportError(
            f"Task {task} needs the Python package {(error.name or '').partition('.')[0]!r}: pip install it."
        ) from error
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        module = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError) or module in ("datasets", "huggingface_hub", "requests", "httpx", "fsspec"):
            raise ValueError(
                f"Task {task}: its data set cannot be had ({cause}). With a network it is fetched once; to have it "
                "without one, load it where there is one and bring the cache along (HF_HOME=DIR, "
                "HF_DATASETS_OFFLINE=1), or give a copy of the task that reads local files (include_path=DIR)."
            ) from error
        raise ValueError(f"Task {task} cannot be loaded ({cause}).") from error
