"""Which files of a repository are fetched, and how: with the real client against a server on loopback."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from litgpt.hub import HubError, adapter_files, open_repository, tokenizer_files, weight_files
from litgpt.hub.cache import snapshot
from tests.hub_server import Hub, commit_of, serve_hub

SMALL = {"config.json": b"{}", "generation_config.json": b"{}", "tokenizer.json": b"{}", "tokenizer_config.json": b"{}"}
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}})
WEIGHTS = os.urandom(3_000_000)


@pytest.fixture
def hub(monkeypatch, tmp_path_factory) -> Iterator[Hub]:
    """A hub that the client talks to; address and cache are read once by the client, so they are set there."""
    with serve_hub(Hub()) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path_factory.mktemp("login") / "token"))
        monkeypatch.setattr("litgpt.hub.transfer.WAITS", (0, 0, 0))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def names(directory: Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}


def fetch(directory: Path, *files: str, **settings: str) -> Path:
    """Fetches files of org/model, all that there are by default."""
    repository = open_repository("org/model", **settings)
    return repository.fetch(files or repository.files, directory)


def no_index(name: str) -> bytes:
    raise AssertionError(name)


def in_cache(repo_id: str, files: dict[str, bytes], branch: str = "main") -> Path:
    """Puts files into the client's cache, laid out as it does."""
    folder = snapshot(repo_id, commit_of(repo_id, branch))
    blobs, refs = folder.parents[1] / "blobs", folder.parents[1] / "refs"
    for each in (folder, blobs, refs):
        each.mkdir(parents=True, exist_ok=True)
    (refs / branch).write_text(commit_of(repo_id, branch))
    for name, content in files.items():
        blob = blobs / hashlib.sha256(content).hexdigest()
        if not name.endswith(".safetensors"):
            blob = blobs / hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob.write_bytes(content)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(blob)
    return folder


def test_weights_prefer_safetensors():
    def chosen(*files: str) -> list[str]:
        return weight_files("a/b", files, lambda name: INDEX.encode())

    assert chosen("pytorch_model.bin", "model.safetensors", "config.json") == ["model.safetensors"]
    assert chosen("consolidated.safetensors", "model.safetensors") == ["model.safetensors"]
    shards = ["model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]
    assert chosen(*shards, "model-3.safetensors", "consolidated.safetensors", "pytorch_model.bin") == shards
    assert chosen("pytorch_model.bin", "training_args.bin", "optimizer.bin") == ["pytorch_model.bin"]
    assert chosen("adapter_model.safetensors", "pytorch_model.bin") == ["pytorch_model.bin"]
    assert chosen("part-1.safetensors", "part-2.safetensors", "onnx/model.safetensors") == [
        "part-1.safetensors",
        "part-2.safetensors",
    ]


def test_the_files_of_an_adapter_alone():
    both = ["adapter_config.json", "adapter_model.safetensors"]
    assert adapter_files([*both, "training_args.bin", "adapter_model.bin", "tokenizer.json"]) == both
    assert adapter_files(["adapter_config.json", "adapter_model.bin"]) == ["adapter_config.json", "adapter_model.bin"]
    for files in ([*both, "model.safetensors"], [*both, "pytorch_model.bin"], both[:1], both[1:]):
        assert adapter_files(files) == []


def test_the_beginning_of_a_file_is_all_that_is_fetched(hub):
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    for no_ranges in (False, True):
        hub.no_ranges = no_ranges
        assert open_repository("org/model").beginning("model.safetensors", 100) == WEIGHTS[:100]
        if not no_ranges:
            until = time.monotonic() + 60
            while not hub.sent["model.safetensors"] and time.monotonic() < until:  # the server counts afterwards
                time.sleep(0.01)
            assert hub.sent["model.safetensors"] == 100


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["model.Q4_1.gguf", "README.md"], r"a/b holds GGUF files only: model\.Q4_1\.gguf\. Fetch one of them with `hf download a/b model\.Q4_1\.gguf"),
        (["README.md"], r"no weights as \.safetensors or pytorch_model\.bin\. It has: README\.md"),
        (["adapter_model.safetensors"], "an adapter for another model: adapter_model.safetensors"),
        (["consolidated.safetensors", "params.json"], "weights under another program's names: consolidated.safetensors"),
        (["original/model.safetensors"], "holds no weights"),
    ],
)  # fmt: skip
def test_no_weights_says_what_there_is(files, message):
    with pytest.raises(HubError, match=message):
        weight_files("a/b", files, no_index)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", r"a/b: 'model\.safetensors\.index\.json' is not valid JSON"),
        (INDEX.encode(), r"lists files that are not there: model-2\.safetensors"),
    ],
)
def test_a_wrong_index_is_refused(content, message):
    with pytest.raises(HubError, match=message):
        weight_files("a/b", ["model.safetensors.index.json", "model-1.safetensors"], lambda name: content)


