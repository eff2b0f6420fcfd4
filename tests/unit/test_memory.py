"""The estimate of memory against what autograd keeps, what tensors weigh, and what whole runs use."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.convert.source import meta_model
from litgpt.distributed import PRECISIONS
from litgpt.memory import Usage, activation_bytes, cache_bytes, estimate_memory, lora_parameters
from litgpt.model import GPT

BASE = {"block_size": 512, "n_layer": 3, "n_embd": 256, "n_head": 8, "n_query_groups": 2, "vocab_size": 1000}
BASE |= {"padding_multiple": 8, "rotary_percentage": 1.0, "parallel_residual": False, "bias": False}
BASE |= {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 704}
NEOX = {"mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "parallel_residual": True, "bias": True}
LATENT = {"kv_lora_rank": 48, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 40}
EXPERTS = {"mlp_class_name": "LLaMAMoE", "n_expert": 8, "n_expert_per_token": 2, "moe_intermediate_size": 96}
POST_NORMS = {"post_attention_norm": True, "post_mlp_norm": True}
SHAPES = {
    "llama": {},
    "neox": {**NEOX, "n_query_groups": 8, "rotary_percentage": 0.25, "intermediate_size": 1024},
    "falcon": {**NEOX, "shared_attention_norm": True, "n_query_groups": 1, "intermediate_size": 1024},
    "gemma2": {"mlp_class_name": "GemmaMLP", "attention_logit_softcapping": 50.0, "norm_unit_offset": True}
    | POST_NORMS
    | {"sliding_window_size": 64},
    "window": {"sliding_window_size": 64},
    "qwen3": {"norm_qk": True, "head_size": 64},
    "olmo2": {"norm_qk": True, "norm_qk_type": "olmo2", "norm_1": False, "norm_2": False, **POST_NORMS},
    "gpt_oss": {**EXPERTS, "attention_sinks": True, "swiglu_limit": 7.0},
    "mixture": {**EXPERTS, "n_shared_expert": 2, "first_k_dense_replace": 1},
    "latent": {"n_query_groups": 8, "latent_attention": {**LATENT, "q_lora_rank": 64}},
    "latent_without_query_rank": {"n_query_groups": 8, "latent_attention": LATENT},
}
ROWS, TOKENS = 2, 512


def kept_for_backward(model: GPT, compute: torch.dtype | None) -> int:
    """Bytes of all that autograd keeps of a forward pass, but for the weights themselves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    precision = torch.autocast("cpu", compute) if compute else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), precision:
        model.hidden_states(torch.randint(0, 1000, (ROWS, TOKENS)))
    return sum(storage.nbytes() for storage in storages.values())


def small_model(shape: str, dtype: torch.dtype) -> GPT:
    torch.manual_seed(0)
    model = GPT(Config(**{**BASE, **SHAPES[shape]}))
    model.init_weights()
    return model.to(dtype).train()


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_what_autograd_keeps(shape, precision):
    weights, compute = PRECISIONS[precision]
    model = small_model(shape, weights)
    usage = Usage("full", weights, compute, batch_size=ROWS, context=TOKENS)
    estimated = estimate_memory(model, usage)["activations"]
    assert estimated == pytest.approx(kept_for_backward(model, compute), rel=0.03)


