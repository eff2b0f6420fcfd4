"""Whether a directory in the cache still is as it was written.

Beside its files lies `sums.json`: their sizes, and the CRC-32 of each 64 MB of them. Directories of before there were
sums have none, and pass.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from litgpt.checkpoint.sums import CheckedPart, DamagedFile, check_parts

SUMS_FILE = "sums.json"
_PART = 64 * 2**20  # several cores look at a large file
_BLOCK = 1 << 20


def write_sums(directory: Path) -> None:
    """Write down the sums of all files in a directory, which are complete."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != SUMS_FILE)
    sums = {str(path.relative_to(directory)): [path.stat().st_size, _sums_of(path)] for path in files}
    (directory / SUMS_FILE).write_text(json.dumps(sums), encoding="utf-8")


def damage_in(directory: Path) -> str | None:
    """What differs from when the directory was written; None where nothing does, or no sums were written with it.

    It reads the files once.
    """
    try:
        sums = json.loads((directory / SUMS_FILE).read_text(encoding="utf-8"))
        for name, (size, values) in sums.items():
            path = directory / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes, not {size:,}"
            starts = range(0, size, _PART)
            parts = zip(starts, values, strict=True)
            check_parts(path, [CheckedPart(name, start, min(_PART, size - start), value) for start, value in parts])
    except FileNotFoundError as error:
        name = Path(error.filename).name
        return None if name == SUMS_FILE else f"{name} is missing"
    except DamagedFile as error:
        return str(error).removeprefix("it is damaged, ")
    except (ValueError, TypeError, AttributeError) as error:  # of what is no longer JSON, or no longer this form
        return f"{SUMS_FILE} is not as it was written ({error})"
    return None


def is_whole(directory: Path, last: str, what: str) -> bool:
    """Whether a directory is there with its file `last`, and as it was written; says so where it is damaged.

    Args:
        directory: In the cache.
        last: A file that it has in any case.
        what: What to call it.
    """
    if not (directory / last).is_file():
        return False
    damage = damage_in(directory)
    if damage:
        print(f"The {what} {directory} is damaged ({damage}): it is made again.", flush=True)
    return damage is None


def sum_of(files: Iterable[Path]) -> str:
    """8 hexadecimal digits that files of another content change."""
    found = 0
    for path in files:
        for value in _sums_of(path):
            found = zlib.crc32(value.to_bytes(4, "little"), found)
    return f"{found:08x}"


def _sums_of(path: Path) -> list[int]:
    values, left = [], 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            if not left:
                values.append(0)
                left = _PART
            values[-1] = zlib.crc32(block, values[-1])
            left -= len(block)
    return values
