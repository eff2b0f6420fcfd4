"""The pretraining recipes: what they say, and two steps of each on a small model and stand-ins of their data, which are
served as the Hub has them where a recipe downloads."""

import io
import json
import math
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from litgpt.cli import resources
from litgpt.data import OpenWebText, TinyStories
from litgpt.data.dataset_record import DatasetRecord
from litgpt.data.token_chunks import TokenChunks, open_chunk
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.metrics import read_metrics
from tests import tokenizer_files
from tests.hub_server import Hub, connect, serve_hub

HUB = resources.config_hub() / "pretrain"
# Name, data, sequences of a step, at once, tokens of a sequence, warmup, peak, end, tokens: LitGPT 0.5.13's.
PUBLISHED = {
    "debug": ("pythia-14m", "TinyStories", 125, 5, 512, 100, 6e-4, 6e-5, 100_000_000),
    "tinystories": ("stories15M", "TinyStories", 512, 128, 256, 1000, 5e-4, 0.0, 9_700_000_000),
    "tinyllama": ("tiny-llama-1.1b", "TinyLlama", 512, 4, 2048, 2000, 4e-4, 4e-5, 3_000_000_000_000),
    "microllama": ("micro-llama-300M", "MicroLlama", 48, 12, 2048, 2000, 4e-4, 4e-5, 3_000_000_000_000),
}
WORDS = "the cat sat on a mat and saw one big red dog run to its small old house in the sun".split()  # noqa: SIM905
STORIES = [f"Once {' '.join(WORDS[i % 7 : i % 7 + 9])}. That was story {i}." for i in range(240)]
SMALL = {
    **{"n_layer": 1, "n_head": 2, "n_query_groups": 2, "n_embd": 32, "intermediate_size": 64, "head_size": 16},
    **{"vocab_size": 400, "padded_vocab_size": 400, "block_size": 64},
}