class WithLoRA(nn.Module):
    """A frozen layer with one LoRA product beside it."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.a = nn.Linear(layer.in_features, rank, bias=False, dtype=layer.weight.dtype)
        self.b = nn.Linear(rank, layer.out_features, bias=False, dtype=layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.b(self.a(nn.functional.dropout(x, 0.05)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("shape", ["llama", "neox", "gemma2", "qwen3"])
def test_frozen_weights_need_fewer_activations(shape, precision):
    weights, compute = PRECISIONS[precision]
    model = small_model(shape, weights)
    full = kept_for_backward(model, compute)
    model.requires_grad_(False)
    model.transformer["wte"].requires_grad_()  # a gradient flows through the first block as through the others
    for block in model.transformer["h"]:
        block.attn.qkv = WithLoRA(block.attn.qkv, rank=8)
    kept = kept_for_backward(model, compute)
    usage = Usage("lora", weights, compute, batch_size=ROWS, context=TOKENS)
    assert activation_bytes(model.config, usage) == pytest.approx(kept, rel=0.1)
    assert kept < 0.9 * full


def test_weights_and_what_training_adds_to_them():
    model = small_model("llama", torch.float32)
    count = model.num_parameters()
    parts = estimate_memory(model, Usage("full", torch.float32, context=64))
    assert [parts[name] for name in ("weights", "gradients", "optimizer")] == [4 * count, 4 * count, 8 * count]
    half = estimate_memory(model, Usage("full", torch.bfloat16, context=64, optimizer_states=0))
    assert [half[name] for name in ("weights", "gradients", "optimizer")] == [2 * count, 2 * count, 0]
    sharded = estimate_memory(model, Usage("full", torch.float32, context=64, devices=4))
    assert [sharded[name] for name in ("weights", "gradients", "optimizer")] == [count, count, 2 * count]
    assert sharded["working"] > parts["working"]  # the blocks that are gathered


def test_a_shared_head_is_there_once():
    tied = meta_model(Config(**BASE, tie_embeddings=True))
    untied = meta_model(Config(**BASE))
    difference = [estimate_memory(m, Usage("full", torch.float32, context=64))["weights"] for m in (untied, tied)]
    assert difference[0] - difference[1] == 4 * 1000 * 256


def test_lora_parameters_are_the_published_number():
    # "trainable params: ..." as the common LoRA tools print it for r=8 on q and v.
    assert lora_parameters(meta_model(Config.from_name("Llama-2-7b-hf")), 8) == 4_194_304
    assert lora_parameters(meta_model(Config.from_name("Llama-3-8B")), 8) == 3_407_872


def test_lora_and_qlora_train_little_and_qlora_stores_little():
    model = meta_model(Config.from_name("Llama-2-7b-hf"))
    parts = {m: estimate_memory(model, Usage(m, torch.bfloat16, context=512)) for m in ("full", "lora", "qlora")}
    assert parts["lora"]["lora_weights"] == parts["lora"]["gradients"] == 2 * 4_194_304
    assert parts["lora"]["weights"] == parts["full"]["weights"]
    assert sum(parts["lora"].values()) < 0.5 * sum(parts["full"].values())
    # 6,476,005,376 weights of the blocks' matrices in nf4, the rest (embedding, head, norms) as it is.
    quantised = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = model.num_parameters() - quantised
    assert parts["qlora"]["weights"] == pytest.approx(quantised * 0.5625 + 2 * rest, rel=1e-6)


@pytest.mark.parametrize("shape", ["llama", "window", "latent"])
def test_the_cache_is_that_of_the_model(shape):
    model = small_model(shape, torch.float32)
    cache = model.new_cache(3, 300, dtype=torch.bfloat16)
    usage = Usage("inference", torch.float32, torch.bfloat16, batch_size=3, context=300)
    assert cache_bytes(model.config, usage) == sum(t.numel() * t.dtype.itemsize for t in cache.tensors())


def test_a_window_and_latents_keep_the_cache_small():
    sizes = {}
    for shape in ("llama", "window", "neox", "latent"):
        usage = Usage("inference", torch.float32, context=512)
        sizes[shape] = cache_bytes(Config(**{**BASE, **SHAPES[shape]}), usage)
    assert sizes["window"] < 0.2 * sizes["llama"]
    assert sizes["latent"] < 0.2 * sizes["neox"]


def test_recomputing_the_blocks_saves_their_activations():
    model = meta_model(Config.from_name("pythia-160m"))
    usual = Usage("full", torch.float32, context=512)
    again = Usage("full", torch.float32, context=512, checkpoints_activations=True)
    parts = [estimate_memory(model, usage)["activations"] for usage in (usual, again)]
    assert parts[1] < 0.3 * parts[0]


def measure(method: str, name: str, precision: str, batch_size: int, context: int, **environment: str) -> int:
    words = [method, name, precision, str(batch_size), str(context)]
    command = [sys.executable, "-m", "tests.measured_run", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def estimated(method: str, name: str, precision: str, batch_size: int, context: int) -> dict[str, int]:
    weights, compute = PRECISIONS[precision]
    usage = Usage(method, weights, compute, batch_size, context)
    return estimate_memory(meta_model(Config.from_name(name)), usage)


linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")


@linux_only
@pytest.mark.parametrize("method", ["full", "inference"])
def test_a_small_run_uses_what_is_estimated(method):
    run = (method, "pythia-70m", "32-true", 2, 256)
    # Every allocation is given back at once, so that the peak is what is in use.
    grown = measure(*run, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    parts = estimated(*run)
    in_use = sum(parts.values()) - parts["program"] - parts.get("allocator", 0)
    assert in_use == pytest.approx(grown, rel=0.15)


RUNS = [
    ("full", "pythia-160m", "32-true", 4, 512),
    ("full", "SmolLM2-135M", "32-true", 2, 512),
    ("full", "SmolLM2-135M", "bf16-true", 2, 512),
    ("full", "SmolLM2-135M", "bf16-mixed", 2, 512),
    ("inference", "pythia-160m", "32-true", 8, 512),
    ("inference", "SmolLM2-135M", "32-true", 4, 2048),
    ("inference", "SmolLM2-135M", "bf16-true", 4, 2048),
]


@linux_only
@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_a_run_of_a_real_shape_uses_what_is_estimated(run):
    grown, parts = measure(*run), estimated(*run)
    estimate = sum(parts.values()) - parts["program"]
    print(f"{' '.join(map(str, run))}: measured {grown / 1e9:.2f} GB, estimated {estimate / 1e9:.2f} GB")
    assert estimate == pytest.approx(grown, rel=0.25)
