"""Quantised checkpoints against the functions with which transformers de-quantises them, and against whole models."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
)
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from litgpt.checkpoint import save_model
from litgpt.export.hf_writer import export_hf
from litgpt.formats.hf_config import config_from_hf
from litgpt.formats.quantised_weights import BlockScaled, PackedFP4, dequantised_type, read_quantised
from litgpt.formats.safetensors_file import read_safetensors
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model

IDS = torch.arange(40)[None] % 64
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 20}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
BLOCK = (32, 16)


def nothing(tensor):
    """For `release`."""


def float8(weight, block):
    """Float8 values and the factor of each block, as `weight_scale_inv` has it; a single one without a block."""
    rows, columns = block or weight.shape[-2:]
    grid = (-(-weight.shape[-2] // rows), -(-weight.shape[-1] // columns))
    scales = torch.empty(*weight.shape[:-2], *grid)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = (..., slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[..., i, j] = weight[part].float().abs().amax((-2, -1)) / 448
            values[part] = (weight[part].float() / scales[..., i, j, None, None]).to(torch.float8_e4m3fn)
    return values, scales if block else scales.squeeze()


def packed(weight):
    """FP4 blocks and scales of a stack (E, C, R), by the nearest value below the largest of each 32."""
    grouped = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))  # (E, R, C / 32, 32)
    exponent = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor() - 2
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = (grouped[..., None] / exponent.exp2()[..., None] - levels).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent.squeeze(-1) + 127).to(torch.uint8)


# --- the numbers, bit for bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "block"),
    [((256, 384), (128, 128)), ((64, 48), (32, 16)), ((3, 64, 48), (32, 16)), ((64, 48), None), ((3, 8, 8), None)],
)
def test_blocks_of_float8_equal_the_reference(shape, block, dtype):
    torch.manual_seed(0)
    values = torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)  # every bit pattern, NaN too
    grid = (*shape[:-2], shape[-2] // block[0], shape[-1] // block[1]) if block else ()
    scales = torch.randn(grid).exp() * 10.0 ** torch.randint(-6, 4, grid)
    expected = Fp8Dequantize(None)._dequantize_one(values, scales if block else scales.view(1, 1), dtype)
    weight = BlockScaled(values, scales, block, dtype)
    assert (weight.like.shape, weight.like.dtype) == (values.shape, dtype)
    torch.testing.assert_close(weight.read(nothing), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(130, 257), (1, 129), (127, 1), (2, 200, 130), (1500, 1000)])
def test_the_last_blocks_may_be_smaller(shape):
    """DeepSeek's own form, which rounds the number of blocks up: one factor looked up for every value."""
    torch.manual_seed(0)
    values = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    row, column = torch.arange(shape[-2]) // 128, torch.arange(shape[-1]) // 128
    expected = (values.float() * scales[..., row, :][..., column]).bfloat16()
    weight = BlockScaled(values, scales, (128, 128), torch.bfloat16).read(nothing)
    assert torch.equal(weight, expected)
    assert torch.equal(
        BlockScaled(values, scales, (128, 128), torch.float32).read(nothing),
        _dequantize_fp8_weight(values, scales, (128, 128), torch.float32),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_fp4_equals_the_reference(dtype):
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (3, 130, 5, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 130, 5), dtype=torch.uint8)
    blocks[0, 0].flatten()[:80] = torch.arange(80)
    blocks[0, 1:12] = torch.arange(256, dtype=torch.uint8).repeat(4)[: 11 * 80].view(11, 5, 16)  # every byte
    scales[1, :127, 0] = torch.arange(127)  # down to 2^-127
    scales[1, :128, 1] = torch.arange(127, 255)  # up to 2^127
    weight = PackedFP4(blocks, scales, dtype)
    value = weight.read(nothing)
    assert value.shape == weight.like.shape == (3, 160, 130)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert torch.equal(value, expected)
    assert torch.equal(value.signbit(), expected.signbit())


def test_fp4_with_the_scale_that_is_no_number_is_no_number():
    """The specification's E8M0 has no infinity; all bits set is NaN."""
    scales = torch.full((1, 1, 2), 127, dtype=torch.uint8)
    scales[0, 0, 1] = 255
    value = PackedFP4(torch.full((1, 1, 2, 16), 0x72, dtype=torch.uint8), scales, torch.float32).read(nothing)
    assert torch.equal(value[0, :32, 0], torch.tensor([1.0, 6.0]).repeat(16))
    assert value[0, 32:].isnan().all()


