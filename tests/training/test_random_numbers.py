"""Which random numbers training draws: other ones on each rank, and the same ones again after a resume."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from litgpt.training.batches import BatchStream
from tests.training.conftest import on_two_ranks, weights
from tests.training.ragged import Ragged

RUN = r"""
import sys
from dataclasses import replace
from pathlib import Path
import torch
from litgpt.cli import ConfigOverrides
from litgpt.cli.flat import flattened
from litgpt.commands import pretrain
from litgpt.parallel import fabric as fabrics
from litgpt.training import loop
from tests.training.ragged import Ragged
from tests.training.test_ragged import EVALUATION, MODEL

real = loop.accumulate_gradients

def accumulate_gradients(fabric, *others):
    with torch.random.fork_rng(), notes(fabric.global_rank).open("a") as file:
        if file.tell() == 0:
            file.write(f"{sum(p.double().sum() for p in initial):.12f}\n")
        file.write(f"{torch.rand(()):.8f}\n")
    return real(fabric, *others)

def shard(module, *args):
    initial.extend(p.detach().clone() for p in module.parameters())
    return shard_module(module, *args)

initial, shard_module = [], fabrics.shard_module
fabrics.shard_module = shard
loop.accumulate_gradients = accumulate_gradients
out_dir, steps, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
notes = lambda rank: out_dir.parent / f"{sys.argv[4]}{rank}.txt"
train = replace(pretrain.TRAIN, global_batch_size=8, micro_batch_size=2, lr_warmup_steps=5, max_tokens=None,
                max_steps=steps, save_interval=2, neftune_noise_alpha=5.0)
flattened(pretrain.setup)(model_name="tiny", model_config=ConfigOverrides(MODEL), out_dir=out_dir, devices=2, strategy="fsdp", train=train,
               data=Ragged(), eval=EVALUATION, logger_name="csv", resume=resume)
"""


def on_both(tmp_path: Path, name: str, *arguments: object) -> list[list[str]]:
    """Trains; what each rank noted: the sum of its initial weights, then a number per step."""
    on_two_ranks(RUN, tmp_path, *arguments, name)
    return [(tmp_path / f"{name}{rank}.txt").read_text().split() for rank in (0, 1)]


def test_ranks_draw_apart_from_equal_weights_and_go_on_where_they_were(tmp_path):
    (first, *drawn), (second, *others) = on_both(tmp_path, "whole", tmp_path / "whole", 4, "false")
    assert first == second
    assert len({*drawn, *others}) == 8  # noise on the embeddings was drawn between them
    step = tmp_path / "whole/step-00000002"
    (_, *resumed), (_, *others_resumed) = on_both(tmp_path, "resumed", tmp_path / "parts", 4, step)
    assert (resumed, others_resumed) == (drawn[2:], others[2:])
    whole, parts = weights(tmp_path / "whole/final"), weights(tmp_path / "parts/final")
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())


def loaders() -> dict[str, DataLoader]:
    data = Ragged()
    data.connect(batch_size=2)
    return {"its own order": data.train_dataloader(), "torch's": DataLoader(torch.arange(8), 2, shuffle=True)}


@pytest.mark.parametrize("kind", ["its own order", "torch's"])
def test_reading_data_leaves_all_generators_as_they_are(kind, monkeypatch):
    """Those of GPUs too, where a resumed run has just put them back and each rank has numbers of its own."""
    loader, seeded = loaders()[kind], []
    for device in (torch.cuda, torch.mps):
        monkeypatch.setattr(device, "manual_seed_all" if device is torch.cuda else "manual_seed", seeded.append)
    if kind == "torch's":
        loader.collate_fn = lambda rows: torch.stack(rows)[:, None].expand(-1, 4)
    before = torch.get_rng_state()
    stream = BatchStream(loader, 2)
    for _ in range(3):
        stream.next()
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []
