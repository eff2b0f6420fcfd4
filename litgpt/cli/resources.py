"""Recipes that travel with the package: `config_hub/...` works wherever litgpt is installed. And the user's cache."""

import os
from pathlib import Path

# In a wheel the recipes lie inside the package; in a source tree next to it.
_PACKAGE = Path(__file__).parents[1]
_PLACES = (_PACKAGE / "config_hub", _PACKAGE.parent / "config_hub")


def config_hub() -> Path | None:
    """The directory of packaged recipes, or None where there is none."""
    return next((place for place in _PLACES if place.is_dir()), None)


def cache_directory() -> Path:
    """Where prepared data and compiled code lie: LITGPT_CACHE_DIR, else `litgpt` in the user's cache directory."""
    if chosen := os.environ.get("LITGPT_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "litgpt"


def find_file_or_folder(path: str | Path) -> Path:
    """As `find`, of what is read more than once: not a pipe or a device.

    Raises:
        ValueError: it is neither a file nor a folder.
    """
    found = find(path)
    if not found.is_file() and not found.is_dir():
        raise ValueError(
            f"{path} is neither a file nor a folder. Data is read more than once: write it to a file first."
        )
    return found


def find(path: str | Path) -> Path:
    """Locate a file: `path` as given if it exists, else the same path inside the packaged `config_hub`.

    Both `config_hub/pretrain/quickstart.yaml` and `pretrain/quickstart.yaml` are found there.

    Raises:
        FileNotFoundError: in neither place; the message names packaged files that look alike.
    """
    given = Path(path).expanduser()
    if given.exists():
        return given
    hub = config_hub()
    if hub is not None and not given.is_absolute():
        parts = given.parts[1:] if given.parts[:1] == ("config_hub",) else given.parts
        packaged = hub.joinpath(*parts)
        if parts and ".." not in parts and packaged.exists():
            return packaged
    raise FileNotFoundError(f"There is no file {str(path)!r} here or among the packaged recipes.{_alike(given, hub)}")


def _alike(path: Path, hub: Path | None) -> str:
    """A did-you-mean over the packaged recipes: first by file name, then by the whole path."""
    from litgpt.cli.suggest import did_you_mean

    if hub is None:
        return ""
    recipes = sorted(f"config_hub/{file.relative_to(hub).as_posix()}" for file in hub.rglob("*.yaml"))
    same_name = [recipe for recipe in recipes if recipe.rpartition("/")[2] == path.name]
    if same_name:
        return f" Did you mean {' or '.join(map(repr, same_name[:3]))}?"
    return did_you_mean(path.as_posix(), recipes)
