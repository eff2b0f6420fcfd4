"""The C++ kernels against the plain functions of PyTorch, at every instruction set that this CPU has."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from litgpt.kernels import build, levels, native
from litgpt.kernels.native import BLOCKS, INT4, INT8, TYPES, Matrix
from litgpt.quantization.blocks import FORMATS
from tests.unit.test_blocks import random_blocks

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="there is no C++ compiler")
needs_levels = pytest.mark.skipif(not levels.supported(), reason="there are no kernels for this CPU")
LEVELS = [pytest.param(level, marks=(needs_compiler, needs_levels), id=level.name) for level in levels.supported()]
# Sizes that are no multiples of vectors, of groups, and of the rows that are taken together.
SHAPES = [(192, 128), (130, 96), (37, 33), (1, 1), (16, 32), (75, 70)]
ROWS = [0, 1, 2, 3, 4, 5, 7, 16, 17, 33]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def use(folder, monkeypatch):
    """Has the kernels of a level used."""

    def use_level(level: levels.Level) -> None:
        monkeypatch.setenv("LITGPT_KERNELS_DIR", str(folder))
        monkeypatch.setattr(native, "_library", native.load(level))

    return use_level


def weights(shape: tuple[int, int]) -> dict[str, tuple[Matrix, Tensor, list[Tensor]]]:
    """One of each kind, what its values are, and the tensors that it is in."""
    weight = torch.randn(shape)
    made = {}
    for dtype, number in TYPES.items():
        values = weight.to(dtype)
        made[str(dtype)] = (Matrix(number, 0, *shape, values.data_ptr()), values.double(), [values])
    codes, scales = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0]).bfloat16()
    matrix = Matrix(INT8, TYPES[torch.bfloat16], *shape, codes.data_ptr(), scales.data_ptr())
    made["int8"] = (matrix, codes.double() * scales.double()[:, None], [codes, scales])
    blocks, groups = -(-shape[0] // 16), -(-shape[1] // 32)
    for dtype in (torch.float32, torch.bfloat16):
        bytes_ = torch.randint(0, 256, (blocks, groups, 4, 16, 4), dtype=torch.uint8)
        pairs = torch.randn(blocks, groups, 2, 16).to(dtype)
        values = torch.stack((bytes_ & 15, bytes_ >> 4), dim=3)  # (blocks, groups, 4, 2, 16, 4)
        values = values.permute(0, 4, 1, 2, 3, 5).reshape(blocks * 16, groups, 32).double() - 8
        scale, middle = pairs.double().permute(2, 0, 3, 1).reshape(2, blocks * 16, groups, 1)
        values = (values * scale + middle).flatten(1)[: shape[0], : shape[1]]
        matrix = Matrix(INT4, TYPES[dtype], *shape, bytes_.data_ptr(), pairs.data_ptr())
        made[f"int4 {dtype}"] = (matrix, values, [bytes_, pairs])
    return made


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item() if actual.numel() else 0.0


@pytest.mark.parametrize("level", LEVELS)
def test_linear_layers_of_every_kind(level, use):
    """In float32 they are float32's, with weights in 16 bits too; int4's inputs are rounded to 16 bits."""
    use(level)
    torch.manual_seed(0)
    for shape in SHAPES:
        for kind, (matrix, values, _kept) in weights(shape).items():
            for dtype, tolerance in ((torch.float32, 5e-5), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)):
                for rows in ROWS:
                    x = torch.randn(rows, shape[1]).to(dtype)
                    expected = x.double() @ values.T
                    for exact in (True, False):
                        bound = tolerance if exact or kind != "torch.bfloat16" else 4e-3
                        y = native.linear(matrix, x, exact)
                        assert (y.dtype, y.shape) == (dtype, expected.shape)
                        assert error(y, expected) < bound, (kind, shape, rows, dtype, exact)
                assert error(native.widened_product(matrix, x), expected) < max(tolerance, 4e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_the_blocks_of_gguf_files(level, use):
    """Widened they are exactly what they stand for; in products, inputs are rounded to 8 bits, in spans of 32."""
    use(level)
    torch.manual_seed(0)
    for form, number in BLOCKS.items():
        for rows_of_weight in (1, 37, 200):
            raw = random_blocks(form, rows_of_weight, 768 // FORMATS[form].values)
            values = FORMATS[form].dequantised(raw)
            matrix = Matrix(number, 0, rows_of_weight, 768, raw.data_ptr())
            assert torch.equal(native.widen(matrix, 0, rows_of_weight, torch.empty(values.shape)), values), form
            part = native.widen(matrix, rows_of_weight // 2, rows_of_weight, torch.empty(values.shape).bfloat16())
            assert torch.equal(part, values[rows_of_weight // 2 :].bfloat16()), form
            for dtype in TYPES:
                for rows in (0, 1, 2, 4, 7):
                    x = torch.randn(rows, 768).to(dtype)
                    spans = x.double().unflatten(1, (-1, 32))
                    step = spans.abs().amax(dim=2, keepdim=True) / 127
                    rounded = ((spans / step).round() * step).flatten(1)
                    sizes = rounded.abs() @ values.double().T.abs()
                    y = native.linear(matrix, x)
                    assert (y.dtype, y.shape) == (dtype, sizes.shape)
                    bound = {torch.float32: 1e-4, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
                    if dtype != torch.float16:  # in which some are infinite
                        assert not rows or ((y - rounded @ values.double().T).abs() / sizes).max() < bound, (form, rows)
    x = torch.randn(3, 768)
    x[1, 5] = torch.nan
    y = native.linear(matrix, x)
    assert y[[0, 2]].isfinite().all()
    assert not y[1].isfinite().any()
    x[1] = 0
    assert (native.linear(matrix, x)[1] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_finite_stays_so_in_its_row(level, use):
    use(level)
    for kind, (matrix, values, _kept) in weights((48, 70)).items():
        for wrong in (torch.nan, torch.inf):
            for rows in (3, 17):
                x = torch.randn(rows, 70)
                x[1, 5] = wrong
                y = native.linear(matrix, x)
                assert not y[1].isfinite().any(), kind
                rest = [0, *range(2, rows)]
                torch.testing.assert_close(y[rest].double(), x[rest].double() @ values.T, rtol=0.02, atol=0.05)


@needs_compiler
def test_a_long_row_is_added_up_in_float32(folder, use):
    """One large number among many small ones: to int4 those of its group are nothing, the other groups have scales of
    their own."""
    torch.manual_seed(0)
    use(levels.supported()[-1])
    x = torch.full((1, 4096), 1e-3)
    x[0, 7] = 1000.0
    for name, (matrix, values, _kept) in weights((32, 4096)).items():
        lost = float(1e-3 * values[:, :32].abs().sum(1).max()) if "int4" in name else 0
        found = native.linear(matrix, x, True).double()
        torch.testing.assert_close(found, x.double() @ values.T, rtol=1e-4, atol=0.05 + lost)


def test_the_level_is_capped_by_a_variable(monkeypatch):
    for level in levels.supported():
        monkeypatch.setenv(levels.SWITCH, level.name)
        assert levels.chosen() == level
    monkeypatch.setenv(levels.SWITCH, "none")
    assert levels.chosen() is None
    monkeypatch.setenv(levels.SWITCH, "sse1")
    if levels.supported():
        with pytest.raises(
            ValueError, match=r"LITGPT_CPU_LEVEL=sse1 is not supported on this CPU. Choose one of: none, "
        ):
            levels.chosen()


@needs_compiler
@needs_levels
def test_the_library_is_built_once_and_said_so(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_KERNELS_DIR", str(tmp_path))
    said: list[str] = []
    level = levels.supported()[0]
    path = build.library_path(level, said.append)
    assert said[0].startswith(f"Building litgpt's kernels for this CPU ({level.name}) with ")
    assert said[1].startswith("Built litgpt's kernels (")
    assert build.library_path(level, said.append) == path
    assert len(said) == 2
    assert [file.suffix for file in sorted(path.parent.iterdir())] == [".lock", ".so"]  # nothing half-made


def test_without_a_compiler_it_is_said_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_KERNELS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    level = levels.LEVELS["x86_64"][0]
    with pytest.raises(build.NoLibraryError, match=r"no C\+\+ compiler. Install g\+\+ or clang\+\+, or set CXX"):
        build.library_path(level, print)
    wrong = tmp_path / "g++"
    wrong.write_text("#!/bin/sh\necho 'a.h:1: error: nothing works' >&2\nexit 1\n")
    wrong.chmod(0o755)
    with pytest.raises(build.NoLibraryError, match=r"failed: a\.h:1: error: nothing works"):
        build.library_path(level, lambda text: None)


FORKED = """
import os, torch
from litgpt.kernels import native
from litgpt.kernels.native import Matrix
w, x = torch.randn(640, 64), torch.randn(2, 64)
matrix = Matrix(0, 0, 640, 64, w.data_ptr())
torch.set_num_threads(2)
def check():
    for _ in range(300):
        torch.testing.assert_close(native.linear(matrix, x), x @ w.T, rtol=1e-4, atol=1e-4)
check()
child = os.fork()
if child == 0:
    torch.set_num_threads(2)
    for _ in range(300):
        native.linear(matrix, x)
    os._exit(0)
check()
print(os.waitpid(child, 0)[1])
"""


@needs_compiler
@needs_levels
def test_a_forked_process_has_threads_of_its_own(folder):
    environment = {**os.environ, "LITGPT_KERNELS_DIR": str(folder), "PYTHONPATH": str(build.FOLDER.parents[1])}
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, env=environment, timeout=100)
    assert done.stdout.strip() == "0", done.stderr