def test_tokenizer_files():
    wanted = [*SMALL, "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "special_tokens_map.json"]
    unwanted = ["README.md", "model.safetensors", "onnx/tokenizer.json", "tf_model.h5", "pytorch_model.bin"]
    named = "additional_chat_templates/rag.jinja"
    unwanted += ["additional_chat_templates/README.md", "onnx/additional_chat_templates/rag.jinja"]
    assert tokenizer_files([*wanted, *unwanted, named]) == [*wanted, named]


def test_only_what_is_asked_for_is_fetched(hub, tmp_path):
    hub.repositories["org/model"] = {**SMALL, "README.md": b"x", "onnx/model.onnx": b"x", "model.safetensors": WEIGHTS}
    directory = fetch(tmp_path / "org/model", "config.json", "model.safetensors")
    assert directory == tmp_path / "org/model"
    assert names(tmp_path) == {"org/model/config.json", "org/model/model.safetensors"}
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(hub.fetched()) == ["config.json", "model.safetensors"]


def test_what_is_there_is_verified_and_stays(hub, tmp_path):
    hub.repositories["org/model"] = {**SMALL, "model.safetensors": WEIGHTS}
    directory = fetch(tmp_path / "model", *SMALL)
    hub.requests.clear()
    fetch(directory)
    assert hub.fetched() == ["model.safetensors"]
    # A byte that has changed on the disk is noticed, the same size notwithstanding.
    (directory / "model.safetensors").write_bytes(WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1]))
    hub.requests.clear()
    fetch(directory)
    assert hub.fetched() == ["model.safetensors"]
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert names(tmp_path) == {f"model/{name}" for name in (*SMALL, "model.safetensors")}


def test_a_file_that_was_read_is_not_fetched_again(hub, tmp_path):
    hub.repositories["org/model"] = dict(SMALL)
    repository = open_repository("org/model")
    assert repository.read("config.json") == b"{}"
    repository.fetch(SMALL, tmp_path / "model")
    assert hub.fetched().count("config.json") == 1
    assert names(tmp_path / "model") == set(SMALL)


