"""The C++ of layers for a few rows, compiled, against the layers that it stands for."""

import copy
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.generation import skinny_gemm
from litgpt.kv_cache import AttentionPlan
from litgpt.model import CausalSelfAttention
from litgpt.quantization.layers import QuantizedLinear

HAS_COMPILER = any(os.access(Path(folder, "g++"), os.X_OK) for folder in os.get_exec_path())
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
# Sizes that are no multiples of vectors, of the rows that are taken together and of the blocks of int4.
SIZES = [(96, 128), (75, 70)]


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
@pytest.mark.parametrize(("rows", "dtype"), [(3, torch.bfloat16), (20, torch.bfloat16), (3, torch.float32)])
def test_compiled_layers_are_the_layers(rows, dtype, tmp_path):
    torch.manual_seed(0)
    layers = Layers(dtype)
    inputs = [torch.randn(rows, 1, size[0], dtype=dtype) for size in SIZES for _ in range(3)]
    for x in inputs:
        x[1] = 0  # a row without a request, which is left out
    fast = copy.deepcopy(layers)
    kernels = skinny_gemm.use(fast, rows, dtype)
    kinds = {type(getattr(layer, "quantized", layer)).__name__ for layer in fast.layers}
    if rows == 3:
        assert kinds == {"SkinnyLinear", "SkinnyInt8", "SkinnyInt4"}
    elif torch.cpu._is_avx512_bf16_supported():
        # The second size is too much for torch's int8; where there are tiles, only the first fills them.
        assert kinds == {"SkinnyLinear", "Int8Weight", "SkinnyInt8", "Int4Weight"}
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


@pytest.mark.skipif(not HAS_COMPILER, reason="there is no g++")
def test_prompts_of_few_tokens_and_of_many(tmp_path):
    """One program for both; the layers of more than a few tokens are torch's."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(*size, bias=size[0] == 75, dtype=torch.bfloat16) for size in SIZES)
    plain = Layers.__new__(Layers)
    nn.Module.__init__(plain)
    plain.layers = layers.requires_grad_(False)
    fast = copy.deepcopy(plain)
    kernels = skinny_gemm.use_for_prefill(fast, torch.bfloat16)
    if not kernels:
        pytest.skip("the CPU does not multiply pairs of bfloat16, or has tiles, which are quicker")
    assert skinny_gemm.use_for_prefill(copy.deepcopy(plain).float(), torch.float32) == {}

    def inputs(tokens: int) -> list[Tensor]:
        return [torch.randn(2, tokens, size[0], dtype=torch.bfloat16) for size in SIZES]

    any_number = torch.export.Dim("tokens", min=2, max=1000)
    with torch.no_grad():
        program = torch.export.export(fast, (inputs(10),), dynamic_shapes=([{1: any_number}] * 2,))
        path = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "layers.pt2"),
            inductor_configs={"aot_inductor.custom_ops_to_c_shims": kernels},
        )
        run, plain = torch._inductor.aoti_load_package(path), plain.float()
        for tokens in (2, skinny_gemm.FEW_TOKENS // 2, skinny_gemm.FEW_TOKENS // 2 + 1, 400):
            given = inputs(tokens)
            for result, right in zip(run(given), plain([x.float() for x in given]), strict=True):
                torch.testing.assert_close(result.float(), right, rtol=2**-7, atol=2**-7)


class Attend(nn.Module):
    """The attention of one token of each row."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = CausalSelfAttention(config).to(dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return self.attention.attended(q, k, v, AttentionPlan(mask))


@pytest.mark.skipif(not (HAS_COMPILER and HAS_AVX512), reason="there is no g++, or no AVX-512")
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 48), (torch.bfloat16, 64), (torch.float32, 48)])
def test_compiled_attention_is_attention(dtype, size, tmp_path):
    """Rows of unlike lengths; one has a hole, and one is idle: it sees nothing."""
    torch.manual_seed(0)
    rows, keys = 5, 37
    config = Config(n_embd=6 * size, n_head=6, n_query_groups=2, head_size=size)
    plain = Attend(config, dtype).requires_grad_(False)
    fast = copy.deepcopy(plain)
    kernels = skinny_gemm.use(fast, rows, dtype)
    assert type(fast.attention).__name__ == "DecodeAttention"
    q = torch.randn(rows, 1, 6, size, dtype=dtype) * 3
    k, v = torch.randn(2, rows, 64, 2, size, dtype=dtype)[:, :, :keys]  # a part of a longer cache
    masked = torch.arange(keys) >= torch.tensor([37, 1, 20, 33, 0])[:, None]
    masked[3, :6] = masked[3, 10:13] = True
    mask = torch.where(masked, -30000.0, 0.0).to(dtype)[:, None, None]
    with torch.no_grad():
        program = torch.export.export(fast, (q, k, v, mask))
        options = {"aot_inductor.custom_ops_to_c_shims": kernels}
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "attention.pt2"), inductor_configs=options
        )
        # What is masked is not even read: a long row would cost as much in all others.
        unread = masked[:, :, None, None]
        found = torch._inductor.aoti_load_package(path)(
            q, k.masked_fill(unread, torch.nan), v.masked_fill(unread, torch.nan), mask
        )
        expected = plain.float()(*(x.float() for x in (q, k, v, mask)))
    assert (found.dtype, found.shape) == (dtype, q.shape)
    assert found.isfinite().all()
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[:4].float(), expected[:4], rtol=tolerance, atol=tolerance)
