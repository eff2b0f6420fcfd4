"""Two real processes (gloo), each with a part of every layer, say what one says with the whole model."""

import json
import re

import pytest
import torch

from litgpt.checkpoint import save_model
from litgpt.config import Config
from litgpt.convert import open_checkpoint
from litgpt.generation.engine import Engine, Request
from litgpt.generation.sampling import Sampling
from litgpt.model import GPT
from litgpt.tensor_parallel import check_split, split_model
from tests import checkpoint_files
from tests.training.conftest import on_two_ranks

SMALL = {
    "block_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 50, "padded_vocab_size": 50,
    "intermediate_size": 48, "rotary_percentage": 1.0, "parallel_residual": False, "norm_class_name": "RMSNorm",
}  # fmt: skip
MIXTURE = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 16}
SHAPES = {
    "GptNeoxMLP": {"mlp_class_name": "GptNeoxMLP", "bias": True, "norm_class_name": "LayerNorm",
                   "parallel_residual": True, "rotary_percentage": 0.25, "lm_head_bias": True},
    "LLaMAMLP, grouped": {"mlp_class_name": "LLaMAMLP", "bias": False, "n_query_groups": 2, "norm_qk": True},
    "GemmaMLP, one group, tied": {"mlp_class_name": "GemmaMLP", "bias": False, "n_query_groups": 1,
                                  "tie_embeddings": True, "scale_embeddings": True, "post_attention_norm": True,
                                  "post_mlp_norm": True, "attention_logit_softcapping": 20.0,
                                  "sliding_window_size": 8, "sliding_window_indices": [1, 0]},
    "LLaMAMoE, biases, sinks": {**MIXTURE, "bias": True, "mlp_bias": True, "attention_sinks": True,
                                "n_query_groups": 2, "swiglu_limit": 7.0},
    "LLaMAMoE, shared experts, latent": {**MIXTURE, "bias": False, "n_shared_expert": 2, "first_k_dense_replace": 1,
                                         "latent_attention": {"q_lora_rank": 12, "kv_lora_rank": 16, "v_head_dim": 8,
                                                              "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}},
    "olmo2 norm, one group": {"mlp_class_name": "LLaMAMLP", "bias": False, "n_query_groups": 1, "norm_qk": True,
                              "norm_qk_type": "olmo2", "padded_vocab_size": 51},
}  # fmt: skip
PROMPTS = [[1, 2, 3, 4, 5], list(range(20)), [7]]

RANK = """
import json, sys
import torch
import torch.distributed as dist
from functools import partial
from pathlib import Path
from litgpt.convert import load_model
from litgpt.distributed import make_fabric
from litgpt.generation.ranks import RankEngine, Ranks
from litgpt.tensor_parallel import split_model
from tests.training.test_tensor_parallel import requests

fabric = make_fabric(2, precision="32-true", strategy="ddp")
fabric.launch()
ranks, results = Ranks(), {}
for directory in sorted(Path(sys.argv[1]).iterdir()):
    model = load_model(directory, split=partial(split_model, rank=fabric.global_rank, ranks=2))
    with torch.inference_mode():
        logits = model(torch.arange(24)[None])
    everywhere = [torch.empty_like(logits) for _ in range(2)]
    dist.all_gather(everywhere, logits.contiguous())
    engine = RankEngine(model, ranks, slots=2)
    if fabric.global_rank == 0:
        cancelled = engine.submit(requests()[0])
        engine.step()
        engine.cancel(cancelled)
        tokens = engine.complete(requests())
        ranks.tell(None)
        results[directory.name] = {
            "tokens": tokens, "same": torch.equal(*everywhere), "size": sum(p.numel() for p in model.parameters()),
        }
        torch.save(logits, directory / "logits.pth")
    else:
        engine.follow()
if fabric.global_rank == 0:
    print("RESULTS " + json.dumps(results))
"""


def requests() -> list[Request]:
    samplings = [Sampling(0), Sampling(0), Sampling(0.9, 20)]
    return [Request(p, 15, s, seed=i) for i, (p, s) in enumerate(zip(PROMPTS, samplings, strict=True))]


def test_two_ranks_say_what_one_says(tmp_path):
    models = {}
    for name, changes in SHAPES.items():
        torch.manual_seed(0)
        model = GPT(Config(name=name, **{**SMALL, **changes})).eval()
        model.init_weights()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(p * 2 + torch.randn_like(p) * 0.1)  # biases and norms, too
        (tmp_path / "models" / name).mkdir(parents=True)
        save_model(tmp_path / "models" / name, model, model.config)
        models[name] = model
    out = on_two_ranks(RANK, tmp_path, tmp_path / "models")
    results = json.loads(re.search(r"RESULTS (.*)", out)[1])
    assert results.keys() == models.keys()
    for name, model in models.items():
        with torch.inference_mode():
            expected = model(torch.arange(24)[None])
        logits = torch.load(tmp_path / "models" / name / "logits.pth")
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item(), msg=name)
        assert results[name]["same"], name
        assert results[name]["tokens"] == Engine(model).complete(requests()), name
        assert results[name]["size"] < 0.75 * model.num_parameters(), name


COMMAND = """
import sys
from litgpt.__main__ import main
sys.exit(main(["generate_tp", *sys.argv[1:]]))
"""


def test_the_command_answers_once_with_quantised_parts(litgpt_main, tmp_path):
    """Blocks of 64 values lie within one rank's part here: both quantise to the same."""
    directory = checkpoint_files.chat_model(tmp_path / "model")
    sizes = {"n_embd": 128, "n_head": 2, "intermediate_size": 128, "mlp_class_name": "LLaMAMLP", "bias": False}
    torch.manual_seed(0)
    model = GPT(Config(name="tiny", **{**SMALL, **sizes, "vocab_size": 700, "padded_vocab_size": 704}))
    model.init_weights()
    save_model(directory, {name: 3 * p for name, p in model.state_dict().items()}, model.config)
    options = [directory, "--prompt", "Hello", "--top_k", 1, "--precision", "32-true", "--max_new_tokens", 12]
    options += ["--quantize", "bnb.nf4"]
    assert on_two_ranks(COMMAND, tmp_path, *options, "--devices", 2) == litgpt_main("generate", *options)


def test_each_rank_reads_views_of_the_file(tmp_path):
    source = open_checkpoint(checkpoint_files.chat_model(tmp_path))
    with torch.device("meta"):
        take = split_model(GPT(source.config), 1, 2)
    for name, tensor in source.weights():
        part = take(name, tensor)
        if "mlp" in name:
            assert part.numel() == tensor.numel() // 2
            assert part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "its 4 heads are not divisible by 3"),
        ({"n_head": 12, "head_size": 8, "n_query_groups": 6}, 4, "its 6 key/value heads are neither"),
        ({"intermediate_size": 50}, 4, "an MLP's width of 50 is not divisible by 4"),
        ({**MIXTURE, "moe_intermediate_size": 6}, 4, "an MLP's width of 6 is not divisible by 4"),
        ({"norm_qk": True, "norm_qk_type": "olmo2", "norm_class_name": "LayerNorm"}, 2, "its LayerNorm over all heads"),
    ],
)
def test_what_cannot_be_split_is_refused_with_its_reason(changes, ranks, message):
    config = Config(name="tiny", **{**SMALL, "mlp_class_name": "LLaMAMLP", **changes})
    with pytest.raises(ValueError, match=f"--devices {ranks} cannot split tiny: {message}"):
        check_split(config, ranks)


@pytest.mark.parametrize(("option", "value"), [("--quantize", "bnb.int8"), ("--compile", "true"), ("--devices", 0)])
def test_options_that_cannot_act_are_refused(capsys, tmp_path, option, value):
    from litgpt.__main__ import main

    directory = checkpoint_files.chat_model(tmp_path)
    devices = () if option == "--devices" else ("--devices", "2")
    assert main(["generate_tp", str(directory), *devices, option, str(value)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {option} {value}")


@pytest.fixture
def litgpt_main(capsys):
    from litgpt.__main__ import main

    def run(*argv: object) -> str:
        assert main([str(word) for word in argv]) == 0
        return capsys.readouterr().out

    return run
