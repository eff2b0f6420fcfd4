"""How much memory a model needs on each device, by what is done with it.

Weights, gradients and optimizer state are counted on the model itself, the cache on a `KVCache` without memory. What
training keeps for the backward pass is counted by the formulas below, tensor by tensor as autograd keeps them; tests
hold these to what autograd does keep (within 6 %), and whole runs to the estimate.

Measured on a CPU with torch 2.15, as the growth of the process's peak resident memory over that of the bare program, in
GB of 1e9 bytes. Training: two steps of two micro-batches with AdamW.

    full        pythia-160m    32-true     4 x 512    measured 5.27   estimated 5.14
    full        SmolLM2-135M   32-true     2 x 512             4.72             4.81
    full        SmolLM2-135M   bf16-true   2 x 512             2.76             2.75
    full        SmolLM2-135M   bf16-mixed  2 x 512             4.35             4.33
    lora        SmolLM2-135M   32-true     2 x 512             4.67             4.67
    lora        SmolLM2-135M   bf16-true   4 x 512             4.79             4.79
    lora        SmolLM2-135M   bf16-mixed  4 x 512             5.29             5.27
    adapter v2  SmolLM2-135M   bf16-true   2 x 512             2.45             2.06
    inference   pythia-160m    32-true     8 x 512             1.16             1.11
    inference   SmolLM2-135M   32-true     4 x 2048            1.19             1.16
    inference   SmolLM2-135M   bf16-true   4 x 2048            0.59             0.63

LoRA is on all linear layers, with dropout, whose share of the allocator was fitted to the first of these rows; of 4.79
GB, 2.59 are in use (2.55 estimated). MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=65536 have the rest given
back, at a cost in time.

Not measured yet: GPUs (where RMSNorm is one kernel and keeps less), several devices, QLoRA.

Letters as in `litgpt.model`: B batch, T tokens, C width, H query heads, G key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from litgpt.adaptation.adapter import AdapterV2Linear, PromptedAttention, TrainedLayerNorm
from litgpt.adaptation.lora import LoRALinear
from litgpt.config import Config
from litgpt.generation.engine import PREFILL_CHUNK
from litgpt.model import GPT, QUERY_BLOCK, LLaMAMoE
from litgpt.quantization.layers import QuantizedLinear
from litgpt.training.activation_checkpointing import checkpointed_blocks
from litgpt.training.loss import CACHED_ELEMENTS, even_rows, rows_per_chunk

PROGRAM_BYTES = 750_000_000  # Python with torch and what training imports, or a GPU's context: before any tensor
SAMPLING_BYTES = 32  # of one logit while a token is drawn: probabilities, sorted ones and their places
# Of what comes and goes in training, what the C library keeps from a CPU's next allocation (measured); dropout on the
# inputs of LoRA's matrices scatters it.
HELD_BACK, HELD_BACK_WITH_DROPOUT = 0.4, 1.0


@dataclass(frozen=True)
class Usage:
    """What is done with a model; what is trained of it, and in which types it is, the model itself says.

    Attributes:
        trains: Whether it is trained, or answers.
        compute: The type to compute in where that is not the weights' (mixed precision).
        batch_size: Sequences at a time on one device.
        context: Tokens of each sequence; at inference prompt and answer together.
        device: Kind of device, as in torch.device.
        devices: Devices that share weights, gradients and optimizer state in training (FSDP2).
        optimizer_states: Bytes that the optimizer keeps for each byte of trained parameters: 2 for Adam and AdamW, 0
            for plain SGD (`OptimizerSpec.state_ratio` tells).
        checkpointed: The blocks of which only the input is kept, and the rest computed again afterwards: none, full
            (all), or N for every N-th.
    """

    trains: bool
    compute: torch.dtype | None = None
    batch_size: int = 1
    context: int = 4096
    device: str = "cpu"
    devices: int = 1
    optimizer_states: float = 2
    checkpointed: str | int = "none"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.context


def estimate_memory(model: GPT, usage: Usage) -> dict[str, int]:
    """The most memory that each device needs, in bytes, by what it is for. The parts add up.

    In training it is the peak of a step with gradient accumulation: the gradients of earlier micro-batches are there
    while the activations of the next one are. A step of one micro-batch may stay below it.

    Args:
        model: The model on any device (the meta device will do) in the types that it will have: adapted, quantised, and
            what is not trained frozen.
        usage: What is done with it.
    """
    whole = weight_bytes(model)
    parts = {"program": PROGRAM_BYTES}
    if not usage.trains:
        parts["weights"] = whole
        parts["kv_cache"] = cache_bytes(model, usage)
        parts["working"] = _inference_working(model, usage)
        return parts
    trained = weight_bytes(model, trained=True)
    if trained < whole:
        parts["weights"] = (whole - trained) // usage.devices
        parts["trained_weights"] = trained // usage.devices
    else:
        parts["weights"] = whole // usage.devices
    parts["gradients"] = trained // usage.devices
    parts["optimizer"] = int(trained * usage.optimizer_states) // usage.devices
    parts["activations"] = activation_bytes(model, usage) + _cast_weights(model, usage)
    parts["working"] = _training_working(model, usage)
    if usage.device == "cpu":
        scattered = any(isinstance(m, LoRALinear) and isinstance(m.dropout, nn.Dropout) for m in model.modules())
        share = HELD_BACK_WITH_DROPOUT if scattered else HELD_BACK
        parts["allocator"] = int((parts["activations"] + parts["working"]) * share)
    return parts


# --- weights ---------------------------------------------------------------------------------------------------------


def weight_bytes(module: nn.Module, trained: bool = False) -> int:
    """Of all parameters, or of the trained ones; a shared one counts once."""
    return sum(p.numel() * p.itemsize for p in module.parameters() if p.requires_grad or not trained)


def _stream_bytes(model: GPT) -> int:
    """Of one value of the residual stream: autocast leaves it in the embedding's type."""
    return model.transformer.wte.weight.itemsize


