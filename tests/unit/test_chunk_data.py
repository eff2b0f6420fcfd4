"""Data modules on token chunks: what they give, and what is wrong with data and settings."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from litgpt.config import Config
from litgpt.data import LitData, MicroLlama, TinyLlama
from litgpt.data.document_marks import DocumentMarks
from litgpt.data.streaming import DataError
from litgpt.model import GPT
from litgpt.training.batches import BatchStream
from tests.token_data import EOS, write_numbered, write_tokens

BLOCK = 16


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))


def opened(module: LitData, batch_size: int = 2, block: int = BLOCK, tokenizer=None) -> LitData:
    module.connect(tokenizer, batch_size, block)
    module.prepare_data()
    module.setup()
    return module


def stream(path, batch: int, rank: int = 0, ranks: int = 1, workers: int = 0, **options) -> BatchStream:
    data = opened(LitData(path, num_workers=workers, **options), batch)
    return BatchStream(data.train_dataloader(), batch, rank, ranks)


def numbers(stream: BatchStream, batches: int) -> list[list[int]]:
    """The numbers of the blocks in each batch."""
    return [stream.next().idx[:, 0].tolist() for _ in range(batches)]


def flat(lists: list) -> list:
    return list(chain.from_iterable(lists))


# --- the order


@pytest.mark.parametrize("mixed", [False, True])
def test_an_epoch_over_two_ranks_with_workers_interrupted_and_resumed_on_one(tmp_path, mixed):
    """No sample twice, none left out, the order of an uninterrupted run; whatever the ranks and workers."""
    write_numbered(tmp_path / "a", [7, 3, 10, 0, 5, 9, 2, 8, 6, 4, 10], BLOCK)  # 64 blocks
    path, options = tmp_path / "a", {}
    if mixed:
        write_numbered(tmp_path / "b", [6, 10, 16], BLOCK)  # 32 blocks
        path, options = [tmp_path / "a", tmp_path / "b"], {"weights": [2, 1]}
    epoch = 96 if mixed else 64
    whole = numbers(stream(path, 4, **options), epoch // 4 * 2)
    if not mixed:
        assert sorted(flat(whole[:16])) == sorted(flat(whole[16:])) == list(range(1, 65))
        assert whole[:16] != whole[16:]

    def two(count: int, start: int, workers: int) -> tuple[list[list[int]], int]:
        ranks = [stream(path, 2, rank, 2, workers, **options) for rank in (0, 1)]
        for rank in ranks:
            rank.seek(start)
        shares = [numbers(rank, count) for rank in ranks]
        assert ranks[0].position == ranks[1].position
        return [a + b for a, b in zip(*shares, strict=True)], ranks[0].position

    first, position = two(7, 0, workers=2)
    assert position == 28
    second, position = two(5, position, workers=1)
    assert first + second == whole[:12]
    one = stream(path, 1, **options)
    one.seek(position)
    assert flat(numbers(one, 2 * epoch - position)) == flat(whole[12:])


def test_an_epoch_of_a_mixture_is_as_many_samples_as_there_are(tmp_path):
    write_numbered(tmp_path / "a", [40, 24], BLOCK)
    write_numbered(tmp_path / "b", [32], BLOCK)
    mixture = stream([tmp_path / "a", tmp_path / "b"], 4, weights=[0.9, 0.1])
    assert mixture.samples_per_epoch == 96
    data = opened(LitData([tmp_path / "a", tmp_path / "b"], num_workers=0))
    assert data._train.weights == [64, 32]  # without weights, as much of each as there is
    drawn = [data._train.mixture.draw(position) for position in range(3 * data._train.mixture.cycle)]
    for source, share in ((0, 2 / 3), (1, 1 / 3)):
        places = [place for which, place in drawn if which == source]
        assert sorted(places) == list(range(len(places)))
        assert len(places) == pytest.approx(share * len(drawn), abs=1)


def test_every_token_of_a_chunk_but_the_first_is_predicted_once(tmp_path):
    ids = write_tokens(tmp_path / "d", [100, 65, 16, 17])
    blocks = opened(LitData(tmp_path / "d"))._train
    seen = sorted(tuple(blocks[i].tolist()) for i in range(len(blocks)))
    expected = [chunk[i : i + BLOCK + 1] for chunk in ids for i in range(0, len(chunk) - BLOCK, BLOCK)]
    assert seen == sorted(tuple(block.tolist()) for block in expected)
    assert len(blocks) == 6 + 4 + 0 + 1


def test_validation_sees_the_same_blocks_each_time(tmp_path):
    write_tokens(tmp_path / "d/train", [500])
    write_tokens(tmp_path / "d/val", [300, 200], seed=1)
    data = opened(LitData(tmp_path / "d", num_workers=2))
    loader = data.val_dataloader()
    first, second = (torch.cat(list(loader)) for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) == len(first) == 299 // BLOCK + 199 // BLOCK
    assert "Validation data: 30 blocks of 16 tokens." in data.describe()


# --- documents


def test_documents_are_told_apart():
    block = torch.tensor([5, 6, 0, 7, 0, 0, 8, 9])
    sample = DocumentMarks(end=0).isolate(block)
    assert sample["document_ids"].tolist() == [0, 0, 0, 1, 1, 2, 3, 3]
    assert sample["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert sample["labels"].tolist() == block.tolist()
    sample = DocumentMarks(end=0, start=7).isolate(torch.tensor([7, 5, 7, 6, 0, 7, 1]))
    assert sample["document_ids"].tolist() == [0, 0, 1, 1, 1, 2, 2]


class Tokens:
    """A tokenizer with an EOS token."""

    eos_id = EOS


def test_isolated_documents_do_not_see_each_other(tmp_path):
    write_tokens(tmp_path / "d", [400])
    data = opened(LitData(tmp_path / "d", isolate_documents=True), block=64, tokenizer=Tokens())
    batch = BatchStream(data.train_dataloader(), 2).next()
    config = Config(block_size=64, n_layer=2, n_head=2, n_embd=32, vocab_size=300, padded_vocab_size=300)
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    hidden = model.hidden_states(batch.idx, **batch.inputs)
    for row in range(2):
        ids = batch.inputs["document_ids"][row]
        assert ids.max() >= 1
        for document in ids.unique():
            alone = model.hidden_states(batch.idx[row][ids == document][None])
            torch.testing.assert_close(hidden[row][ids == document], alone[0], rtol=1e-4, atol=1e-5)
    plain = opened(LitData(tmp_path / "d"), block=64)
    together = BatchStream(plain.train_dataloader(), 2).next()
    assert torch.equal(together.idx, batch.idx)
    assert not torch.allclose(model.hidden_states(together.idx), hidden, atol=1e-4)


def test_what_ends_a_document_must_be_known(tmp_path):
    write_tokens(tmp_path / "d", [400])
    with pytest.raises(ValueError, match=r"isolate_documents=true: it is not known which token ends"):
        opened(LitData(tmp_path / "d", isolate_documents=True))


# --- data that litdata wrote


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_litdata_wrote_is_read(tmp_path, dtype, compression):
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    rng = np.random.default_rng(0)
    documents = [torch.tensor(rng.integers(0, 300, 40)).to(getattr(torch, dtype)) for _ in range(60)]
    writer = BinaryWriter(str(tmp_path), chunk_bytes=4000, item_loader=TokensLoader())
    for number, document in enumerate(documents):
        writer[number] = document
    writer.done()
    writer.merge()
    if compression:
        compress(tmp_path)
    assert len(list(tmp_path.glob("chunk-*"))) > 1
    data = opened(LitData(tmp_path, num_workers=0))
    read = [data._stores[0].open(n).tolist() for n in range(len(data._stores[0].index.chunks))]
    assert flat(read) == torch.cat(documents).tolist()
    index = json.loads((tmp_path / "index.json").read_text())
    del index["config"]["item_loader"]  # as older versions wrote it
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert len(opened(LitData(tmp_path))._train) == len(data._train)


def compress(directory: Path) -> None:
    """Chunks as litdata writes them with compression="zstd" (which wants a package for that alone)."""
    import zstandard

    index = json.loads((directory / "index.json").read_text())
    for chunk in index["chunks"]:
        path = directory / chunk["filename"]
        chunk["filename"] = path.name.replace(".bin", ".zstd.bin")
        (directory / chunk["filename"]).write_bytes(zstandard.compress(path.read_bytes()))
        path.unlink()
    index["config"]["compression"] = "zstd"
    (directory / "index.json").write_text(json.dumps(index))


def changed_index(directory: Path, **config) -> None:
    index = json.loads((directory / "index.json").read_text())
    index["config"].update(config)
    (directory / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"encryption": {"algorithm": "fernet"}}, "are encrypted"),
        ({"item_loader": "PyTreeLoader", "data_format": ["int", "str"]}, "chunks of another kind"),
        ({"compression": "lz4"}, "compressed with 'lz4'; only zstd is supported"),
        ({"data_format": ["no_header_tensor:0"]}, "is not a type of token ids"),
    ],
)
def test_other_data_of_litdata_is_refused_by_name(tmp_path, config, message):
    write_tokens(tmp_path, [400])
    changed_index(tmp_path, **config)
    with pytest.raises(ValueError, match=message):
        opened(LitData(tmp_path))


# --- what is wrong


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), r"The chunk \S+chunk-0-0.bin is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), r"chunk-0-0.bin is damaged: it has [\d,]+ bytes"),
        (lambda path: path.write_bytes(bytes(len(path.read_bytes()))), r"chunk-0-0.bin is damaged: its header"),
        (damage, r"chunk-0-0.bin is damaged: its SHA-256 is not the one in the index"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_chunk_is_named_in_one_line(tmp_path, spoil, message, workers):
    write_tokens(tmp_path, [400])
    spoil(tmp_path / "chunk-0-0.bin")
    with pytest.raises(DataError, match=message) as caught:
        stream(tmp_path, 2, workers=workers).next()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("chunks", "block", "message"),
    [
        ([100, 90], 100, r"train.max_seq_length=100: the chunks .* too short, the longest has 100 tokens"),
        ([], 16, "training data in .* is empty"),
    ],
)
def test_data_that_gives_no_block_is_refused(tmp_path, chunks, block, message):
    write_tokens(tmp_path / "d", chunks)
    with pytest.raises(ValueError, match=message):
        opened(LitData(tmp_path / "d"), block=block)


def test_empty_validation_data_is_refused(tmp_path):
    write_tokens(tmp_path / "train", [400])
    write_tokens(tmp_path / "val", [])
    with pytest.raises(ValueError, match=r"validation data in \S+val is empty"):
        opened(LitData(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data_path": "a", "path": "b"}, r"`data_path` and `path` say the same"),
        ({"path": "a", "data_dir": "b"}, r"`path` and `data_dir` say the same"),
        ({"data_path": ["a", "b"], "weights": [1.0]}, r"has 1 number\(s\), and `data_path` names 2"),
        ({"data_path": ["a", "b"], "weights": [1.0, 0.0]}, "every weight must be greater than 0"),
        ({"data_path": ["a", "a"]}, "each only once"),
        ({"split_names": ("train",)}, "two names are needed"),
    ],
)
def test_wrong_settings_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        LitData(**settings)


def test_data_that_is_not_there_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no prepared data \(there is no such folder\).*prepare_dataset"):
        opened(LitData(tmp_path / "none"))
    for name in ("path", "data_dir"):
        assert LitData(**{name: "x"}).data_path == "x"


def test_tiny_llama_mixes_slimpajama_and_starcoder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"895 GB(.|\n)*cerebras/SlimPajama-627B(.|\n)*bigcode/starcoderdata"):
        opened(TinyLlama(tmp_path))
    write_tokens(tmp_path / "slimpajama/train", [5000])
    write_tokens(tmp_path / "slimpajama/val", [500])
    with pytest.raises(FileNotFoundError, match="slimpajama and starcoder"):
        opened(TinyLlama(tmp_path))
    assert len(opened(MicroLlama(tmp_path))._train.orders) == 1
    assert len(opened(TinyLlama(tmp_path, use_starcoder=False))._train.orders) == 1
    write_tokens(tmp_path / "starcoder", [3000])  # LitGPT 0.5.13's layout
    data = opened(TinyLlama(tmp_path))
    assert "(69.4% of the samples)" in data.describe()
    assert len(data._val) == 499 // BLOCK
    drawn = [data._train.mixture.draw(i)[0] for i in range(10_240)]
    assert drawn.count(1) / 10_240 == pytest.approx(0.306416, abs=2e-4)
