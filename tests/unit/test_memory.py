"""The estimate of memory against what autograd keeps, what tensors weigh, and what whole runs use."""

import contextlib
import os
import subprocess
import sys
import weakref
from dataclasses import fields
from itertools import product

import pytest
import torch
from torch import Tensor

from litgpt.adaptation.adapter import apply_adapter, apply_adapter_v2
from litgpt.adaptation.lora import LoRASettings, apply_lora
from litgpt.catalog import known_checkpoints
from litgpt.config import Config
from litgpt.devices.precision import PRECISIONS
from litgpt.generation.kv_cache_manager import limit_attention
from litgpt.kv_cache import KVCache
from litgpt.model import GPT
from litgpt.quantization.layers import replace_linears
from litgpt.runs import memory_count
from litgpt.runs.live_memory import LiveMemory
from litgpt.runs.memory_count import inference_memory, training_memory
from litgpt.runs.memory_estimate import Usage, cache_bytes, estimate_memory
from litgpt.sources.meta import meta_model
from litgpt.training.activation_checkpointing import checkpoint_blocks
from litgpt.training.frozen_weights import store_frozen_matrices
from litgpt.training.loss import NextTokenLoss
from tests.measured_run import change

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
CHUNK = 256  # tokens of prompts that are prefilled in a step


class Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_for_backward(model: GPT, compute: torch.dtype | None) -> int:
    """Bytes of all that autograd keeps of a forward pass, but for the weights themselves."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()  # what only a part of the graph kept that is gone does not count

    def keep(tensor: Tensor) -> Kept:
        packed = Kept(tensor.detach())  # with its graph, a result that is kept would keep itself, for ever
        if tensor.untyped_storage().data_ptr() not in own:
            kept.add(packed)
        return packed

    precision = torch.autocast("cpu", compute) if compute else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda packed: packed.tensor), precision:
        graph = model.hidden_states(torch.randint(0, 1000, (ROWS, TOKENS)))
    assert graph.requires_grad
    storages = {packed.tensor.untyped_storage().data_ptr(): packed.tensor.untyped_storage() for packed in kept}
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
    usage = Usage(True, compute, batch_size=ROWS, context=TOKENS)
    estimated = estimate_memory(model, usage)["activations"]
    assert estimated == pytest.approx(kept_for_backward(model, compute), rel=0.005)


EVERYWHERE = {"key": True, "projection": True, "mlp": True}


def quantised_lora(model: GPT) -> None:
    replace_linears(model, "bnb.nf4", model.transformer["wte"].weight.dtype)
    apply_lora(model, LoRASettings(**EVERYWHERE))


# name: (what is done to the model, how close the estimate is)
METHODS = {
    "lora": (lambda model: apply_lora(model, LoRASettings()), 0.006),
    "lora on all layers": (lambda model: apply_lora(model, LoRASettings(**EVERYWHERE)), 0.006),
    "lora without dropout": (lambda model: apply_lora(model, LoRASettings(dropout=0.0, **EVERYWHERE)), 0.006),
    "lora on mlps": (
        lambda model: apply_lora(model, LoRASettings(query=False, value=False, mlp=True, dropout=0)),
        0.006,
    ),
    "dora": (lambda model: apply_lora(model, LoRASettings(dora=True, dropout=0.0, **EVERYWHERE)), 0.006),
    "qlora": (quantised_lora, 0.006),
    "adapter": (lambda model: apply_adapter(model, start_layer=1), 0.012),
    "adapter v2": (lambda model: apply_adapter_v2(model, start_layer=1), 0.02),
}


@pytest.mark.parametrize(
    ("method", "precision"),
    # QLoRA refuses mixed precision.
    sorted({*product(METHODS, ["32-true", "bf16-true", "bf16-mixed"])} - {("qlora", "bf16-mixed")}),
)
def test_activations_beside_frozen_weights_are_what_autograd_keeps(method, precision):
    weights, compute = PRECISIONS[precision]
    change, close = METHODS[method]
    for shape in ("llama", "neox", "gemma2", "qwen3"):
        model = small_model(shape, weights)
        change(model)
        store_frozen_matrices(model, precision)
        usage = Usage(True, compute, batch_size=ROWS, context=TOKENS)
        estimated = estimate_memory(model, usage)["activations"]
        assert estimated == pytest.approx(kept_for_backward(model, compute), rel=close), shape


def given_memory(model: GPT) -> LiveMemory:
    """What counts all that is made from here on, besides the weights and the gradients of earlier micro-batches."""
    memory = LiveMemory()
    for tensor in (*model.parameters(), *model.buffers()):
        memory.ignore(tensor)
        if tensor.requires_grad:
            tensor.grad = torch.zeros_like(tensor)
            memory.ignore(tensor.grad)
    return memory


def peak_of_training(model: GPT, compute: torch.dtype | None, checkpointed: str | int) -> int:
    checkpoint_blocks(model, checkpointed)
    module, memory = NextTokenLoss(model), given_memory(model)
    precision = torch.autocast("cpu", compute) if compute else contextlib.nullcontext()
    with memory, memory.measured() as step:
        idx = torch.randint(0, 1000, (ROWS, TOKENS))
        with precision:
            loss = module(idx, idx)
        loss.backward()
    return step.peak


def peak_of_answering(model: GPT, compute: torch.dtype | None, rows: int, tokens: int) -> int:
    """Chunks of one prompt after the other, and a last token of all."""
    memory = given_memory(model.eval())
    cache = model.new_cache(rows, tokens, dtype=compute or model.transformer.wte.weight.dtype)
    limit_attention(cache, tokens)
    for tensor in cache.tensors():
        memory.ignore(tensor)

    def call(*args: Tensor | None, cache: KVCache) -> None:
        with torch.autocast("cpu", compute) if compute else contextlib.nullcontext():
            model.hidden_states(*args, cache=cache)

    with torch.no_grad(), memory, memory.measured() as calls:
        for start in range(0, tokens, CHUNK):
            positions = torch.arange(start, start + CHUNK)[None]
            part = cache.select(torch.arange(1), is_empty=not start)
            call(torch.randint(0, 1000, positions.shape), positions if start else None, cache=part)
        last = torch.full((rows, 1), tokens - 1)
        call(torch.zeros_like(last), last, cache=cache.select(slice(rows)))
    return calls.peak


@pytest.mark.parametrize("checkpointed", ["none", 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_peak_of_a_step_is_that_of_a_real_one(shape, precision, checkpointed):
    weights, compute = PRECISIONS[precision]
    model = small_model(shape, weights)
    counted = sum(training_memory(model, ROWS, TOKENS, "cpu", compute, checkpointed))
    assert counted == pytest.approx(peak_of_training(model, compute, checkpointed), rel=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_the_peak_of_a_step_beside_frozen_weights_is_that_of_a_real_one(method):
    change, _ = METHODS[method]
    for shape in ("llama", "gemma2"):
        model = small_model(shape, torch.bfloat16)
        change(model)
        store_frozen_matrices(model, "bf16-true")
        counted = sum(training_memory(model, ROWS, TOKENS, "cpu", None, "none"))
        assert counted == pytest.approx(peak_of_training(model, None, "none"), rel=0.03), shape


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_peak_of_answering_is_that_of_real_calls(shape, precision, monkeypatch):
    monkeypatch.setattr(memory_count, "PREFILL_CHUNK", CHUNK)
    weights, compute = PRECISIONS[precision]
    tokens = 2 * CHUNK
    model = GPT(Config(**{**BASE, **SHAPES[shape], "block_size": tokens})).to(weights)
    counted = inference_memory(model, 3, tokens, "cpu", compute)
    assert counted == pytest.approx(peak_of_answering(model, compute, 3, tokens), rel=0.03)


def kind_of(config: Config) -> tuple:
    """Which parts a model has; not how large they are."""
    values = ((f.name, getattr(config, f.name)) for f in fields(config) if f.name not in ("name", "hf_config"))
    return tuple((name, value if isinstance(value, str | None) else bool(value)) for name, value in values)


KINDS = {kind_of(config): config for config in map(Config.from_name, known_checkpoints())}


@pytest.mark.parametrize("config", KINDS.values(), ids=[config.name for config in KINDS.values()])
def test_every_kind_of_model_is_counted(config):
    model = meta_model(config).bfloat16()
    training = estimate_memory(model, Usage(True, batch_size=2, context=32, device="cuda"))
    answering = estimate_memory(model, Usage(False, batch_size=2, context=32))
    stream = 2 * 32 * config.n_embd * 2
    assert training["activations"] > config.n_layer * stream
    assert answering["working"] > stream


def test_a_gpu_that_is_not_here_is_estimated_with_its_own_attention():
    model = small_model("llama", torch.bfloat16)
    apply_lora(model, LoRASettings(dropout=0.0))
    sizes = [
        estimate_memory(model, Usage(True, batch_size=ROWS, context=TOKENS, device=device))["activations"]
        for device in ("cpu", "cuda")
    ]
    # The CPU's backward pass computes the result and the sum of each row again; a GPU's kernel keeps both.
    assert sizes[1] - sizes[0] == pytest.approx(3 * ROWS * TOKENS * (256 * 2 + 8 * 4), rel=0.01)
    assert torch.ones(1).device.type == "cpu"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dora_keeps_nothing_of_the_size_of_the_weights():
    plain, dora = (small_model("llama", torch.float32) for _ in range(2))
    apply_lora(plain, LoRASettings(dropout=0.0))
    apply_lora(dora, LoRASettings(dropout=0.0, dora=True))
    outputs = 3 * (256 + 64)  # of queries and values in three layers: the product, and what it is added to
    more = kept_for_backward(dora, None) - kept_for_backward(plain, None)
    assert more == pytest.approx(2 * outputs * ROWS * TOKENS * 4, rel=0.01)


def test_weights_and_what_training_adds_to_them():
    model = small_model("llama", torch.float32)
    count = model.num_parameters()
    parts = estimate_memory(model, Usage(True, context=64))
    assert [parts[name] for name in ("weights", "gradients", "optimizer")] == [4 * count, 4 * count, 8 * count]
    half = estimate_memory(model.bfloat16(), Usage(True, context=64, optimizer_states=0))
    assert [half[name] for name in ("weights", "gradients", "optimizer")] == [2 * count, 2 * count, 0]
    sharded = estimate_memory(model.float(), Usage(True, context=64, devices=4))
    assert [sharded[name] for name in ("weights", "gradients", "optimizer")] == [count, count, 2 * count]
    assert sharded["working"] > parts["working"]  # the blocks that are gathered


def test_a_shared_head_is_there_once():
    tied = meta_model(Config(**BASE, tie_embeddings=True))
    untied = meta_model(Config(**BASE))
    difference = [estimate_memory(m, Usage(True, context=64))["weights"] for m in (untied, tied)]
    assert difference[0] - difference[1] == 4 * 1000 * 256


def test_lora_and_qlora_train_little_in_float32_and_qlora_stores_little():
    parts = {}
    for method in ("full", "lora", "qlora"):
        model = meta_model(Config.from_name("Llama-2-7b-hf")).bfloat16()
        if method == "qlora":
            replace_linears(model, "bnb.nf4", torch.bfloat16)
        if method != "full":
            apply_lora(model, LoRASettings())
        parts[method] = estimate_memory(model, Usage(True, context=512))
    # "trainable params: ..." as the common LoRA tools print it for r=8 on q and v; 4 bytes each, also in the gradient
    assert parts["lora"]["trained_weights"] == parts["lora"]["gradients"] == 4 * 4_194_304
    assert parts["qlora"]["optimizer"] == 8 * 4_194_304
    assert parts["lora"]["weights"] == parts["full"]["weights"] == 2 * 6_738_415_616
    assert sum(parts["lora"].values()) < 0.5 * sum(parts["full"].values())
    # 6,476,005,376 weights of the blocks' matrices in nf4, the rest (embedding, head, norms) as it is.
    quantised = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert parts["qlora"]["weights"] == quantised * 0.5625 + 2 * (6_738_415_616 - quantised)


@pytest.mark.parametrize("shape", ["llama", "window", "latent"])
def test_the_cache_is_that_of_the_model(shape):
    model = small_model(shape, torch.float32)
    cache = model.new_cache(3, 300, dtype=torch.bfloat16)
    usage = Usage(False, torch.bfloat16, batch_size=3, context=300)
    assert cache_bytes(model, usage) == sum(t.numel() * t.dtype.itemsize for t in cache.tensors())


def test_a_window_and_latents_keep_the_cache_small():
    sizes = {}
    for shape in ("llama", "window", "neox", "latent"):
        model = meta_model(Config(**{**BASE, **SHAPES[shape]}))
        sizes[shape] = cache_bytes(model, Usage(False, context=512))
    assert sizes["window"] < 0.2 * sizes["llama"]
    assert sizes["latent"] < 0.2 * sizes["neox"]


def test_recomputing_the_blocks_saves_their_activations():
    model = meta_model(Config.from_name("pythia-160m"))
    parts = [
        estimate_memory(model, Usage(True, context=512, checkpointed=choice))["activations"]
        for choice in ("none", "full", 3)  # the third of 12 blocks
    ]
    assert parts[1] < 0.3 * parts[0]
    assert 0.6 * parts[0] < parts[2] < 0.8 * parts[0]


def measure(method: str, name: str, precision: str, batch_size: int, context: int, **environment: str) -> int:
    words = [method, name, precision, str(batch_size), str(context)]
    command = [sys.executable, "-m", "tests.measured_run", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def estimated(method: str, name: str, precision: str, batch_size: int, context: int) -> dict[str, int]:
    weights, compute = PRECISIONS[precision]
    model = change(meta_model(Config.from_name(name)).to(weights), method, precision)
    return estimate_memory(model, Usage(method != "inference", compute, batch_size, context))


linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")


@linux_only
@pytest.mark.parametrize("method", ["full", "lora", "inference"])
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
    ("lora", "SmolLM2-135M", "32-true", 2, 512),
    ("lora", "SmolLM2-135M", "bf16-true", 4, 512),
    ("lora", "SmolLM2-135M", "bf16-mixed", 4, 512),
    ("qlora", "SmolLM2-135M", "bf16-true", 1, 256),
    ("adapter_v2", "SmolLM2-135M", "bf16-true", 2, 512),
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


@pytest.mark.parametrize("kind", ["int4", "int8", "bnb.nf4", "bnb.int8", "gguf"])
def test_a_quantised_model_is_counted_without_its_kernels(kind):
    model = meta_model(Config(**BASE), kind, torch.bfloat16).to(torch.bfloat16)
    assert estimate_memory(model, Usage(False, context=512))["working"] > 512 * 256 * 2
