"""How much memory a model needs on each device, by what is done with it.

Weights, gradients and optimizer state are counted on the model itself, the cache on a `KVCache` without memory. What
training keeps for the backward pass is counted by the formulas below, tensor by tensor as autograd keeps them; tests
hold these to what autograd does keep (within 5 %), and whole runs to the estimate.

Measured on a CPU with torch 2.15, as the growth of the process's peak resident memory over that of the bare program, in
GB of 1e9 bytes. Training: two steps of two micro-batches with AdamW.

    full        pythia-160m    32-true     4 x 512    measured 5.27   estimated 5.14
    full        SmolLM2-135M   32-true     2 x 512             4.72             4.81
    full        SmolLM2-135M   bf16-true   2 x 512             2.76             2.75
    full        SmolLM2-135M   bf16-mixed  2 x 512             4.35             4.33
    inference   pythia-160m    32-true     8 x 512             1.16             1.11
    inference   SmolLM2-135M   32-true     4 x 2048            1.19             1.16
    inference   SmolLM2-135M   bf16-true   4 x 2048            0.59             0.63

Not measured yet: GPUs (where RMSNorm is one kernel and keeps less), several devices, QLoRA.

Letters as in `litgpt.model`: B batch, T tokens, C width, H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from litgpt.config import Config
from litgpt.generation.engine import PREFILL_CHUNK
from litgpt.model import GPT, QUERY_BLOCK, KVCache
from litgpt.training.loss import rows_per_chunk

Method = Literal["inference", "lora", "qlora", "full"]
METHODS: tuple[Method, ...] = ("inference", "lora", "qlora", "full")

PROGRAM_BYTES = 750_000_000  # Python with torch and what training imports, or a GPU's context: before any tensor
NF4_BYTES = 0.5 + 4 / 64  # of one weight: 4 bits, and a float32 scale for every 64 (https://arxiv.org/abs/2305.14314)
LORA_TARGETS = ("query", "value")
SAMPLING_BYTES = 32  # of one logit while a token is drawn: probabilities, sorted ones and their places
HELD_BACK = 0.4  # of what comes and goes in training: what the C library keeps from a CPU's next allocation (measured)


@dataclass(frozen=True)
class Usage:
    """What is done with a model, and how.

    Attributes:
        method: inference, full finetuning (pretraining is the same), LoRA, or QLoRA (LoRA on 4-bit weights, nf4).
        weights: The type of the weights.
        compute: The type to compute in where that is another one (mixed precision).
        batch_size: Sequences at a time on one device.
        context: Tokens of each sequence; at inference prompt and answer together.
        device: Kind of device, as in torch.device.
        devices: Devices that share weights, gradients and optimizer state in training (FSDP2).
        lora_r: Rank of the LoRA matrices.
        lora_targets: Linear layers that have them: query, key, value, projection, mlp, head.
        lora_dropout: Whether LoRA drops some of its input.
        optimizer_states: Tensors the optimizer keeps for each trained parameter: 2 for Adam and AdamW, 0 for plain SGD.
        checkpoints_activations: Keep only the input of each block and compute the rest again in the backward pass.
    """

    method: Method
    weights: torch.dtype = torch.float32
    compute: torch.dtype | None = None
    batch_size: int = 1
    context: int = 4096
    device: str = "cpu"
    devices: int = 1
    lora_r: int = 8
    lora_targets: tuple[str, ...] = LORA_TARGETS
    lora_dropout: bool = True
    optimizer_states: int = 2
    checkpoints_activations: bool = False

    @property
    def trains(self) -> bool:
        return self.method != "inference"

    @property
    def uses_lora(self) -> bool:
        return self.method in ("lora", "qlora")

    @property
    def weight_bytes(self) -> int:
        return self.weights.itemsize

    @property
    def compute_bytes(self) -> int:
        """Of one value inside a block."""
        return (self.compute or self.weights).itemsize

    @property
    def tokens(self) -> int:
        return self.batch_size * self.context


def estimate_memory(model: GPT, usage: Usage) -> dict[str, int]:
    """The most memory that each device needs, in bytes, by what it is for. The parts add up.

    In training it is the peak of a step with gradient accumulation: the gradients of earlier micro-batches are there
    while the activations of the next one are. A step of one micro-batch may stay below it.

    Args:
        model: The model, on any device (the meta device will do) and in any dtype.
        usage: What is done with it.
    """
    parts = {"program": PROGRAM_BYTES, "weights": _weights(model, usage)}
    if not usage.trains:
        parts["kv_cache"] = cache_bytes(model.config, usage)
        parts["working"] = _inference_working(model.config, usage)
        return parts
    trained = _trained_parameters(model, usage)
    if usage.uses_lora:
        parts["lora_weights"] = trained * usage.weight_bytes // usage.devices
    parts["gradients"] = trained * usage.weight_bytes // usage.devices
    parts["optimizer"] = trained * usage.weight_bytes * usage.optimizer_states // usage.devices
    parts["activations"] = activation_bytes(model.config, usage) + _cast_weights(model, usage)
    parts["working"] = _training_working(model, usage)
    if usage.device == "cpu":
        parts["allocator"] = int((parts["activations"] + parts["working"]) * HELD_BACK)
    return parts


# --- weights ---------------------------------------------------------------------------------------------------------


def _weights(model: GPT, usage: Usage) -> int:
    """The model's own weights on one device."""
    count = model.num_parameters()
    if usage.method == "qlora":
        quantised = sum(layer.weight.numel() for layer in _block_linears(model))
        return int(((count - quantised) * usage.weight_bytes + quantised * NF4_BYTES) / usage.devices)
    return count * usage.weight_bytes // (usage.devices if usage.trains else 1)


