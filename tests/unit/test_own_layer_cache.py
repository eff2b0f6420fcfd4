"""A key-value cache of one's own, as tutorials/python-api.md shows it."""

import torch

from litgpt.config import Config
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.kv_cache import LayerCache
from litgpt.model import GPT

CONFIG = Config(
    block_size=64, n_layer=2, n_embd=32, n_head=4, n_query_groups=2, padded_vocab_size=96, sliding_window_size=8,
    sliding_window_indices=[0, 1], rotary_percentage=1.0,
)  # fmt: skip


def tiny_model() -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    model.init_weights()
    return model


def test_the_engine_remembers_in_a_layer_cache_of_ones_own():
    model = tiny_model()
    requests = [Request(list(range(1, count)), 10, Sampling(0)) for count in (5, 20, 9)]
    expected = Engine(model).complete(requests)
    widths, noise = [], 0.0

    class Noisy(LayerCache):
        def update(self, plan, *new):
            widths.append(new[0].size(1))
            return super().update(plan, *(tensor + noise * torch.randn_like(tensor) for tensor in new))

    model.layer_cache = Noisy
    assert Engine(model).complete(requests) == expected
    assert max(widths) > 1  # prompts
    assert widths.count(1) >= CONFIG.n_layer * 9  # and each token after the first
    noise = 10.0
    assert Engine(model).complete(requests) != expected


def test_the_kernels_do_not_pass_over_it(capsys):
    model = tiny_model()
    model.layer_cache = type("Mine", (LayerCache,), {})
    engine = Engine(model, compile=True)
    assert engine.runner.decode_step is model
    assert "Decoding runs layer by layer: keys and values are kept in a Mine." in capsys.readouterr().err