@pytest.mark.parametrize("lost_at", [[1_000_000], [0, 1_000_000, 500_000]])
def test_a_lost_connection_is_taken_up_again(hub, tmp_path, lost_at):
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    hub.drop_after["model.safetensors"] = lost_at
    fetch(tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent["model.safetensors"] - len(WEIGHTS) < 200_000  # what was under way when the connection broke


def test_a_connection_that_is_lost_for_good(hub, tmp_path):
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    hub.drop_after["model.safetensors"] = [2_500_000] + [0] * 9
    with pytest.raises(
        HubError, match=r"^org/model cannot be downloaded: no connection to .* the same command goes on"
    ):
        fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    arrived = hub.sent["model.safetensors"]
    hub.drop_after.clear()
    fetch(tmp_path / "model")
    assert hub.sent["model.safetensors"] - arrived < 700_000
    assert (tmp_path / "model/model.safetensors").read_bytes() == WEIGHTS


def test_large_files_come_in_several_requests(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("litgpt.hub.transfer.REQUEST", 1_000_000)
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    fetch(tmp_path / "model")
    assert hub.fetched() == ["model.safetensors"] * 3
    assert hub.sent["model.safetensors"] == len(WEIGHTS)
    assert (tmp_path / "model/model.safetensors").read_bytes() == WEIGHTS


def test_a_server_without_ranges(hub, tmp_path):
    hub.no_ranges = True
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    hub.drop_after["model.safetensors"] = [2_000_000]
    fetch(tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_noticed_and_nothing_of_it_kept(hub, tmp_path, name):
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
    hub.corrupt.add(name)
    with pytest.raises(HubError, match=f"{name} arrives damaged: its checksum is not the one that the hub lists"):
        fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert not any(name in file for file in names(tmp_path))
    hub.corrupt.clear()
    assert names(fetch(tmp_path / "model")) == {"model.safetensors", "tokenizer.json"}


def test_damaged_bytes_of_an_earlier_attempt_are_fetched_again(hub, tmp_path):
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    repository = open_repository("org/model")
    partial = tmp_path / ".model.partial" / repository.files["model.safetensors"].partial_name
    partial.parent.mkdir()
    partial.write_bytes(b"\0" * 2_000_000)  # what a power failure may leave
    repository.fetch(["model.safetensors"], tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent["model.safetensors"] == 1_000_000 + len(WEIGHTS)


@pytest.mark.parametrize("path", ["/revision/", "/tree/", "/resolve/", "/elsewhere/"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_asked_again(hub, tmp_path, path, status):
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    hub.failures = [(path, status, {}), (path, status, {})]
    assert names(fetch(tmp_path / "model")) == {"model.safetensors"}
    assert not hub.failures


def test_a_wait_is_as_long_as_the_hub_says_and_is_announced(hub, tmp_path, capsys):
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    hub.failures = [("/elsewhere/", 429, {"Retry-After": "2"})]
    fetch(tmp_path / "model")
    assert "Waiting 2 s before trying again: the hub answers 429." in capsys.readouterr().err


def test_revisions(hub, tmp_path):
    hub.repositories["org/model"] = {"model.safetensors": b"new"}
    hub.revisions["org/model", "v1"] = {"model.safetensors": b"old"}
    for revision, content in (("v1", b"old"), (None, b"new"), (commit_of("org/model", "v1"), b"old")):
        directory = fetch(tmp_path / "model", revision=revision)
        assert (directory / "model.safetensors").read_bytes() == content
    with pytest.raises(HubError, match=r"org/model has no such revision \(revision=v9\)"):
        fetch(tmp_path / "model", revision="v9")
    assert names(tmp_path) == {"model/model.safetensors"}


def test_what_another_revision_has_left_does_not_come_along(hub, tmp_path):
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
    hub.corrupt.add("model.safetensors")
    with pytest.raises(HubError):
        fetch(tmp_path / "model")
    hub.revisions["org/model", "v1"] = {"config.json": b"{}"}
    assert names(fetch(tmp_path / "model", revision="v1")) == {"config.json"}


def test_gated(hub, tmp_path, monkeypatch):
    hub.repositories["org/model"] = {**SMALL, "model.safetensors": WEIGHTS}
    hub.tokens["org/model"] = "hf_right"
    with pytest.raises(HubError, match=r"^org/model is gated: accept its terms on .*/org/model, .*access_token"):
        fetch(tmp_path / "model")
    with pytest.raises(HubError, match=r"gated, and the account of this access token has no access"):
        fetch(tmp_path / "model", access_token="hf_wrong")
    fetch(tmp_path / "given", access_token="hf_right")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    fetch(tmp_path / "environment")
    everything = b"".join(file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    assert b"hf_right" not in everything
    assert hub.tokens_elsewhere == []


def test_private(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub.repositories["org/model"] = dict(SMALL)
    hub.private["org/model"] = "hf_right"
    with pytest.raises(
        HubError, match=r"no repository 'org/model' on the hub .* If it is private, pass `access_token`"
    ):
        fetch(tmp_path / "model")
    Path(constants.HF_TOKEN_PATH).write_text("hf_right")  # `hf auth login`
    assert names(fetch(tmp_path / "model")) == set(SMALL)


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("EleutherAI/pythia-14n", r"no repository 'EleutherAI/pythia-14n' on the hub .* Did you mean 'EleutherAI/pythia-14m'"),
        ("meta-llama/Llama-3.2-8B", r"Did you mean 'meta-llama/Llama-3\.2-"),
        ("someone/her-own-model", r"^There is no repository 'someone/her-own-model' on the hub \(answer 401\)\. If it is private"),
        ("no such id", "'no such id' is not a repository id"),
    ],
)  # fmt: skip
def test_unknown_repositories(hub, repo_id, message):
    with pytest.raises(HubError, match=message):
        open_repository(repo_id)


@pytest.mark.parametrize(("status", "message"), [(500, "the hub answers 500"), (403, "wants an access token")])
def test_refusals(hub, status, message):
    hub.fail_status = status
    with pytest.raises(HubError, match=message):
        open_repository("org/model")


def test_no_connection(monkeypatch):
    with serve_hub(Hub()) as hub:
        pass
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    with pytest.raises(HubError, match=rf"no connection to {hub.url}.*Check the network"):
        open_repository("org/model")


def test_room_on_the_disk_is_checked_before(hub, tmp_path, monkeypatch):
    from shutil import _ntuple_diskusage

    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    monkeypatch.setattr("shutil.disk_usage", lambda path: _ntuple_diskusage(10**9, 10**9, 5_000_000))
    repository = open_repository("org/model")
    message = (
        r"^No room for org/model: 3\.0 MB to download and 4\.0 MB for the converted weights are needed, and 5\.0 MB are "
        rf"free at '{tmp_path}'\. .*`checkpoint_dir`.*convert_checkpoint=false"
    )
    with pytest.raises(HubError, match=message):
        repository.fetch(["model.safetensors"], tmp_path / "model", further_bytes=4_000_000)
    assert hub.fetched() == []
    # What an earlier attempt has left need not come again.
    hub.drop_after["model.safetensors"] = [2_500_000] + [0] * 9
    with pytest.raises(HubError, match="no connection"):
        repository.fetch(["model.safetensors"], tmp_path / "model", further_bytes=1_000_000)
    hub.drop_after.clear()
    repository.fetch(["model.safetensors"], tmp_path / "model", further_bytes=4_000_000)


def test_a_disk_that_fills_up_meanwhile(hub, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(HubError, match=r"The disk is full.*checkpoint_dir"):
        fetch(tmp_path / "model")


@pytest.mark.parametrize("linked_from", [1, 2**26])
def test_what_the_cache_holds_is_taken_from_there(hub, tmp_path, monkeypatch, linked_from):
    monkeypatch.setattr("litgpt.hub.cache.LINKED_FROM", linked_from)
    hub.repositories["org/model"] = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    folder = in_cache("org/model", {"model.safetensors": WEIGHTS})
    directory = fetch(tmp_path / "model")
    assert hub.fetched() == ["config.json"]
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert not (directory / "model.safetensors").is_symlink()
    assert (folder / "model.safetensors").samefile(directory / "model.safetensors") == (linked_from == 1)


@pytest.mark.parametrize("where", ["hub", "cache", "offline"])
def test_named_chat_templates_keep_their_folder(hub, tmp_path, monkeypatch, where):
    files = {
        "tokenizer.json": b"{}",
        "additional_chat_templates/rag.jinja": b"{{ rag }}",
        "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
        "onnx/model.onnx": b"x",
    }
    hub.repositories["org/model"] = files
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", where == "offline")
    if where != "hub":
        in_cache("org/model", files)
    repository = open_repository("org/model")
    wanted = tokenizer_files(repository.files)
    for directory in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there/additional_chat_templates").mkdir(parents=True, exist_ok=True)
        (tmp_path / "there/additional_chat_templates/mine.jinja").write_bytes(b"mine")
        repository.fetch(wanted, directory)
        repository.fetch(wanted, directory)  # a second time: nothing changes
        found = {name: (directory / name).read_bytes() for name in names(directory)}
        mine = {"additional_chat_templates/mine.jinja": b"mine"} if directory.name == "there" else {}
        assert found == {name: content for name, content in files.items() if name != "onnx/model.onnx"} | mine


def test_no_name_leaves_the_checkpoints_directory(hub, tmp_path):
    hub.repositories["org/model"] = {
        "additional_chat_templates/../../x.jinja": b"x",
        "additional_chat_templates/a.jinja": b"a",
    }
    assert list(open_repository("org/model").files) == ["additional_chat_templates/a.jinja"]


def test_a_damaged_cache_is_not_believed(hub, tmp_path):
    hub.repositories["org/model"] = {"model.safetensors": WEIGHTS}
    folder = in_cache("org/model", {"model.safetensors": WEIGHTS})
    (folder / "model.safetensors").resolve().write_bytes(b"\0" * len(WEIGHTS))
    directory = fetch(tmp_path / "model")
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.fetched() == ["model.safetensors"]


def test_offline(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    in_cache("org/model", {"config.json": b"{}", "model.safetensors": WEIGHTS})
    in_cache("org/model", {"config.json": b"{ }"}, "v1")
    assert (fetch(tmp_path / "model") / "model.safetensors").read_bytes() == WEIGHTS
    assert (fetch(tmp_path / "v1", revision="v1") / "config.json").read_bytes() == b"{ }"
    assert (fetch(tmp_path / "v2", revision=commit_of("org/model", "v1")) / "config.json").read_bytes() == b"{ }"
    with pytest.raises(
        HubError, match=r"HF_HUB_OFFLINE is set, and the Hub cache has no org/other at revision main \(looked in"
    ):
        open_repository("org/other")
    blob = Path(snapshot("org/model", "main"), "model.safetensors").resolve()
    blob.write_bytes(b"\0" * len(WEIGHTS))
    with pytest.raises(HubError, match="what the Hub cache has of it is damaged"):
        fetch(tmp_path / "damaged")
    assert hub.requests == []


def test_a_failure_stops_the_other_files(hub, tmp_path):
    many = {f"model-{number}.safetensors": WEIGHTS for number in range(12)}
    hub.repositories["org/model"] = {**many, "tokenizer.json": b"{}"}
    hub.corrupt.add("tokenizer.json")
    hub.delay = 0.05
    with pytest.raises(HubError, match="damaged"):
        fetch(tmp_path / "model", "tokenizer.json", *many)
    assert hub.sent.total() < len(WEIGHTS)