def _block_linears(model: GPT) -> Iterable[nn.Linear]:
    """The linear layers that quantisation replaces: all but the head and the routers of experts."""
    return (module for module in model.transformer["h"].modules() if type(module) is nn.Linear)


def _trained_parameters(model: GPT, usage: Usage) -> int:
    return lora_parameters(model, usage.lora_r, usage.lora_targets) if usage.uses_lora else model.num_parameters()


def lora_parameters(model: GPT, rank: int, targets: Iterable[str] = LORA_TARGETS) -> int:
    """Parameters of LoRA's matrices A (r x inputs) and B (outputs x r), https://arxiv.org/abs/2106.09685."""
    targets = set(targets)
    count = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            outputs = _lora_outputs(name, layer, model.config, targets)
            count += sum(rank * (layer.in_features + output) for output in outputs)
    return count


def _lora_outputs(name: str, layer: nn.Linear, config: Config, targets: set[str]) -> list[int]:
    """Output widths of the LoRA products that a layer gets; several where it is several in one, as qkv is."""
    inner, size = name.rpartition(".")[2], config.head_size
    if inner == "qkv":
        keys = config.n_query_groups * size
        rows = {"query": config.n_head * size, "key": keys, "value": keys}
        return [outputs for target, outputs in rows.items() if target in targets]
    if name == "lm_head":
        target = "head"
    elif ".attn" not in name:
        target = "mlp"
    else:
        target = "projection" if inner == "proj" else "query" if inner.startswith("q_") else "value"
    return [layer.out_features] if target in targets else []


def _cast_weights(model: GPT, usage: Usage) -> int:
    """Mixed precision: the backward pass needs the copies of the weights that were computed with."""
    if usage.compute is None or usage.method == "qlora":
        return 0
    return sum(layer.weight.numel() for layer in _block_linears(model)) * usage.compute_bytes


# --- inference -------------------------------------------------------------------------------------------------------


def cache_bytes(config: Config, usage: Usage) -> int:
    """The cache of keys and values: a window's worth where a layer has one, latents where attention is latent."""
    cache = KVCache(config, usage.batch_size, usage.context, "meta", usage.compute or usage.weights)
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in cache.tensors())


def _inference_working(config: Config, usage: Usage) -> int:
    """What comes and goes while a prompt is read in chunks, and a token drawn from the logits."""
    chunk = min(PREFILL_CHUNK, usage.context)
    rows, element = usage.batch_size * chunk, usage.compute_bytes
    attention = _attention_width(config) * element * 2 + _rotation_bytes(config)
    widest = max(attention, max(_mlp_values(config, layer) for layer in range(config.n_layer)) * element)
    stream = config.n_embd * (2 * element + 8)  # the stream, its norm, and the norm's float32 within
    distances = 0 if chunk == usage.context else rows * usage.context * (8 + 1 + element)  # who sees whom
    logits = usage.batch_size * config.padded_vocab_size * SAMPLING_BYTES
    return max(rows * (widest + stream) + distances + _scores(config, usage, chunk), logits)


def _scores(config: Config, usage: Usage, queries: int) -> int:
    """Attention scores where no kernel computes without holding them, for one layer."""
    if not _holds_scores(config, usage.device):
        return 0
    queries = min(queries, QUERY_BLOCK)
    return usage.batch_size * config.n_head * queries * usage.context * (2 * 4 + usage.compute_bytes)


