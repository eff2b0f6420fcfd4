"""Matrices in the blocks of GGUF files: how near they are, what importances and odd values do, and where bits go."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from litgpt.export.gguf_kinds import KINDS, QUANTISED
from litgpt.quantization.block_search import quantised
from litgpt.quantization.blocks import FORMATS

WRITTEN = [name for name, form in FORMATS.items() if form.pack]
# Relative errors of normally distributed values; measured, and a hundredth more.
ERRORS = {
    "q4_0": 0.0822,
    "q4_1": 0.0708,
    "q5_0": 0.0408,
    "q5_1": 0.0342,
    "q8_0": 0.0054,
    "q4_k": 0.0711,
    "q5_k": 0.0351,
    "q6_k": 0.0175,
}


def values_of(raw: torch.Tensor, form: str) -> torch.Tensor:
    return FORMATS[form].dequantised(raw)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="module")
def normal() -> torch.Tensor:
    return torch.randn(192, 1024, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", WRITTEN)
def test_values_are_near(normal, form):
    scaled = normal * torch.logspace(-3, 3, len(normal))[:, None]  # each row has its scale
    raw = quantised(scaled, form)
    assert raw.dtype == torch.uint8
    assert raw.shape == (192, FORMATS[form].row_bytes(1024))
    found = values_of(raw, form) / torch.logspace(-3, 3, len(normal))[:, None]
    assert error(found, normal) < ERRORS[form]


@pytest.mark.parametrize("form", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_values_are_nearer_than_by_plain_rounding(normal, form):
    kind = Type[form.upper()]
    rounded = torch.from_numpy(gguf.dequantize(gguf.quantize(normal.numpy(), kind), kind))
    assert error(values_of(quantised(normal, form), form), normal) < 0.99 * error(rounded, normal)


@pytest.mark.parametrize("form", [form for form in WRITTEN if form != "q8_0"])
def test_columns_that_matter_are_nearer(normal, form):
    importance = torch.where(torch.arange(1024) % 8 == 3, 100.0, 1.0)
    plain, weighted = (values_of(quantised(normal, form, given), form) for given in (None, importance))
    matter = importance > 1
    assert error(weighted[:, matter], normal[:, matter]) < 0.8 * error(plain[:, matter], normal[:, matter])
    cost = importance.sqrt()
    assert error(weighted * cost, normal * cost) < 0.97 * error(plain * cost, normal * cost)


@pytest.mark.parametrize("form", WRITTEN)
def test_odd_values(form):
    """Zeros, constants, values of one sign, one large value among small ones, what 16 bits cannot hold."""
    x = torch.zeros(6, 256)
    x[1] = 0.75
    x[2] = torch.linspace(1, 2, 256)
    x[3, 17] = -8.0
    x[4] = 1e-9
    x[5] = 1e9
    without = values_of(quantised(x, form, torch.zeros(256)), form)  # columns that are given nothing
    torch.testing.assert_close(without[:5], values_of(quantised(x, form), form)[:5], rtol=0.1, atol=0.05)
    found = values_of(quantised(x, form), form)
    assert found.isfinite().all()
    assert (found[0] == 0).all()
    assert error(found[1], x[1]) < 2e-3
    assert error(found[2], x[2]) < 0.05
    assert error(found[3], x[3]) < 2e-2
    assert found[4].abs().max() < 1e-6
    assert quantised(torch.zeros(0, 256), form).shape == (0, FORMATS[form].row_bytes(256))


def kinds_of(kind: str, width: int = 2048, layers: int = 16, tied: bool = False) -> dict[str, Type]:
    shapes = {"token_embd": (320, width), "output": (320, width), "output_norm": (width,)}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.{layer}.{part}": (512, width) for layer in range(layers) for part in parts}
    return {name: KINDS[kind].stored(f"{name}.weight", shape, layers, tied) for name, shape in shapes.items()}


def test_mixtures_give_more_bits_where_they_count():
    found = kinds_of("q4_k_m")
    more = [name for name, kind in found.items() if kind == Type.Q6_K]
    layers = [0, 1, 4, 7, 10, 13, 14, 15]
    assert more == ["output", *(f"blk.{layer}.{part}" for layer in layers for part in ("attn_v", "ffn_down"))]
    assert {kind for name, kind in found.items() if name not in more} == {Type.Q4_K, Type.F32}
    found = kinds_of("q4_k_s")
    more = [name for name, kind in found.items() if kind == Type.Q5_K]
    assert more == ["blk.0.attn_v", "blk.0.ffn_down", "blk.1.attn_v", "blk.1.ffn_down", "blk.2.attn_v", "blk.3.attn_v"]
    assert kinds_of("q5_k_m")["blk.4.ffn_down"] == Type.Q6_K
    assert set(kinds_of("q6_k").values()) == {Type.Q6_K, Type.F32}
    assert kinds_of("q5_k_s", tied=True)["token_embd"] == Type.Q6_K
    assert kinds_of("q5_k_s")["token_embd"] == Type.Q5_K


@pytest.mark.parametrize("kind", QUANTISED)
def test_rows_that_are_no_whole_blocks_fall_back(kind):
    """To formats of 32 values with a bit more, and to 16 bits where that does not fit either."""
    wide, narrow = kinds_of(kind), kinds_of(kind, width=576)
    instead = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
    assert narrow == {name: instead.get(given, given) for name, given in wide.items()}
    assert set(kinds_of(kind, width=100).values()) == {Type.F16, Type.F32}
