"""Weights in the blocks of a GGUF file: matrices of several parts, rows in another order, embeddings, memory."""

import gguf
import pytest
import torch

from litgpt.export.lit import check_form
from litgpt.formats.gguf.file import GGUFFile
from litgpt.formats.gguf.row_places import RowNumbers, composed
from litgpt.kernels import native
from litgpt.llm.llm import LLM
from litgpt.quantization import block_weight
from litgpt.quantization.block_weight import BlockEmbedding, BlockMatrix, BlockRows
from litgpt.quantization.blocks import FORMATS
from litgpt.quantization.layers import QuantizedLinear, check_quantize, num_parameters, quantized_layers
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from tests.unit.test_blocks import random_blocks

KINDS = ("q4_k", "q6_k", None, "q5_0")


def rows_of(form: str | None, rows: int) -> BlockRows:
    """Rows of 768 values."""
    if form is None:
        return BlockRows(torch.randn(rows, 768).to(torch.float16), None)
    raw = random_blocks(form, rows, 768 // FORMATS[form].values)
    return BlockRows(raw, form)


@pytest.fixture(scope="module")
def mixed() -> BlockMatrix:
    """Rows of four kinds, in any order."""
    torch.manual_seed(0)
    parts = [rows_of(form, rows) for form, rows in zip(KINDS, (5, 8, 3, 6), strict=True)]
    return BlockMatrix(parts, torch.randperm(22))


def values_of(matrix: BlockMatrix) -> torch.Tensor:
    values = [
        rows.raw.double()
        if rows.form is None
        else torch.from_numpy(gguf.dequantize(rows.raw.numpy(), gguf.GGMLQuantizationType[rows.form.upper()])).double()
        for rows in matrix.parts
    ]
    return torch.cat(values)[matrix.order]


@pytest.mark.parametrize("by", ["blocks", "widened", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_several_kinds_is_multiplied_without_another_copy(mixed, dtype, by, monkeypatch):
    """By the kernels, which round inputs to 8 bits where they are few; and by PyTorch alone."""
    if by == "plain":
        monkeypatch.setattr(native, "library", lambda: None)
    if by == "widened":
        monkeypatch.setattr(block_weight, "FEW", 0)
    layer = QuantizedLinear(768, 22, True, "gguf", dtype)
    torch.nn.init.normal_(layer.bias)
    layer.quantized.take(mixed)
    expected = values_of(mixed)
    torch.testing.assert_close(layer.plain_weight().double(), expected, rtol=1e-2, atol=0)
    for shape in ((1, 1), (3, 2), (0, 4), (2, 40)):
        x = torch.randn(*shape, 768).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        wanted = x.double() @ expected.T + layer.bias.double()
        assert y.shape == wanted.shape
        scale = (x.double().abs() @ expected.abs().T).clamp(min=1e-9)
        if y.numel():
            exact = dtype == torch.float32 and by != "blocks"
            assert ((y.double() - wanted).abs() / scale).max() < (1e-5 if exact else 1e-2)
    held = {p.untyped_storage().data_ptr() for p in layer.quantized.parameters()}
    assert held == {rows.raw.untyped_storage().data_ptr() for rows in mixed.parts}


def test_an_embedding_gives_the_rows_that_are_asked_for(mixed):
    embedding = BlockEmbedding(22, 768, torch.float32)
    embedding.quantized.take(mixed)
    idx = torch.tensor([[0, 21, 7], [7, 3, 3]])
    torch.testing.assert_close(embedding(idx).double(), values_of(mixed)[idx], rtol=1e-6, atol=0)
    assert embedding.to(torch.bfloat16)(idx).dtype == torch.bfloat16
    whole = BlockEmbedding(22, 768, torch.float32)
    whole.quantized.take(BlockMatrix(mixed.parts[:1]))
    torch.testing.assert_close(whole(idx[1:, 1:]), mixed.parts[0].dequantised(torch.float32)[idx[1:, 1:]])


def test_rows_are_found_whatever_was_done_to_them():
    """As queries, keys and values are joined and the halves of their heads exchanged."""
    numbers = RowNumbers({"q": 8, "k": 4, "v": 4})
    one = {"q": rows_of("q8_0", 8), "k": rows_of("q4_k", 4), "v": rows_of(None, 4)}
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    joined = torch.cat((numbers.of("q")[order], numbers.of("k")[order[:4] // 2], numbers.of("v")[1:3]))
    joined[8:12] = numbers.of("k")[[3, 2, 1, 0]]
    places = numbers.places(joined[:, 0])
    assert [(name, len(rows)) for name, rows in places] == [("q", 8), ("k", 4), ("v", 2)]
    matrix = composed([(one[name], rows) for name, rows in places])
    assert [rows.form for rows in matrix.parts] == ["q8_0", "q4_k", None]
    expected = torch.cat([one["q"].dequantised(torch.float32)[order], one["k"].dequantised(torch.float32).flip(0)])
    expected = torch.cat([expected, one["v"].dequantised(torch.float32)[1:3]])
    assert torch.equal(matrix.dequantised(torch.float32), expected)
    assert all(
        rows.raw.untyped_storage().data_ptr() in {o.raw.data_ptr() for o in one.values()} for rows in matrix.parts
    )
    assert composed([(one["q"], torch.arange(2, 6))]).order is None  # a part of a matrix is a view of it
    some = composed([(one["q"], torch.tensor([5, 1]))])  # and rows that are not neighbours are taken out
    assert torch.equal(some.dequantised(torch.float32), one["q"].dequantised(torch.float32)[[5, 1]])


def test_a_real_model_runs_from_its_file(smollm2_gguf):
    """Its memory is the file's: every matrix, the tied head too, is a view of one mapping."""
    plain = load_model(smollm2_gguf, dtype=torch.float32)
    blocks = load_model(smollm2_gguf, dtype=torch.float32, quantize="gguf")
    ids = torch.arange(1, 41)[None] * 37
    with torch.inference_mode():
        torch.testing.assert_close(blocks(ids), plain(ids), rtol=1e-3, atol=1e-3)
    assert num_parameters(blocks) == num_parameters(plain)
    assert blocks.lm_head.quantized is blocks.transformer.wte.quantized
    weights = {layer.quantized for _, layer in quantized_layers(blocks)}
    held = [parameter for weight in weights for parameter in weight.parameters()]
    tensors = GGUFFile(smollm2_gguf).tensors.values()
    assert sum(p.nbytes for p in held) == sum(tensor.size for tensor in tensors if len(tensor.shape) == 2)
    assert {p.untyped_storage().nbytes() for p in held} == {smollm2_gguf.stat().st_size}
    assert len({p.untyped_storage().data_ptr() for p in held}) == 1


def test_what_is_saved_of_it_is_plain(smollm2_gguf, tmp_path):
    llm = LLM.load(smollm2_gguf, quantize="gguf", precision="32-true")
    llm.save(tmp_path / "saved")
    saved, plain = load_model(tmp_path / "saved"), load_model(smollm2_gguf)
    assert saved.config.tie_embeddings
    for name, tensor in plain.state_dict().items():
        assert torch.equal(saved.state_dict()[name], tensor), name


def test_what_it_is_not_for_is_refused(tmp_path, smollm2_gguf):
    with pytest.raises(ValueError, match=r"gguf is not for training"):
        check_quantize("gguf", "bf16-true", training=True)
    with pytest.raises(ValueError, match=r"gguf is for CPUs, and the model goes to cuda\. Use quantize=bnb\.nf4"):
        check_quantize("gguf", "bf16-true", training=False, device="cuda")
    with pytest.raises(ValueError, match=r"gguf is not for checkpoints in litgpt's format"):
        check_form(None, "gguf")
    LLM.load(smollm2_gguf, precision="32-true").save(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"uses the blocks of a GGUF file as they lie there, and .* holds none"):
        load_model(open_checkpoint(tmp_path / "plain"), quantize="gguf")
