"""Blocks on several devices: the CPU twice, where the numbers can be compared, and the meta device for what moves."""

from collections import Counter

import pytest
import torch

from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.generation.step_program import why_not
from litgpt.kv_cache import AttentionPlan
from litgpt.model import GPT
from litgpt.parallel.sequential import Mover, connect_blocks, place_blocks, placed_weights
from litgpt.sources.load import load_model
from litgpt.sources.meta import meta_model
from tests import checkpoint_files
from tests.unit.test_engine import PROMPTS, tiny_model

CPU, META = torch.device("cpu"), torch.device("meta")
TWO_BASES = {"rope_local_base_freq": 50, "rope_indices": [1, 0, 1, 1, 0], "rope_adjustments": {"factor": 4.0}}
WINDOWS = {"n_layer": 5, "sliding_window_size": 12, "sliding_window_indices": [1, 0, 1, 1, 0]}


@pytest.mark.parametrize("bases", [{}, TWO_BASES], ids=["one RoPE base", "two"])
def test_an_engine_batches_over_several_devices(bases, monkeypatch):
    model = tiny_model(**WINDOWS, **bases)
    requests = [Request(prompt, 30, Sampling(0.8, seed=index)) for index, prompt in enumerate(PROMPTS)]
    expected = Engine(model).complete(requests)
    copies, calls, blocks = Counter(), [], []
    real = Mover._plan
    monkeypatch.setattr(Mover, "_plan", lambda self, plan: copies.update([type(plan)]) or real(self, plan))
    model.transformer["wte"].register_forward_hook(lambda *_: calls.append(1))
    connect_blocks(model, [0, 0, 1, 2, 2], [CPU] * 3)
    model.transformer["h"][4].register_forward_hook(lambda *_: blocks.append(1))
    assert Engine(model).complete(requests) == expected
    # Of two devices, the one has one kind of block and the other both: each plan is brought to each once in a call.
    assert copies[AttentionPlan] == 3 * len(calls)
    assert len(blocks) == len(calls)


@pytest.mark.parametrize("bases", [{}, TWO_BASES], ids=["one RoPE base", "two"])
def test_activations_weights_keys_and_values_are_on_the_blocks_device(bases):
    model = tiny_model(**WINDOWS, **bases)
    places = [0, 0, 0, 1, 1]
    for block in model.transformer["h"][3:]:
        block.to(META)
    connect_blocks(model, places, [CPU, META])
    cache = model.new_cache(2, 32)
    assert [layer.tensors[0].device.type for layer in cache.layers] == ["cpu"] * 3 + ["meta"] * 2
    alone = tiny_model(**WINDOWS, **bases).new_cache(2, 32)
    assert [[t.shape for t in layer.tensors] for layer in cache.layers] == [
        [t.shape for t in layer.tensors] for layer in alone.layers
    ]
    assert {ring.table.device for ring in cache.rings.values()} == {CPU}
    seen = []
    for block in model.transformer["h"]:
        block.register_forward_hook(lambda _, args, output: seen.append((args[0].device.type, output.device.type)))
    selected = cache.select(torch.tensor([1, 0]))
    for start in (0, 4):  # into an empty cache, and with what it holds
        seen.clear()
        with torch.inference_mode(), pytest.raises(NotImplementedError, match="meta tensor"):  # none comes back
            model(torch.ones(2, 4, dtype=torch.int64), torch.arange(start, start + 4).expand(2, 4), cache=selected)
        assert seen == [("cpu", "cpu")] * 3 + [("meta", "meta")] * 2


def test_weights_are_read_to_where_they_belong(tmp_path):
    directory = checkpoint_files.chat_model(tmp_path)
    model = load_model(directory, dtype=torch.float32, device=placed_weights([0, 1], [CPU, META]))
    whole = load_model(directory, dtype=torch.float32)
    for name, p in model.named_parameters():
        assert p.device.type == ("meta" if name.startswith("transformer.h.1.") else "cpu"), name
        assert p.is_meta or torch.equal(p, whole.get_parameter(name))
    quantised = load_model(directory, device=placed_weights([0, 1], [CPU, CPU]), quantize="bnb.nf4")
    assert isinstance(quantised, GPT)


@pytest.mark.parametrize(
    ("changes", "count", "expected"),
    [
        ({"n_layer": 6}, 2, [0, 0, 0, 1, 1, 1]),
        ({"n_layer": 6}, 3, [0, 0, 1, 1, 2, 2]),
        ({"n_layer": 6}, 6, [0, 1, 2, 3, 4, 5]),
        ({"n_layer": 6, "padded_vocab_size": 400}, 2, [0, 0, 1, 1, 1, 1]),  # 25,600 more: nearly three blocks
        ({"n_layer": 3, "padded_vocab_size": 9000}, 2, [0, 1, 1]),
        ({"n_layer": 6}, 1, [0] * 6),
    ],
)
def test_devices_hold_about_the_same(changes, count, expected):
    model = meta_model(tiny_model(**changes).config)
    assert place_blocks(model, count) == expected


def test_code_that_would_leave_the_moves_out_is_not_compiled():
    model = tiny_model()
    assert why_not(model) is None
    connect_blocks(model, [0, 1, 1], [CPU, CPU])
    assert why_not(model) == "the model is spread over several devices"


def test_more_devices_than_blocks_are_refused():
    with pytest.raises(ValueError, match="devices=4: tiny has 3 blocks, which is the most devices"):
        place_blocks(tiny_model(), 4)
