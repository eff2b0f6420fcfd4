"""The index of sharded weights, `model.safetensors.index.json`: which file holds which tensor."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from litgpt.cli.untrusted import FETCH_AGAIN, LARGE_BYTES, parse_json_object, read_bounded, shown


def read_weight_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by name, as a path below the directory of the index.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged, or names a file that is not in its directory.
    """
    return parse_weight_index(read_bounded(path, LARGE_BYTES), str(path))


def parse_weight_index(content: bytes, name: str) -> dict[str, str]:
    """The same from the content of an index; `name` is what errors call it."""
    weight_map = parse_json_object(content, name).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"'{name}' is not a valid weight index (it has no 'weight_map'). {FETCH_AGAIN}")
    for file in set(map(_file_name, weight_map.values())):
        if file is None or _leaves_directory(file):
            wrong = next(value for value in weight_map.values() if _file_name(value) == file)
            raise ValueError(
                f"'{name}' is not a valid weight index (it lists {shown(wrong)}, which is not a file in its directory)"
                f". {FETCH_AGAIN}"
            )
    return weight_map


def _file_name(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _leaves_directory(file: str) -> bool:
    """Whether a path is not one below a directory, on any system. A link there may lead away, as in the Hub's cache."""
    parts = PurePosixPath(file).parts, PureWindowsPath(file).parts
    is_absolute = PurePosixPath(file).is_absolute() or bool(PureWindowsPath(file).anchor)
    return not file.isprintable() or not parts[0] or is_absolute or any(".." in each for each in parts)