def _compute_bytes(model: GPT, usage: Usage) -> int:
    """Of one value inside a block."""
    return usage.compute.itemsize if usage.compute else _stream_bytes(model)


def _cast_weights(model: GPT, usage: Usage) -> int:
    """The backward pass needs the copies of the weights that were computed with, where they are of another type."""
    element = _compute_bytes(model, usage)
    matrices: list[nn.Parameter] = []
    for module in model.transformer.h.modules():
        if type(module) is nn.Linear:
            matrices.append(module.weight)
        elif isinstance(module, LoRALinear):
            matrices += [module.lora_A, module.lora_B]
    return sum(p.numel() for p in matrices if p.itemsize != element) * element


# --- inference -------------------------------------------------------------------------------------------------------


def cache_bytes(model: GPT, usage: Usage) -> int:
    """The cache of keys and values: a window's worth where a layer has one, latents where attention is latent."""
    dtype = usage.compute or model.transformer.wte.weight.dtype
    cache = model.new_cache(usage.batch_size, usage.context, device="meta", dtype=dtype)
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in cache.tensors())


def _inference_working(model: GPT, usage: Usage) -> int:
    """What comes and goes while a prompt is read in chunks, and a token drawn from the logits."""
    config = model.config
    chunk = min(PREFILL_CHUNK, usage.context)
    rows, element = usage.batch_size * chunk, _compute_bytes(model, usage)
    attention = _attention_width(config) * element * 2 + _rotation_bytes(config)
    # What attention reads of a layer, de-quantised.
    read = 0 if model.layer_cache.kind is None else _kept_width(model) * usage.tokens * element
    widest = max(attention, max(_mlp_values(config, layer) for layer in range(config.n_layer)) * element)
    stream = config.n_embd * (2 * element + 8)  # the stream, its norm, and the norm's float32 within
    distances = 0 if chunk == usage.context else rows * usage.context * (8 + 1 + element)  # who sees whom
    logits = usage.batch_size * config.padded_vocab_size * SAMPLING_BYTES
    return max(rows * (widest + stream) + read + distances + _scores(config, usage, chunk, element), logits)


def _scores(config: Config, usage: Usage, queries: int, element: int) -> int:
    """Attention scores where no kernel computes without holding them, for one layer."""
    if not _holds_scores(config, usage.device):
        return 0
    queries = min(queries, QUERY_BLOCK)
    return usage.batch_size * config.n_head * queries * usage.context * (2 * 4 + element)