# --- training --------------------------------------------------------------------------------------------------------


def activation_bytes(config: Config, usage: Usage) -> int:
    """What is kept for the backward pass between the two, for the whole model."""
    stream = usage.tokens * config.n_embd * _stream_bytes(usage)
    layers = [_kept_by_layer(config, usage, layer) for layer in range(config.n_layer)]
    kept = max(layers) + config.n_layer * stream if usage.checkpoints_activations else sum(layers)
    masks = usage.context**2 * usage.compute_bytes if config.sliding_window_size else 0
    return kept + masks + usage.tokens * _kept_by_norm(config, usage, config.n_embd)


def _kept_by_layer(config: Config, usage: Usage, layer: int) -> int:
    """Bytes of one block, for all tokens."""
    norms = [config.norm_1, config.norm_2 and not config.shared_attention_norm]
    norms += [config.post_attention_norm, config.post_mlp_norm]
    per_token = sum(norms) * _kept_by_norm(config, usage, config.n_embd)
    if config.parallel_residual and sum(norms[:2]) == 2 and config.norm_class_name == "LayerNorm":
        per_token -= config.n_embd * _stream_bytes(usage)  # both read the same tensor
    attention = _kept_by_attention if config.latent_attention is None else _kept_by_latent_attention
    per_token += attention(config, usage) + _kept_by_mlp(config, usage, layer)
    return usage.tokens * per_token


def _stream_bytes(usage: Usage) -> int:
    """Of one value of the residual stream: autocast leaves it in the weights' type."""
    return usage.weight_bytes


def _kept_by_norm(config: Config, usage: Usage, width: int, element: int | None = None) -> int:
    """Its input of that element size and, on a CPU, where RMSNorm is no single kernel, the normalised values."""
    element = element or _stream_bytes(usage)
    if config.norm_class_name == "LayerNorm":
        return width * element + 8
    if usage.device != "cpu":
        return width * (4 if config.norm_unit_offset else element) + 4
    return width * 4 * (1 if usage.uses_lora else 2) + 4


def _kept_by_inputs(usage: Usage, width: int, layers: int) -> int:
    """The input that so many linear layers share: autocast makes a copy for each, frozen layers need none."""
    if usage.uses_lora:
        return 0
    return width * usage.compute_bytes * (layers if usage.compute else 1)


def _kept_by_attention(config: Config, usage: Usage) -> int:
    element, size = usage.compute_bytes, config.head_size
    queries, keys = config.n_head * size, config.n_query_groups * size
    kept = _kept_by_inputs(usage, config.n_embd, 1) + _kept_by_lora(config, usage)
    if config.norm_qk:
        shared = config.norm_class_name == "RMSNorm" and usage.device == "cpu" and element == 4  # with what qkv gave
        kept += _kept_by_norm(config, usage, queries + keys, element) - shared * (queries + keys) * 4
    if not _holds_scores(config, usage.device):
        qkv = (queries + 2 * keys) + (queries + keys if config.rope_n_elem else 0)
        return kept + (qkv + queries) * element + config.n_head * 4
    scores = usage.context + config.attention_sinks
    kept += 3 * queries * element + _kept_by_inputs(usage, queries, 1)
    kept += config.n_head * scores * 4  # the softmax
    kept += config.n_head * scores * element * ((config.attention_logit_softcapping is not None) + (element != 4))
    return kept


def _kept_by_latent_attention(config: Config, usage: Usage) -> int:
    element, latent, heads = usage.compute_bytes, config.latent_attention, config.n_head
    query_rank, rank = latent.get("q_lora_rank"), latent["kv_lora_rank"]
    query_size, value_size = latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"], latent["v_head_dim"]
    kept = _kept_by_inputs(usage, config.n_embd, 2) + _kept_by_lora(config, usage)
    for width in (query_rank, rank):
        if width is not None:
            kept += _kept_by_norm(config, usage, width, element) + _kept_by_inputs(usage, width, 1)
    values = heads * (2 * query_size + value_size)  # queries, keys, values
    if not _holds_scores(config, usage.device):
        return kept + (values + heads * value_size) * element + heads * 4
    return kept + _kept_by_inputs(usage, heads * value_size, 1) + (values + heads * usage.context) * 4  # in float32


def _holds_scores(config: Config, device: str) -> bool:
    """Whether attention is written out, so that all its scores are held."""
    uneven = config.latent_attention is not None and device == "cpu"  # its kernel wants queries and values of one size
    return config.attention_logit_softcapping is not None or config.attention_sinks or uneven


