"""The C++ of linear layers for a few rows, compiled, against the layers that it stands for."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from litgpt.generation import few_rows
from litgpt.quantize import QuantizedLinear

HAS_COMPILER = any(os.access(Path(folder, "g++"), os.X_OK) for folder in os.get_exec_path())
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
# Sizes that are no multiples of vectors, of the rows that are taken together and of the blocks of int4.
SIZES = [(96, 128), (75, 70)]
ROWS = 3  # two and one


class Layers(nn.Module):
    """One of each kind and size, side by side."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for inputs, outputs in SIZES:
            linear = nn.Linear(inputs, outputs, bias=dtype == torch.float32, dtype=dtype)
            quantized = [QuantizedLinear(inputs, outputs, False, kind, dtype) for kind in ("int8", "int4")]
            for layer in quantized:
                layer.load_weight(linear.weight.detach())
            self.layers.extend([linear, *quantized])
        self.requires_grad_(False)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


@pytest.mark.skipif(not (HAS_COMPILER and HAS_AVX512), reason="there is no g++, or no AVX-512")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_layers_are_the_layers(dtype, tmp_path):
    torch.manual_seed(0)
    layers = Layers(dtype)
    inputs = [torch.randn(ROWS, 1, size[0], dtype=dtype) for size in SIZES for _ in range(3)]
    fast = copy.deepcopy(layers)
    kernels = few_rows.use(fast, ROWS, dtype)
    kinds = {type(getattr(layer, "quantized", layer)).__name__ for layer in fast.layers}
    assert kinds == {"FewRowsLinear", "FewRowsInt8", "FewRowsInt4"}
    with torch.no_grad():
        program = torch.export.export(fast, (inputs,))
        options = {"aot_inductor.custom_ops_to_c_shims": kernels}
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "layers.pt2"), inductor_configs=options
        )
        results = torch._inductor.aoti_load_package(path)(inputs)
        # In float32, from the same values: what bfloat16 adds is the rounding of the result.
        expected = layers.float()([x.float() for x in inputs])
    for result, right in zip(results, expected, strict=True):
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), right, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
