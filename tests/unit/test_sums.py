"""A flipped bit is found where it matters: in weights of both formats, whoever opens them."""

import struct
import zipfile
import zlib

import pytest
import safetensors.torch
import torch

from litgpt.checkpoint import WEIGHTS, read_state_dict, save_model, write_state_dict
from litgpt.checkpoint.sums import CheckedPart, DamagedFile, check_archive, check_parts
from litgpt.config import Config
from litgpt.formats.safetensors_file import read_safetensors, write_safetensors
from litgpt.model import GPT
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.load import load_model
from tests.data_damage import flip

TENSORS = {name: torch.arange(3000.0) + i for i, name in enumerate("abc")}
SHAPE = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "padding_multiple": 32, "block_size": 16}


def write_ours(path):
    write_state_dict(path, TENSORS.items())


def write_torch(path):
    torch.save(TENSORS, path)


def write_sft(path):
    write_safetensors(path, TENSORS, TENSORS.items())


def content_of(path) -> bytes:
    """A value in the middle of the second tensor, as it stands in the file."""
    return struct.pack("<f", 1501.0)


@pytest.mark.parametrize(
    ("write", "read", "name"),
    [
        (write_ours, read_state_dict, "lit_model.pth"),
        (write_torch, read_state_dict, "pytorch_model.bin"),
        (write_sft, read_safetensors, "model.safetensors"),
    ],
)
def test_each_bit_of_a_value_counts(write, read, name, tmp_path):
    path = tmp_path / name
    write(path)
    before = path.read_bytes()
    for bit in (0, 7, 30):
        flip(path, before.index(content_of(path), before.index(content_of(path)) + 4) + bit // 8, bit % 8)
        with pytest.raises(ValueError, match=rf"{name}.* is damaged, .*(data/1|b) is not as it was written.*again\."):
            read(path)
        assert len(read(path, check=False)) == 3  # whoever wants the names alone
        path.write_bytes(before)
    assert torch.equal(read(path)["b"], TENSORS["b"])


def test_the_names_and_shapes_count_too(tmp_path):
    """A flipped bit that turns F32 into another type of the same size, or a name into another."""
    path = tmp_path / "model.safetensors"
    write_sft(path)
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ValueError, match="its header is not as it was written"):
        read_safetensors(path)
    write_ours(path := tmp_path / WEIGHTS)
    path.write_bytes(path.read_bytes().replace(b"X\x01\x00\x00\x00b", b"X\x01\x00\x00\x00d"))
    with pytest.raises(ValueError, match=r"data\.pkl is not as it was written"):
        read_state_dict(path)


def test_other_programs_read_it_and_files_without_sums_pass(tmp_path):
    write_sft(ours := tmp_path / "ours.safetensors")
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in safetensors.torch.load_file(ours).items())
    safetensors.torch.save_file(TENSORS, tmp_path / "theirs.safetensors")
    torch.serialization.set_crc32_options(False)
    try:
        write_torch(tmp_path / "without.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(TENSORS, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for read, name in (
        (read_safetensors, "theirs.safetensors"),
        (read_state_dict, "without.bin"),
        (read_state_dict, "old.bin"),
    ):
        assert torch.equal(read(tmp_path / name)["c"], TENSORS["c"])


def test_a_file_whose_records_overlap_is_not_read_over_and_over(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"0" * 1000)
    with pytest.raises(DamagedFile, match="overlap"):
        check_parts(path, [CheckedPart(str(i), 0, 900, zlib.crc32(b"0" * 900)) for i in range(2)])
    with pytest.raises(DamagedFile, match="p is not as it was written"):
        check_parts(path, [CheckedPart("p", 500, 900, 1)])


def test_a_compressed_record_is_left_to_torch(tmp_path):
    with zipfile.ZipFile(tmp_path / "f.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 1000)
    check_archive(tmp_path / "f.pth")


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    config = Config(**SHAPE)
    (tmp_path / "own").mkdir()
    save_model(tmp_path / "own", GPT(config), config)
    return tmp_path / "own"


def test_a_model_is_not_loaded_from_damaged_weights(checkpoint):
    file = checkpoint / WEIGHTS
    value = read_state_dict(file)["transformer.h.0.mlp.fc.weight"].flatten()[5]
    flip(file, file.read_bytes().index(value.numpy().tobytes()), 6)
    source = open_checkpoint(checkpoint)  # what it is can be seen
    with pytest.raises(ValueError, match=r"lit_model.pth' .*damaged.*Download or convert the checkpoint again"):
        next(iter(source.weights()))
    with pytest.raises(ValueError, match="damaged"):
        load_model(checkpoint)
    (checkpoint / "training_state.pth").write_bytes(b"")
    (checkpoint.parent / "step-00000002").mkdir()
    (checkpoint.parent / "step-00000002/training_state.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"Take another checkpoint of the run: .*step-00000002\."):
        load_model(checkpoint)
    (checkpoint / "lit_model.pth.lora").write_bytes(b"")
    with pytest.raises(ValueError, match="write it again with `litgpt merge_lora"):
        load_model(checkpoint)