# --- training --------------------------------------------------------------------------------------------------------


def activation_bytes(model: GPT, usage: Usage) -> int:
    """What is kept for the backward pass between the two, for the whole model."""
    return Activations(model, usage).total()


class Activations:
    """What a forward pass keeps for the backward pass, in bytes. Methods give them per token but for `total`.

    Args:
        model: The model as it is trained.
        usage: How.
    """

    def __init__(self, model: GPT, usage: Usage) -> None:
        self.model, self.config, self.usage = model, model.config, usage
        self.stream, self.element = _stream_bytes(model), _compute_bytes(model, usage)
        self.mixed = usage.compute is not None
        self.holds_scores = _holds_scores(model.config, usage.device)

    def total(self) -> int:
        """For the whole model and all tokens."""
        config, usage = self.config, self.usage
        again = [id(block) for block in checkpointed_blocks(self.model, usage.checkpointed)]
        kept, recomputed, deep = 0, 0, _is_trained(self.model.transformer.wte)
        for block in self.model.transformer.h:
            if not deep and not _is_trained(block):
                continue  # no gradient goes so far back
            size = self.block(block, deep)
            if id(block) in again:
                recomputed, size = max(recomputed, size), config.n_embd * self.stream
            kept, deep = kept + size, True
        kept += recomputed
        masks = usage.context**2 * self.element if config.sliding_window_size else 0
        return masks + usage.tokens * (kept + self.norm(self.model.transformer.ln_f))

    def block(self, block: nn.Module, deep: bool) -> int:
        """One block; `deep` is whether its input needs a gradient, too."""
        config = self.config
        attention_counts = deep or _is_trained(block.attn)
        before_mlp = deep or (attention_counts and not config.parallel_residual)
        norms = [(block.norm_1, deep), (getattr(block, "norm_2", None), before_mlp)]
        norms += [(block.post_attention_norm, attention_counts), (block.post_mlp_norm, True)]
        kept = sum(
            self.norm(norm)
            for norm, counts in norms
            if norm is not None and not isinstance(norm, nn.Identity) and (counts or _is_trained(norm))
        )
        two = not config.shared_attention_norm and config.norm_1 and config.norm_2
        if deep and config.parallel_residual and two and config.norm_class_name == "LayerNorm":
            kept -= config.n_embd * self.stream  # both read the same tensor
        if attention_counts:
            latent = config.latent_attention is not None
            kept += self.latent_attention(block.attn) if latent else self.attention(block.attn, deep)
        return kept + (self.mlp(block) if before_mlp or _is_trained(block.mlp) else 0)

    def norm(self, norm: nn.Module, width: int | None = None, element: int | None = None) -> int:
        """Its input, and a number or two for each row."""
        width, element = width or self.config.n_embd, element or self.stream
        if isinstance(norm, nn.LayerNorm):
            return width * (4 if isinstance(norm, TrainedLayerNorm) else element) + 8
        return width * max(element, self.norm_bytes(norm)) + 4

    def norm_bytes(self, norm: nn.Module) -> int:
        """Of a value that RMSNorm computes with: where its input has less, it keeps a copy."""
        return 4 if self.config.norm_unit_offset else norm.weight.element_size()

    def linears(self, layers: Iterable[nn.Module], width: int, *, kept: bool = False, inner: bool = False) -> int:
        """Linear layers that read one tensor of that width: what they keep of it, and what is theirs alone.

        Args:
            layers: The layers.
            width: Of their input.
            kept: Whether their input is kept anyway.
            inner: Whether it is in the type that is computed in; autocast makes a copy of others for each layer.
        """
        layers, readers, result = list(layers), 0, 0
        for layer in layers:
            if isinstance(layer, AdapterV2Linear):
                result += layer.out_features * self.element  # what the scale is multiplied with
                layer = layer.linear
            if isinstance(layer, LoRALinear):
                result += self.update(layer)
                result += width * isinstance(layer.dropout, nn.Dropout)  # a byte for each value: whether it was kept
            readers += self.reads(layer)
        copied = self.mixed and not inner
        return result + width * self.element * (readers if copied else min(readers, 1) * (not kept))

    def reads(self, layer: nn.Module) -> bool:
        """Whether a layer's gradient needs its input as it is."""
        if isinstance(layer, LoRALinear):
            return True
        return not isinstance(layer, QuantizedLinear) and _is_trained(layer)

    def update(self, layer: LoRALinear) -> int:
        """Between LoRA's matrices, and what DoRA scales: the product and what it is added to."""
        rows = layer.lora_B.size(0)
        return (layer.lora_A.size(0) + (2 * rows if layer.lora_magnitude is not None else 0)) * self.element

    def attention(self, attention: nn.Module, deep: bool) -> int:
        config, element, size = self.config, self.element, self.config.head_size
        queries, keys = config.n_head * size, config.n_query_groups * size
        prompt = queries * element + config.n_head * 4 if isinstance(attention, PromptedAttention) else 0
        if prompt and not deep and not _is_trained(attention.qkv):
            return prompt + queries * element  # what the queries find in the prompt, and themselves
        kept = prompt + self.linears([attention.qkv], config.n_embd)
        grouped = config.n_head != config.n_query_groups
        own = self.usage.device == "cpu" and element == 2 and grouped and not self.holds_scores  # cpu_backward.py
        kept += self.linears([attention.proj], queries, kept=not self.holds_scores and not own, inner=True)
        if config.norm_qk:
            plain = config.norm_class_name == "RMSNorm" and self.usage.device == "cpu"
            shared = plain and self.norm_bytes(attention.norm_q) <= element
            # ... with what qkv gave
            kept += self.norm(attention.norm_q, queries + keys, element) - shared * (queries + keys) * element
        if not self.holds_scores:
            qkv = (queries + 2 * keys) + (queries + keys if config.rope_n_elem else 0)
            return kept + qkv * element + (0 if own else queries * element + config.n_head * 4)
        scores = self.usage.context + config.attention_sinks
        kept += 3 * queries * element
        kept += config.n_head * scores * 4  # the softmax
        kept += config.n_head * scores * element * ((config.attention_logit_softcapping is not None) + (element != 4))
        return kept

    def latent_attention(self, attention: nn.Module) -> int:
        config, element, latent, heads = self.config, self.element, self.config.latent_attention, self.config.n_head
        query_rank, rank = latent.get("q_lora_rank"), latent["kv_lora_rank"]
        query_size, value_size = latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"], latent["v_head_dim"]
        down = attention.q_proj if query_rank is None else attention.q_a_proj
        kept = self.linears([down, attention.kv_a_proj_with_mqa], config.n_embd)
        if query_rank is not None:
            kept += self.norm(attention.q_a_norm, query_rank, element)
            kept += self.linears([attention.q_b_proj], query_rank, inner=True)
        kept += self.norm(attention.kv_a_norm, rank, element) + self.linears([attention.kv_b_proj], rank, inner=True)
        kept += self.linears([attention.proj], heads * value_size, kept=not self.holds_scores, inner=True)
        values = heads * (2 * query_size + value_size)  # queries, keys, values
        if not self.holds_scores:
            return kept + (values + heads * value_size) * element + heads * 4
        return kept + (values + heads * self.usage.context) * 4  # in float32

    def mlp(self, block: nn.Module) -> int:
        config, mlp, chosen = self.config, block.mlp, self.config.n_expert_per_token
        if not isinstance(mlp, LLaMAMoE):
            # A norm shared with the attention gives both one tensor.
            return self.unit(mlp, kept=config.shared_attention_norm and not self.mixed and self.reads(block.attn.qkv))
        kept = chosen * (self.unit(mlp.experts[0]) + config.n_embd * self.element)
        kept += chosen * 3 * 8 + config.n_expert * 2 * 4  # the order of the choices, the router's scores
        kept += config.n_embd * 4 if self.element != 4 and _is_trained(mlp.gate) else 0  # it computes in float32
        return kept + (self.unit(mlp.shared_experts) if mlp.shared_experts is not None else 0)

    def unit(self, unit: nn.Module, kept: bool = False) -> int:
        """A feed-forward unit: its input, unless that is kept anyway, the values inside it, and its last layer's."""
        first = [unit.fc] if self.config.mlp_class_name == "GptNeoxMLP" else [unit.fc_1, unit.fc_2]
        width = unit.proj.in_features
        inputs = self.linears(first, self.config.n_embd, kept=kept) + self.linears([unit.proj], width, inner=True)
        return inputs + _inner_values(self.config) * width * self.element


