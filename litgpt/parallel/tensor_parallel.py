"""A GPT split over several devices, each of which has a part of every matrix (tensor parallelism), from outside.

As in Megatron-LM (https://arxiv.org/abs/1909.08053): the first matrix of attention and MLP is split by rows, so that
each rank has some heads and some of the inner units, the second by columns, and the ranks' results are added up. The
residual stream, the norms, the router and the embedding are the same on all ranks. For inference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from litgpt.config import Config
from litgpt.model import GPT, CausalSelfAttention, GptNeoxMLP, LatentAttention, LLaMAMLP, RMSNorm
from litgpt.parallel.process_group import ProcessGroup

Take = Callable[[str, Tensor], Tensor]


def check_split(config: Config, ranks: int) -> None:
    """Refuses what cannot be split over this many ranks, before any weights are read.

    Raises:
        ValueError: Names the figure of the model that this many ranks do not divide.
    """

    def refuse(what: str) -> None:
        raise ValueError(f"devices={ranks} cannot split {config.name or 'this model'}: {what}. Take another number.")

    if config.n_head % ranks:
        refuse(f"its {config.n_head} heads are not divisible by {ranks}")
    groups = config.n_query_groups
    if config.latent_attention is None and groups % ranks and ranks % groups:
        refuse(f"its {groups} key/value heads are neither divisible by {ranks} nor a divisor of it")
    mixture = config.mlp_class_name == "LLaMAMoE"
    widths = {config.intermediate_size} if not mixture or config.first_k_dense_replace else set()
    if mixture:
        width = config.expert_size
        widths |= {width, width * (config.n_shared_expert or 1)}
    for width in sorted(widths):
        if width % ranks:
            refuse(f"an MLP's width of {width} is not divisible by {ranks}")
    if config.norm_qk and config.norm_qk_type == "olmo2" and config.norm_class_name != "RMSNorm":
        refuse("its LayerNorm over all heads at once cannot be computed in parts")


def split_model(gpt: GPT, group: ProcessGroup) -> Take:
    """Leaves a model on the meta device its rank's part.

    Args:
        gpt: The model, without memory. Its calls are then collective: every rank makes the same ones.
        group: The ranks, which need not have met yet.

    Returns:
        What takes this rank's part of a whole weight, by the weight's name: of a view of a file another view where
        possible, so that no more is read.

    Raises:
        ValueError: The model cannot be split so.
    """
    check_split(gpt.config, group.count)
    return _Split(gpt, group).part


class _Split:
    def __init__(self, gpt: GPT, group: ProcessGroup) -> None:
        self.group, self.rank, self.ranks = group, group.rank, group.count
        self.parts: dict[str, Callable[[Tensor], Tensor]] = {}
        self.names = {module: name for name, module in gpt.named_modules()}
        for block in gpt.transformer.h:
            if isinstance(block.attn, LatentAttention):
                self.latent_attention(block.attn)
            else:
                self.attention(block.attn)
            for module in block.mlp.modules():
                if isinstance(module, (GptNeoxMLP, LLaMAMLP)):
                    self.mlp(module)
            block.attn.register_forward_hook(self.all_reduce)
            block.mlp.register_forward_hook(self.all_reduce)
        head = gpt.lm_head
        if not gpt.config.tie_embeddings and head.out_features % self.ranks == 0:
            self.rows(head, [self.share(head.out_features)])
            head.register_forward_hook(self.all_gather)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        return self.parts[name](tensor) if name in self.parts else tensor

    def share(self, size: int, start: int = 0) -> tuple[int, int]:
        """Where this rank's part of `size` things from `start` on begins, and its length."""
        length = size // self.ranks
        return start + self.rank * length, length

    def attention(self, attention: CausalSelfAttention) -> None:
        heads, groups, _ = attention.sizes
        size = attention.head_size
        first, count = self.share(heads)
        if groups % self.ranks == 0:
            group, group_count = self.share(groups)
        else:  # several ranks have heads of one group, and each its keys and values
            group, group_count = self.rank * groups // self.ranks, 1
        spans = [(first, count), (heads + group, group_count), (heads + groups + group, group_count)]
        self.rows(attention.qkv, [(start * size, length * size) for start, length in spans])
        self.columns(attention.proj, (first * size, count * size))
        attention.sizes = (count, group_count, group_count)
        if attention.sinks is not None:
            self.tensor(attention, "sinks", lambda t: t.narrow(0, first, count))
        if attention.norm_all_heads:
            for norm, (start, length) in ((attention.norm_q, spans[0]), (attention.norm_k, (group, group_count))):
                if isinstance(norm, RMSNorm):  # a model without norms has none; a LayerNorm is refused
                    self.norm(norm, (start * size, length * size))

    def latent_attention(self, attention: LatentAttention) -> None:
        heads = attention.n_head
        first, count = self.share(heads)
        attention.n_head = count
        queries = attention.q_b_proj if attention.compresses_queries else attention.q_proj
        for linear in (queries, attention.kv_b_proj):
            size = linear.out_features // heads
            self.rows(linear, [(first * size, count * size)])
        self.columns(attention.proj, (first * attention.value_size, count * attention.value_size))

    def norm(self, norm: RMSNorm, span: tuple[int, int]) -> None:
        """Keeps some of the weight, of a norm over what all ranks have."""
        self.tensor(norm, "weight", lambda t: t.narrow(0, *span))
        norm.__class__ = SplitRMSNorm
        assert isinstance(norm, SplitRMSNorm)
        norm.group = self.group

    def mlp(self, mlp: GptNeoxMLP | LLaMAMLP) -> None:
        inner = [mlp.fc] if isinstance(mlp, GptNeoxMLP) else [mlp.fc_1, mlp.fc_2]
        span = self.share(mlp.proj.in_features)
        for linear in inner:
            self.rows(linear, [span])
        self.columns(mlp.proj, span)

    def rows(self, linear: nn.Linear, spans: Sequence[tuple[int, int]]) -> None:
        """Keeps some of the outputs."""
        self.tensor(linear, "weight", lambda t: _rows(t, spans))
        if linear.bias is not None:
            self.tensor(linear, "bias", lambda t: _rows(t, spans))
        linear.out_features = sum(length for _, length in spans)

    def columns(self, linear: nn.Linear, span: tuple[int, int]) -> None:
        """Keeps some of the inputs; the bias is the first rank's, as the results are added up."""
        self.tensor(linear, "weight", lambda t: t.narrow(1, *span))
        if linear.bias is not None:
            self.tensor(linear, "bias", lambda t: t if self.rank == 0 else torch.zeros_like(t))
        linear.in_features = span[1]

    def tensor(self, module: nn.Module, name: str, part: Callable[[Tensor], Tensor]) -> None:
        whole = getattr(module, name)
        setattr(module, name, nn.Parameter(whole.new_empty(part(whole.detach()).shape)))
        self.parts[f"{self.names[module]}.{name}"] = part

    def all_reduce(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """A forward hook: the sum of the ranks' outputs."""
        output = output.contiguous()
        self.group.all_reduce(output)
        return output

    def all_gather(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """A forward hook: the ranks' outputs, concatenated along the last dimension."""
        return self.group.all_gather(output.contiguous())


class SplitRMSNorm(RMSNorm):
    """A norm over all ranks' heads: the squares are added up over the ranks."""

    group: ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        """(..., size of this rank) -> the same."""
        squares = x.float().square().mean(dim=-1, keepdim=True)
        self.group.all_reduce(squares)  # heads that several ranks have count as often in the divisor
        scale = torch.rsqrt(squares / self.group.count + self.eps)
        weight = 1 + self.weight.float() if self.unit_offset else self.weight.float()
        return (x.float() * scale * weight).to(x.dtype)


def _rows(tensor: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    parts = [tensor.narrow(0, *span) for span in spans]
    if len(parts) == 1:
        return parts[0]
    if tensor.is_meta:  # torch.cat would import torch's compiler for it
        return tensor.new_empty(sum(length for _, length in spans), *tensor.shape[1:])
    return torch.cat(parts)
