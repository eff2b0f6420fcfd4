"""Sums of a file's parts, written with it, and compared before what is in it is used.

Disks, memory and networks change bits now and then, and nothing else notices: a weight with another exponent is still a
number. A `.pth` or `.bin` file carries a CRC-32 of each of its records, as every zip archive; torch writes it and
compares it neither when it maps a file nor when it reads it. Files that were written without sums pass unchecked.
"""

import os
import threading
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

_BLOCK = 4 * 2**20
_THREADS = 8  # CRC-32 goes at about 1 GB/s on a core: some cores keep up with a disk
_LOCAL_HEADER = 30


class CheckedPart(NamedTuple):
    """A piece of a file, and the CRC-32 that it was written with."""

    name: str
    offset: int
    size: int
    crc: int


class DamagedFile(ValueError):
    """A file is not as it was written."""


def check_archive(path: Path) -> None:
    """Compares the records of a `.pth` or `.bin` file with their sums, once in a process as long as it stays the same.

    It costs one pass over the file. Does nothing where the file has another format, or was written without sums
    (`torch.serialization.set_crc32_options(False)`).

    Raises:
        DamagedFile: Some bytes have changed, or the archive's directory cannot be read.
    """
    status = path.stat()
    _check_archive(path.resolve(), (status.st_ino, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1000)
def _check_archive(path: Path, version: tuple[int, int, int]) -> None:
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            # Without sums, all of them are 0. (torch compresses nothing; what is compressed, it decompresses itself.)
            stored = (record for record in archive.infolist() if record.compress_type == zipfile.ZIP_STORED)
            parts = [_part(record, file) for record in stored if record.CRC]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DamagedFile(f"it is damaged, the directory of its records cannot be read ({error})") from error
    check_parts(path, parts)


def _part(record: zipfile.ZipInfo, file: IO[bytes]) -> CheckedPart:
    """Where torch finds a record: behind the header before it, whose length is in that header."""
    file.seek(record.header_offset)
    header = file.read(_LOCAL_HEADER)
    name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    label = record.filename.partition("/")[2]  # what is before it is the archive's name
    return CheckedPart(label, record.header_offset + _LOCAL_HEADER + name + extra, record.file_size, record.CRC)


def check_parts(path: Path, parts: Iterable[CheckedPart]) -> None:
    """Compares parts of a file with their sums, on several cores.

    Raises:
        DamagedFile: Some differ; says how many, and names the first.
    """
    parts = sorted(parts, key=lambda part: part.offset)
    total = sum(part.size for part in parts)
    if total > path.stat().st_size:  # believed, they could take for ever
        raise DamagedFile("it is damaged, its parts overlap or are not all there")
    local = threading.local()
    files: list[FileIO] = []

    def differs(part: CheckedPart) -> bool:
        if not hasattr(local, "file"):
            local.file, local.buffer = path.open("rb", buffering=0), bytearray(_BLOCK)
            files.append(local.file)
        found = _sum_of(local.file, part, memoryview(local.buffer), bar)
        return found != part.crc

    threads = max(1, min(_THREADS, os.cpu_count() or 1, len(parts)))
    with (
        tqdm(total=total, desc=f"Checking {path.name}", unit="B", unit_scale=True, delay=2, disable=None) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            wrong = [part for part, bad in zip(parts, pool.map(differs, parts), strict=True) if bad]
        finally:
            pool.shutdown(cancel_futures=True)
            for file in files:
                file.close()
    if wrong:
        raise DamagedFile(_difference(wrong, len(parts)))


def _sum_of(file: FileIO, part: CheckedPart, buffer: memoryview, bar: tqdm) -> int | None:
    """The CRC-32 of a part; None where the file ends before."""
    file.seek(part.offset)
    found, left = 0, part.size
    while left:
        count = file.readinto(buffer[: min(left, len(buffer))])
        if not count:
            return None
        found = zlib.crc32(buffer[:count], found)
        left -= count
        bar.update(count)
    return found


def _difference(wrong: Sequence[CheckedPart], total: int) -> str:
    if len(wrong) == 1:
        return f"it is damaged, {wrong[0].name} is not as it was written"
    return f"it is damaged, {len(wrong)} of its {total} parts are not as they were written ({wrong[0].name}, ...)"
