"""Public data sets: found on the hub, fetched once and whole, read as what they are."""

import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from litgpt.data import FLAN, LIMA, Alpaca, Alpaca2k, AlpacaGPT4, Deita, Dolly, HFDataset, LongForm, SFTData, longform
from litgpt.data.hub_dataset import Wanted, fetch_dataset, split_of
from litgpt.data.url_file import fetch_url
from litgpt.hub import HubError
from litgpt.prompts import ChatTemplate
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import tokenizer_files
from tests.hub_server import Hub, connect, serve_hub

TOKEN = "hf_secret"
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]


def parquet(records: list[dict]) -> bytes:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    writer.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


def lines(records: list[dict]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def alpaca(count: int, start: int = 0) -> list[dict]:
    return [{"instruction": f"Say {i}.", "input": "", "output": f"{i}"} for i in range(start, start + count)]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub on loopback; data sets go below the test's own directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    with serve_hub(Hub()) as server:
        connect(server, monkeypatch)
        yield server


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    config = {"chat_template": tokenizer_files.CHATML, "eos_token": "<|im_end|>"}
    return Tokenizer(tokenizer_files.byte_level(tmp_path_factory.mktemp("tokenizer"), config))


def prepared(data: SFTData, tokenizer: Tokenizer) -> SFTData:
    data.connect(tokenizer, 2, 512)
    data.prepare_data()
    data.setup()
    return data


def said(data: SFTData) -> list[list[str]]:
    return [[m["content"] for m in data.train_samples.messages_of(i)] for i in range(len(data.train_samples))]


# --- the data sets


def test_alpaca_2k_from_a_parquet_file_that_names_no_split(hub, tokenizer):
    hub.repositories["datasets/mhenrichsen/alpaca_2k_test"] = {
        "alpaca_2000.parquet": parquet(alpaca(40)),
        "README.md": b"# Alpaca",
    }
    data = prepared(Alpaca2k(), tokenizer)
    assert (len(data.train_samples), len(data.val_samples)) == (38, 2)
    assert said(data)[0] == ["Say 0.", "0"]
    assert data.style.format.name == "alpaca"
    assert Path("data/alpaca2k/alpaca_2000.parquet").is_file()
    hub.requests.clear()
    prepared(Alpaca2k(), tokenizer)
    assert hub.requests == []


@pytest.mark.parametrize(("multi_turn", "expected"), [(False, ["Hi", "Ho"]), (True, ["Hi", "Ho", "And?", "No."])])
def test_deita_first_exchanges_or_whole_conversations(hub, tokenizer, multi_turn, expected):
    record = {"prompt": "Hi", "prompt_id": "1", "messages": CHAT}
    hub.repositories["datasets/HuggingFaceH4/deita-10k-v0-sft"] = {
        "data/train_sft-00000-of-00001.parquet": parquet([record] * 5),
        "data/test_sft-00000-of-00001.parquet": parquet([record] * 2),
        "data/train_gen-00000-of-00001.parquet": parquet([record] * 9),
    }
    data = prepared(Deita(include_multiturn_conversations=multi_turn), tokenizer)
    assert (len(data.train_samples), len(data.val_samples)) == (5, 2)
    assert said(data)[0] == expected
    assert isinstance(data.style, ChatTemplate) == multi_turn
    assert ("replies only" in data.describe()) == multi_turn


def test_dolly_has_the_context_as_input(hub, tokenizer):
    record = {"instruction": "Sum up.", "context": "A text.", "response": "Short.", "category": "summarization"}
    hub.repositories["datasets/databricks/databricks-dolly-15k"] = {"databricks-dolly-15k.jsonl": lines([record] * 10)}
    data = prepared(Dolly(), tokenizer)
    assert data.train_samples[0].messages[0] == {"role": "user", "content": "Sum up.", "input": "A text."}


def test_lima_is_gated_and_its_token_is_not_recorded(hub, tokenizer):
    hub.repositories["datasets/GAIR/lima"] = {
        "train.jsonl": lines([{"conversations": ["Hi", "Ho"], "source": "x"}] * 10),
        "test.jsonl": lines([{"conversations": ["Hi"]}]),
    }
    hub.tokens["datasets/GAIR/lima"] = TOKEN
    with pytest.raises(
        HubError,
        match=r"datasets/GAIR/lima is gated: accept its terms on .*/datasets/GAIR/lima, .*access_token",
    ):
        prepared(LIMA(), tokenizer)
    data = LIMA(access_token=TOKEN)
    assert len(prepared(data, tokenizer).train_samples) == 9
    assert TOKEN not in repr(data)
    assert TOKEN not in "".join(path.read_text() for path in Path().rglob("*.json"))


def test_flan_takes_the_chosen_tasks(hub, tokenizer):
    record = {"inputs": "Is it so?", "targets": "yes", "task": "x"}
    tasks = ("arc_easy", "boolq", "wnli")
    hub.repositories["datasets/Muennighoff/flan"] = {
        f"{split}/{task}_{split}.jsonl": lines([record] * 3)
        for split in ("train", "test", "validation")
        for task in tasks
    }
    data = prepared(FLAN(subsets="boolq, wnli"), tokenizer)
    assert (len(data.train_samples), len(data.val_samples)) == (6, 6)
    assert data.style.format.name == "flan"
    assert sorted(hub.fetched()) == ["boolq_test.jsonl", "boolq_train.jsonl", "wnli_test.jsonl", "wnli_train.jsonl"]
    assert len(prepared(FLAN(), tokenizer).train_samples) == 9
    with pytest.raises(HubError, match=r"has no 'train/bool_train\.jsonl'\. Did you mean 'train/boolq_train\.jsonl'"):
        prepared(FLAN(subsets="bool"), tokenizer)
    with pytest.raises(ValueError, match=r"url=ftp://x: expected https"):
        FLAN(url="ftp://x")


# --- any data set of the hub


def test_splits_by_the_names_of_files():
    names = {
        "data/train-00000-of-00002.parquet": "train",
        "data/train_sft-00001-of-00002-ab12.parquet": "train_sft",
        "en/validation/part1.parquet": "validation",
        "my_dev.jsonl": "validation",
        "test/train.json": "train",
        "alpaca.json": None,
        "constrained.json": None,
    }
    assert {name: split_of(name) for name in names} == names


def test_any_data_set_with_columns_configuration_and_splits(hub, tokenizer):
    readme = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path: main/test-*
- config_name: socratic
  data_files: [{split: train, path: "socratic/**"}]
---
# Words
"""
    record = {"question": "1 + 1?", "answer": "2"}
    hub.repositories["datasets/openai/gsm8k"] = {
        "README.md": readme.encode(),
        "main/train-00000-of-00001.parquet": parquet([record] * 6),
        "main/test-00000-of-00001.parquet": parquet([record] * 3),
        "socratic/a/b.parquet": parquet([{**record, "answer": "It is 2"}] * 4),
    }
    columns = {"instruction": "question", "output": "answer"}
    data = prepared(HFDataset("openai/gsm8k", val_split="test", columns=columns), tokenizer)
    assert (len(data.train_samples), len(data.val_samples)) == (6, 3)
    assert said(data)[0] == ["1 + 1?", "2"]
    data = prepared(HFDataset("openai/gsm8k", name="socratic", columns=columns), tokenizer)
    assert said(data)[0] == ["1 + 1?", "It is 2"]
    assert (len(data.train_samples), len(data.val_samples)) == (3, 1)
    with pytest.raises(HubError, match=r"has no configuration 'man' \(`name`\)\. Did you mean 'main'"):
        prepared(HFDataset("openai/gsm8k", name="man", columns=columns), tokenizer)
    with pytest.raises(ValueError, match=r"row 1: has no 'instruction', 'output' .* Its keys are 'question', 'answer'"):
        prepared(HFDataset("openai/gsm8k"), tokenizer)


def test_a_data_set_in_other_files_is_read_from_its_converted_branch(hub, tokenizer):
    repository = "datasets/some/csv"
    hub.repositories[repository] = {"train.csv": b"a,b\n"}
    with pytest.raises(
        HubError,
        match=r"no split 'train' in files that can be read .*no branch refs/convert/parquet. It has: train\.csv",
    ):
        prepared(HFDataset("some/csv"), tokenizer)
    hub.revisions[repository, "refs/convert/parquet"] = {
        "default/train/0000.parquet": parquet(alpaca(4)),
        "default/test/0000.parquet": parquet(alpaca(2)),
    }
    data = prepared(HFDataset("some/csv", val_split="test"), tokenizer)
    assert (len(data.train_samples), len(data.val_samples)) == (4, 2)
    with pytest.raises(HubError, match=r"Did you mean 'test'\? Its splits are: test, train"):
        prepared(HFDataset("some/csv", val_split="tests"), tokenizer)


def test_a_file_is_verified_and_a_lost_connection_resumed(hub):
    content = lines(alpaca(20_000))
    hub.repositories["datasets/some/json"] = {"train.jsonl": content}
    hub.drop_after["train.jsonl"] = [100_000]
    found = fetch_dataset(Wanted("some/json", ("train",)), Path("there"))
    assert found == {"train": [Path("there/train.jsonl")]}
    assert found["train"][0].read_bytes() == content
    assert hub.sent["train.jsonl"] < 1.2 * len(content)
    hub.corrupt.add("train.jsonl")
    with pytest.raises(HubError, match=r"train\.jsonl arrives damaged: its checksum"):
        fetch_dataset(Wanted("some/json", ("train",)), Path("elsewhere"))
    assert not any(Path("elsewhere").glob("train.jsonl"))


def test_what_an_interrupted_run_has_fetched_is_not_fetched_again(hub):
    hub.repositories["datasets/some/json"] = {f"train-{i}.jsonl": lines(alpaca(3, i)) for i in range(3)}
    Path("there").mkdir()
    Path("there/train-1.jsonl").write_bytes(lines(alpaca(3, 1)))
    Path("there/train-2.jsonl").write_bytes(lines(alpaca(3, 7)))  # of the same size, and another file
    found = fetch_dataset(Wanted("some/json", ("train",)), Path("there"))
    assert [path.read_bytes() for path in found["train"]] == [lines(alpaca(3, i)) for i in range(3)]
    assert sorted(hub.fetched()) == ["train-0.jsonl", "train-2.jsonl"]


def test_a_file_that_was_deleted_is_fetched_again(hub):
    hub.repositories["datasets/some/json"] = {"train.jsonl": lines(alpaca(3))}
    for _ in range(2):
        found = fetch_dataset(Wanted("some/json", ("train",)), Path("there"))
        found["train"][0].unlink()
    assert hub.fetched().count("train.jsonl") == 2


def test_paths_that_lead_out_of_the_directory_are_not_taken(hub):
    hub.repositories["datasets/some/json"] = {"../../train.jsonl": lines(alpaca(3)), "train.jsonl": lines(alpaca(1))}
    assert fetch_dataset(Wanted("some/json", ("train",)), Path("a/b")) == {"train": [Path("a/b/train.jsonl")]}


def test_what_is_not_there_is_explained(hub, tokenizer, monkeypatch):
    with pytest.raises(HubError, match=r"no repository 'datasets/some/thing' on the hub .*access_token"):
        prepared(HFDataset("some/thing"), tokenizer)
    hub.repositories["datasets/some/json"] = {"train.jsonl": lines(alpaca(3))}
    with pytest.raises(HubError, match=r"no such revision \(data.revision=v9\)"):
        prepared(HFDataset("some/json", revision="v9"), tokenizer)
    with pytest.raises(ValueError, match=r"repo_id=ORG/NAME is missing"):
        HFDataset()
    with pytest.raises(ValueError, match=r"val_split=test and val_split_fraction=0\.1"):
        HFDataset("a/b", val_split="test", val_split_fraction=0.1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and the data set some/json has not been downloaded"):
        prepared(HFDataset("some/json"), tokenizer)


# --- files at an address


class Files(BaseHTTPRequestHandler):
    """Serves `content` by path; `promise` adds to the announced length; `failures` are answered first."""

    content: dict[str, bytes] = {}  # noqa: RUF012
    promise = 0
    failures: list[int] = []  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status = self.failures.pop(0) if self.failures else 200 if self.path in self.content else 404
        body = self.content.get(self.path, b"") if status == 200 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) + self.promise))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path, monkeypatch) -> Iterator[type[Files]]:
    """A web server; `web.url` is its address."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("litgpt.hub.transfer.WAITS", (0, 0))
    handler = type("Handler", (Files,), {"content": {}, "failures": [], "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("kind", "held"), [(Alpaca, 2), (AlpacaGPT4, 2)])
def test_alpaca_is_fetched_once(web, tokenizer, kind, held):
    web.content["/file.json"] = json.dumps(alpaca(52)).encode()
    data = prepared(kind(file_url=f"{web.url}/file.json"), tokenizer)
    assert (len(data.train_samples), len(data.val_samples)) == (52 - held, held)
    prepared(kind(file_url=f"{web.url}/file.json"), tokenizer)
    assert web.asked == ["/file.json"]
    assert (data.download_dir / data.file_name).read_bytes() == web.content["/file.json"]


def test_longform_has_files_for_training_and_validation(web, tokenizer, monkeypatch):
    monkeypatch.setattr(longform, "URL", web.url)
    record = {"input": "Write about ducks.", "output": "Ducks quack.", "source": "x", "subset": "y"}
    web.content |= {"/train.json": json.dumps([record] * 3).encode(), "/val.json": json.dumps([record]).encode()}
    data = prepared(LongForm(), tokenizer)
    assert (len(data.train_samples), len(data.val_samples)) == (3, 1)
    assert data.style.format.name == "longform"
    assert tokenizer.decode(data.train_samples[0].input_ids).count("Write about ducks.") == 1


def test_a_file_is_there_whole_or_not_at_all(web, tmp_path):
    web.content["/a"] = b"x" * 1000
    web.promise = 10
    with pytest.raises(HubError, match=r"/a cannot be downloaded: no connection"):
        fetch_url(f"{web.url}/a", tmp_path / "d/a")
    assert not list((tmp_path / "d").iterdir())
    web.promise, web.failures[:] = 0, [503, 503]
    digest = hashlib.sha256(fetch_url(f"{web.url}/a", tmp_path / "d/a").read_bytes()).digest()
    assert digest == hashlib.sha256(web.content["/a"]).digest()
    with pytest.raises(HubError, match="/b cannot be downloaded: the server answers 404"):
        fetch_url(f"{web.url}/b", tmp_path / "b")
    with pytest.raises(HubError, match="cannot be downloaded: no connection"):
        fetch_url("http://127.0.0.1:9/a", tmp_path / "c")
    with pytest.raises(ValueError, match=r"file_url=file:///a"):
        fetch_url("file:///a", tmp_path / "c")
