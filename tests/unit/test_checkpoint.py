"""The checkpoint directory: atomic saves, finding, reading and writing weights."""

import os
import signal
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

from litgpt.checkpoint import (
    CONFIG,
    WEIGHTS,
    SaveError,
    atomic_additions,
    atomic_directory,
    atomic_file,
    copy_companion_files,
    read_state_dict,
    save_model,
    write_state_dict,
)
from litgpt.config import Config
from litgpt.model import GPT

TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "padding_multiple": 32, "block_size": 16}


def run(script, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)], capture_output=True, text=True, **options
    )


def write_and_fail(saving, name=None):
    """Begins a save with one of the context managers, writes "new" and fails."""
    with saving as path:
        (path / name if name else path).write_text("new")
        raise KeyError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# --- atomic saves


def test_a_directory_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "a" / "final") as directory:
        (directory / "x").write_text("1")
        assert not (tmp_path / "a" / "final").exists()
    assert names(tmp_path / "a") == ["final"]
    assert (tmp_path / "a" / "final" / "x").read_text() == "1"


def test_a_failed_save_leaves_the_old_directory_and_no_rest(tmp_path):
    final = tmp_path / "final"
    with atomic_directory(final) as directory:
        (directory / "x").write_text("old")
    with pytest.raises(KeyError):
        write_and_fail(atomic_directory(final, overwrite=True), "x")
    assert names(tmp_path) == ["final"]
    assert (final / "x").read_text() == "old"


def test_a_directory_is_replaced_only_when_asked(tmp_path):
    (tmp_path / "final").mkdir()
    with atomic_directory(tmp_path / "final") as directory:  # an empty directory holds nothing to lose
        (directory / "x").write_text("old")
    with pytest.raises(ValueError, match="exists already"), atomic_directory(tmp_path / "final"):
        pass
    with atomic_directory(tmp_path / "final", overwrite=True) as directory:
        (directory / "y").write_text("new")
    assert names(tmp_path) == ["final"]
    assert names(tmp_path / "final") == ["y"]


KILLED = """
import os, signal, sys
from litgpt.checkpoint import atomic_directory
with atomic_directory(sys.argv[1], overwrite=True) as directory:
    (directory / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    final = tmp_path / "final"
    assert run(KILLED, final).returncode == -signal.SIGKILL
    assert not final.exists()
    assert len(names(tmp_path)) == 1
    with atomic_directory(final) as directory:
        (directory / "x").write_text("whole")
    assert names(tmp_path) == ["final"]


def test_a_directory_caught_between_two_names_is_put_back(tmp_path):
    # A kill between the two renames of a replacement leaves the old version under a hidden name.
    script = """
    import os, signal, sys
    import litgpt.checkpoint as checkpoint
    with checkpoint.atomic_directory(sys.argv[1]) as directory:
        (directory / "x").write_text("old")
    rename = os.rename
    def rename_once(source, target):
        rename(source, target)
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename = rename_once
    with checkpoint.atomic_directory(sys.argv[1], overwrite=True) as directory:
        (directory / "x").write_text("new")
    """
    final = tmp_path / "final"
    assert run(script, final).returncode == -signal.SIGKILL
    assert not final.exists()
    with pytest.raises(ValueError, match="exists already"), atomic_directory(final):
        pass
    assert (final / "x").read_text() == "old"


def test_siblings_of_running_processes_are_left_alone(tmp_path):
    with atomic_directory(tmp_path / "final") as directory:
        other = directory.with_name(directory.name.rpartition("-")[0] + f"-{os.getppid()}")
        other.mkdir()
        with atomic_file(tmp_path / "final.txt") as path:
            path.write_text("")
    with atomic_directory(tmp_path / "final", overwrite=True):
        pass
    assert other.is_dir()


def test_a_file_is_replaced_whole(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(KeyError):
        write_and_fail(atomic_file(tmp_path / "f"))
    assert (tmp_path / "f").read_text() == "old"
    with atomic_file(tmp_path / "f") as path:
        path.write_text("new")
    assert (tmp_path / "f").read_text() == "new"
    assert names(tmp_path) == ["f"]


def test_of_additions_the_weights_come_last(tmp_path, monkeypatch):
    moved = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: (moved.append(target.name), replace(source, target)))
    with atomic_additions(tmp_path) as directory:
        for name in ("z.json", WEIGHTS, CONFIG, "a.json"):
            (directory / name).write_text("")
    assert sorted(moved) == names(tmp_path)
    assert moved[-1] == WEIGHTS


def test_additions_replace_files_and_keep_the_others(tmp_path):
    (tmp_path / "kept").write_text("")
    (tmp_path / CONFIG).write_text("old")
    with pytest.raises(KeyError):
        write_and_fail(atomic_additions(tmp_path), CONFIG)
    assert (tmp_path / CONFIG).read_text() == "old"
    with atomic_additions(tmp_path) as directory:
        (directory / CONFIG).write_text("new")
        (directory / WEIGHTS).write_text("")
    assert names(tmp_path) == sorted(["kept", CONFIG, WEIGHTS])
    assert (tmp_path / CONFIG).read_text() == "new"
    for content in ("1", "2"):  # in folders, too
        with atomic_additions(tmp_path) as directory:
            (directory / "inside").mkdir()
            (directory / "inside/added").write_text(content)
        assert (tmp_path / "inside/added").read_text() == content
        (tmp_path / "inside/kept").write_text("")
    assert names(tmp_path / "inside") == ["added", "kept"]


FULL = """
import resource, sys, torch
from litgpt.checkpoint import SaveError, atomic_directory, write_state_dict
limit, how, final = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    with atomic_directory(final, overwrite=True) as directory:
        tensors = {str(i): torch.randn(512, 512) for i in range(8)}
        if how == "ours":
            write_state_dict(directory / "lit_model.pth", tensors.items())
        else:
            torch.save(tensors, directory / "state.pth")
