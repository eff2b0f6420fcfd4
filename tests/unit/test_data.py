"""Text into tokens, tokens into blocks, blocks in an order that survives restarts."""

import pickle
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import litgpt.data.cache_sums as cache_sums
import litgpt.data.text_files as text_files
import litgpt.data.text_reading as text_reading
from litgpt.cli.resources import cache_directory
from litgpt.data import DataModule, StreamSampler, TextFiles, stream_loader
from litgpt.data.cache_sums import damage_in, write_sums
from litgpt.data.token_stream import TokenBlocks, TokenFile
from litgpt.data.tokenizer_training import train_tokenizer
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.batches import BatchStream, micro_batch
from tests.data_damage import flip

TEXT = Path(__file__).parents[2] / "config_hub/pretrain/data/shakespeare.txt"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([TEXT.read_text()[:100_000]], 400, directory)
    return Tokenizer(directory)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three files, one of them in a folder below."""
    text = TEXT.read_text()
    (tmp_path / "texts/deeper").mkdir(parents=True)
    for number, name in enumerate(("b.txt", "a.txt", "deeper/c.txt")):
        (tmp_path / "texts" / name).write_text(text[number * 3000 : number * 3000 + 3000])
    (tmp_path / "texts/notes.md").write_text("not for training")
    return tmp_path / "texts"


def module(path: Path | None, tokenizer: Tokenizer | None, block: int = 32, **options) -> TextFiles:
    data = TextFiles(train_data_path=path, num_workers=0, **options)
    data.connect(tokenizer, batch_size=4, max_seq_length=block)
    data.prepare_data()
    data.setup()
    return data


# --- the tokenizer trained on the text


def test_trained_tokenizer_is_lossless_and_the_same_each_time(tokenizer, tmp_path):
    train_tokenizer([TEXT.read_text()[:100_000]], 400, tmp_path / "again")
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tokenizer.dir / "tokenizer.json").read_bytes()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (400, 0, 0)
    for text in (TEXT.read_text()[200_000:201_000], "Übergröße 漢字 🙂\x00\t\r\n  two  spaces "):
        assert tokenizer.decode(tokenizer.encode_ids(text, bos=False)) == text
    with pytest.raises(ValueError, match=r"tokenizer_vocab_size=200 .* at least 257"):
        train_tokenizer(["text"], 200, tmp_path / "small")


# --- text files


def test_tokens_are_those_of_each_file_with_bos_before_it(folder, tokenizer):
    data = module(folder, tokenizer, val_split_fraction=0)
    expected = []
    for name in ("a.txt", "b.txt", "deeper/c.txt"):
        expected += [tokenizer.bos_id, *tokenizer.encode_ids((folder / name).read_text(), bos=False)]
    assert data._train.tokens.tolist() == expected
    assert data.val_dataloader() == []
    assert "There is no validation text" in data.describe()


def test_eos_stands_in_for_a_missing_bos(folder, tokenizer):
    tokenizer = Tokenizer(tokenizer.dir)
    tokenizer.bos_id, tokenizer.eos_id = None, 5
    assert module(folder, tokenizer, val_split_fraction=0)._train.tokens[0] == 5


def test_cutting_a_large_file_into_chunks_changes_no_token(tokenizer, monkeypatch, tmp_path):
    """Also for a tokenizer that has tokens for several line breaks in a row, as Llama 3's has."""
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Library

    text = TEXT.read_text()[:60_000] + "\n\n \n  Über\n\nend without break"
    path = tmp_path / "one.txt"
    path.write_text(text)
    library = Library.from_file(str(tokenizer.dir / "tokenizer.json"))
    split = pre_tokenizers.Split(Regex(r"\s*[\r\n]+|\s+(?!\S)|\s+|[^\s]+"), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    from tokenizers import trainers

    library.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    (tmp_path / "breaks").mkdir()
    library.save(str(tmp_path / "breaks/tokenizer.json"))
    breaks = Tokenizer(tmp_path / "breaks")
    assert len(breaks.encode_ids("\n\n", bos=False)) == 1

    monkeypatch.setattr(text_reading, "CHUNK_BYTES", 999)
    chunks = list(text_reading.read_chunks(text_reading.whole_file(path)))
    assert len(chunks) > 30
    assert "".join(chunks) == text
    for one in (tokenizer, breaks):
        first = [] if one.bos_id is None else [one.bos_id]
        data = module(path, one, val_split_fraction=0)
        assert data._train.tokens.tolist() == first + one.encode_ids(text, bos=False)


def test_a_text_without_line_breaks_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(text_reading, "CHUNK_BYTES", 7)
    monkeypatch.setattr(text_reading, "MAX_CHUNK_BYTES", 20)
    path = tmp_path / "one.txt"
    path.write_text("\ufeff" + "漢字🙂" * 50, encoding="utf-8")
    chunks = list(text_reading.read_chunks(text_reading.whole_file(path)))
    assert "".join(chunks) == "漢字🙂" * 50
    assert len(chunks) > 3
    train, val = text_reading.hold_out_text([path], 0.1)
    assert "".join(text_reading.read_chunks(train[0])) + "".join(text_reading.read_chunks(val[0])) == "漢字🙂" * 50
    assert 0 < val[0].size < 0.2 * path.stat().st_size


def test_control_tokens_spelled_between_documents_count(tokenizer, tmp_path):
    path = tmp_path / "documents.txt"
    path.write_text("first one<|endoftext|>second one" * 20)
    tokens = module(path, tokenizer, val_split_fraction=0)._train.tokens.tolist()
    assert tokens.count(tokenizer.eos_id) == 21  # the one at the start of the file, and those spelled out
    first = tokens[1 : tokens.index(tokenizer.eos_id, 1)]
    assert tokenizer.decode(first) == "first one"


def test_documents_of_a_text_are_kept_apart(tokenizer, tmp_path):
    path = tmp_path / "documents.txt"
    path.write_text("first one<|endoftext|>second one" * 20)
    data = module(path, tokenizer, val_split_fraction=0, isolate_documents=True)
    block = next(iter(data.train_dataloader()))
    begins = block["positions"] == 0
    assert torch.equal(begins[:, 1:], block["input_ids"][:, 1:] == tokenizer.eos_id)  # EOS stands before each
    assert torch.equal(block["document_ids"], begins.long().cumsum(1) - 1)
    assert int(block["document_ids"].max()) > 1


def test_five_percent_of_a_single_file_are_held_out_and_said(tmp_path, tokenizer, capsys):
    path = tmp_path / "one.txt"
    path.write_bytes(TEXT.read_bytes()[:50_000])
    data = module(path, tokenizer)
    text = path.read_text()
    held = "".join(text_reading.read_chunks(data._pieces()[1][0]))
    assert text.endswith(held)
    assert text[-len(held) - 1] == "\n"
    assert 0.045 < len(held) / len(text) <= 0.05
    assert data._val.tokens.tolist() == tokenizer.encode_ids(held, bos=False)
    assert held[:40] not in "".join(data.training_texts())
    assert "Held out for validation: 5.0% (the end of each file" in data.describe()
    assert "Tokenised the train text" in capsys.readouterr().out


def test_whole_files_are_held_out_of_many(tmp_path, tokenizer):
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text(f"File {number}. " + TEXT.read_text()[:500])
    train, val = module(tmp_path, tokenizer)._pieces()
    assert (len(train), len(val)) == (38, 2)
    assert not {p.path for p in train} & {p.path for p in val}


def test_a_validation_file_in_the_training_folder_is_not_trained_on(folder, tokenizer):
    data = module(folder, tokenizer, val_data_path=folder / "deeper")
    train, val = data._pieces()
    assert [p.path.name for p in train] == ["a.txt", "b.txt"]
    assert [p.path.name for p in val] == ["c.txt"]
    with pytest.raises(ValueError, match="nothing is left to train on"):
        module(folder, tokenizer, val_data_path=folder)


def test_data_dir_with_train_and_val(tmp_path, tokenizer):
    for name in ("train", "val"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "text.txt").write_text(TEXT.read_text()[:2000])
    data = TextFiles(data_dir=tmp_path / "d")
    assert (data.train_data_path, data.val_data_path) == (tmp_path / "d/train", tmp_path / "d/val")
    assert TextFiles(data_dir=tmp_path / "d/val").train_data_path == tmp_path / "d/val"
    with pytest.raises(ValueError, match="only one of them"):
        TextFiles(train_data_path=tmp_path, data_dir=tmp_path)


def test_tokenised_once_and_again_when_text_or_tokenizer_change(folder, tokenizer, cache, monkeypatch, tmp_path):
    calls = []
    real = text_files.tokenize
    monkeypatch.setattr(text_files, "tokenize", lambda *a: calls.append(1) or real(*a))
    module(folder, tokenizer)
    assert len(calls) == 2  # training and validation text
    module(folder, tokenizer)
    assert len(calls) == 2
    text = (folder / "a.txt").read_text()
    (folder / "a.txt").write_text("X" + text[1:])  # the same size
    module(folder, tokenizer)
    assert len(calls) == 3  # what was held out did not change
    train_tokenizer([TEXT.read_text()[:50_000]], 350, tmp_path / "other")
    module(folder, Tokenizer(tmp_path / "other"))
    assert len(calls) == 5
    assert len(list((cache / "tokens").iterdir())) == 5
    module(folder, tokenizer, cache_dir=tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere/tokens").iterdir())) == 2


def test_a_broken_tokenisation_leaves_no_cache(folder, tokenizer, cache, monkeypatch):
    def fails(*args):
        yield [1, 2, 3]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(text_files, "tokenize", fails)
        with pytest.raises(KeyboardInterrupt):
            module(folder, tokenizer)
    assert list((cache / "tokens").iterdir()) == []
    module(folder, tokenizer)


@pytest.mark.parametrize("name", ["tokens.bin", "index.json", "sums.json"])
def test_a_damaged_cache_is_made_again(name, folder, tokenizer, cache, capsys):
    tokens, places = module(folder, tokenizer)._train.tokens.tolist(), sorted(cache.glob("tokens/*"))
    for file in cache.glob(f"tokens/*/{name}"):
        flip(file, file.stat().st_size // 2, bit=7)
    capsys.readouterr()
    assert module(folder, tokenizer)._train.tokens.tolist() == tokens
    assert sorted(cache.glob("tokens/*")) == places
    assert capsys.readouterr().out.count(f"is damaged ({name} is not as it was written") == 2
    module(folder, tokenizer)
    assert "damaged" not in capsys.readouterr().out


def test_a_large_cache_is_looked_at_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_sums, "_PART", 1000)
    monkeypatch.setattr(cache_sums, "_BLOCK", 500)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").write_bytes(bytes(2500))
    (tmp_path / "empty").write_bytes(b"")
    write_sums(tmp_path)
    assert damage_in(tmp_path) is None
    flip(tmp_path / "a/b", 2400)
    assert damage_in(tmp_path) == "a/b is not as it was written"
    (tmp_path / "a/b").write_bytes(bytes(2400))
    assert damage_in(tmp_path) == "a/b has 2,400 bytes, not 2,500"
    (tmp_path / "a/b").unlink()
    assert damage_in(tmp_path) == "b is missing"


def test_a_cache_of_before_there_were_sums_is_taken_by_its_size(folder, tokenizer, cache, monkeypatch):
    module(folder, tokenizer)
    for file in cache.glob("tokens/*/sums.json"):
        file.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(text_files, "tokenize", lambda *args: 1 / 0)
        module(folder, tokenizer)
    for file in cache.glob("tokens/*/tokens.bin"):
        file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"token cache .* is damaged"):
        module(folder, tokenizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "no such file or folder"),
        (lambda d: d.mkdir(), "holds no .txt file .it is empty"),
        (lambda d: (d.mkdir(), (d / "a.pdf").touch()), r"holds no .txt file .it holds a.pdf"),
        (lambda d: (d.mkdir(), (d / "a.txt").touch()), "1 text file.s. are empty"),
        (lambda d: d.write_bytes(b"caf\xe9 " * 100), "is not UTF-8 text .*iconv"),
        (lambda d: d.write_text("too short"), r"too short: \d+ tokens, and one block needs 33.*train.max_seq_length"),
    ],
)
def test_wrong_texts_are_explained(make, message, tmp_path, tokenizer):
    make(tmp_path / "data")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        module(tmp_path / "data", tokenizer)


