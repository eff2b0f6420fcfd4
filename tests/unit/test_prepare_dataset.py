"""`litgpt prepare_dataset`: the same tokens from every kind of file, the same bytes whoever does the work."""

import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from litgpt.__main__ import main
from litgpt.data import corpus, preparation, preparation_end, source_files, text_reading, unit_tokens
from litgpt.data import documents as documents_module
from litgpt.data.dataset_record import DatasetRecord
from litgpt.data.source_files import Extent, describe_file, read_records_of
from litgpt.data.token_chunks import ChunkInfo, TokenChunks, document_offsets, open_chunk, write_chunk, write_index
from litgpt.tokenizer.tokenizer import Tokenizer
from tests import tokenizer_files
from tests.hub_server import Hub, serve_hub

TEXT = (Path(__file__).parents[2] / "config_hub/pretrain/data/shakespeare.txt").read_text()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(tokenizer_files.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def documents():
    """600 documents of 20 to 900 characters, some with what could be taken for a mark."""
    rng, documents, place = random.Random(0), [], 0
    while len(documents) < 600:
        size = rng.randrange(20, 900)
        documents.append(TEXT[place : place + size].strip() + rng.choice(["", "\n", " é漢🙂", " <|im_end|> <s>"]))
        place += size
    return documents


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """A small corpus becomes many units, of several of which a chunk is made."""
    monkeypatch.setattr(corpus, "MIN_UNIT_BYTES", 9_000)
    monkeypatch.setattr(preparation_end, "CHUNK_BYTES", 12_000)


def run(tokenizer, source, destination, *options):
    """The command, in this process."""
    words = ["prepare_dataset", "--source_path", source, "--checkpoint_dir", tokenizer.dir]
    code = main([str(word) for word in [*words, "--destination_path", destination, "--num_workers", 1, *options]])
    assert code == 0
    return destination


def fails(capsys, tokenizer, source, destination, *options):
    """What the command says where it cannot do its work: one line."""
    words = ["prepare_dataset", "--source_path", source, "--checkpoint_dir", tokenizer.dir]
    code = main([str(word) for word in [*words, "--destination_path", destination, "--num_workers", 1, *options]])
    said = capsys.readouterr().err.strip()
    assert code == 1
    assert "Traceback" not in said
    assert said.startswith("error: ")
    return said


def items(directory):
    """The items of a split's chunks."""
    found, index = [], TokenChunks.read(directory)
    for chunk in index.chunks:
        ids = open_chunk(directory / chunk.filename, chunk, index.dtype)
        offsets = document_offsets(directory / chunk.filename, chunk, index.dtype)
        found += [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        assert hashlib.sha256((directory / chunk.filename).read_bytes()).hexdigest() == chunk.sha256
    return found


def tokens(directory):
    return [i for item in items(directory) for i in item]


def sums(directory):
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def expected(tokenizer, documents):
    return [[*tokenizer.encode_ids(text, bos=False), tokenizer.eos_id] for text in documents]


def write_jsonl(path, documents, key="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": n, key: text}) + "\n" for n, text in enumerate(documents))
    opener = {".gz": gzip.open, ".zst": zstandard.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return path


def write_parquet(path, documents, **options):
    table = pyarrow.table({"id": range(len(documents)), "text": documents})
    pyarrow.parquet.write_table(table, path, **options)
    return path


# --- the same tokens from every kind of file -------------------------------------------------------------------------


def write_form(folder, form, documents):
    folder.mkdir(exist_ok=True)
    path = folder / f"corpus{form}"
    if form in (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".json.gz"):
        return write_jsonl(path, documents)
    if form == ".json":
        path.write_text(json.dumps([{"text": text} for text in documents], indent=1, ensure_ascii=False))
    if form == ".strings.json":
        path.write_text(json.dumps(documents))
    if form == ".object.json":
        path.write_text(json.dumps({"train": [{"text": text} for text in documents]}))
    if form == ".parquet":
        return write_parquet(path, documents, row_group_size=70)
    if form == ".frames.jsonl.zst":
        lines = [json.dumps({"text": text}) + "\n" for text in documents]
        parts = ["".join(lines[start : start + 100]).encode() for start in range(0, len(lines), 100)]
        path.write_bytes(b"".join(zstandard.compress(part) for part in parts))
    return path


FORMS = (
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".ndjson",
    ".json",
    ".json.gz",
    ".strings.json",
    ".object.json",
    ".parquet",
    ".frames.jsonl.zst",
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_records_gives_the_same(tokenizer, documents, tmp_path, form):
    source = write_form(tmp_path / "in", form, documents)
    out = run(tokenizer, source, tmp_path / "out", "--val_split_fraction", 0.1)
    train, val = items(out / "train"), items(out / "val")
    reference = expected(tokenizer, documents)
    drawn = [
        int.from_bytes(
            hashlib.blake2b(text.encode(), digest_size=8, key=(42).to_bytes(16, "little")).digest(), "little"
        )
        for text in documents
    ]
    assert train == [ids for ids, number in zip(reference, drawn, strict=True) if number >= 0.1 * 2**64]
    assert val == [ids for ids, number in zip(reference, drawn, strict=True) if number < 0.1 * 2**64]
    assert 30 < len(val) < 90
    record = DatasetRecord.read(out)
    assert record.splits["train"].documents == len(train)
    assert record.splits["val"].tokens == sum(map(len, val))
    assert record.tokenizer == Tokenizer(out / "tokenizer").fingerprint() == tokenizer.fingerprint()
    assert (record.eos_id, record.dtype) == (tokenizer.eos_id, "uint16")
    assert not (out / unit_tokens.WORK_DIR).exists()


@pytest.mark.parametrize("form", [".txt", ".txt.gz", ".txt.zst"])
def test_text_files_between_separators(tokenizer, documents, tmp_path, form, monkeypatch):
    """EOS spelled out, and a separator of one's own that has line breaks in it, in whose middle no unit may begin."""
    monkeypatch.setattr(text_reading, "CHUNK_BYTES", 1_500)
    monkeypatch.setattr(source_files, "BLOCK_BYTES", 1_500)
    texts = [text.strip().replace("<s>", "") for text in documents]
    joined = (
        "".join(text + ("\n---\n" if number % 2 else "<|endoftext|>") for number, text in enumerate(texts[:-1]))
        + texts[-1]
    )
    path = tmp_path / f"corpus{form}"
    opener = {".gz": gzip.open, ".zst": zstandard.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(joined)
    out = run(tokenizer, path, tmp_path / "out", "--split", "train", "--document_separator", r"\n---\n")
    assert tokens(out / "train") == [i for ids in expected(tokenizer, texts) for i in ids]
    assert DatasetRecord.read(out).splits["train"].documents == len(texts)
    assert not (out / "val").exists()


def test_units_begin_between_separators_or_where_no_token_changes(tmp_path):
    """Wherever two units are to meet: no separator is cut, and whether a document begins there is told rightly."""
    separators = ("<|endoftext|>", "\n---\n", "aba")
    text = "Grüße\n---\none two\nthree<|endoftext|>é\n---\n\n---\n---\nababa four\nababa\n// five\n\nsix 漢字\nabab"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data, split = text.encode(), re.compile("|".join(map(re.escape, separators)))
    piece, places = text_reading.FilePiece(tmp_path / "a.txt", 0, len(data)), set()
    for near in range(len(data) + 1):
        place, at_separator = documents_module._text_cut(piece, near, separators)
        assert place >= near
        before, after = data[:place].decode(), data[place:].decode()
        assert len(split.findall(before)) + len(split.findall(after)) == len(split.findall(text))
        assert at_separator == bool(split.split(before)[-1] == "" and before and after)
        if not at_separator and after and before:
            assert text_reading.LINE_BREAK.search(text, len(before) - 1).end() == len(before)
        places.add(place)
    assert len(places) == 8


def test_what_is_held_out_begins_in_no_separator(tmp_path):
    word, text = "\n---\n", "one\n---\ntwo\n---\nthree and more"
    (tmp_path / "a.txt").write_text(text)
    for place in range(len(text)):
        moved = text_reading.beyond(tmp_path / "a.txt", place, [word])
        assert text[:moved].count(word) + text[moved:].count(word) == 2
        assert moved == place or (moved - place < len(word) and text[:moved].endswith(word))
    (train,), (val,) = text_reading.hold_out_text([tmp_path / "a.txt"], 0.75, [word])
    assert (train.end, val.start) == (8, 8)  # the first line that begins after a quarter of it is within the first one


def test_documents_across_units_begin_with_one_bos(tmp_path):
    tokenizer = Tokenizer(tokenizer_files.byte_fallback(tmp_path / "tokenizer"))
    texts = [TEXT[start : start + 150].strip() for start in range(0, 60_000, 150)]
    texts = [*texts, *(text.replace("\n", " ") for text in texts)]  # units of these can meet between documents only
    for name, joined in {"many": "</s>".join(texts), "runs": "</s></s>".join(texts)}.items():
        (tmp_path / f"{name}.txt").write_text(joined)
        out = run(tokenizer, tmp_path / f"{name}.txt", tmp_path / name, "--split", "train", "--add_bos", "true")
        reference = [[tokenizer.bos_id, *ids] for ids in expected(tokenizer, texts)]
        assert tokens(out / "train") == [i for ids in reference for i in ids]


@pytest.mark.parametrize("make", [tokenizer_files.byte_level, tokenizer_files.byte_fallback, tokenizer_files.metaspace])
def test_a_long_document_is_cut_without_changing_a_token(tmp_path, monkeypatch, make):
    """Units, chunks of text and parts of a record are cut at line breaks; some tokenizers put a space before a text."""
    tokenizer = Tokenizer(make(tmp_path / "tokenizer"))
    monkeypatch.setattr(text_reading, "CHUNK_BYTES", 3_000)
    monkeypatch.setattr("litgpt.data.documents.MAX_CHUNK_BYTES", 5_000)
    text = "\ufeff" + TEXT[:60_000] + "\n\n \n  Über\n\nend without break"
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    write_jsonl(tmp_path / "one.jsonl", [text[1:]])
    whole = [*tokenizer.encode_ids(text[1:], bos=False), tokenizer.eos_id]
    for name in ("one.txt", "one.jsonl"):
        out = run(tokenizer, tmp_path / name, tmp_path / f"out-{name}", "--split", "train")
        assert tokens(out / "train") == whole
        assert DatasetRecord.read(out).splits["train"].documents == 1


def test_a_text_file_without_line_breaks(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_reading, "MAX_CHUNK_BYTES", 4_000)
    monkeypatch.setattr("litgpt.data.documents.MAX_CHUNK_BYTES", 4_000)
    text = "漢字🙂é" * 4_000
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    out = run(tokenizer, tmp_path / "one.txt", tmp_path / "out", "--split", "train")
    assert tokenizer.decode(tokens(out / "train")) == text


def test_marks_in_records_are_text_and_in_text_files_tokens(tmp_path):
    tokenizer = Tokenizer(tokenizer_files.byte_fallback(tmp_path / "tokenizer"))
    write_jsonl(tmp_path / "in.jsonl", ["one</s><s>two"])
    (tmp_path / "in.txt").write_text("one</s><s>two</s>")
    hostile = tokens(run(tokenizer, tmp_path / "in.jsonl", tmp_path / "a", "--split", "train") / "train")
    assert hostile.count(tokenizer.eos_id) == 1
    assert tokenizer.bos_id not in hostile
    one, two = (tokenizer.encode_ids(text, bos=False) for text in ("one", "two"))
    plain = tokens(run(tokenizer, tmp_path / "in.txt", tmp_path / "b", "--split", "train") / "train")
    assert plain == [*one, tokenizer.eos_id, tokenizer.bos_id, *two, tokenizer.eos_id]
    first = tokens(
        run(tokenizer, tmp_path / "in.jsonl", tmp_path / "c", "--split", "train", "--add_bos", "true") / "train"
    )
    assert first == [tokenizer.bos_id, *hostile]


def test_folders_train_and_val_and_a_large_vocabulary(tokenizer, documents, tmp_path):
    for number in range(6):
        write_jsonl(tmp_path / f"in/train/{number}.jsonl", documents[number * 50 : number * 50 + 50])
    write_parquet(tmp_path / "in/train/9.parquet", documents[300:400])
    (tmp_path / "in/train/.hidden.txt").write_text("not this")
    write_jsonl(tmp_path / "in/validation/held.jsonl.gz", documents[400:420])
    out = run(tokenizer, tmp_path / "in", tmp_path / "out")
    assert items(out / "train") == expected(tokenizer, documents[:400])
    assert items(out / "val") == expected(tokenizer, documents[400:420])
    wide = tmp_path / "wide"
    shutil.copytree(tokenizer.dir, wide)
    config = json.loads((wide / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"70000": {"content": "<|far|>", "special": True}}
    (wide / "tokenizer_config.json").write_text(json.dumps(config))
    other = run(Tokenizer(wide), tmp_path / "in", tmp_path / "other", "--split", "train")
    assert TokenChunks.read(other / "train").dtype == np.dtype("int32")
    assert items(other / "train") == expected(tokenizer, documents[:400])


def test_many_text_files_hold_out_whole_ones_and_few_their_ends(tokenizer, tmp_path):
    for number in range(40):
        path = tmp_path / f"many/{number:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"File {number}. " + TEXT[number * 500 : number * 500 + 500])
    texts = [path.read_text() for path in sorted((tmp_path / "many").iterdir())]
    out = run(tokenizer, tmp_path / "many", tmp_path / "out")
    assert items(out / "val") == expected(tokenizer, [texts[19], texts[39]])
    assert items(out / "train") == expected(tokenizer, texts[:19] + texts[20:39])
    (tmp_path / "one.txt").write_text(TEXT[:50_000])
    out = run(tokenizer, tmp_path / "one.txt", tmp_path / "end")
    train, val = (tokenizer.decode(tokens(out / split)) for split in ("train", "val"))
    assert train + val == TEXT[:50_000]
    assert 0.045 < len(val) / 50_000 <= 0.05


def test_litdata_reads_it(tokenizer, documents, tmp_path):
    from litdata import StreamingDataset, TokensLoader

    out = run(tokenizer, write_jsonl(tmp_path / "in.jsonl", documents), tmp_path / "out", "--split", "train")
    index = TokenChunks.read(out / "train")
    assert len(index.chunks) > 3
    blocks = []
    for chunk in index.chunks:
        ids = open_chunk(out / "train" / chunk.filename, chunk, index.dtype)
        blocks += [ids[n * 64 : n * 64 + 64].tolist() for n in range(len(ids) // 64)]
    dataset = StreamingDataset(str(out / "train"), item_loader=TokensLoader(block_size=64), shuffle=False)
    assert [block.tolist() for block in dataset] == blocks


def test_a_hub_dataset(tokenizer, documents, tmp_path, monkeypatch, capsys):
    write_parquet(tmp_path / "train.parquet", documents[:100])
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents[100:120])
    files = {
        "data/train-00000-of-00001.parquet": (tmp_path / "train.parquet").read_bytes(),
        "data/validation-00000-of-00001.jsonl.zst": zstandard.compress(lines.encode()),
    }
    monkeypatch.chdir(tmp_path)
    with serve_hub(Hub(repositories={"datasets/someone/stories": files})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        out = run(tokenizer, "someone/stories", tmp_path / "out")
        assert "gone/nothing" in fails(capsys, tokenizer, "gone/nothing", tmp_path / "no")
    assert items(out / "train") == expected(tokenizer, documents[:100])
    assert items(out / "val") == expected(tokenizer, documents[100:120])


# --- the same bytes whoever does the work ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, documents):
    """A folder of all kinds of files."""
    folder = tmp_path_factory.mktemp("mixed")
    write_jsonl(folder / "a.jsonl", documents[:300])
    write_jsonl(folder / "b.jsonl.zst", documents[300:400])
    write_parquet(folder / "c.parquet", documents[400:], row_group_size=30)
    (folder / "d.txt").write_text("<|endoftext|>".join(documents[:100]))
    return folder


@pytest.fixture
def by_one(tokenizer, mixed, tmp_path):
    return sums(run(tokenizer, mixed, tmp_path / "by-one"))


def test_the_same_bytes_with_any_number_of_workers(tokenizer, mixed, by_one, tmp_path):
    for workers in (2, 3):
        out = run(tokenizer, mixed, tmp_path / f"by-{workers}", "--num_workers", workers)
        assert sums(out) == by_one


def test_shards_and_merge(tokenizer, mixed, by_one, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    run(tokenizer, mixed, out, "--shard", "3/3")
    for name, value in (("ID", "6"), ("MIN", "4"), ("COUNT", "3"), ("STEP", "2")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    said = fails(capsys, tokenizer, mixed, out, "--merge", "true")
    assert "--shard 1/3, 2/3" in said
    run(tokenizer, mixed, out, "--shard", "slurm")
    assert "--shard 1/3." in fails(capsys, tokenizer, mixed, out, "--merge", "true")
    assert not (out / "train").exists()
    run(tokenizer, mixed, out, "--shard", "1/3")
    assert sums(run(tokenizer, mixed, out, "--merge", "true")) == by_one


def test_what_is_done_is_not_done_again(tokenizer, mixed, by_one, tmp_path, capsys, monkeypatch):
    out, done = tmp_path / "out", []
    real = unit_tokens.prepare_unit

    def interrupted(job, unit, *rest):
        if len(done) == 5:
            raise KeyboardInterrupt
        real(job, unit, *rest)
        done.append(unit.number)

    with monkeypatch.context() as patch:
        patch.setattr("litgpt.data.unit_processes.prepare_unit", interrupted)
        words = ["prepare_dataset", "--source_path", mixed, "--checkpoint_dir", tokenizer.dir, "--num_workers", 1]
        assert main([str(word) for word in [*words, "--destination_path", out]]) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert not (out / "train").exists()
    again = []
    monkeypatch.setattr(
        "litgpt.data.unit_processes.prepare_unit",
        lambda job, unit, *rest: again.append(unit.number) or real(job, unit, *rest),
    )
    assert sums(run(tokenizer, mixed, out)) == by_one
    assert "5 of" in capsys.readouterr().out
    assert not set(done) & set(again)
    run(tokenizer, mixed, out)
    assert "is prepared already" in capsys.readouterr().out


def test_a_finish_that_is_cut_short_is_finished_again(tokenizer, mixed, by_one, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for target in ("DatasetRecord.write", "write_index", "_concatenate"):
        with monkeypatch.context() as patch:
            owner = preparation.DatasetRecord if "." in target else preparation_end
            patch.setattr(owner, target.rpartition(".")[2], lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(AssertionError):  # the exit code
                run(tokenizer, mixed, out)
        assert not (out / "train/index.json").exists()
    assert sums(run(tokenizer, mixed, out)) == by_one


COMMAND = """
import sys
from litgpt.data import corpus, preparation_end
corpus.MIN_UNIT_BYTES, preparation_end.CHUNK_BYTES = 9_000, 12_000
from litgpt.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def killed_and_restarted(tokenizer, source, out, script, kills, seed):
    """Kill the command's process at random moments, again and again; returns how often it was."""
    script.write_text(COMMAND)
    words = [sys.executable, script, "prepare_dataset", "--source_path", source, "--checkpoint_dir", tokenizer.dir]
    words = [str(word) for word in [*words, "--destination_path", out, "--num_workers", 2]]
    rng, killed = random.Random(seed), 0
    while killed < kills:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        before = len(list(out.rglob("unit-*.json")))
        while len(list(out.rglob("unit-*.json"))) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return killed


def test_killed_and_restarted(tokenizer, documents, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", documents * 4)
    whole = sums(run(tokenizer, source, tmp_path / "whole"))
    assert killed_and_restarted(tokenizer, source, tmp_path / "out", tmp_path / "c.py", 1, 0) == 1
    assert sums(tmp_path / "out") == whole


@pytest.mark.slow
def test_killed_five_times_and_restarted(tokenizer, documents, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", documents * 20)
    whole = sums(run(tokenizer, source, tmp_path / "whole"))
    assert killed_and_restarted(tokenizer, source, tmp_path / "out", tmp_path / "c.py", 5, 1) == 5
    assert sums(tmp_path / "out") == whole


PEAK = """
import resource, sys
from pathlib import Path
from litgpt.__main__ import main
from litgpt.data import unit_tokens
unit_tokens.PART_BYTES = 1 << 20
peak = 0
def measured(*arguments, real=unit_tokens.encode_texts, **options):
    global peak
    for ids in real(*arguments, **options):
        _, resident, of_files, *_ = Path("/proc/self/statm").read_text().split()
        peak = max(peak, (int(resident) - int(of_files)) * resource.getpagesize())
        yield ids
unit_tokens.encode_texts = measured
main(sys.argv[1:])
print("PEAK", peak)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tokenizer, tmp_path):
    """One process; 2 MB and 12 MB of text, a single document. What is between them is 18 MB of ids as they are written,
    and 36 MB as the tokenizer returns them."""
    script, peaks = tmp_path / "peak.py", {}
    script.write_text(PEAK)
    for size in (2, 12):
        source = tmp_path / f"{size}.txt.gz"  # which is one unit, however large
        source.write_bytes(gzip.compress(TEXT[:1_000_000].encode() * size, 1))
        words = ["prepare_dataset", "--source_path", source, "--checkpoint_dir", tokenizer.dir, "--num_workers", 1]
        words = [sys.executable, script, *words, "--destination_path", tmp_path / f"out{size}", "--split", "train"]
        # One thread and one heap, whose size tells what is kept.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}
        words = [str(word) for word in words]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        peaks[size] = int(re.search(r"PEAK (\d+)", done.stdout)[1]) / 1e6
    assert peaks[12] - peaks[2] < 8, peaks


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_the_same_bytes_on_ray(tokenizer, mixed, by_one, tmp_path, capsys):
    import ray

    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    try:
        assert sums(run(tokenizer, mixed, tmp_path / "out", "--engine", "ray")) == by_one
        (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
        capsys.readouterr()
        said = fails(capsys, tokenizer, tmp_path / "bad.jsonl", tmp_path / "bad", "--engine", "ray", "--split", "train")
        assert "bad.jsonl, line 2: not valid JSON" in said
    finally:
        ray.shutdown()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_that_is_missing_is_named(tokenizer, mixed, tmp_path, capsys):
    assert "pip install 'litgpt[ray]'" in fails(capsys, tokenizer, mixed, tmp_path / "out", "--engine", "ray")
    assert not (tmp_path / "out").exists()


# --- what is wrong is named ------------------------------------------------------------------------------------------


def test_damaged_files_are_named(tokenizer, documents, tmp_path, capsys):
    def said(name, content):
        (tmp_path / name).write_bytes(content)
        return fails(capsys, tokenizer, tmp_path / name, tmp_path / f"out-{name}", "--split", "train")

    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    assert "cut.jsonl.gz is damaged or cut off" in said("cut.jsonl.gz", gzip.compress(lines.encode())[:-900])
    assert "cut.jsonl.zst is damaged or cut off" in said("cut.jsonl.zst", zstandard.compress(lines.encode())[:-900])
    assert "no.jsonl.zst is damaged or cut off" in said("no.jsonl.zst", lines.encode())
    bad = lines.split("\n")
    bad[400] = bad[400][:-3]
    assert "bad.jsonl, line 401: not valid JSON" in said("bad.jsonl", "\n".join(bad).encode())
    broken = "\n".join(bad[:300]).encode() + b'\n{"text": "caf\xe9"}\n'
    assert "latin.jsonl, line 301 is not UTF-8" in said("latin.jsonl", broken)
    plain = TEXT[:20_000].encode() + b"caf\xe9 au lait" + TEXT[:20_000].encode()
    place = len(TEXT[:20_000].encode()) + 3
    assert f"plain.txt is not UTF-8 text (invalid continuation byte at byte {place:,})" in said("plain.txt", plain)
    assert "not valid JSON" in said("list.json", json.dumps([{"text": "a"}, {"text": "b"}]).encode()[:-4])
    write_parquet(tmp_path / "whole.parquet", documents)
    content = (tmp_path / "whole.parquet").read_bytes()
    assert "cut.parquet is damaged or cut off" in said("cut.parquet", content[:-500])
    assert "page.parquet is damaged or cut off" in said("page.parquet", content[:3000] + bytes(2000) + content[5000:])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "many.json.gz"])
def test_a_record_without_an_end_is_refused_in_bounded_memory(name, tmp_path, monkeypatch):
    limit = 1 << 23
    monkeypatch.setattr("litgpt.data.source_files.MAX_RECORD", limit)
    monkeypatch.setattr("litgpt.data.source_files.LONG_RECORD", 1 << 20)
    monkeypatch.setattr("litgpt.data.source_files.MAX_RECORD_VALUES", 1 << 20)
    monkeypatch.setattr("litgpt.data.bounded_text.MAX_RECORD", limit)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get((tmp_path / name).suffix, bytes)
    block = (b"[]," if name == "many.json.gz" else b"x") * (limit // 3)
    (tmp_path / name).write_bytes(compress(b'{"text": "' if "jsonl" in name else b"[[") + compress(block) * 60)
    file = describe_file(tmp_path / name, tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            list(read_records_of(file, Extent(0, 0, file.size, file.size), lambda size: None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 * limit
    if name == "many.json.gz":
        assert re.search(r"many\.json\.gz, record 1: it has about [\d,]+ values, where 1,048,576", str(caught.value))
    else:
        assert f"{name}, {'the line at byte 0' if 'jsonl' in name else 'record 1'}: one record" in str(caught.value)
        assert f"more than {limit:,} " in str(caught.value)


def test_columns(tokenizer, tmp_path, capsys):
    def write(name, records):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path / name

    out = tmp_path / "out"
    two = write("two.jsonl", [{"title": "a", "summary": "b", "n": 1}])
    assert "--text_column. It has: title, summary, n." in fails(capsys, tokenizer, two, out, "--split", "train")
    assert "no such column. Did you mean 'title'?" in fails(capsys, tokenizer, two, out, "--text_column", "titel")
    assert "which is not text" in fails(capsys, tokenizer, two, out / "a", "--text_column", "n", "--split", "train")
    empty = write("empty.jsonl", [{"text": None}, {"text": ""}, {"id": 3}])
    said = fails(capsys, tokenizer, empty, out / "b", "--text_column", "text", "--split", "train")
    assert "The column 'text' is empty in all 3 records" in said
    some = write("some.jsonl", [{"text": None}, {"text": "a"}, {"id": 3}])
    assert items(run(tokenizer, some, out / "c", "--split", "train") / "train") == expected(tokenizer, ["a"])
    assert "2 records without text were left out" in capsys.readouterr().out
    only = write("only.jsonl", [{"n": 1, "prose": "a"}])
    assert items(run(tokenizer, only, out / "d", "--split", "train") / "train") == expected(tokenizer, ["a"])
    table = pyarrow.table({"text": pyarrow.array([1, 2]), "n": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "n.parquet")
    assert "Which column" in fails(capsys, tokenizer, tmp_path / "n.parquet", out / "e", "--split", "train")
    said = fails(capsys, tokenizer, tmp_path / "n.parquet", out / "f", "--split", "train", "--text_column", "text")
    assert "is of type int64" in said
    (tmp_path / "a.txt").write_text("text")
    assert "no columns" in fails(capsys, tokenizer, tmp_path / "a.txt", out / "g", "--text_column", "text")


def test_another_plan_in_the_same_place_is_refused(tokenizer, documents, mixed, tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "in.jsonl", documents), tmp_path / "out"
    run(tokenizer, source, out, "--shard", "1/2")
    said = fails(capsys, tokenizer, source, out, "--seed", 1)
    assert "unfinished preparation (seed differ)" in said
    assert "--overwrite true" in said
    os.utime(source, (1, 1))
    assert "(source files differ)" in fails(capsys, tokenizer, source, out)
    assert "cannot be combined with --shard" in fails(
        capsys, tokenizer, source, out, "--shard", "1/2", "--overwrite", "true"
    )
    run(tokenizer, source, out, "--overwrite", "true")
    assert "(val_split_fraction differ)" in fails(capsys, tokenizer, source, out, "--val_split_fraction", 0.2)
    other = Tokenizer(tokenizer_files.byte_fallback(tmp_path / "tokenizer"))
    assert "tokenizer" in fails(capsys, other, source, out)
    strange = tmp_path / "strange"
    (strange / "train").mkdir(parents=True)
    (strange / "notes.txt").write_text("keep")
    assert "train from something else" in fails(capsys, tokenizer, source, strange)
    run(tokenizer, source, strange, "--overwrite", "true")
    assert (strange / "notes.txt").read_text() == "keep"
    inside = write_jsonl(tmp_path / "own/train/in.jsonl", documents)
    said = fails(capsys, tokenizer, tmp_path / "own", tmp_path / "own", "--overwrite", "true")
    assert "lies where the result goes" in said
    assert inside.exists()


def test_options_that_cannot_act(tokenizer, documents, tmp_path, capsys, monkeypatch):
    source, out = write_jsonl(tmp_path / "in.jsonl", documents[:20]), tmp_path / "out"
    for options, part in {
        ("--split", "val"): "give train,val or train",
        ("--shard", "0/2"): "counted from 1",
        ("--shard", "a"): "I/N is expected",
        ("--shard", "slurm"): "not a task of a SLURM array",
        ("--split", "train", "--val_split_fraction", "0.1"): "--split leaves val out",
        ("--val_split_fraction", "1.5"): "not between 0 and 1",
        ("--num_workers", "0"): "at least one",
        ("--revision", "main"): "for a data set on the Hub",
        ("--eos_token", "<|none|>"): "has no token '<|none|>'",
        ("--val_split_fraction", "0.000001"): "There is no document for val among 20",
    }.items():
        assert part in fails(capsys, tokenizer, source, out, *options), options
        shutil.rmtree(out, ignore_errors=True)
    assert "no such file or folder" in fails(capsys, tokenizer, tmp_path / "nowhere", out)
    monkeypatch.chdir(tmp_path)
    assert "no such file or folder" in fails(capsys, tokenizer, "data/corpus.jsonl", out)  # no id of a data set
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(b"1")
    assert "it holds a.png" in fails(capsys, tokenizer, tmp_path / "pictures", out)
    assert "ends in none of" in fails(capsys, tokenizer, tmp_path / "pictures/a.png", out)
    (tmp_path / "none.txt").touch()
    assert "are empty" in fails(capsys, tokenizer, tmp_path / "none.txt", out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    assert "GB are needed" in fails(capsys, tokenizer, source, out)
    endless = Tokenizer(tokenizer_files.byte_level(tmp_path / "endless", {"eos_token": None}))
    assert "--eos_token" in fails(capsys, endless, source, out)
    monkeypatch.undo()
    made = run(endless, source, out, "--split", "train", "--eos_token", "<|endoftext|>")
    assert items(made / "train") == expected(tokenizer, documents[:20])


# --- chunks of tokens ------------------------------------------------------------------------------------------------


def test_hostile_and_damaged_indices_and_chunks(tmp_path):
    rows = [np.arange(5, dtype="<u2"), np.arange(9, dtype="<u2")]
    info = write_chunk(tmp_path / "chunk-0.bin", rows, np.dtype("<u2"))
    write_index(tmp_path, [info], np.dtype("<u2"))
    good = json.loads((tmp_path / "index.json").read_text())

    def broken(change):
        content = json.loads(json.dumps(good))
        change(content)
        with pytest.raises(ValueError, match="index"):
            TokenChunks.parse(json.dumps(content), "the index")

    for name in ("../chunk-0.bin", "/etc/passwd", ".hidden", "a\\b", "", None, "c:d"):
        broken(lambda c, name=name: c["chunks"][0].update(filename=name))
    for key, value in (("dim", 10**30), ("dim", -1), ("chunk_size", True), ("chunk_bytes", "9"), ("sha256", "x")):
        broken(lambda c, key=key, value=value: c["chunks"][0].update({key: value}))
    broken(lambda c: c["chunks"].append(c["chunks"][0]))
    broken(lambda c: c["config"].update(data_format=["no_header_tensor:3"]))
    broken(lambda c: c["config"].update(item_loader="PyTreeLoader"))
    broken(lambda c: c["config"].update(encryption={"level": "chunk"}))
    broken(lambda c: c.pop("chunks"))
    for text in ("[" * 100_000, "{", "[]"):
        with pytest.raises(ValueError, match="damaged"):
            TokenChunks.parse(text, "the index")
    path, dtype = tmp_path / "chunk-0.bin", np.dtype("<u2")
    content = path.read_bytes()
    for damage in (content[:-1], b"\3" + content[1:], content[:8] + b"\xff" + content[9:], b""):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="is damaged"):
            open_chunk(path, info, dtype)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="is missing, though"):
        open_chunk(path, info, dtype)
    empty = write_chunk(tmp_path / "empty.bin", [], dtype)
    assert empty == ChunkInfo("empty.bin", 0, 0, 8, empty.sha256)
    assert open_chunk(tmp_path / "empty.bin", empty, dtype).size == 0
