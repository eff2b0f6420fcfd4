"""What a user names is found on this machine or downloaded; what is written as a path is never asked of the Hub."""

from pathlib import Path

import pytest

from litgpt.checkpoint import WEIGHTS, atomic_directory, missing_files, save_model
from litgpt.checkpoint.names import CONFIG, LORA_WEIGHTS
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.sources.find import expect_checkpoint, find_checkpoint, find_here, find_tokenizer

TINY = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "padding_multiple": 32, "block_size": 16}
NAME = "EleutherAI/pythia-14m"


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "checkpoints" / NAME
    directory.parent.mkdir(parents=True)
    config = Config(name="pythia-14m", **TINY)
    with atomic_directory(directory) as target:
        save_model(target, GPT(config), config)
        (target / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def asked(checkpoint, monkeypatch):
    """The repositories that are downloaded, in order; every download brings the checkpoint that is here."""
    asked = []

    def download(repo_id, access_token=None, tokenizer_only=False):
        asked.append(repo_id)
        (checkpoint / WEIGHTS).touch()
        (checkpoint / CONFIG).touch()
        return checkpoint

    monkeypatch.setattr("litgpt.sources.find.download", download)
    return asked


@pytest.mark.parametrize(
    "name", [f"checkpoints/{NAME}", f"checkpoints/{NAME}/lit_model.pth", NAME, "pythia-14m", "eleutherai/PYTHIA-14m"]
)
def test_a_checkpoint_is_found_by_path_and_name(checkpoint, name):
    assert find_here(name).resolve() == checkpoint


def test_a_gguf_file_is_found(checkpoint):
    (checkpoint / "m.gguf").write_bytes(b"GGUF")
    assert find_here(f"{NAME}/m.gguf").name == "m.gguf"


def test_what_is_not_here_is_downloaded(checkpoint, asked, capsys):
    for name in ("pythia-31m", "someone/some-model", "checkpoints/EleutherAI/pythia-31m", "checkpoints/someone/model"):
        assert find_here(name) is None
        expect_checkpoint(name)
        assert find_checkpoint(name) == checkpoint
        assert capsys.readouterr().err == f"Downloading {asked[-1]}\n"
    assert asked == ["EleutherAI/pythia-31m", "someone/some-model", "EleutherAI/pythia-31m", "someone/model"]


@pytest.mark.parametrize(
    "name",
    [
        *("./nope/dir", "../x", "../../x", "/x", "/x/y", "~/x", "out/x", "checkpoints/x", "checkpoints/out/x"),
        *("here/dir", "nope/x.gguf", "x.gguf", "a/..", "a/b/c", "org/name/"),
    ],
)
@pytest.mark.parametrize("find", [find_checkpoint, expect_checkpoint])
def test_what_is_written_as_a_path_is_no_name_on_the_hub(asked, name, find):
    Path("here").mkdir()
    with pytest.raises(FileNotFoundError, match=r"No checkpoint.*Give the path"):
        find(name)
    assert asked == []


def test_a_path_that_begins_as_one_means_nothing_below_checkpoints(checkpoint):
    with pytest.raises(FileNotFoundError, match=rf"No checkpoint './{NAME}' \(looked for '{NAME}'\)"):
        find_checkpoint(f"./{NAME}")


@pytest.mark.parametrize("name", ["microsoft/phi2", "checkpoints/microsoft/phi2"])
def test_a_near_miss_of_a_known_name_is_not_asked_for(asked, name):
    with pytest.raises(FileNotFoundError, match="Did you mean 'microsoft/phi-2'\\?"):
        find_checkpoint(name)
    assert asked == []


def test_a_near_miss_is_suggested(checkpoint):
    with pytest.raises(FileNotFoundError, match=r"Did you mean.*pythia-14m"):
        find_checkpoint("pithia-14m")


def test_where_a_tokenizer_alone_was_downloaded_the_weights_are_too(checkpoint, asked):
    def remove_weights():
        (checkpoint / WEIGHTS).unlink()
        (checkpoint / CONFIG).unlink()

    remove_weights()
    assert find_tokenizer(NAME).resolve() == checkpoint
    assert asked == []
    for name in (NAME, f"checkpoints/{NAME}", "pythia-14m"):
        assert find_checkpoint(name).resolve() == checkpoint
    assert asked == [NAME]
    remove_weights()
    (checkpoint / LORA_WEIGHTS).write_bytes(b"")  # what was finetuned alone has a base that it names
    assert find_checkpoint(NAME).resolve() == checkpoint
    assert asked == [NAME]


def test_a_half_written_directory_says_what_it_lacks(checkpoint):
    (checkpoint / CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"incomplete.*model_config.yaml"):
        find_checkpoint("pythia-14m")
    (checkpoint / WEIGHTS).unlink()
    assert missing_files(checkpoint) == []  # still a tokenizer
    assert "lit_model.pth" in missing_files(checkpoint, weights=True)[0]
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"lacks weights .* and model_config.yaml or config.json"):
        find_checkpoint("pythia-14m")
    assert find_checkpoint("pythia-14m", incomplete=True).resolve() == checkpoint


def test_absent_shards_are_all_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-3.safetensors"}}'
    )
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"model-1.safetensors and the weight file model-3.safetensors"):
        find_checkpoint(tmp_path)