def test_missing_settings_are_explained(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"tokenizer_dir` .*tokenizer_vocab_size"):
        module(tmp_path, None)
    with pytest.raises(ValueError, match=r"train_data_path"):
        module(None, None)
    with pytest.raises(ValueError, match=r"val_split_fraction=1\.5"):
        TextFiles(val_split_fraction=1.5)


def test_cache_directory(monkeypatch, tmp_path):
    assert cache_directory() == tmp_path / "cache"
    monkeypatch.delenv("LITGPT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "litgpt"


# --- tokens and blocks


@pytest.mark.parametrize(("vocab_size", "bytes_each"), [(65_536, 2), (65_537, 4)])
def test_token_file_holds_every_id(tmp_path, vocab_size, bytes_each):
    file = TokenFile.write(tmp_path / "t", [[0, vocab_size - 1], [], [7]], vocab_size)
    assert file.tokens.tolist() == [0, vocab_size - 1, 7]
    assert (tmp_path / "t/tokens.bin").stat().st_size == 3 * bytes_each
    assert isinstance(file.tokens, np.memmap)
    assert "tokens" not in pickle.loads(pickle.dumps(file)).__dict__


def test_every_token_but_the_first_is_predicted_once(tmp_path):
    blocks = TokenBlocks(TokenFile.write(tmp_path / "t", [range(23)], 100), block_size=5)
    assert len(blocks) == 4
    assert torch.cat([block[1:] for block in blocks]).tolist() == list(range(1, 21))
    assert blocks[1].tolist() == [5, 6, 7, 8, 9, 10]
    assert blocks[1].dtype == torch.int64


# --- order


def positions(stream: BatchStream, count: int) -> list[list[int]]:
    return [stream.next().idx[:, 0].tolist() for _ in range(count)]


def flat(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


class Numbers(torch.utils.data.Dataset):
    """Sample i is the tokens (i, i)."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, index])


def stream(
    batch: int = 3, rank: int = 0, world_size: int = 1, count: int = 10, workers: int = 0, epochs: float | None = None
) -> BatchStream:
    loader = stream_loader(Numbers(count), batch, seed=5, num_workers=workers)
    return BatchStream(loader, batch, rank, world_size, epochs=epochs)


def test_each_epoch_is_a_new_order_of_all_samples():
    batches = positions(stream(), 12)
    assert [len(batch) for batch in batches] == [3, 3, 3, 1] * 3  # none reaches into the next epoch
    seen = flat(batches)
    assert [sorted(seen[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert seen[:10] != seen[10:20] != seen[20:]
    assert batches == positions(stream(), 12)
    assert stream(batch=4, count=3).next().idx.shape == (3, 1)  # a batch may be larger than the data


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_position_resumes_exactly_with_any_number_of_workers(workers):
    whole = positions(stream(), 12)
    first = stream(workers=workers)
    assert positions(first, 5) == whole[:5]
    second = stream(workers=2 - min(workers, 2))
    second.seek(first.position)
    assert positions(second, 7) == whole[5:]
    assert second.position == 30
    assert second.epoch == 3.0


def test_ranks_share_what_one_would_see():
    whole = positions(stream(batch=4), 6)
    shares = [positions(stream(batch=2, rank=rank, world_size=2), 6) for rank in (0, 1)]
    # Of 10 samples, 4 and 4 are shared; the last 2 are the first rank's, and the other has nothing to learn from.
    assert [a + b for a, b in zip(*shares, strict=True)][:2] == whole[:2]
    assert shares[0][2] == whole[2]
    assert [a + b for a, b in zip(*shares, strict=True)][3:5] == whole[3:5]


def learned(streams: list[BatchStream], steps: int, most: int) -> list[list[int]]:
    """The samples with targets in each of the next steps, over all ranks; every rank goes through as many batches."""
    found = []
    for _ in range(steps):
        shares = [one.next_step(most) for one in streams]
        assert len({len(share) for share in shares}) == 1
        assert len({one.position for one in streams}) == 1
        rows = [batch.targets[:, 0] for share in shares for batch in share]
        assert sum(len(row[row >= 0]) for row in rows) == sum(b.num_tokens for share in shares for b in share)
        found.append([i for row in rows for i in row.tolist() if i >= 0])
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("batch", "ranks", "most"), [(1, 1, 16), (1, 2, 8), (2, 4, 2), (4, 4, 1), (16, 1, 1), (1, 16, 1)]
)
def test_the_last_step_of_an_epoch_holds_what_is_left_on_any_number_of_ranks(batch, ranks, most, workers):
    if workers and ranks > 4:
        pytest.skip("16 ranks of 2 workers are 32 processes")
    streams = [stream(batch, rank, ranks, 17, workers, epochs=2.5) for rank in range(ranks)]
    steps = learned(streams, 5, most)
    assert [len(step) for step in steps] == [16, 1, 16, 1, 9]
    assert all(one.has_ended and one.epoch == 43 / 17 for one in streams)
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(17))
    assert len(set(steps[4])) == 9


def test_a_stream_that_ended_within_an_epoch_goes_on_there():
    first, rest = stream(2, count=17, epochs=0.5), stream(2, count=17, epochs=1)
    seen = learned([first], 1, 8)
    assert first.has_ended
    rest.seek(first.position)
    seen += learned([rest], 1, 8)
    assert [len(step) for step in seen] == [9, 8]
    assert sorted(flat(seen)) == list(range(17))
    assert rest.has_ended


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_other_loader_is_learned_from_whole_too(ranks):
    streams = [
        BatchStream(DataLoader(Numbers(17), batch_size=3, shuffle=True), 3, rank, ranks, seed=11, epochs=2)
        for rank in range(ranks)
    ]
    steps = learned(streams, 6 if ranks < 4 else 4, 2 // ranks or 1)
    assert all(one.has_ended for one in streams)
    for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        assert sorted(flat(epoch)) == list(range(17))
    half = [
        BatchStream(DataLoader(Numbers(17), batch_size=3, shuffle=True), 3, rank, ranks, seed=11, epochs=2)
        for rank in range(ranks)
    ]
    for one in half:
        one.seek(18)  # an epoch of six batches
    assert learned(half, len(steps) // 2, 2 // ranks or 1) == steps[len(steps) // 2 :]


def test_loading_leaves_the_training_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    positions(stream(workers=2), 4)
    assert torch.equal(torch.rand(1), expected)


def test_sampler_without_shuffling():
    assert list(islice(StreamSampler(3, 2, shuffle=False), 3)) == [[0, 1], [2], [0, 1]]


def test_any_other_loader_resumes_by_skipping():
    def plain(rank: int = 0, world_size: int = 1) -> BatchStream:
        loader = DataLoader(Numbers(10), batch_size=3, shuffle=True, drop_last=True)
        return BatchStream(loader, 3, rank, world_size, seed=11)

    whole = positions(plain(), 9)
    assert flat(whole[:3]) != flat(whole[3:6])  # a new order each epoch
    resumed = plain()
    torch.manual_seed(99)
    resumed.seek(4 * 3)
    assert positions(resumed, 5) == whole[4:]
    assert plain(0, 3).samples_per_epoch == 9
    assert [positions(plain(rank, 3), 1)[0] for rank in range(3)] == whole[:3]
    with pytest.raises(ValueError, match="The training data is empty"):
        BatchStream(DataLoader(Numbers(2), batch_size=3, drop_last=True), 3)


def test_micro_batches_of_both_kinds():
    tokens = torch.arange(10).reshape(2, 5)
    batch = micro_batch(tokens)
    assert torch.equal(batch.idx, tokens[:, :-1])
    assert torch.equal(batch.targets, tokens[:, 1:])
    labels = tokens.clone()
    labels[0, :3] = -100
    batch = micro_batch({"input_ids": tokens, "labels": labels, "document_ids": tokens * 0, "token_counts": 3})
    assert batch.targets[0].tolist() == [-100, -100, 3, 4]
    assert batch.num_targets == 6
    assert batch.inputs.keys() == {"document_ids"}
    assert batch.inputs["document_ids"].shape == (2, 4)
    assert batch.without_targets().num_targets == 0
    with pytest.raises(ValueError, match="a dict with text"):
        micro_batch({"text": tokens})


def test_a_data_module_must_give_batches():
    with pytest.raises(TypeError, match="Mine has no train_dataloader"):
        type("Mine", (DataModule,), {})().train_dataloader()
    assert DataModule().val_dataloader() == []
