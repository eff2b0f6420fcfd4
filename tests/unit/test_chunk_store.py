"""Chunks out of an object store, through a cache on disk that processes share; and damaged ones wherever they lie."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from litgpt.data import LitData, object_store
from litgpt.data.chunk_cache import ChunkCache
from litgpt.data.chunk_store import ChunkStore
from litgpt.data.object_store import StoreError, read_small
from litgpt.training.batches import BatchStream
from tests.data_damage import flip
from tests.s3_server import connect, serve_s3
from tests.token_data import write_tokens

GB = 10**9


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("litdata")
    with serve_s3() as store:
        yield store


@pytest.fixture
def s3(server, monkeypatch):
    connect(server, monkeypatch)
    monkeypatch.setattr(object_store, "_downloaders", {})
    server.gets.clear()
    server.refuses = False
    return server


@pytest.fixture
def cache(tmp_path) -> ChunkCache:
    return ChunkCache(tmp_path / "cache", GB)


def bucket(tmp_path: Path) -> str:
    return tmp_path.name.replace("_", "-").lower()


def uploaded(s3, tmp_path: Path, chunks: list[int]) -> tuple[str, list[np.ndarray]]:
    ids = write_tokens(tmp_path / "made", chunks)
    s3.upload(tmp_path / "made", bucket(tmp_path), "data")
    return f"s3://{bucket(tmp_path)}/data", ids


def test_chunks_of_a_bucket_are_fetched_once(s3, tmp_path, cache):
    address, ids = uploaded(s3, tmp_path, [50_000, 700])
    for _ in range(2):
        store = ChunkStore(address, cache)
        for number, expected in enumerate(ids):
            assert (store.open(number) == expected).all()
    assert s3.gets["chunk-0-0.bin"] == 1
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_chunk_that_is_damaged_in_the_cache_is_fetched_again(s3, tmp_path, cache):
    address, ids = uploaded(s3, tmp_path, [50_000, 700])
    first = ChunkStore(address, cache)  # it goes on with what it has open
    assert (first.open(0) == ids[0]).all()
    (chunk,) = (tmp_path / "cache").rglob("chunk-0-0.bin")
    flip(chunk, 70_000)
    for _ in range(2):
        assert (ChunkStore(address, cache).open(0) == ids[0]).all()
    assert s3.gets["chunk-0-0.bin"] == 2
    chunk.write_bytes(b"")
    assert (ChunkStore(address, cache).open(0) == ids[0]).all()
    assert s3.gets["chunk-0-0.bin"] == 3


def test_a_connection_that_breaks_in_a_chunk_is_taken_up_again(s3, tmp_path, cache):
    address, ids = uploaded(s3, tmp_path, [50_000])
    s3.drop_after["chunk-0-0.bin"] = [10_000, 0]
    assert (ChunkStore(address, cache).open(0) == ids[0]).all()
    assert s3.gets["chunk-0-0.bin"] == 3


def test_what_is_wrong_with_a_bucket_is_said(s3, tmp_path, cache, monkeypatch):
    address, _ = uploaded(s3, tmp_path, [500])
    with pytest.raises(FileNotFoundError, match=r"There is no s3://nowhere-at-all/data/index.json: no such bucket"):
        ChunkStore("s3://nowhere-at-all/data", cache)
    with pytest.raises(FileNotFoundError, match="there is neither train/index"):
        LitData(f"s3://{bucket(tmp_path)}/elsewhere").sources()
    s3.refuses = True
    with pytest.raises(StoreError, match=r"may not be read .*Check the credentials"):
        read_small(f"{address}/index.json")
    s3.refuses = False
    monkeypatch.setattr(object_store, "_downloaders", {})
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        with pytest.raises(StoreError, match="credentials"):
            read_small(f"{address}/index.json")
    monkeypatch.setattr(object_store, "_downloaders", {})
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    monkeypatch.setattr(object_store, "CLIENT_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"cannot be read .*Check the network"):
        read_small(f"{address}/index.json")


def test_a_chunk_that_is_damaged_in_the_store_is_fetched_twice_and_named(s3, tmp_path, cache):
    address, _ = uploaded(s3, tmp_path, [500])
    content = bytearray((tmp_path / "made/chunk-0-0.bin").read_bytes())
    content[-1] ^= 1
    s3.put(bucket(tmp_path), "data/chunk-0-0.bin", bytes(content))
    with pytest.raises(ValueError, match=rf"The chunk {address}/chunk-0-0.bin is damaged: its SHA-256"):
        ChunkStore(address, cache).open(0)
    assert s3.gets["chunk-0-0.bin"] == 2
    assert not list((tmp_path / "cache").rglob("*.bin"))


def loaded(path: str | Path, batch_size: int, workers: int, cache: Path, rank: int = 0, ranks: int = 1) -> BatchStream:
    data = LitData(path, num_workers=workers, cache_dir=cache)
    data.connect(None, batch_size, 32)
    data.setup()
    return BatchStream(data.train_dataloader(), batch_size, rank, ranks)


def test_processes_share_the_cache(s3, tmp_path):
    """Two ranks with two workers each: every chunk is fetched once, and they read what a local folder gives."""
    address, _ = uploaded(s3, tmp_path, [320] * 12)
    ranks = [loaded(address, 2, 2, tmp_path / "cache", rank, 2) for rank in (0, 1)]
    local = loaded(tmp_path / "made", 4, 0, tmp_path / "cache")
    for _ in range(30):
        both = [row for rank in ranks for row in rank.next().idx.tolist()]
        assert local.next().idx.tolist() == both
    assert {s3.gets[f"chunk-0-{n}.bin"] for n in range(12)} == {1}


def test_chunks_to_come_are_fetched_ahead(s3, tmp_path):
    address, _ = uploaded(s3, tmp_path, [320] * 30)
    stream = loaded(address, 1, 0, tmp_path / "cache")
    order = stream.loader.dataset.orders[0]
    stream.next()  # of one chunk
    wanted = {*order.window_at(0).chunks, *order.window_after(order.window_at(0)).chunks}
    deadline = threading.Event()
    for _ in range(300):
        there = {int(path.stem.rpartition("-")[2]) for path in (tmp_path / "cache").rglob("chunk-*.bin")}
        if there == wanted:
            break
        deadline.wait(0.1)
    assert there == wanted
    assert len(wanted) == 16


# --- the cache


def content(size: int):
    return lambda path: path.write_bytes(bytes(size))


def test_the_cache_is_bounded_and_never_takes_what_is_in_use(tmp_path):
    cache = ChunkCache(tmp_path, 1000).of("one")
    other = ChunkCache(tmp_path, 1000).of("two")
    _, held = cache.hold("a", 400, content(400))
    for number, (name, place) in enumerate((("b", cache), ("c", other))):
        path, descriptor = place.hold(name, 250, content(250))
        os.utime(path, (1000 + number, 1000 + number))  # b was used before c
        os.close(descriptor)
    os.utime(cache.folder / "a", (1, 1))  # a before both, but it is open
    os.close(cache.hold("d", 300, content(300))[1])
    assert {path.name for path in tmp_path.rglob("[a-d]") if path.is_file()} == {"a", "c", "d"}
    assert other.obtain("e", 700, content(700), wait=False) is None  # ahead of time, only where there is room
    os.close(held)
    os.close(other.hold("e", 900, content(900))[1])
    assert {path.name for path in tmp_path.rglob("[a-e]") if path.is_file()} == {"e"}


def test_one_makes_a_chunk_while_the_others_wait(tmp_path):
    cache = ChunkCache(tmp_path, GB).of("one")
    calls, started, go = [], threading.Event(), threading.Event()

    def slow(path: Path) -> None:
        calls.append(path)
        started.set()
        go.wait(10)
        path.write_bytes(b"x")

    threads = [threading.Thread(target=lambda: os.close(cache.hold("a", 1, slow)[1])) for _ in range(4)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    assert cache.obtain("a", 1, slow, wait=False) is None  # somebody is at it
    go.set()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_what_fails_leaves_nothing(tmp_path):
    cache = ChunkCache(tmp_path, GB).of("one")

    def broken(path: Path) -> None:
        path.write_bytes(b"half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cache.hold("a", 1, broken)
    assert [path.name for path in cache.folder.iterdir() if not path.name.endswith(".lock")] == []


def test_a_cache_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path / "cache"))
    write_tokens(tmp_path / "made", [3000] * 4)
    data = LitData(f"local:{tmp_path / 'made'}", max_cache_gb=1e-5)
    data.connect(None, 1, 32)
    with pytest.raises(ValueError, match=r"max_cache_gb=1e-05 is too small.*Set at least"):
        data.setup()
