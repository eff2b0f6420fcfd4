"""Batches of samples: grouped by length or packed, resumable, and the same loss either way."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from litgpt.config import Config
from litgpt.data import JSON, LengthGroupedSampler, StreamSampler
from litgpt.data.packing import Collate, PackedSample, pack
from litgpt.model import GPT
from litgpt.tokenizer.tokenizer import Tokenizer
from litgpt.training.batches import BatchStream, micro_batch
from litgpt.training.loss import NextTokenLoss
from tests import shapes, tokenizer_files

LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(tokenizer_files.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """60 records of very different lengths."""
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    rng = np.random.default_rng(0)
    lines = [
        {"instruction": f"Say {i}.", "output": "hello world " * int(n)} for i, n in enumerate(rng.integers(0, 12, 60))
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LITGPT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "sft_cache"))


def module(records: Path, tokenizer: Tokenizer, batch: int = 2, step: int | None = None, **options) -> JSON:
    data = JSON(
        **{"json_path": records, "num_workers": 0, "prompt_style": "chatml", "val_split_fraction": 0.2, **options}
    )
    data.connect(tokenizer, batch, LENGTH, samples_per_step=step)
    data.prepare_data()
    data.setup()
    return data


def samples(stream: BatchStream, count: int) -> list[list[int]]:
    """The samples in each of the next batches."""
    numbers = [stream.next().samples for _ in range(count)]
    return [batch[batch >= 0].tolist() for batch in numbers]


def stream(data: JSON, batch: int, rank: int = 0, world_size: int = 1) -> BatchStream:
    return BatchStream(data.train_dataloader(), batch, rank, world_size)


# --- grouped by length


def test_a_step_sees_what_it_would_see_without_grouping():
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    plain, grouped = StreamSampler(50, 4, seed=3), LengthGroupedSampler(lengths, 4, 8, seed=3)
    given = [
        list(chain(*(batch for batch, _ in zip(sampler, range(52), strict=False)))) for sampler in (plain, grouped)
    ]
    for epoch in range(0, 200, 50):
        assert sorted(given[1][epoch : epoch + 50]) == list(range(50))
        for first in range(epoch, epoch + 50, 8):  # the last step of an epoch is of 2 samples
            end = min(first + 8, epoch + 50)
            whole, sorted_ = given[0][first:end], given[1][first:end]
            assert sorted(whole) == sorted(sorted_)
            assert [lengths[i] for i in sorted_] == sorted((lengths[i] for i in whole), reverse=True)
    assert given[0] != given[1]


def test_a_step_that_was_cut_is_grouped_by_what_it_had():
    """A run of a part of an epoch takes random samples, not the longest ones, and one that goes on takes the others."""
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    plain, cut, rest = StreamSampler(50, 4, seed=3), *(LengthGroupedSampler(lengths, 4, 8, seed=3) for _ in range(2))
    cut.set_position(0, end=13)
    rest.set_position(13, end=50)
    first = list(chain(*cut))
    order = list(chain(*(batch for batch, _ in zip(plain, range(13), strict=False))))
    assert sorted(first) == sorted(order[:13])
    assert sorted(first + list(chain(*rest))) == list(range(50))


@pytest.mark.parametrize("pack_", [False, True])
def test_a_step_does_not_depend_on_ranks_or_micro_batches(records, tokenizer, pack_):
    def step(batch: int, world_size: int) -> list[list[int]]:
        streams = [
            stream(module(records, tokenizer, batch, 8, pack=pack_), batch, r, world_size) for r in range(world_size)
        ]
        count = 8 // (batch * world_size)
        return [sorted(chain(*chain(*(samples(one, count) for one in streams)))) for _ in range(6)]

    expected = step(8, 1)
    assert step(1, 1) == step(2, 1) == step(2, 2) == step(1, 4) == expected
    assert len(set(map(tuple, expected))) > 1


@pytest.mark.parametrize("options", [{}, {"pack": True}, {"num_workers": 2}])
def test_the_order_resumes_exactly(records, tokenizer, options):
    whole = samples(stream(module(records, tokenizer, 2, 8, **options), 2), 40)
    first = stream(module(records, tokenizer, 2, 8, **options), 2)
    assert samples(first, 12) == whole[:12]  # three steps
    second = stream(module(records, tokenizer, 2, 8, **options), 2)
    second.seek(first.position)
    assert samples(second, 28) == whole[12:]


def test_grouping_saves_padding(records, tokenizer):
    def padded(step: int | None) -> int:
        one = stream(module(records, tokenizer, 2, step), 2)
        return sum(one.next().idx.numel() for _ in range(24))

    assert padded(24) < 0.9 * padded(None)


# --- packed


def test_every_sample_is_in_one_row_and_rows_are_full():
    lengths = np.random.default_rng(1).integers(1, 129, 2000)
    rows = pack(lengths, 512, seed=0)
    assert sorted(chain(*rows)) == list(range(2000))
    assert max(lengths[row].sum() for row in rows) <= 512
    assert lengths.sum() / (512 * len(rows)) > 0.99
    assert rows == pack(lengths, 512, seed=0)
    assert rows != pack(lengths, 512, seed=1)
    pairs = np.concatenate([np.arange(200, 250), 512 - np.arange(200, 250)])
    assert len(pack(pairs, 512, seed=0)) == 50  # each with its counterpart


def test_a_packed_row_says_where_each_sample_begins():
    parts = [
        PackedSample(7, np.array([1, 2, 3]), np.array([0, 1, 1])),
        PackedSample(4, np.array([8, 9]), np.array([0, 1])),
    ]
    batch = Collate(packed=True, multiple=8)([parts, parts[1:]])
    assert batch["input_ids"][0].tolist() == [1, 2, 3, 8, 9, 0, 0, 0, 0]
    assert batch["labels"][0].tolist() == [-100, 2, 3, -100, 9, -100, -100, -100, -100]
    assert batch["document_ids"][0].tolist() == [0, 0, 0, 1, 1, -1, -1, -1, -1]
    assert batch["positions"][0].tolist() == [0, 1, 2, 0, 1, -1, -1, -1, -1]
    assert batch["samples"].tolist() == [[7, 4], [4, -1]]
    assert batch["num_tokens"].tolist() == [5, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert Collate(packed=False)([parts[:1]]).keys() == {"input_ids", "labels", "samples", "num_tokens"}


@pytest.mark.parametrize(
    ("tokens", "multiple", "longest", "width"),
    [(9, 8, None, 9), (10, 8, None, 17), (10, 8, 12, 13), (10, 1, 5, 10), (1, 1, None, 2)],
)
def test_width_of_a_batch(tokens, multiple, longest, width):
    part = PackedSample(0, np.zeros(tokens), np.zeros(tokens))
    assert Collate(False, multiple, longest)([[part]])["input_ids"].shape == (1, width)


def test_packed_rows_have_one_width():
    """However full: one shape is quicker, and leaves no holes in memory."""
    rows = [[PackedSample(0, np.arange(count), np.ones(count, bool))] for count in (33, 20, 5)]
    assert {Collate(True, 1, 32)([row])["input_ids"].shape for row in rows} == {(1, 33)}


MODELS = {
    "full attention": {},
    "grouped queries, sliding window": {
        "n_query_groups": 2,
        "sliding_window_size": 8,
        "sliding_window_indices": [1, 0],
    },
    "softcap": {"attention_logit_softcapping": 30.0},
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_samples_have_the_loss_and_gradient_of_padded_ones(name, records, tokenizer):
    config = Config(
        block_size=LENGTH, n_layer=2, n_embd=32, n_head=4, vocab_size=400, padded_vocab_size=400, intermediate_size=64,
        **shapes.LLAMA, **MODELS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    gpt = GPT(config)
    gpt.init_weights()
    model = NextTokenLoss(gpt)

    def one_epoch(**options) -> tuple[float, int, int, torch.Tensor]:
        gpt.zero_grad()
        data, loss, targets, places = module(records, tokenizer, **options), 0.0, 0, 0
        loader = data.train_dataloader()
        batches = BatchStream(loader, 2)
        for _ in range(-(-batches.samples_per_epoch // 2)):
            batch = batches.next()
            summed = model(batch.idx, batch.targets, **batch.inputs)
            summed.backward()
            loss, targets, places = loss + summed.item(), targets + batch.num_targets, places + batch.idx.numel()
        return loss, targets, places, torch.cat([p.grad.flatten() for p in gpt.parameters()])

    for mask_prompt in (True, False):
        padded = one_epoch(mask_prompt=mask_prompt)
        packed = one_epoch(mask_prompt=mask_prompt, pack=True)
        assert padded[1] == packed[1] > 100
        assert packed[2] < 0.9 * padded[2]
        assert packed[0] == pytest.approx(padded[0], rel=1e-5)
        difference = (packed[3] - padded[3]).norm() / padded[3].norm()
        assert difference < 1e-5


def test_padding_reaches_no_gradient(records, tokenizer):
    """A row that is mostly padding gives finite numbers, and what stands in the padding does not matter."""
    config = Config(block_size=64, n_layer=1, n_embd=32, n_head=4, vocab_size=400, padded_vocab_size=400)
    torch.manual_seed(0)
    model = NextTokenLoss(GPT(config))
    row = [PackedSample(0, np.arange(10, 20), np.ones(10)), PackedSample(1, np.arange(30, 35), np.ones(5))]
    long = [PackedSample(2, np.arange(60), np.ones(60))]
    batch = Collate(packed=True)([row, long])
    losses = []
    for filler in (0, 399):
        batch["input_ids"][0, 15:] = filler
        one = micro_batch(batch)
        losses.append(model(one.idx, one.targets, **one.inputs))
    assert torch.isfinite(losses[0])
    assert torch.equal(losses[0], losses[1])


def test_the_validation_batches_hold_all_of_it_once(records, tokenizer):
    for options in ({}, {"pack": True}):
        data = module(records, tokenizer, **options)
        found = [batch["samples"][batch["samples"] >= 0].tolist() for batch in data.val_dataloader()]
        assert sorted(chain(*found)) == list(range(12))


def test_packing_says_how_full_the_rows_are_and_needs_a_length(records, tokenizer):
    assert "% full." in module(records, tokenizer, pack=True).describe()
    data = JSON(json_path=records, pack=True)
    with pytest.raises(ValueError, match=r"pack=true fills rows of `train\.max_seq_length`"):
        data.connect(tokenizer, 2, None)