def _is_trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _holds_scores(config: Config, device: str) -> bool:
    """Whether attention is written out, so that all its scores are held."""
    uneven = config.latent_attention is not None and device == "cpu"  # its kernel wants queries and values of one size
    return config.attention_logit_softcapping is not None or config.attention_sinks or uneven


def _inner_values(config: Config) -> int:
    """How many tensors of its inner width a feed-forward unit keeps, without the input of its last layer."""
    if config.mlp_class_name == "GptNeoxMLP":
        return 1
    return 3 if config.swiglu_limit is None else 6


def _training_working(model: GPT, usage: Usage) -> int:
    """What comes and goes: a chunk of logits with the head's gradient, or a block's gradients on their way back."""
    config, element = model.config, _compute_bytes(model, usage)
    rows = even_rows(usage.tokens, rows_per_chunk(usage.device, config.padded_vocab_size))
    # The logits, which become their gradient, and probabilities in float32: on a CPU of a few rows at a time.
    at_once = CACHED_ELEMENTS * 2 if usage.device == "cpu" else rows * config.padded_vocab_size
    logits = rows * config.padded_vocab_size * element + at_once * 4
    head = weight_bytes(model.lm_head, trained=True)
    loss = logits + head * (2 if rows < usage.tokens else 1) + 2 * usage.tokens * config.n_embd * element
    widest = max(_mlp_values(config, layer) for layer in range(config.n_layer))
    matrices = max(_matrix_bytes(layer, element) for layer in model.transformer.h.modules())
    backward = usage.tokens * (widest + 2 * config.n_embd) * element + matrices
    return max(loss, backward) + _gathered(model, usage)


