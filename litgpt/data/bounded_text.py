"""Text from files of data by strangers, within bounds on memory: line by line, row by row, or whole.

A megabyte can unpack to tens of gigabytes, and a line need not end: what is read at once has a limit.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from litgpt.data.compressed_files import BLOCK_BYTES, COMPRESSIONS, open_bytes, reading
from litgpt.data.text_encoding import encoding_of, not_text

MAX_RECORD = 256 << 20
"""Characters (or bytes, where a file is read as bytes) of one record; a book has a million."""
MAX_RECORD_VALUES = 16_000_000
"""Values in one record, each of which takes up to a hundred bytes of memory."""
MIN_WHOLE_BYTES = 1 << 30
WHOLE_PART = 8  # of the memory: the text, its bytes and the objects made of it are there at the same time
BYTES_PER_VALUE = 24  # on average over a whole file of the largest size


def open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """The text in a file, decompressed if need be, in the encoding that its mark says."""
    with reading(path):
        return io.TextIOWrapper(open_bytes(path), encoding=encoding_of(path), newline=newline)


def lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a file, their ends included.

    Raises:
        ValueError: One is longer than a record may be, is no text, or the file is damaged.
    """
    number = 1
    with reading(path), open_text(path, newline) as file:
        try:
            while line := file.readline(MAX_RECORD + 1):
                if len(line) > MAX_RECORD:
                    raise too_long(path, f"line {number:,}")
                yield line
                number += 1
        except UnicodeDecodeError as error:
            raise not_text(path, error) from None


def too_long(path: Path, place: str, unit: str = "characters") -> ValueError:
    """The error of a record that is longer than a record may be."""
    return ValueError(
        f"{path}, {place}: one record has more than {MAX_RECORD:,} {unit}, which is the limit. Split it into several "
        "records; in a .jsonl file, each must stand on a line of its own."
    )


def whole_text(path: Path) -> str:
    """The text of a file whose form has it read whole.

    Raises:
        ValueError: It has more bytes than the memory has room for, is no text, or is damaged.
    """
    limit, content = max_whole_bytes(), bytearray()
    if path.suffix not in COMPRESSIONS and path.stat().st_size > limit:
        raise too_large(path, limit)
    with reading(path), open_bytes(path) as file:
        while block := file.read(BLOCK_BYTES):
            content += block
            if len(content) > limit:
                raise too_large(path, limit)
    try:
        return content.decode(encoding_of(path))
    except UnicodeDecodeError as error:
        raise not_text(path, error) from None


def max_whole_bytes() -> int:
    """How many bytes a file may have, unpacked, that is read whole: a part of the memory, at least a GiB."""
    import torch

    from litgpt.devices.memory import memory_present

    return max(MIN_WHOLE_BYTES, (memory_present(torch.device("cpu")) or 0) // WHOLE_PART)


def too_large(path: Path, limit: int) -> ValueError:
    """The error of a file that is larger than what may be read whole."""
    unpacked = {".gz": "gzip -dc", ".zst": "zstd -dc"}.get(path.suffix, "cat")
    name = path.with_suffix("").name if path.suffix in COMPRESSIONS else path.name
    return ValueError(
        f"{path}: more than {limit:,} bytes{' when unpacked' if path.suffix in COMPRESSIONS else ''}. A .json file is "
        f"read whole, and that is the limit for one on this machine (1/{WHOLE_PART} of its memory, at least "
        f"{MIN_WHOLE_BYTES >> 30} GiB). A .jsonl file, with a record on each line, can be of any size; to make one of "
        f"a list: {unpacked} {path.name} | jq -cn --stream 'fromstream(1|truncate_stream(inputs))' > "
        f"{Path(name).stem}.jsonl"
    )