def _kept_by_lora(config: Config, usage: Usage) -> int:
    """The input of the LoRA products and, with dropout, what is left of it and which part that is."""
    if not usage.uses_lora or not set(usage.lora_targets) & {"query", "key", "value"}:
        return 0
    return config.n_embd * (usage.compute_bytes + usage.lora_dropout)


def _kept_by_mlp(config: Config, usage: Usage, layer: int) -> int:
    element, chosen = usage.compute_bytes, config.n_expert_per_token
    dense = config.mlp_class_name != "LLaMAMoE" or layer < (config.first_k_dense_replace or 0)
    if dense:
        shares_input = config.shared_attention_norm and not usage.compute  # with the attention
        return _kept_by_unit(config, usage, config.intermediate_size, 0 if shares_input else config.n_embd)
    width = config.moe_intermediate_size or config.intermediate_size
    kept = chosen * (_kept_by_unit(config, usage, width, config.n_embd) + config.n_embd * element)
    kept += chosen * 3 * 8 + config.n_expert * 2 * 4  # the order of the choices, the router's scores
    kept += 0 if element == 4 or usage.uses_lora else config.n_embd * 4  # the router computes in float32
    if config.n_shared_expert:
        kept += _kept_by_unit(config, usage, width * config.n_shared_expert, config.n_embd)
    return kept


def _kept_by_unit(config: Config, usage: Usage, width: int, inputs: int) -> int:
    """A feed-forward unit: its input, the values inside it, and the input of its last layer."""
    values = _inner_values(config)
    gates = 1 if config.mlp_class_name == "GptNeoxMLP" else 2
    kept = _kept_by_inputs(usage, inputs, gates) + _kept_by_inputs(usage, width, 1)
    return kept + values * width * usage.compute_bytes


def _inner_values(config: Config) -> int:
    """How many tensors of its inner width a feed-forward unit keeps, without the input of its last layer."""
    if config.mlp_class_name == "GptNeoxMLP":
        return 1
    return 3 if config.swiglu_limit is None else 6


def _training_working(model: GPT, usage: Usage) -> int:
    """What comes and goes: a chunk of logits with the head's gradient, or a block's gradients on their way back."""
    config, element = model.config, usage.compute_bytes
    rows = min(usage.tokens, rows_per_chunk(usage.device, config.padded_vocab_size))
    logits = rows * config.padded_vocab_size * 12  # probabilities and two gradients, in float32
    head = 0 if usage.uses_lora else model.lm_head.weight.numel() * usage.weight_bytes
    loss = logits + head * (2 if rows < usage.tokens else 1) + 2 * usage.tokens * config.n_embd * element
    widest = max(_mlp_values(config, layer) for layer in range(config.n_layer))
    largest = max(parameter.numel() for parameter in model.transformer["h"].parameters())
    backward = usage.tokens * (widest + 2 * config.n_embd) * element + largest * usage.weight_bytes
    return max(loss, backward) + _gathered(model, usage)


def _gathered(model: GPT, usage: Usage) -> int:
    """FSDP2: two blocks at a time, and what is in no block, are whole on each device, with their gradients."""
    if usage.devices == 1:
        return 0
    blocks = sum(parameter.numel() for parameter in model.transformer["h"].parameters())
    whole = 2 * blocks // model.config.n_layer + model.num_parameters() - blocks
    return whole * usage.compute_bytes * (1 if usage.uses_lora else 2)


def _mlp_values(config: Config, layer: int) -> int:
    """Values per token that a feed-forward unit holds at a time while it computes."""
    tensors = 2 if config.mlp_class_name == "GptNeoxMLP" else 4
    if config.mlp_class_name != "LLaMAMoE" or layer < (config.first_k_dense_replace or 0):
        return tensors * config.intermediate_size
    width = config.moe_intermediate_size or config.intermediate_size
    chosen = config.n_expert_per_token
    return max(chosen * config.n_embd * 4, tensors * width * max(config.n_shared_expert or 0, chosen))


def _attention_width(config: Config) -> int:
    """Values per token of queries, keys and values together."""
    latent = config.latent_attention
    if latent is None:
        return (config.n_head + 2 * config.n_query_groups) * config.head_size
    query_size = latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"]
    return config.n_head * (2 * query_size + latent["v_head_dim"]) + latent["kv_lora_rank"]


def _rotation_bytes(config: Config) -> int:
    """Of the queries of one token while they are rotated, in float32."""
    return config.n_head * config.rope_n_elem * 3 * 4
