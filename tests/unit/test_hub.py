"""Which files of a repository are fetched, what a refusal says, with the real client against a server on loopback."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from litgpt.hub import HubError, download_files, tokenizer_files, weight_files
from tests.hub_server import Hub, serve_hub

SMALL = {"config.json": b"{}", "generation_config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}})


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    """A hub that the client talks to; the address is read once by the client, so it is set there."""
    with serve_hub(Hub()) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def names(directory: Path) -> set[str]:
    return {
        str(file.relative_to(directory))
        for file in directory.rglob("*")
        if file.is_file() and ".cache" not in file.parts
    }


def test_weights_prefer_safetensors():
    both = ["pytorch_model.bin", "model.safetensors", "config.json"]
    assert weight_files("a/b", both) == ["model.safetensors"]
    assert weight_files("a/b", ["consolidated.safetensors", "model.safetensors"]) == ["model.safetensors"]
    sharded = ["model.safetensors.index.json", "model-1.safetensors", "consolidated.safetensors", "pytorch_model.bin"]
    assert weight_files("a/b", sharded) == ["model.safetensors.index.json"]
    assert weight_files("a/b", ["pytorch_model.bin", "training_args.bin", "optimizer.bin"]) == ["pytorch_model.bin"]
    assert weight_files("a/b", ["pytorch_model.bin.index.json", "x.bin"]) == ["pytorch_model.bin.index.json"]
    assert weight_files("a/b", ["consolidated.safetensors", "sub/model.safetensors"]) == ["consolidated.safetensors"]


def test_no_weights_says_what_there_is():
    with pytest.raises(HubError, match=r"GGUF files only.*convert_to_litgpt FILE.gguf"):
        weight_files("a/b", ["model.Q4_1.gguf", "README.md"])
    with pytest.raises(HubError, match=r"no weights as \.safetensors or pytorch_model\.bin\. It has: README\.md"):
        weight_files("a/b", ["README.md"])


def test_tokenizer_files():
    wanted = [*SMALL, "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "special_tokens_map.json"]
    unwanted = ["README.md", "model.safetensors", "onnx/tokenizer.json", "tf_model.h5", "pytorch_model.bin"]
    assert tokenizer_files([*wanted, *unwanted]) == wanted


def test_only_needed_files_are_fetched(hub, tmp_path):
    extra = {"README.md": b"x", "pytorch_model.bin": b"bin", "onnx/model.onnx": b"x", "model.safetensors": b"weights"}
    hub.repositories["org/model"] = {**SMALL, **extra}
    directory = download_files("org/model", tmp_path / "org/model")
    assert directory == tmp_path / "org/model"
    assert names(directory) == {*SMALL, "model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    assert sorted(hub.fetched()) == sorted([*SMALL, "model.safetensors"])
    assert not list(tmp_path.glob("org/.*"))


def test_shards_by_their_index(hub, tmp_path):
    shards = {"model-1.safetensors": b"1", "model-2.safetensors": b"2", "model-3.safetensors": b"3"}
    hub.repositories["org/model"] = {**SMALL, **shards, "model.safetensors.index.json": INDEX.encode()}
    directory = download_files("org/model", tmp_path / "model")
    assert names(directory) == {*SMALL, "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"}


def test_tokenizer_only(hub, tmp_path):
    hub.repositories["org/model"] = {**SMALL, "model.safetensors": b"weights"}
    assert names(download_files("org/model", tmp_path / "model", tokenizer_only=True)) == set(SMALL)
    # The weights may come later, and nothing is fetched twice.
    hub.requests.clear()
    assert names(download_files("org/model", tmp_path / "model")) == {*SMALL, "model.safetensors"}
    assert hub.fetched() == ["model.safetensors"]


def test_a_directory_appears_when_it_is_complete_and_a_second_attempt_goes_on(hub, tmp_path):
    shards = {"model-1.safetensors": b"1"}
    hub.repositories["org/model"] = {**SMALL, **shards, "model.safetensors.index.json": INDEX.encode()}
    with pytest.raises(HubError, match=r"lists files that the repository lacks: model-2\.safetensors"):
        download_files("org/model", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    hub.repositories["org/model"]["model-2.safetensors"] = b"2"
    hub.requests.clear()
    directory = download_files("org/model", tmp_path / "model")
    assert names(directory) == {*SMALL, "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"}
    assert "model.safetensors.index.json" not in hub.fetched()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_gated(hub, tmp_path, monkeypatch):
    hub.repositories["org/model"] = dict(SMALL)
    hub.tokens["org/model"] = "hf_right"
    with pytest.raises(HubError, match=r"org/model is gated: accept its terms on .*/org/model, .*--access_token"):
        download_files("org/model", tmp_path / "model", tokenizer_only=True)
    with pytest.raises(HubError, match=r"gated, and the account of this access token has no access"):
        download_files("org/model", tmp_path / "model", tokenizer_only=True, access_token="hf_wrong")
    download_files("org/model", tmp_path / "given", tokenizer_only=True, access_token="hf_right")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    download_files("org/model", tmp_path / "environment", tokenizer_only=True)
    everything = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"hf_right" not in everything


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("EleutherAI/pythia-14n", r"no repository 'EleutherAI/pythia-14n' on the hub .* Did you mean 'EleutherAI/pythia-14m'"),
        ("someone/her-own-model", r"^There is no repository 'someone/her-own-model' on the hub \(answer 404\)\. If it is private"),
        ("no such id", "'no such id' is no repository id"),
    ],
)  # fmt: skip
def test_unknown_repositories(hub, tmp_path, repo_id, message):
    with pytest.raises(HubError, match=message):
        download_files(repo_id, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_unknown_revision(hub, tmp_path):
    hub.repositories["org/model"] = dict(SMALL)
    with pytest.raises(HubError, match="no such revision"):
        download_files("org/model", tmp_path / "model", revision="v9")


@pytest.mark.parametrize(("status", "message"), [(500, "the hub answers 500"), (403, "wants an access token")])
def test_refusals(hub, tmp_path, status, message):
    hub.fail_status = status
    with pytest.raises(HubError, match=message):
        download_files("org/model", tmp_path / "model")


def test_no_connection(tmp_path, monkeypatch):
    with serve_hub(Hub()) as hub:
        pass
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    with pytest.raises(HubError, match=rf"no connection to {hub.url}.*Check the network"):
        download_files("org/model", tmp_path / "model")


def test_full_disk(hub, tmp_path, monkeypatch):
    def full(*args: object, **settings: object) -> str:
        raise OSError(28, "No space left on device")

    hub.repositories["org/model"] = {**SMALL, "model.safetensors": b"weights"}
    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(HubError, match=r"The disk is full.*--checkpoint_dir"):
        download_files("org/model", tmp_path / "model")
