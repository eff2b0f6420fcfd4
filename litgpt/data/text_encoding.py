"""In which encoding a file's text is, and what to say of a file whose content is no text that can be read."""

from __future__ import annotations

import codecs
from pathlib import Path

from litgpt.data.compressed_files import open_bytes

# The marks that a text may begin with; UTF-32's begins with UTF-16's.
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What files begin with that hold no text, and what they are.
BINARY = (
    (b"ARROW1", "an Arrow file (.arrow)"),
    (b"\xff\xff\xff\xff", "an Arrow file (.arrow)"),
    (b"PAR1", "a parquet file (.parquet)"),
    (b"\x1f\x8b", "compressed with gzip (.gz)"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard (.zst)"),
    (b"PK\x03\x04", "a ZIP archive (.zip, .xlsx, .docx)"),
    (b"%PDF", "a PDF document"),
    (b"SQLite format 3", "an SQLite database"),
)
HEAD_BYTES = 1 << 12


def encoding_of(path: Path) -> str:
    """The encoding that a text file's mark says; UTF-8 where there is none."""
    with open_bytes(path) as file:
        head = file.read(4)
    return next((encoding for mark, encoding in MARKS if head.startswith(mark)), "utf-8")


def not_text(
    path: Path, error: UnicodeDecodeError | None = None, byte: int | None = None, line: int | None = None
) -> ValueError:
    """What is wrong with a file that cannot be read as text, and what to do.

    Args:
        path: The file.
        error: What its bytes fail with in UTF-8.
        byte, line: Where they do.
    """
    with open_bytes(path) as file:
        head = file.read(HEAD_BYTES)
    for beginning, kind in BINARY:
        if head.startswith(beginning):
            return ValueError(
                f"{path} is not text: it is {kind}. Unpack it, or export what is in it. Records to finetune on are "
                "read from .parquet, .arrow, .csv and .jsonl files (data=JSON data.json_path=FILE); text to "
                "pretrain on from .txt files, and by `litgpt prepare_dataset` from .parquet and .jsonl files."
            )
    encoding = next((encoding for mark, encoding in MARKS if head.startswith(mark)), None)
    nulls = (head[0::2].count(0) * 4 > len(head), head[1::2].count(0) * 4 > len(head))
    if encoding is None and any(nulls):
        encoding = {(False, True): "utf-16le", (True, False): "utf-16be"}.get(nulls)
        if encoding is None:
            return ValueError(f"{path} is not text: it is binary data of an unknown kind.")
    if encoding not in (None, "utf-8-sig"):
        return ValueError(f"{path} is text in {encoding.upper()}, not in UTF-8. {_convert(path, encoding)}")
    where = "" if error is None else f" ({error.reason}{'' if byte is None else f' at byte {byte:,}'})"
    place = path if line is None else f"{path}, line {line:,}"
    return ValueError(
        f"{place} is not UTF-8 text{where}. Convert it from the encoding that it was written in; of older Western "
        f"European files from Windows: {_convert(path, 'cp1252').partition(': ')[2]}"
    )


def _convert(path: Path, encoding: str) -> str:
    new = path.with_name(f"{path.stem}-utf8{path.suffix}").name
    return f"Convert it: iconv -f {encoding.upper()} -t UTF-8 {path} > {new}"
