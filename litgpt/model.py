"""The GPT: every supported decoder-only transformer in one file, mathematics only.

What a model looks like is decided by its `Config` alone. Loading, sharding, LoRA and quantisation act from outside.

Letters of the shapes written next to the tensors:

    B  batch                            C  n_embd, width of the residual stream
    T  tokens of this call              V  padded vocabulary
    S  keys a token may attend to       E  experts          K  experts per token
    H  query heads                      N  tokens of the whole batch, B * T
    G  key/value heads                  P  rotary frequencies of a head, rope_n_elem / 2
    D  head size (Q of queries and keys where values differ)
    R  rank of the key/value latent (multi-head latent attention)
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from litgpt.config import Config
from litgpt.devices import cpu_backward
from litgpt.kv_cache import AttentionPlan, KVCache, LayerCache, LayerShape, Ring

# Added to the score of a key that must not be seen. Finite, so that a row that sees nothing (padding) stays finite, and
# representable in every dtype; its exponential is 0 in all of them.
MASKED = -30000.0


# The label of a token that is not to be predicted, which torch's losses leave out.
IGNORE_INDEX = -100


# How many queries at a time attention that is written out looks at.
QUERY_BLOCK = 512


# The norms within latent attention keep this, whatever norm_eps is.
LATENT_NORM_EPS = 1e-6


# How much steeper than in SiLU the sigmoid of the clamped SwiGLU is.
CLAMPED_SWIGLU_ALPHA = 1.702


class GPT(nn.Module):
    """A decoder-only transformer.

    Args:
        config: the architecture. Built under `torch.device("meta")` the model has shapes and no memory.

    Attributes:
        layer_cache: What each layer of its caches is made of; a class of one's own remembers as it likes.
    """

    layer_cache: type[LayerCache] = LayerCache

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=config.lm_head_bias)
        self.transformer = Transformer(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "h": Blocks(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": build_norm(config, config.n_embd),
            }
        )
        self.rope = RotaryEmbedding(config)
        self.tie_weights()

    def forward(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: "KVCache | None" = None,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token after each token: `logits(hidden_states(...))`.

        Args:
            idx: (B, T) int64 token ids.
            positions: (B, T) int64 absolute position of each token in its row, -1 for padding, which nothing attends
                to and which is not cached. None: every row counts 0, 1, ..., T - 1.
            document_ids: (B, T) int64, for packed training: a token attends only within its own document.
            cache: keys and values of earlier calls take part, those of this call are added. A call may hold a
                whole prompt, the next chunk of one, or one token of each row, the rows at different positions.
            document_starts: besides document_ids, what `starts_of_documents` says of them: spares a GPU the mask.

        Returns:
            (B, T, V) logits.

        Raises:
            ValueError: T is larger than the context or the cache, or document_ids come with a cache.
        """
        return self.logits(self.hidden_states(idx, positions, document_ids, cache, document_starts))

    def hidden_states(
        self,
        idx: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: "KVCache | None" = None,
        document_starts: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C) output of the last block after the final norm. Arguments as for `forward`."""
        self._check_call(idx, document_ids, cache)
        x = self.transformer.wte(idx)  # (B, T, C)
        scale = math.sqrt(self.config.n_embd) if self.config.scale_embeddings else self.config.embedding_multiplier
        x = x if scale == 1 else x * scale
        places = torch.arange(idx.size(1), device=idx.device)[None] if positions is None else positions
        rotations = self.rope(places, idx.size(1) if cache is None else cache.lengths)
        if document_ids is not None and idx.device.type == "cpu":
            document_starts = starts_of_documents(positions, document_ids)
        plans = self._plan_attention(idx, positions, document_ids, cache, x.dtype, document_starts)
        for layer, block in enumerate(self.transformer.h):
            layer_cache = None if cache is None else cache.layers[layer]
            rotation = rotations[rotation_of(self.config, layer)]
            x = block(x, rotation, plans[window_of(self.config, layer)], layer_cache)
        return self.transformer.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """(..., C) hidden states -> (..., V) logits."""
        z = self.lm_head(x)
        z = z if self.config.logits_scaling == 1 else z / self.config.logits_scaling
        cap = self.config.final_logit_softcapping
        return z if cap is None else cap * torch.tanh(z / cap)

    def new_cache(
        self,
        batch_size: int,
        max_length: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        spare: int = 0,
    ) -> "KVCache":
        """An empty cache for `batch_size` rows of up to `max_length` tokens; by default as the weights are placed.

        Args:
            device: Where all of it goes. None puts what a layer remembers next to the layer's weights.
            dtype: The type of keys and values.
            spare: How many of the last tokens can always be taken back (`KVCache.rewind`), in sliding windows too.
        """
        weight, blocks = self.transformer.wte.weight, self.transformer.h
        places = [device or next(block.parameters()).device for block in blocks]
        layers = [
            LayerShape(window_of(self.config, layer), block.attn.cache_shapes(), place)
            for layer, (block, place) in enumerate(zip(blocks, places, strict=True))
        ]
        return KVCache(
            layers, batch_size, max_length, device or weight.device, dtype or weight.dtype, spare, self.layer_cache
        )

    def init_weights(self) -> None:
        """Random weights from torch's global generator.

        Matrices are normal with variance 2 / (5 C) (https://arxiv.org/abs/1910.05895), those that write to the
        residual stream scaled by 1 / sqrt(2 layers) as in GPT-2; biases are zero, norms start as the identity.
        """
        std = math.sqrt(2 / (5 * self.config.n_embd))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes_residual = name.endswith(".proj")
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * self.config.n_layer) if writes_residual else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, (nn.LayerNorm, RMSNorm)):
                module.reset_parameters()
            if isinstance(module, CausalSelfAttention) and module.sinks is not None:
                nn.init.zeros_(module.sinks)
            if isinstance(module, Router) and module.e_score_correction_bias is not None:
                nn.init.zeros_(module.e_score_correction_bias)

    def tie_weights(self) -> None:
        """Lets the head share the embedding's weight where the config says so (again after weights were replaced)."""
        if self.config.tie_embeddings and isinstance(self.lm_head, nn.Linear):  # a quantised head is a copy
            self.lm_head.weight = self.transformer.wte.weight

    def num_parameters(self, trainable_only: bool = False) -> int:
        """Number of parameters; a shared one counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def _check_call(self, idx: Tensor, document_ids: Tensor | None, cache: "KVCache | None") -> None:
        tokens = idx.size(1)
        if tokens > self.config.block_size:
            raise ValueError(
                f"A sequence of {tokens} tokens does not fit the model's context of {self.config.block_size} "
                "(block_size). Shorten it."
            )
        if cache is None:
            return
        if tokens > cache.max_length:
            raise ValueError(f"{tokens} tokens do not fit a cache of max_length={cache.max_length}. Make a larger one.")
        if document_ids is not None:
            raise ValueError("document_ids are for training without a cache; with a cache, give each document a row.")

    def _plan_attention(
        self,
        idx: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        cache: "KVCache | None",
        dtype: torch.dtype,
        document_starts: Tensor | None = None,
    ) -> "dict[int | None, AttentionPlan]":
        """Who sees whom, once per kind of layer: by the size of its window, None for layers that see everything."""
        windows = {window_of(self.config, layer) for layer in range(self.config.n_layer)}
        plans = {}
        for window in windows:
            ring = None if cache is None else cache.rings[window]
            if document_starts is not None and attends_by_document(self.config, idx, window, dtype, document_starts):
                # A CPU keeps the mask for blocks that are compiled.
                on_cpu = idx.device.type == "cpu"
                mask = mask_within_call(idx, positions, document_ids, window, dtype) if on_cpu else None
                plans[window] = AttentionPlan(mask, documents=document_starts, window=window)
            elif cache is None or cache.is_empty:
                mask = mask_within_call(idx, positions, document_ids, window, dtype)
                slots = None if ring is None else ring.claim(positions_or_default(idx, positions))
                plans[window] = AttentionPlan(mask, slots)
            else:
                plans[window] = plan_with_cache(
                    cache.rings[window], positions_or_default(idx, positions), window, dtype
                )
        if cache is not None:
            cache.is_empty = False
        return plans


class Transformer(nn.ModuleDict):
    """All but the head, under the names that the weights have in a checkpoint."""

    wte: nn.Embedding
    h: "Blocks"
    ln_f: nn.Module


class Blocks(nn.ModuleList):
    """The layers, in order: torch's own list does not say of what."""

    if TYPE_CHECKING:

        def __iter__(self) -> Iterator["Block"]: ...

        @overload
        def __getitem__(self, idx: int) -> "Block": ...

        @overload
        def __getitem__(self, idx: slice) -> "Blocks": ...


class Block(nn.Module):
    """One transformer layer: attention and MLP, each added to the residual stream."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.shared_norm = config.shared_attention_norm
        self.norm_1 = build_norm(config, config.n_embd) if config.norm_1 else nn.Identity()
        self.attn = CausalSelfAttention(config) if config.latent_attention is None else LatentAttention(config)
        self.post_attention_norm = build_norm(config, config.n_embd) if config.post_attention_norm else nn.Identity()
        if not self.shared_norm:
            self.norm_2 = build_norm(config, config.n_embd) if config.norm_2 else nn.Identity()
        self.mlp = build_mlp(config, layer)
        self.post_mlp_norm = build_norm(config, config.n_embd) if config.post_mlp_norm else nn.Identity()
        self.multiplier = config.residual_multiplier

    def forward(
        self, x: Tensor, rotation: "Rotation | None", plan: "AttentionPlan", cache: "LayerCache | None" = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        normed = self.norm_1(x)
        attended = self._scaled(self.post_attention_norm(self.attn(normed, rotation, plan, cache)))
        if self.parallel:
            mlp_input = normed if self.shared_norm else self.norm_2(x)
            return attended + self._scaled(self.post_mlp_norm(self.mlp(mlp_input))) + x
        x = attended + x
        return self._scaled(self.post_mlp_norm(self.mlp(self.norm_2(x)))) + x

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1 else x * self.multiplier


class CausalSelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, by n_query_groups."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        heads, groups, size = config.n_head, config.n_query_groups, config.head_size
        self.sizes = (heads, groups, groups)  # of queries, keys and values, in the rows of `qkv`
        self.head_size = size
        self.interleave = config.rope_interleave
        self.softcap = config.attention_logit_softcapping
        self.scale = 1 / math.sqrt(config.attention_scores_scalar or size)
        self.qkv = nn.Linear(config.n_embd, sum(self.sizes) * size, bias=config.bias or config.attn_bias)
        self.proj = nn.Linear(heads * size, config.n_embd, bias=config.attn_proj_bias)
        self.clip = config.clip_qkv
        self.sinks = nn.Parameter(torch.zeros(heads)) if config.attention_sinks else None
        self.norm_all_heads = config.norm_qk_type == "olmo2"
        if config.norm_qk:
            self.norm_q = build_norm(config, heads * size if self.norm_all_heads else size)
            self.norm_k = build_norm(config, groups * size if self.norm_all_heads else size)
        else:
            self.norm_q = self.norm_k = None

    def forward(
        self, x: Tensor, rotation: "Rotation | None", plan: "AttentionPlan", cache: "LayerCache | None" = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        qkv = self.qkv(x) if self.clip is None else self.qkv(x).clamp(-self.clip, self.clip)
        q, k, v = qkv.split([heads * self.head_size for heads in self.sizes], dim=-1)  # (B, T, heads * D)
        if self.norm_all_heads:
            q, k = self._normed(q, k)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in (q, k, v))  # (B, T, H, D), twice (B, T, G, D)
        if not self.norm_all_heads:
            q, k = self._normed(q, k)
        q = rotate(scale_queries(q, rotation), rotation, self.interleave)
        k = rotate(k, rotation, self.interleave)
        if cache is not None:
            k, v = cache.update(plan, k, v)  # (B, S, G, D)
        return self.proj(self.attended(q, k, v, plan).flatten(-2))

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.norm_q is None or self.norm_k is None:
            return q, k
        return self.norm_q(q), self.norm_k(k)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, plan: "AttentionPlan") -> Tensor:
        """q (B, T, H, D), k and v (B, S, G, D), rotated -> (B, T, H, D) what each query finds."""
        if plan.documents is not None and not (q.device.type == "cpu" and torch.compiler.is_compiling()):
            return attend_by_document(q, k, v, plan.documents, plan.window, self.scale)
        return attend(q, k, v, plan.mask, self.scale, self.softcap, self.sinks)

    def cache_shapes(self) -> list[tuple[int, int]]:
        """(G, D) of each tensor that is kept of a token: keys and values."""
        return [(self.sizes[1], self.head_size)] * 2


class LatentAttention(nn.Module):
    """Multi-head latent attention of DeepSeek V2 (https://arxiv.org/abs/2405.04434).

    Keys and values of all heads are products of one latent of rank R per token; next to it, one rotated key is shared
    by the heads. The cache holds the latent and the rotated key only.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        latent = config.latent_attention
        assert latent is not None
        query_rank = latent.get("q_lora_rank")
        self.n_head = config.n_head
        self.rank, self.value_size = latent["kv_lora_rank"], latent["v_head_dim"]
        self.plain_size, self.rotated_size = latent["qk_nope_head_dim"], latent["qk_rope_head_dim"]
        query_size = self.plain_size + self.rotated_size
        self.interleave = config.rope_interleave
        self.softcap = config.attention_logit_softcapping
        self.scale = latent_attention_scale(config, query_size)
        if query_rank is None:
            self.q_proj = nn.Linear(config.n_embd, self.n_head * query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.n_embd, query_rank, bias=config.attn_bias)
            self.q_a_norm = RMSNorm(query_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(query_rank, self.n_head * query_size, bias=False)
        self.compresses_queries = query_rank is not None
        self.kv_a_proj_with_mqa = nn.Linear(config.n_embd, self.rank + self.rotated_size, bias=config.attn_bias)
        self.kv_a_norm = RMSNorm(self.rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.n_head * (self.plain_size + self.value_size), bias=False)
        self.proj = nn.Linear(self.n_head * self.value_size, config.n_embd, bias=config.attn_proj_bias)

    def forward(
        self, x: Tensor, rotation: "Rotation | None", plan: "AttentionPlan", cache: "LayerCache | None" = None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if self.compresses_queries else self.q_proj(x)
        q = scale_queries(q.unflatten(-1, (self.n_head, -1)), rotation)  # (B, T, H, Q)
        q_plain, q_rotated = q.split([self.plain_size, self.rotated_size], dim=-1)
        q_rotated = rotate(q_rotated, rotation, self.interleave)  # (B, T, H, .)
        latent, k_rotated = self.kv_a_proj_with_mqa(x).split([self.rank, self.rotated_size], dim=-1)
        latent = self.kv_a_norm(latent)[:, :, None]  # (B, T, 1, R)
        k_rotated = rotate(k_rotated[:, :, None], rotation, self.interleave)  # (B, T, 1, .)
        seen = torch.cat((latent, k_rotated), dim=-1)  # (B, S, 1, R + .)
        if cache is not None:
            seen = cache.update(plan, seen)[0]
        if cache is None or plan.reads == "call":
            latent, k_rotated = seen.split([self.rank, self.rotated_size], dim=-1)
            y = self._attend_heads(q_plain, q_rotated, latent, k_rotated, plan)
        else:
            y = self._attend_latents(q_plain, q_rotated, seen, plan)
        return self.proj(y.flatten(-2))

    def _attend_heads(
        self, q_plain: Tensor, q_rotated: Tensor, latent: Tensor, k_rotated: Tensor, plan: "AttentionPlan"
    ) -> Tensor:
        """Keys and values of every head are made from the latents: the cheaper way for many tokens at once."""
        kv = self.kv_b_proj(latent.squeeze(2)).unflatten(-1, (self.n_head, -1))
        k_plain, v = kv.split([self.plain_size, self.value_size], dim=-1)
        k = torch.cat((k_plain, k_rotated.expand(-1, -1, self.n_head, -1)), dim=-1)  # (B, T, H, Q)
        q = torch.cat((q_plain, q_rotated), dim=-1)
        return attend(q, k, v, plan.mask, self.scale, self.softcap)

    def _attend_latents(self, q_plain: Tensor, q_rotated: Tensor, stored: Tensor, plan: "AttentionPlan") -> Tensor:
        """Queries are brought into the latents' space instead, and the latents act as keys and values of one group."""
        up = self._up_projection().unflatten(0, (self.n_head, -1))  # (H, ., R)
        up_k, up_v = up.split([self.plain_size, self.value_size], dim=1)
        q_latent = torch.einsum("bthq,hqr->bthr", q_plain, up_k.to(q_plain.dtype))
        q = torch.cat((q_latent, q_rotated), dim=-1)  # (B, T, H, R + .)
        y = attend(q, stored, stored[..., : self.rank], plan.mask, self.scale, self.softcap)  # (B, T, H, R)
        return torch.einsum("bthr,hvr->bthv", y, up_v.to(y.dtype))

    def cache_shapes(self) -> list[tuple[int, int]]:
        """(1, R + .) of the one tensor that is kept of a token: its latent and the rotated key."""
        return [(1, self.rank + self.rotated_size)]

    def _up_projection(self) -> Tensor:
        """The matrix of `kv_b_proj`, also where it was replaced from outside (LoRA, quantised): (H * ., R)."""
        if type(self.kv_b_proj) is nn.Linear:
            return self.kv_b_proj.weight
        identity = torch.eye(self.rank, device=self.kv_a_norm.weight.device, dtype=self.kv_a_norm.weight.dtype)
        return self.kv_b_proj(identity).T


def latent_attention_scale(config: Config, query_size: int) -> float:
    """1 / sqrt(Q), times YaRN's correction of the temperature where the context is stretched."""
    scale = 1 / math.sqrt(config.attention_scores_scalar or query_size)
    stretch = config.rope_adjustments or {}
    if config.rope_kind == "yarn" and stretch.get("mscale_all_dim"):
        scale *= yarn_magnitude(stretch["factor"], stretch["mscale_all_dim"]) ** 2
    return scale


class GptNeoxMLP(nn.Module):
    """Two layers with a GELU between them."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.fc = nn.Linear(config.n_embd, width, bias=config.mlp_bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.mlp_bias)
        self.approximate = config.gelu_approximate

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.proj(F.gelu(self.fc(x), approximate=self.approximate))


class LLaMAMLP(nn.Module):
    """A SiLU-gated unit (SwiGLU, https://arxiv.org/abs/2002.05202), or the clamped one of gpt-oss
    (https://arxiv.org/abs/2508.10925)."""

    def __init__(self, config: Config, intermediate_size: int | None = None) -> None:
        super().__init__()
        width = intermediate_size or config.intermediate_size
        self.fc_1 = nn.Linear(config.n_embd, width, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, width, bias=config.mlp_bias)
        self.proj = nn.Linear(width, config.n_embd, bias=config.mlp_bias)
        self.approximate = config.gelu_approximate
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.proj(self.gated(self.fc_1(x), self.fc_2(x)))

    def gated(self, gate: Tensor, x: Tensor) -> Tensor:
        if self.limit is None:
            return F.silu(gate) * x
        gate, x = gate.clamp(max=self.limit), x.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(CLAMPED_SWIGLU_ALPHA * gate) * (x + 1)


class GemmaMLP(LLaMAMLP):
    """A GELU-gated unit (GEGLU)."""

    def gated(self, gate: Tensor, x: Tensor) -> Tensor:
        return F.gelu(gate, approximate=self.approximate) * x


class LLaMAMoE(nn.Module):
    """A mixture of experts: each token goes through the K experts that the router chooses for it.

    The router's scores are a softmax as in Mixtral (https://arxiv.org/abs/2401.04088) or sigmoids as in DeepSeek V3
    (https://arxiv.org/abs/2412.19437); both may choose by groups of experts and have experts that see every token.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.expert_size
        self.gate = Router(config)
        self.experts = nn.ModuleList(LLaMAMLP(config, width) for _ in range(config.n_expert))
        self.shared_experts = LLaMAMLP(config, width * config.n_shared_expert) if config.n_shared_expert else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        tokens = x.flatten(0, -2)  # (N, C)
        weights, chosen = route(self.gate, tokens)  # (N, K) each
        n_choices = chosen.size(1)
        order = chosen.flatten().argsort(stable=True)  # (N * K,), the choices sorted by expert
        # How many tokens each expert got decides the shapes: the one number the host has to know.
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        inputs = tokens[order // n_choices].split(counts)
        # In training, experts without tokens run, too: data-parallel ranks wait for the gradient of every parameter.
        parts = zip(self.experts, inputs, strict=True)
        outputs = [expert(part) for expert, part in parts if part.size(0) > 0 or self.training]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        y = torch.cat(outputs)[back].unflatten(0, chosen.shape)  # (N, K, C), in the tokens' order again
        y = (weights[:, None].to(y.dtype) @ y).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


class Router(nn.Linear):
    """Logits of the experts, in float32: which ones are chosen is sensitive to rounding.

    The correction bias of sigmoid routing steers the choice only, and stays in float32.
    """

    e_score_correction_bias: Tensor | None

    def __init__(self, config: Config) -> None:
        super().__init__(config.n_embd, config.n_expert, bias=config.router_bias)
        self.config = config
        corrects = config.router_scores == "sigmoid"
        correction = torch.zeros(config.n_expert, dtype=torch.float32) if corrects else None
        self.register_buffer("e_score_correction_bias", correction)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C) -> (N, E) logits."""
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.e_score_correction_bias = before.to(after.device)
        return self


def route(gate: Router, x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) tokens -> weights (N, K) in float32 and numbers (N, K) of the experts they go through."""
    config = gate.config
    sigmoid = config.router_scores == "sigmoid"
    scores = gate(x).sigmoid() if sigmoid else gate(x).softmax(dim=-1)  # (N, E)
    preference = scores + gate.e_score_correction_bias if sigmoid else scores
    if config.n_expert_groups is not None:
        preference = only_best_groups(preference, config)
    chosen = preference.topk(config.n_expert_per_token, dim=-1).indices  # (N, K)
    weights = scores.gather(1, chosen)
    if config.norm_topk_prob if sigmoid else config.softmax_after_topk:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * config.routed_scaling_factor, chosen


def only_best_groups(preference: Tensor, config: Config) -> Tensor:
    """(N, E) preferences -> the same, -inf outside the n_topk_groups groups whose best experts have the largest sum."""
    preference = preference.unflatten(-1, (config.n_expert_groups or 1, -1))  # (N, groups, E / groups)
    of_group = preference.topk(config.n_topk_scores_per_group or 1, dim=-1).values.sum(dim=-1)  # (N, groups)
    best_groups = of_group.topk(config.n_topk_groups or 1, dim=-1).indices
    allowed = torch.zeros_like(of_group, dtype=torch.bool).scatter_(1, best_groups, True)
    return preference.masked_fill(~allowed[..., None], -math.inf).flatten(1)


def build_mlp(config: Config, layer: int) -> "GptNeoxMLP | LLaMAMLP | LLaMAMoE":
    """The MLP of a layer, by its class name; the first layers of a mixture may be dense."""
    if config.mlp_class_name == "LLaMAMoE":
        return LLaMAMLP(config) if layer < (config.first_k_dense_replace or 0) else LLaMAMoE(config)
    return {"GptNeoxMLP": GptNeoxMLP, "LLaMAMLP": LLaMAMLP, "GemmaMLP": GemmaMLP}[config.mlp_class_name](config)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (https://arxiv.org/abs/1910.07467), in float32 whatever the dtype of x.

    Args:
        size: width of the last dimension.
        eps: added to the mean.
        unit_offset: multiply by 1 + weight, as Gemma does.
    """

    def __init__(self, size: int, eps: float = 1e-6, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.unit_offset = unit_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight) if self.unit_offset else nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        weight = 1 + self.weight.float() if self.unit_offset else self.weight
        y, weight = (x, weight) if weight.dtype == x.dtype else (x.float(), weight.float())
        if cpu_backward.suits(y, weight):
            y = cpu_backward.RMSNormFunction.apply(y, weight, self.eps)
        else:
            y = F.rms_norm(y, self.weight.shape, weight, self.eps)  # one kernel, in float32 within
        return y.to(x.dtype)


def build_norm(config: Config, size: int) -> RMSNorm | nn.LayerNorm:
    """The model's normalisation over `size` values."""
    if config.norm_class_name == "RMSNorm":
        return RMSNorm(size, eps=config.norm_eps, unit_offset=config.norm_unit_offset)
    return nn.LayerNorm(size, eps=config.norm_eps, elementwise_affine=config.norm_affine)


class Rotation(NamedTuple):
    """By what the queries and keys of a call are rotated, each (B or 1, T, 1, P) in float32."""

    cos: Tensor
    sin: Tensor
    query_scale: Tensor | None = None
    """(B or 1, T, 1, 1), by what queries are multiplied besides."""


class RotaryEmbedding(nn.Module):
    """Rotations of positions (RoPE, https://arxiv.org/abs/2104.09864), one for each base the model has.

    The frequencies are computed on the CPU and follow the model from device to device, but never leave float32: they
    are no part of the state dict, and converting the model's dtype does not touch them.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        frequencies, self.magnitudes = rope_frequencies(config)
        self.register_buffer("frequencies", frequencies, persistent=False)  # (bases, P)

    def forward(self, positions: Tensor, length: int | Tensor) -> list[Rotation | None]:
        """(B or 1, T) positions in sequences of up to `length`, of each row (B, 1), -> the rotations, in the order
        `rotation_of` counts."""
        if self.frequencies.device != positions.device:  # the weights were given to a model built without memory
            self.frequencies = rope_frequencies(self.config)[0].to(positions.device)
        positions = positions.clamp(min=0)
        angles = positions.float()[..., None, None] * self.frequencies[:, None, None, None]
        scale = query_scale(positions, self.config)
        rotations = [
            Rotation(of_base.cos() * magnitude, of_base.sin() * magnitude, scale)
            for of_base, magnitude in zip(angles, self.magnitudes, strict=True)
        ]
        if self.config.rope_kind == "longrope":
            # A property of the sequence, not of the token: keys that are cached must fit the queries still to come.
            stretch = self.config.rope_adjustments or {}
            is_long = torch.as_tensor(length > stretch["original_max_seq_len"])[..., None, None]
            (short, long), is_long = rotations, is_long.to(positions.device)
            cos, sin = torch.where(is_long, long.cos, short.cos), torch.where(is_long, long.sin, short.sin)
            rotations = [Rotation(cos, sin, scale)]
        return [*rotations, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        self.frequencies = rope_frequencies(self.config)[0].to(fn(self.frequencies).device)
        return self


def rope_frequencies(config: Config) -> tuple[Tensor, list[float]]:
    """Angles per position (bases, P), in float32 on the CPU, and a factor on the cosines and sines of each base.

    The bases are rope_base and, where there is one, rope_local_base_freq; or those of short and long sequences.
    """
    size = config.rope_n_elem
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / max(size, 1)
    frequencies = 1.0 / config.rope_base**exponents / config.rope_condense_ratio
    magnitude = 1.0
    stretch = config.rope_adjustments or {}
    if config.rope_kind == "linear":
        frequencies = frequencies / stretch["factor"]
    elif config.rope_kind == "llama3":
        frequencies = stretch_by_parts(frequencies, stretch)
    elif config.rope_kind == "yarn":
        frequencies, magnitude = stretch_yarn(frequencies, stretch, config.rope_base)
    elif config.rope_kind == "longrope":  # https://arxiv.org/abs/2402.13753
        divisors = torch.tensor([stretch["short_factor"], stretch["long_factor"]], dtype=torch.float32, device="cpu")
        return frequencies / divisors, [stretch["attention_factor"]] * 2
    if config.rope_local_base_freq is None:
        return frequencies[None], [magnitude]
    local = 1.0 / config.rope_local_base_freq**exponents
    return torch.stack((frequencies, local)), [magnitude, 1.0]


def stretch_by_parts(frequencies: Tensor, stretch: dict) -> Tensor:
    """Llama 3.1: slow rotations become `factor` times slower, fast ones stay, those between are blended."""
    turns = stretch["original_max_seq_len"] * frequencies / (2 * math.pi)  # (P,), within the original context
    low, high = stretch["low_freq_factor"], stretch["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / stretch["factor"]


def stretch_yarn(frequencies: Tensor, stretch: dict, base: float) -> tuple[Tensor, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): blends by the index of the frequency; also scales the rotated values."""
    pairs, factor = frequencies.numel(), stretch["factor"]

    def index_of(turns: float) -> float:
        """Index of the frequency that turns this many times within the original context."""
        return pairs * math.log(stretch["original_max_seq_len"] / (turns * 2 * math.pi)) / math.log(base)

    first, last = index_of(stretch["beta_fast"]), index_of(stretch["beta_slow"])
    if stretch.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    span = max(last - first, 0.001)
    slow = ((torch.arange(pairs, dtype=torch.float32, device="cpu") - first) / span).clamp(0, 1)
    return frequencies * (1 - slow) + frequencies / factor * slow, yarn_rope_magnitude(stretch)


def yarn_rope_magnitude(stretch: dict) -> float:
    """The factor on the rotated queries and keys."""
    if stretch.get("attention_factor") is not None:
        return stretch["attention_factor"]
    factor = stretch["factor"]
    if stretch.get("mscale") and stretch.get("mscale_all_dim"):
        return yarn_magnitude(factor, stretch["mscale"]) / yarn_magnitude(factor, stretch["mscale_all_dim"])
    return yarn_magnitude(factor)


def yarn_magnitude(factor: float, strength: float = 1.0) -> float:
    """YaRN's correction of the temperature for a context stretched by `factor`; `mscale` is its strength."""
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def query_scale(positions: Tensor, config: Config) -> Tensor | None:
    """What queries are multiplied by at each (B or 1, T) position, (B or 1, T, 1, 1), as in Llama 4 and Ministral 3."""
    stretch = config.rope_adjustments or {}
    beta = stretch.get("llama_4_scaling_beta")
    if beta is None:
        return None
    periods = positions // stretch["original_max_seq_len"]
    return 1 + beta * torch.log1p(periods.float())[..., None, None]


def rotation_of(config: Config, layer: int) -> int:
    """Which of the rotations of a call a layer uses; -1 is none at all."""
    if config.nope_indices is not None and config.nope_indices[layer]:
        return -1
    return config.rope_indices[layer] if config.rope_indices else 0


def scale_queries(q: Tensor, rotation: Rotation | None) -> Tensor:
    """(B, T, H, D) -> the same."""
    scale = None if rotation is None else rotation.query_scale
    return q if scale is None else (q * scale).to(q.dtype)


def rotate(x: Tensor, rotation: Rotation | None, interleave: bool) -> Tensor:
    """Rotates the first 2 * P values of each head, in float32: (B, T, heads, D) -> the same."""
    if rotation is None or rotation.cos.size(-1) == 0:
        return x
    size = 2 * rotation.cos.size(-1)
    part = x if size == x.size(-1) else x[..., :size]
    if interleave:
        a, b = part[..., ::2], part[..., 1::2]
    else:
        a, b = part.chunk(2, dim=-1)
    pair = (a * rotation.cos - b * rotation.sin, b * rotation.cos + a * rotation.sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleave else torch.cat(pair, dim=-1)
    turned = turned.to(x.dtype)
    return turned if size == x.size(-1) else torch.cat((turned, x[..., size:]), dim=-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention by the kernel that suits: q (B, T, H, Q), k (B, S, G, Q), v (B, S, G, D) -> (B, T, H, D)."""
    if mask is None and softcap is None and sinks is None and cpu_backward.suits_attention(q, k):
        return cpu_backward.CausalAttention.apply(q, k, v, scale)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    heads, groups, tokens = q.size(1), k.size(1), q.size(2)
    if k.dtype != q.dtype:  # a cache in another dtype
        k, v = k.to(q.dtype), v.to(q.dtype)
    if softcap is not None or sinks is not None:
        return attend_written_out(q, k, v, mask, scale, softcap, sinks).transpose(1, 2)
    if tokens == 1 and mask is not None:
        # One token: the query heads of a group are rows of one product, and the keys need no copies.
        rows = q.reshape(q.size(0), groups, heads // groups, q.size(3))
        y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
        return y.reshape(y.size(0), 1, heads, y.size(3))
    grouped = heads != groups
    if grouped and mask is not None and q.device.type != "cpu":
        # No fused GPU kernel takes both groups and a mask: without copies of the keys, all T x S scores would be held.
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def attends_by_document(
    config: Config, idx: Tensor, window: int | None, dtype: torch.dtype, document_starts: Tensor
) -> bool:
    """Whether `attend_by_document` can do what the layers with this window want, where idx is."""
    if config.attention_logit_softcapping is not None or config.attention_sinks or config.latent_attention is not None:
        return False
    device = idx.device.type
    if device == "cpu":
        return window is None or bool((document_starts.diff() <= window).all())
    computes_in = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    if device != "cuda" or computes_in not in (torch.float16, torch.bfloat16) or config.head_size > 256:
        return False
    return "enable_gqa" in (getattr(varlen_kernel(), "__kwdefaults__", None) or ())  # and windows, in newer torch


def attend_by_document(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int | None, scale: float) -> Tensor:
    """Attention of packed rows, each document on its own: shapes as in `attend`, S = T, starts (documents + 1,).

    The time grows with the squares of the documents' lengths, not of the row's.
    """
    batch = q.shape[:2]
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * T, heads, D)
    if q.device.type == "cpu":  # where no document is longer than the window
        return attend_one_by_one(q, k, v, starts, scale).unflatten(0, batch)
    return attend_at_once(q, k, v, starts, window, scale).unflatten(0, batch)


def attend_one_by_one(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """(tokens, H, D), twice (tokens, G, D) -> (tokens, H, D).

    On 1 thread in bfloat16, 9 heads of 64, six documents in 1,024 tokens took 38 ms forward and back, where the mask
    took 64; six in 2,048 took 170 and 420.
    """
    lengths = starts.diff().tolist()
    documents = zip(*(part[None].split(lengths, dim=1) for part in (q, k, v)), strict=True)  # (1, length, heads, D)
    return torch.cat([attend(*document, mask=None, scale=scale) for document in documents], dim=1)[0]


def attend_at_once(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int | None, scale: float) -> Tensor:
    """The same by a GPU's kernel for sequences of unequal lengths."""
    kernel = varlen_kernel()
    assert kernel is not None  # as attends_by_document asks
    longest = q.size(0)  # an upper bound, for which the GPU need not be asked
    grouped = q.size(1) != k.size(1)
    reach = (-1 if window is None else window - 1, 0)  # how far a token looks back, and ahead
    return kernel(q, k, v, starts, starts, longest, longest, scale=scale, window_size=reach, enable_gqa=grouped)


@cache
def varlen_kernel() -> Callable[..., Any] | None:
    """torch's attention for sequences of unequal lengths, None before torch 2.10. Importing it brings the compiler."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def attend_written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention for what no kernel knows: scores softcap * tanh(score / softcap), and a sink for each head.

    q (B, H, T, Q), k (B, G, S, Q), v (B, G, S, D), sinks (H,) -> (B, H, T, D). Queries are taken in blocks, so that
    without gradients only the scores of one block are held.
    """
    if mask is None:
        rows = torch.arange(q.size(2), device=q.device)
        mask = additive_mask(rows[None] > rows[:, None], q.dtype)[None, None]
    k, v = k[:, :, None], v[:, :, None]
    parts = []
    for queries, block_mask in zip(q.split(QUERY_BLOCK, dim=2), mask.split(QUERY_BLOCK, dim=2), strict=True):
        queries = queries.unflatten(1, (k.size(1), -1))  # (B, G, H / G, block, Q)
        scores = (queries * scale) @ k.transpose(-1, -2)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.float() + block_mask[:, :, None]
        if sinks is not None:  # one more key, which has no value
            sink = sinks.float().view(1, k.size(1), -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(dim=-1)[..., : k.size(3)]
        parts.append((weights.to(v.dtype) @ v).flatten(1, 2))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def additive_mask(masked: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean, True where a key must not be seen -> what is added to the scores: MASKED there, 0 elsewhere."""
    return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, MASKED)


def mask_within_call(
    idx: Tensor, positions: Tensor | None, document_ids: Tensor | None, window: int | None, dtype: torch.dtype
) -> Tensor | None:
    """The mask where only the tokens of the call are seen; None where plain causal attention says it all."""
    tokens = idx.size(1)
    narrow = window is not None and window < tokens
    if positions is None and document_ids is None and not narrow:
        return None
    order = torch.arange(tokens, device=idx.device)
    distance = order[:, None] - order[None]  # (T, T)
    masked = distance < 0
    if narrow:
        masked = masked | (distance >= window)
    masked = masked[None]  # (B or 1, T, T)
    if document_ids is not None:
        masked = masked | (document_ids[:, :, None] != document_ids[:, None])
    if positions is not None:
        masked = masked | (positions[:, None] < 0)
    return additive_mask(masked[:, None], dtype)


def starts_of_documents(positions: Tensor | None, document_ids: Tensor) -> Tensor | None:
    """Where each document begins in the B * T tokens, row after row, and at last their number, (documents + 1,) int32;
    padding counts as a document. None where a document is in pieces. Of tensors on a CPU: a GPU would be waited for.
    """
    if torch.compiler.is_compiling():
        return None
    ids = document_ids if positions is None else torch.where(positions < 0, -1, document_ids)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    if any(len(row.unique()) != of_row.sum() for row, of_row in zip(ids, begins, strict=True)):
        return None
    first = begins.flatten().nonzero().flatten()
    return torch.cat((first, first.new_tensor([ids.numel()]))).int()


def plan_with_cache(ring: "Ring", positions: Tensor, window: int | None, dtype: torch.dtype) -> AttentionPlan:
    """The plan where tokens of earlier calls are seen, too."""
    # Many new tokens would push old ones out of a window-sized ring before the first of them has looked at these.
    both = window is not None and positions.size(1) > 1
    if both:
        seen = torch.cat((ring.positions, positions), dim=1)
        slots = ring.claim(positions)
    else:
        slots = ring.claim(positions)
        seen = ring.positions if ring.read_length is None else ring.positions[:, : ring.read_length]
    distance = positions[:, :, None] - seen[:, None]  # (B, T, S)
    masked = (distance < 0) | (seen[:, None] < 0)
    if window is not None:
        masked = masked | (distance >= window)
    mask = additive_mask(masked[:, None], dtype)
    return AttentionPlan(mask, slots, "both" if both else "cache", ring.read_length)


def positions_or_default(idx: Tensor, positions: Tensor | None) -> Tensor:
    """(B, T) positions; 0, 1, ... where none are given."""
    if positions is not None:
        return positions
    return torch.arange(idx.size(1), device=idx.device).expand(idx.shape)


def window_of(config: Config, layer: int) -> int | None:
    """Size of a layer's sliding window, None where it sees everything."""
    has_window = config.sliding_window_indices is not None and config.sliding_window_indices[layer]
    return config.sliding_window_size if has_window else None
