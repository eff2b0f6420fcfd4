"""Damage as disks do it."""

from pathlib import Path


def flip(path: Path, place: int, bit: int = 3) -> None:
    """Flips a bit of the byte at a place in a file (from its end where that is negative)."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)