except SaveError as error:
    sys.exit(f"SaveError: {error}")
"""


def keep_good(final):
    with atomic_directory(final) as directory:
        write_state_dict(directory / WEIGHTS, [("x", torch.ones(3))])


def assert_still_good(final, result):
    assert "SaveError: Could not save" in result.stderr, result.stderr
    assert "untouched" in result.stderr
    assert "Traceback" not in result.stderr
    assert names(final.parent) == [final.name]
    assert read_state_dict(final / WEIGHTS)["x"].tolist() == [1, 1, 1]


def test_a_limit_on_file_size_leaves_the_previous_checkpoint_good(tmp_path):
    final = tmp_path / "final"
    keep_good(final)
    assert_still_good(final, run(FULL, 2**20, "ours", final))


@pytest.mark.parametrize("how", ["ours", "torch.save"])
def test_a_full_disk_leaves_the_previous_checkpoint_good(tmp_path, how):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        final = disk / "final"
        keep_good(final)
        assert_still_good(final, run(FULL, 0, how, final))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("save", [atomic_directory, atomic_file, atomic_additions])
def test_a_place_that_cannot_be_written_is_named(tmp_path, save):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "below"
    with pytest.raises(SaveError, match=f"'{place}' cannot be written \\(.*\\). Choose another place"), save(place):
        pass


def test_other_errors_of_a_save_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), atomic_directory(tmp_path / "final"):
        raise RuntimeError("shapes")
    with pytest.raises(PermissionError), atomic_directory(tmp_path / "final"):
        raise PermissionError(13, "no")


# --- writing and reading weights


DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
NEWER = ["float8_e4m3fn", "float8_e5m2", "uint16", "complex64"]


def raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("zip64_limit", [zipfile.ZIP64_LIMIT, 100], ids=["small", "zip64"])
def test_torch_reads_what_is_written(tmp_path, monkeypatch, mmap, zip64_limit):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", zip64_limit)
    tensors = {name: (torch.rand(5, 7) * 3).to(getattr(torch, name)) for name in DTYPES + NEWER}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "transposed": torch.randn(4, 6).t()}
    tensors |= {"slice": torch.randn(9, 9)[2:5, 1:8], "parameter": torch.nn.Parameter(torch.randn(3))}
    write_state_dict(tmp_path / "w.pth", tensors.items())
    read = torch.load(tmp_path / "w.pth", weights_only=True, mmap=mmap)
    assert list(read) == list(tensors)
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(raw(read[name]), raw(tensor)), name
        assert read[name].data_ptr() % 64 == 0 or not mmap or tensor.numel() == 0
    assert zipfile.ZipFile(tmp_path / "w.pth").testzip() is None


def test_shared_storage_is_written_once_and_shared_when_read(tmp_path):
    tied = torch.randn(100, 100)
    write_state_dict(tmp_path / "w.pth", {"wte": tied, "head": tied, "copy": tied.clone()}.items())
    assert (tmp_path / "w.pth").stat().st_size < 2.2 * raw(tied).numel()
    read = torch.load(tmp_path / "w.pth", weights_only=True)
    read["wte"][0, 0] = 42
    assert read["head"][0, 0] == 42
    assert read["copy"][0, 0] != 42


def test_a_reused_address_is_not_taken_for_a_shared_tensor(tmp_path):
    def stream():
        for value in range(50):  # each is freed before the next is made: the allocator gives the same address again
            yield str(value), torch.full((1000,), value)

    write_state_dict(tmp_path / "w.pth", stream())
    read = read_state_dict(tmp_path / "w.pth")
    assert all((read[str(value)] == value).all() for value in range(50))


def test_a_tensor_is_written_before_the_next_is_made(tmp_path):
    def stream():
        for i in range(4):
            assert (tmp_path / "w.pth").stat().st_size >= i * 4_000_000 - 2**20
            yield str(i), torch.randn(1_000_000)

    write_state_dict(tmp_path / "w.pth", stream())


def test_a_name_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="comes twice"):
        write_state_dict(tmp_path / "w.pth", [("x", torch.ones(1)), ("x", torch.ones(1))])


def test_released_memory_comes_back_from_the_file(tmp_path):
    values = torch.randn(300_000)
    write_state_dict(tmp_path / "w.pth", [("a", values), ("b", values.clone())])
    read = read_state_dict(tmp_path / "w.pth")
    assert torch.equal(read["a"], values)
    read.release(read["a"])
    assert torch.equal(read["a"], values)
    foreign = values.clone()
    read.release(foreign)
    assert torch.equal(foreign, values)


def test_nested_weights_are_found(tmp_path):
    torch.save({"model": {"x": torch.ones(2)}, "optimizer": {"lr": 0.1}, "iter_num": 3}, tmp_path / "nested.pth")
    assert list(read_state_dict(tmp_path / "nested.pth")) == ["x"]
    torch.save({"x": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert read_state_dict(tmp_path / "old.bin")["x"].tolist() == [1, 1]


class Evil:
    def __reduce__(self):
        return (os.system, ("touch EVIL",))


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth.*other Python objects"):
        read_state_dict(tmp_path / "evil.pth")
    assert not (tmp_path / "EVIL").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<!doctype html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"hello, I am a text file and not a model", "truncated or damaged|other Python objects"),
    ],
)
def test_foreign_files_are_named(tmp_path, content, message):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=message) as info:
        read_state_dict(tmp_path / "w.pth")
    assert "w.pth" in str(info.value)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, share):
    write_state_dict(tmp_path / "w.pth", [(str(i), torch.randn(1000)) for i in range(5)])
    content = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"w\.pth.*(truncated|damaged).*again"):
        read_state_dict(tmp_path / "w.pth")


def test_a_file_without_tensors_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="no weights"):
        read_state_dict(tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        read_state_dict(tmp_path / "absent.pth")


# --- directories


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """checkpoints/EleutherAI/pythia-14m in the working directory."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "checkpoints" / "EleutherAI" / "pythia-14m"
    config = Config(name="pythia-14m", **TINY)
    with atomic_directory(directory) as target:
        save_model(target, GPT(config), config)
        (target / "tokenizer.json").write_text("{}")
    return directory


def test_a_saved_model_is_read_back(checkpoint):
    model = GPT(Config.from_checkpoint(checkpoint))
    save_model(checkpoint, model, model.config)
    expected, found = model.state_dict(), read_state_dict(checkpoint / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_companion_files_follow_and_never_overwrite(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    for name in ("tokenizer.json", "config.json", "chat_template.jinja", "optimizer.pth", "prompt_style.yaml"):
        (source / name).write_text("old")
    target.mkdir()
    (target / "config.json").write_text("new")
    copy_companion_files(source, target)
    assert names(target) == ["chat_template.jinja", "config.json", "prompt_style.yaml", "tokenizer.json"]
    assert (target / "config.json").read_text() == "new"
