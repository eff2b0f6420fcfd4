"""The library of kernels as a file: prebuilt in the package, or built once per machine and kept in the cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from litgpt.cli.resources import cache_directory
from litgpt.kernels.levels import Level, machine

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "library.cpp"
PREBUILT = FOLDER / "prebuilt"
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w"),
]
FOLDER_VARIABLE = "LITGPT_KERNELS_DIR"
PRIORITY = 10  # niceness of the compiler


class NoLibraryError(Exception):
    """There is no library of kernels; says why."""


def library_path(level: Level, say: Callable[[str], None]) -> Path:
    """The library for a level; it is built where it is not there.

    Args:
        level: The instruction set.
        say: Is told that it is being built.

    Raises:
        NoLibraryError: There is none, and it cannot be built.
    """
    prebuilt = _prebuilt(level)
    if prebuilt.is_file():
        return prebuilt
    compiler = find_compiler()
    if compiler is None:
        raise NoLibraryError("there is no C++ compiler. Install g++ or clang++, or set CXX")
    path = _built(level, compiler)
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.is_file():
                    _announced_build(compiler, level, path, say)
    except OSError as error:
        raise NoLibraryError(f"it cannot be built: {error}") from error
    return path


def is_built(level: Level) -> bool:
    """Whether the library for a level is there, or cannot be."""
    compiler = find_compiler()
    return _prebuilt(level).is_file() or compiler is None or _built(level, compiler).is_file()


def _prebuilt(level: Level) -> Path:
    return PREBUILT / f"{machine()}-{level.name}.so"


def _built(level: Level, compiler: str) -> Path:
    folder = os.environ.get(FOLDER_VARIABLE) or cache_directory() / "kernels"
    return Path(folder).expanduser() / f"{level.name}-{_digest(level, compiler)}.so"


def find_compiler() -> str | None:
    """The C++ compiler: that of the variable CXX, g++ or clang++."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if found := shutil.which(name):
            return found
    return None


def build(compiler: str, level: Level, path: Path) -> None:
    """Compile the library for a level into a file, which is there whole or not at all.

    Raises:
        NoLibraryError: The compiler fails; says how.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    command = [compiler, *FLAGS, *level.flags, str(SOURCE), "-o", str(temporary), "-lpthread"]
    if nice := shutil.which("nice"):
        command = [nice, "-n", str(PRIORITY), *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise NoLibraryError(f"{Path(compiler).name} failed: {lines[0].strip() if lines else done.returncode}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sources() -> list[Path]:
    """The files that the library is built from."""
    return sorted([*FOLDER.glob("*.h"), SOURCE])


def _announced_build(compiler: str, level: Level, path: Path, say: Callable[[str], None]) -> None:
    say(f"Building litgpt's kernels for this CPU ({level.name}) with {Path(compiler).name}, once: some seconds.")
    began = time.monotonic()
    build(compiler, level, path)
    say(f"Built litgpt's kernels ({time.monotonic() - began:.0f} s).")


def _digest(level: Level, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = [*FLAGS, *level.flags, compiler, version, machine(), sys.platform]
    digest = hashlib.sha256("\n".join(parts).encode())
    for file in sources():
        digest.update(file.read_bytes())
    return digest.hexdigest()[:24]


@contextmanager
def _locked(path: Path) -> Generator[None]:
    """Let one process at a time in, where the system can do it."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