def test_scales_may_be_of_the_type_that_they_are(tmp_path):
    blocks = torch.randint(0, 256, (2, 8, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (2, 8, 3), dtype=torch.uint8)
    save_file({"x_blocks": blocks, "x_scales": scales.view(torch.float8_e8m0fnu)}, tmp_path / "model.safetensors")
    tensors = read_safetensors(tmp_path / "model.safetensors")
    assert tensors["x_scales"].dtype == torch.float8_e8m0fnu
    weight = PackedFP4(tensors["x_blocks"], tensors["x_scales"], torch.bfloat16).read(nothing)
    assert torch.equal(weight, convert_moe_packed_tensors(blocks, scales))


def test_every_part_of_the_form_is_released_after_use():
    values = torch.ones(3, 1500, 1000).to(torch.float8_e4m3fn)
    form = BlockScaled(values, torch.ones(3, 12, 8), (128, 128), torch.bfloat16)
    assert_released(form, [values.numel(), 3 * 12 * 8])
    blocks = torch.zeros(3, 1500, 50, 16, dtype=torch.uint8)
    form = PackedFP4(blocks, torch.zeros(3, 1500, 50, dtype=torch.uint8), torch.bfloat16)
    assert_released(form, [blocks.numel(), 3 * 1500 * 50])


def assert_released(form, wholes):
    """The values part by part as they are used, and in the end values and scales as a whole, borders included."""
    released = []
    form.read(lambda tensor: released.append(tensor.numel()))
    assert released[-2:] == wholes
    assert sum(released[:-2]) == wholes[0]
    assert max(released[:-2]) <= 2**20


# --- whole checkpoints


def deepseek(directory, block, shards=1):
    """A DeepSeek-V3 checkpoint in float8, with a layer for predicting the next but one; the same without float8."""
    config = DeepseekV3Config(
        **SIZES | LATENT | EXPERTS | {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
    )
    tensors = saved(DeepseekV3ForCausalLM(config), directory)
    quantised = {}
    for name, tensor in tensors.items():
        if "_proj" in name and tensor.dim() == 2:
            quantised[name], quantised[f"{name}_scale_inv"] = float8(tensor, block)
        else:
            quantised[name] = tensor
    for name in [name for name in quantised if ".layers.1." in name]:
        quantised[name.replace(".layers.1.", ".layers.2.")] = quantised[name].clone()
    quantised["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    change_config(directory, quantization_config=settings, num_nextn_predict_layers=1)
    write(directory, quantised, shards)
    return quantised


def gpt_oss(directory, shards=1):
    """A gpt-oss checkpoint whose experts are in MXFP4."""
    config = GptOssConfig(
        **SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )
    quantised = {}
    for name, tensor in saved(GptOssForCausalLM(config), directory).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            quantised[f"{name}_blocks"], quantised[f"{name}_scales"] = packed(tensor)
        else:
            quantised[name] = tensor
    change_config(directory, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    write(directory, quantised, shards)
    return quantised


def saved(model, directory):
    """Writes a random model's files in bfloat16; its tensors as they stand there."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1).add_(float("norm" in name))
    model.bfloat16().save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def change_config(directory, **entries):
    config = json.loads((directory / "config.json").read_text()) | entries
    (directory / "config.json").write_text(json.dumps(config))


def write(directory, tensors, shards):
    """Files that tear apart what belongs together: every n-th tensor in each."""
    (directory / "model.safetensors").unlink()
    if shards == 1:
        save_file({name: t.contiguous() for name, t in tensors.items()}, directory / "model.safetensors")
        return
    files = {f"model-{i}.safetensors": list(tensors)[i::shards] for i in range(shards)}
    for file, names in files.items():
        save_file({name: tensors[name].contiguous() for name in names}, directory / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def logits_of_the_reference(directory, **settings):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **settings).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("block", [list(BLOCK), [128, 128], None], ids=["blocks", "large blocks", "one scale"])
def test_a_float8_deepseek_is_the_dequantised_reference(tmp_path, block, shards):
    quantised = deepseek(tmp_path / "hf", block, shards)
    source = open_checkpoint(tmp_path / "hf")
    assert source.dtype == torch.bfloat16
    assert "fp8 weights are de-quantised to bfloat16" in source.note
    assert "num_nextn_predict_layers: 1" in source.note
    layout, weights = source.layout(), dict(source.weights())
    assert {n: (t.shape, t.dtype) for n, t in layout.items()} == {n: (t.shape, t.dtype) for n, t in weights.items()}
    for name in ("self_attn.o_proj", "self_attn.kv_b_proj"):
        theirs = f"model.layers.1.{name}.weight"
        rows, columns = (BLOCK if block == list(BLOCK) else (128, 128)) if block else (10**6, 10**6)
        scales = quantised[f"{theirs}_scale_inv"]
        scales = scales.view(1, 1) if not block else scales
        shape = quantised[theirs].shape
        row, column = torch.arange(shape[0]) // rows, torch.arange(shape[1]) // columns
        ours = {"self_attn.o_proj": "attn.proj", "self_attn.kv_b_proj": "attn.kv_b_proj"}[name]
        expected = (quantised[theirs].float() * scales[row][:, column]).bfloat16()
        assert torch.equal(weights[f"transformer.h.1.{ours}.weight"], expected)
    export_hf(tmp_path / "hf", tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    assert {t.dtype for t in load_file(tmp_path / "plain" / "model.safetensors").values()} <= {
        torch.bfloat16,
        torch.float32,
    }
    with torch.no_grad():
        ours = load_model(tmp_path / "hf", dtype=torch.float32)(IDS)
    torch.testing.assert_close(ours, logits_of_the_reference(tmp_path / "plain"), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shards", [1, 3])
def test_an_mxfp4_gpt_oss_is_the_dequantised_reference(tmp_path, shards):
    quantised = gpt_oss(tmp_path / "hf", shards)
    source = open_checkpoint(tmp_path / "hf")
    assert "mxfp4 weights are de-quantised to bfloat16" in source.note
    layout, weights = source.layout(), dict(source.weights())
    assert {n: (t.shape, t.dtype) for n, t in layout.items()} == {n: (t.shape, t.dtype) for n, t in weights.items()}
    export_hf(tmp_path / "hf", tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    exported = load_file(tmp_path / "plain" / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in quantised if name.endswith("_blocks")]:
        expected = convert_moe_packed_tensors(quantised.pop(f"{name}_blocks"), quantised.pop(f"{name}_scales"))
        assert torch.equal(exported.pop(name), expected)
    assert exported.keys() == quantised.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in quantised.items())
    expected = logits_of_the_reference(tmp_path / "hf", quantization_config=Mxfp4Config(dequantize=True))
    assert expected.std() > 0.1
    with torch.no_grad():
        ours = load_model(tmp_path / "hf", dtype=torch.float32)(IDS)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def llama(directory, per_tensor=False):
    """A Llama checkpoint in float8, by blocks or as Ministral 3 Instruct has it: one factor, and one for activations."""
    tensors = saved(LlamaForCausalLM(LlamaConfig(**SIZES)), directory)
    block = None if per_tensor else list(BLOCK)
    quantised = {}
    for name, tensor in tensors.items():
        quantised[name] = tensor
        if "_proj" in name:
            quantised[name], quantised[f"{name}_scale_inv"] = float8(tensor, block)
            if per_tensor:
                quantised[name.replace("weight", "activation_scale")] = torch.tensor(0.5)
    settings = {
        "quant_method": "fp8",
        "weight_block_size": block,
        "activation_scheme": "static" if per_tensor else "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    change_config(directory, quantization_config=settings)
    write(directory, quantised, 2)
    return quantised


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_float8_llama_is_what_transformers_loads(tmp_path, per_tensor):
    llama(tmp_path / "hf", per_tensor)
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())["quantization_config"]
    del settings["quant_method"]
    reference = FineGrainedFP8Config(**settings, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", quantization_config=reference, dtype=torch.bfloat16)
    ours = load_model(tmp_path / "hf")
    assert ours.lm_head.weight.dtype == torch.bfloat16
    expected = model.state_dict()
    for part, name in (("attn.proj", "self_attn.o_proj"), ("mlp.fc_2", "mlp.up_proj"), ("mlp.proj", "mlp.down_proj")):
        assert torch.equal(
            ours.state_dict()[f"transformer.h.1.{part}.weight"], expected[f"model.layers.1.{name}.weight"]
        )
    with torch.no_grad():
        torch.testing.assert_close(ours.float()(IDS), model.float()(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_converted_checkpoint_is_exported_unquantised(tmp_path):
    """`config.json` stays next to the weights and says that they are quantised; they no longer are."""
    llama(tmp_path / "hf")
    source = open_checkpoint(tmp_path / "hf")
    expected = {name: tensor.clone() for name, tensor in source.weights()}
    save_model(tmp_path / "hf", source.weights(), source.config, source.release)
    converted = open_checkpoint(tmp_path / "hf")
    assert converted.note is None
    assert all(torch.equal(tensor, expected[name]) for name, tensor in converted.weights())
    export_hf(converted, tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in written
    assert written["eos_token_id"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "back")


@pytest.mark.parametrize(
    ("entries", "dtype"),
    [
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "torch.float32"}, torch.float32),
        ({"dtype": "float8_e4m3fn"}, torch.bfloat16),
        ({"torch_dtype": None}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_the_type_is_that_of_the_config_json(entries, dtype):
    assert dequantised_type(entries) == dtype


# --- damage


def test_what_does_not_belong_together_is_listed(tmp_path):
    quantised = llama(tmp_path / "hf")
    first, second = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
    third, fourth = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.down_proj.weight"
    del quantised[f"{first}_scale_inv"], quantised[third]
    quantised[f"{second}_scale_inv"] = torch.ones(2, 4)
    quantised[fourth] = torch.ones(64, 96)
    for file in (tmp_path / "hf").glob("*.safetensors*"):
        file.unlink()
    save_file(quantised, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match="4 problems") as info:
        open_checkpoint(tmp_path / "hf")
    for line in (
        f"{first} is float8 without {first}_scale_inv",
        f"{second}: its scales are [2, 4], where [3, 4] was expected",
        f"{third}_scale_inv belongs to no weight",
        f"{fourth}: it is of type float32, where float8 was expected",
    ):
        assert line in str(info.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8)}, "x_blocks without x_scales"),
        ({"x_scales": torch.zeros(2, 4, 1, dtype=torch.uint8)}, "x_scales without x_blocks"),
        (
            {
                "x_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8),
                "x_scales": torch.zeros(2, 4, 2, dtype=torch.uint8),
            },
            r"x: its scales are \[2, 4, 2\] uint8, where \[2, 4, 1\] uint8 was expected",
        ),
        (
            {"x_blocks": torch.zeros(2, 4, 16, dtype=torch.uint8), "x_scales": torch.zeros(2, 4, dtype=torch.uint8)},
            r"x: its blocks are \[2, 4, 16\] uint8",
        ),
    ],
)
def test_what_is_no_mxfp4_is_named(tensors, message):
    with pytest.raises(ValueError, match=message):
        read_quantised(tensors, {"quantization_config": {"quant_method": "mxfp4"}})


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "quark"])
def test_other_methods_are_refused_before_anything_is_read(tmp_path, method):
    config = LlamaConfig(**SIZES, quantization_config={"quant_method": method}).to_dict()
    with pytest.raises(ValueError, match=rf"'{method}' are not supported \(only fp8, mxfp4\); use an unquantised"):
        config_from_hf(config | {"architectures": ["LlamaForCausalLM"]})


# --- memory

PEAK = """
import sys
from pathlib import Path
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.checkpoint import save_model
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
path, out = Path(sys.argv[1]), Path(sys.argv[2])
source = open_checkpoint(path)
before = peak()
save_model(out, source.weights(), source.config, source.release)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the memory from /proc")
def test_dequantising_takes_memory_for_two_tensors_however_many_there_are(tmp_path):
    """The one that is being computed, and of the one before it what is still being written."""
    config = SIZES | {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 3, "num_local_experts": 64}
    config |= {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_experts_per_tok": 2}
    config |= {"head_dim": 16, "rope_scaling": None, "dtype": "bfloat16"}
    directory, out = tmp_path / "hf", tmp_path / "lit"
    directory.mkdir()
    out.mkdir()
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        shapes = GptOssForCausalLM(GptOssConfig(**{k: v for k, v in config.items() if k != "quantization_config"}))
    tensors, largest, total = {}, 0, 0
    for name, like in shapes.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = like.shape
            tensors[f"{name}_blocks"] = torch.ones(experts, rows, columns // 32, 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 127, dtype=torch.uint8)
            largest, total = max(largest, like.numel() * 2 / 2**20), total + like.numel() * 2 / 2**20
        else:
            tensors[name] = torch.ones(like.shape, dtype=torch.bfloat16)
    save_file(tensors, directory / "model.safetensors")
    assert (largest, total) == (64, 288)
    command = [sys.executable, "-c", textwrap.dedent(PEAK), str(directory), str(out)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1.5 * largest + 60
