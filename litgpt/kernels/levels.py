"""The instruction sets that the kernels are compiled for, and which of them this CPU has."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SWITCH = "LITGPT_CPU_LEVEL"


@dataclass(frozen=True)
class Level:
    """An instruction set: what a CPU must have for it, in the words of /proc/cpuinfo, and how a compiler is told."""

    name: str
    features: frozenset[str]
    flags: tuple[str, ...]


def _level(name: str, features: str, flags: str) -> Level:
    return Level(name, frozenset(features.split()), tuple(flags.split()))


_AVX2 = "-mavx2 -mfma -mf16c -mbmi2"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd"
LEVELS = {
    "x86_64": (  # from the lowest to the highest
        _level("v2", "sse4_2 ssse3 popcnt", "-msse4.2 -mpopcnt"),
        _level("avx2", "avx2 fma f16c bmi2", _AVX2),
        _level("avxvnni", "avx2 fma f16c bmi2 avx_vnni", f"{_AVX2} -mavxvnni"),
        _level("avx512", "avx2 fma f16c bmi2 avx512f avx512bw avx512dq avx512vl avx512cd", _AVX512),
        _level("avx512vnni", "avx512f avx512bw avx512dq avx512vl avx512cd avx512_vnni", f"{_AVX512} -mavx512vnni"),
        _level("avx512bf16", "avx512f avx512vl avx512_vnni avx512_bf16", f"{_AVX512} -mavx512vnni -mavx512bf16"),
        _level(
            "amx",
            "avx512f avx512vl avx512_vnni avx512_bf16 amx_tile amx_bf16",
            f"{_AVX512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16",
        ),
    ),
    "aarch64": (
        _level("neon", "asimd", "-march=armv8-a"),
        _level("dotprod", "asimd asimddp asimdhp", "-march=armv8.2-a+fp16+dotprod"),
    ),
}


def machine() -> str:
    """The architecture of the CPU: x86_64, aarch64 or another."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


@cache
def supported() -> tuple[Level, ...]:
    """The levels that this CPU has, from the lowest to the highest."""
    features = _features()
    return tuple(level for level in LEVELS.get(machine(), ()) if level.features <= features)


def chosen() -> Level | None:
    """The highest level that this CPU has, or the one of LITGPT_CPU_LEVEL; None where there is none, or that says none.

    Raises:
        ValueError: There is no such level, or this CPU does not have it.
    """
    levels, wanted = supported(), os.environ.get(SWITCH)
    if wanted == "none" or not levels:
        return None
    if not wanted:
        return levels[-1]
    for level in levels:
        if level.name == wanted:
            return level
    raise ValueError(
        f"{SWITCH}={wanted} is not supported on this CPU. Choose one of: "
        f"none, {', '.join(level.name for level in levels)}."
    )


def has_bf16_arithmetic() -> bool:
    """Whether the kernels of the chosen level multiply bfloat16 as such."""
    level = chosen()
    return level is not None and "avx512_bf16" in level.features


def _features() -> set[str]:
    if sys.platform == "darwin":
        names = ["machdep.cpu.features", "machdep.cpu.leaf7_features", "hw.optional.arm.FEAT_DotProd"]
        done = subprocess.run(["sysctl", "-n", *names], capture_output=True, text=True, check=False)
        words = {word.lower().replace(".", "_") for word in done.stdout.split()}
        return {"asimd", "asimdhp", "asimddp"} if machine() == "aarch64" and "1" in words else words | {"asimd"}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()