def archive(files: dict[str, bytes]) -> bytes:
    """A tar.gz with such files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def stories(numbers: range) -> bytes:
    return json.dumps([{"story": STORIES[n], "summary": "", "source": "GPT-4"} for n in numbers]).encode()


def parquet(texts: list[str]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    packed = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), packed)
    return packed.getvalue()


@pytest.fixture(scope="module")
def hub():
    with serve_hub(Hub()) as hub, pytest.MonkeyPatch.context() as patch:
        connect(hub, patch)
        folder = "TinyStories_all_data"
        hub.repositories["datasets/roneneldan/TinyStories"] = {
            "TinyStories_all_data.tar.gz": archive(
                {
                    f"{folder}/data00.json": stories(range(40)),
                    f"{folder}/data01.json": stories(range(40, 150)),
                    f"{folder}/data02.json": stories(range(150, 240)),
                }
            ),
            "TinyStories-train.txt": b"not this",
        }
        head = "---\nconfigs:\n- config_name: plain_text\n  data_files:\n  - split: train\n    path: plain_text/train-*\n---\n"
        hub.repositories["datasets/openwebtext"] = {
            "README.md": head.encode(),
            "plain_text/train-00000-of-00002.parquet": parquet(STORIES[:120]),
            "plain_text/train-00001-of-00002.parquet": parquet(STORIES[120:]),
        }
        yield hub


@pytest.fixture(scope="module")
def place(tmp_path_factory, hub):
    """A directory to work in, with the tokenizers that the recipes name, all the same small one."""
    directory = tmp_path_factory.mktemp("recipes")
    for name in ("EleutherAI/pythia-14m", "meta-llama/Llama-2-7b-hf"):
        tokenizer_files.byte_level(directory / "checkpoints" / name)
    return directory


@pytest.fixture(autouse=True)
def _inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(place / "cache"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(litgpt):
    def run(*words: object):
        shape = [f"--model_config.{key}={value}" for key, value in SMALL.items()]
        few = ["--train.global_batch_size=4", "--train.micro_batch_size=2", "--train.max_seq_length=32"]
        few += ["--train.max_steps=2", "--train.lr_warmup_steps=1", "--eval.max_iters=2", "--devices=1"]
        result = litgpt("pretrain", *words, *shape, *few, "--data.num_workers=0")
        assert result.code in (0, None), result.err
        return result

    return run


def texts(directory: Path) -> list[str]:
    """The documents of a folder of chunks."""
    tokenizer, index = Tokenizer(directory.parent / "tokenizer"), TokenChunks.read(directory)
    ids = [i for chunk in index.chunks for i in open_chunk(directory / chunk.filename, chunk, index.dtype).tolist()]
    assert ids[-1] == tokenizer.eos_id
    return [text.strip() for text in tokenizer.decode(ids, skip_special=False).split("<|endoftext|>")[:-1]]


def settled(litgpt, recipe: str) -> dict:
    result = litgpt("pretrain", "--config", f"config_hub/pretrain/{recipe}.yaml", "--devices", "1", "--print_config")
    assert result.code in (0, None), result.err
    return yaml.safe_load(result.out)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_says_what_was_published_and_its_arithmetic(litgpt, recipe):
    name, data, together, at_once, context, warmup, peak, end, tokens = PUBLISHED[recipe]
    found = settled(litgpt, recipe)
    train, optimizer = found["train"], found["optimizer"]
    assert (found["model_name"], found["data"]["class_path"]) == (name, f"litgpt.data.{data}")
    assert (train["global_batch_size"], train["micro_batch_size"]) == (together, at_once)
    assert train["max_seq_length"] in (None, context)
    assert (train["lr_warmup_steps"], train["min_lr"], train["max_tokens"]) == (warmup, end, tokens)
    assert optimizer["class_path"] == "torch.optim.AdamW"
    assert optimizer["init_args"] == {"lr": peak, "weight_decay": 0.1, "betas": [0.9, 0.95]}
    comment = (HUB / f"{recipe}.yaml").read_text().replace("\n# ", " ")
    assert f"{together:,} sequences x {context:,} tokens = {together * context:,} tokens per step" in comment
    assert f"{math.ceil(tokens / (together * context)):,} steps" in comment


def test_debug_downloads_tokenises_and_trains(run, hub, place):
    result = run("--config", "config_hub/pretrain/debug.yaml")
    rows = read_metrics(Path("out/pretrain/debug/metrics.csv"))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert 0 < float(rows[1]["val_loss"]) < 2 * math.log(400)
    data = place / "data/tinystories"
    assert texts(data / "val") == STORIES[:40]
    assert sorted(texts(data / "train")) == sorted(STORIES[40:])
    assert not (data / "source/TinyStories_all_data").exists()
    assert f"tokens in 1 chunk of {Path('data/tinystories/train')}" in result.out
    asked = len(hub.requests)
    run("--config", "config_hub/pretrain/tinystories.yaml")  # what is there already serves
    run("--data.data_dir", "data/tinystories", "tiny", "--out_dir", "out/other", "--logger_name", "csv")
    assert len(hub.requests) == asked
    used = yaml.safe_load(Path("out/other/hyperparameters.yaml").read_text())
    assert used["data"]["class_path"] == "litgpt.data.LitData"  # chosen by what lies there
    assert (Path("out/other/final/tokenizer.json")).read_bytes() == (data / "tokenizer/tokenizer.json").read_bytes()


def test_open_web_text_downloads_tokenises_and_trains(run, place):
    words = ["--data", "OpenWebText", "--data.val_split_fraction", "0.1", "--data.isolate_documents", "true"]
    run("tiny", *words, "--tokenizer_dir", "EleutherAI/pythia-14m", "--out_dir", "out/web", "--logger_name", "csv")
    data = place / "data/openwebtext"
    train, val = texts(data / "train"), texts(data / "val")
    assert sorted(train + val) == sorted(STORIES)
    assert 0 < len(val) < 60
    assert DatasetRecord.read(data).options["val_split_fraction"] == 0.1
    assert float(read_metrics(Path("out/web/metrics.csv"))[1]["val_loss"]) > 0
    module = OpenWebText(data)
    module.connect(Tokenizer(data / "tokenizer"), 1, 32)
    module.prepare_data()
    with pytest.raises(ValueError, match=r"val_split_fraction=0.0005 has no effect here: \S+ was prepared with 0.1"):
        module.setup()


@pytest.mark.parametrize("recipe", ["tinyllama", "microllama"])
def test_recipes_on_data_prepared_beforehand(run, litgpt, place, recipe):
    for name in ("slimpajama", "starcoder"):
        source = place / f"{name}.jsonl"
        if not source.exists():
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
            done = litgpt(
                *("prepare_dataset", "--source_path", source, "--checkpoint_dir", "meta-llama/Llama-2-7b-hf"),
                *("--destination_path", f"data/{name}", "--num_workers", "1"),
            )
            assert done.code in (0, None), done.err
    result = run("--config", f"config_hub/pretrain/{recipe}.yaml", "--precision", "32-true")
    assert ("(30.6% of the samples)" in result.out) == (recipe == "tinyllama")
    out = settled_out(recipe)
    assert float(read_metrics(out / "metrics.csv")[1]["val_loss"]) > 0


def settled_out(recipe: str) -> Path:
    return Path(yaml.safe_load((HUB / f"{recipe}.yaml").read_text())["out_dir"])


def test_a_tokenizer_that_does_not_match_is_refused(run, litgpt, place):
    tokenizer_files.byte_level(place / "other", {"eos_token": "<|im_end|>"})
    module = TinyStories(place / "stories2")
    module.connect(Tokenizer(place / "checkpoints/EleutherAI/pythia-14m"), 1, 32)
    module.prepare_data()
    result = litgpt(
        *("pretrain", "pythia-14m", "--data.data_dir", place / "stories2", "--tokenizer_dir", place / "other"),
        *("--devices", "1", "--out_dir", "out/refused"),
    )
    assert result.code == 1
    assert "was prepared with another tokenizer than the one in" in result.err
    assert "Leave --tokenizer_dir out" in result.err
    assert "Traceback" not in result.err


def test_what_lies_there_decides_the_data_module(litgpt, place):
    def chosen(*words: str) -> str:
        result = litgpt("pretrain", "pythia-14m", *words, "--devices", "1", "--print_config")
        return yaml.safe_load(result.out)["data"]["class_path"] if result.code in (0, None) else result.err

    (place / "plain").mkdir()
    (place / "plain/a.txt").write_text("text")
    (place / "records").mkdir()
    (place / "records/a.jsonl").write_text("{}")
    assert chosen("--data.data_dir", "plain") == "litgpt.data.TextFiles"
    assert chosen("--data.data_dir", "s3://bucket/data") == "litgpt.data.LitData"
    assert chosen("--data.path", "s3://bucket/data") == "litgpt.data.LitData"
    assert "litgpt prepare_dataset --source_path records" in chosen("--data.data_dir", "records")
    assert "--data.data_dir nowhere: no such file or folder" in chosen("--data.data_dir", "nowhere")
    assert "--data TextFiles --data.data_dir plain" in chosen("--data.data_path", "plain")
    assert "needs --data NAME" in chosen("--data.seed", "1")


@pytest.mark.parametrize("content", [b"no archive", archive({"TinyStories_all_data/data00.json": stories(range(5))})])
def test_a_bad_archive_is_named(tmp_path, content):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/TinyStories_all_data.tar.gz").write_bytes(content)
    module = TinyStories(tmp_path)
    module.connect(Tokenizer(Path("checkpoints/EleutherAI/pythia-14m")), 1, 32)
    with pytest.raises(ValueError, match=r"TinyStories_all_data.tar.gz (is damaged|holds fewer than two JSON files)"):
        module.prepare_data()
