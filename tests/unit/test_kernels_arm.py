"""The kernels for ARM, compiled and run on a CPU that is emulated: each kind of weight, and the functions."""

import shutil
import subprocess
from pathlib import Path

import pytest

from litgpt.kernels import build, levels

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
CPUS = {"neon": "cortex-a72", "dotprod": "max"}  # the first has no dot products: they would be illegal instructions


@pytest.mark.skipif(not (COMPILER and EMULATOR), reason="there is no g++-aarch64-linux-gnu, or no qemu-user")
@pytest.mark.parametrize("level", [pytest.param(level, id=level.name) for level in levels.LEVELS["aarch64"]])
def test_kernels_for_arm(level, tmp_path):
    program, source = tmp_path / "program", Path(__file__).with_name("arm_kernels.cpp")
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    command = [str(COMPILER), *flags, "-static", *level.flags, f"-I{build.FOLDER}", str(source), "-o", str(program)]
    subprocess.run([*command, "-lpthread"], check=True, timeout=250)
    command = [str(EMULATOR), "-cpu", CPUS[level.name], str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert (done.returncode, done.stdout) == (0, "0 failures\n"), done.stderr