def _matrix_bytes(layer: nn.Module, element: int) -> int:
    """What a layer makes of the size of its weight for a moment: its gradient, or the weight de-quantised; with DoRA
    the weight, the update and their sum in float32."""
    if isinstance(layer, LoRALinear):
        return 3 * layer.in_features * layer.out_features * 4 if layer.lora_magnitude is not None else 0
    if isinstance(layer, QuantizedLinear):
        return layer.in_features * layer.out_features * element
    return max((p.numel() * p.itemsize for p in layer.parameters(recurse=False) if p.requires_grad), default=0)


def _gathered(model: GPT, usage: Usage) -> int:
    """FSDP2: two blocks at a time, and what is in no block, are whole on each device, with their gradients."""
    if usage.devices == 1:
        return 0
    blocks = model.transformer.h
    whole, trained = (
        weight_bytes(model, only) - weight_bytes(blocks, only) * max(0, len(blocks) - 2) // len(blocks)
        for only in (False, True)
    )
    return whole + trained


def _mlp_values(config: Config, layer: int) -> int:
    """Values per token that a feed-forward unit holds at a time while it computes."""
    tensors = 2 if config.mlp_class_name == "GptNeoxMLP" else 4
    if config.mlp_class_name != "LLaMAMoE" or layer < (config.first_k_dense_replace or 0):
        return tensors * config.intermediate_size
    width = config.expert_size
    chosen = config.n_expert_per_token
    return max(chosen * config.n_embd * 4, tensors * width * max(config.n_shared_expert or 0, chosen))


def _attention_width(config: Config) -> int:
    """Values per token of queries, keys and values together."""
    latent = config.latent_attention
    if latent is None:
        return (config.n_head + 2 * config.n_query_groups) * config.head_size
    query_size = latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"]
    return config.n_head * (2 * query_size + latent["v_head_dim"]) + latent["kv_lora_rank"]


def _kept_width(model: GPT) -> int:
    """Values per token that a layer's cache is for."""
    return sum(heads * size for heads, size in model.transformer.h[0].attn.cache_shapes())


def _rotation_bytes(config: Config) -> int:
    """Of the queries of one token while they are rotated, in float32."""
    return config.n_head * config.rope_n_elem * 3 * 4
