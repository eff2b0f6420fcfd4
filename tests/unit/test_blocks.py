"""The blocks of GGUF files: what they stand for is what the `gguf` package says, and packing is the way back."""

import gguf
import numpy as np
import pytest
import torch

from litgpt.quantization.blocks import FORMATS


def random_blocks(name: str, rows: int = 7, blocks: int = 3) -> torch.Tensor:
    """(rows, bytes) any bytes at all, but for the numbers in 16 bits, which are no infinities."""
    form, generator = FORMATS[name], np.random.default_rng(0)
    raw = generator.integers(0, 256, (rows, blocks * form.bytes), dtype=np.uint8)
    raw = torch.from_numpy(raw)
    for place in SIXTEEN_BITS[name]:
        at = torch.arange(blocks) * form.bytes + place
        raw[:, at + 1] &= 0b10111011  # the largest exponent is that of infinity
    return raw


# Where in a block numbers of 16 bits are.
SIXTEEN_BITS = {
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q8_0": (0,),
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_the_gguf_package(name):
    kind = gguf.GGMLQuantizationType[name.upper()]
    assert gguf.GGML_QUANT_SIZES[kind] == (FORMATS[name].values, FORMATS[name].bytes)
    raw = random_blocks(name)
    expected = gguf.dequantize(raw.numpy(), kind)
    found = FORMATS[name].dequantised(raw)
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert np.isfinite(expected).all()
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.pack])
def test_packing_is_the_way_back(name):
    form = FORMATS[name]
    blocks = random_blocks(name).view(-1, form.bytes)
    assert torch.equal(form.pack(form.unpack(blocks)), blocks)


@pytest.mark.parametrize("name", FORMATS)
def test_groups_are_as_described(name):
    form = FORMATS[name]
    codes = form.unpack(random_blocks(name).view(-1, form.bytes)).codes
    assert codes.shape == (21, form.values // form.group, form.group)
