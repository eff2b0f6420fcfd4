"""Files compressed with gzip (.gz) or Zstandard (.zst), as streams of what is in them."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

if TYPE_CHECKING:
    import zstandard
    from _typeshed import WriteableBuffer

COMPRESSIONS = (".gz", ".zst")
BLOCK_BYTES = 1 << 18  # of what is in a file, read at a time
# 4 KiB of what a hostile file holds can become 128 MiB: blocks of 4 bytes that say "128 KiB of zeros".
INPUT_BYTES = 1 << 12
MAX_WINDOW = 1 << 27  # what the program zstd accepts without being asked to


def open_bytes(path: Path) -> io.BufferedReader | gzip.GzipFile:
    """The bytes in a file, decompressed if its name ends in .gz or .zst.

    Reading raises what the library raises for a damaged file, and EOFError where it is cut off.
    """
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(ZstandardFile(path), BLOCK_BYTES)
    return open(path, "rb")


def compressed_position(stream: io.BufferedReader | gzip.GzipFile) -> int:
    """How many bytes on the disk a stream of `open_bytes` has read."""
    if isinstance(stream, gzip.GzipFile):
        return cast("BinaryIO", stream.fileobj).tell()  # opened by its path, so a file
    raw = getattr(stream, "raw", None)
    return raw.compressed_position() if isinstance(raw, ZstandardFile) else stream.tell()


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Names the file in the errors of the libraries that decompress and read it."""
    try:
        yield
    except (ValueError, FileNotFoundError, PermissionError) as error:
        if not type(error).__module__.startswith("pyarrow"):
            raise
        raise _damaged(path, error) from None
    except Exception as error:
        library = type(error).__module__.startswith(("pyarrow", "zstd", "zstandard"))
        # pyarrow raises an OSError without a number for a damaged page
        unnumbered = isinstance(error, OSError) and error.errno is None
        if library or unnumbered or isinstance(error, EOFError | zlib.error):
            raise _damaged(path, error) from None
        raise


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = str(error).partition("\n")[0][:200]
    return ValueError(f"{path} is damaged or cut off ({reason}). Fetch it again.")


class ZstandardFile(io.RawIOBase):
    """The frames of a .zst file, one after the other. The library's own stream says nothing of one that is cut off."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ValueError(
                f"{path} is compressed with Zstandard; reading it needs: pip install zstandard (or litgpt[all])."
            ) from error
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj
        self._file = open(path, "rb")  # noqa: SIM115
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._waiting, self._text = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        into = memoryview(buffer).cast("B")
        while not self._text:
            block, self._waiting = self._waiting or self._file.read(INPUT_BYTES), b""
            if not block:
                if self._frame is not None:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            frame = self._frame or self._new_frame()
            self._text = memoryview(frame.decompress(block))
            self._frame, self._waiting = (None, frame.unused_data) if frame.eof else (frame, b"")
        size = min(len(into), len(self._text))
        into[:size] = self._text[:size]
        self._text = self._text[size:]
        return size

    def compressed_position(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
