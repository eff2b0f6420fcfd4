"""SmolLM3: Llama with layers that have no rotary embedding (https://arxiv.org/abs/2501.18795)."""

from typing import Any

from litgpt.config import Config
from litgpt.formats.architectures.llama import llama_like
from litgpt.formats.fields import Field, HFConfig, Rope, SlidingWindow


class LayersWithoutRope:
    """`no_rope_layers`, where 0 means that a layer has none; by default every `no_rope_layer_interval`-th."""

    def read(self, theirs: HFConfig) -> dict[str, Any]:
        return {"nope_indices": self.layers(theirs)}

    @staticmethod
    def layers(theirs: HFConfig) -> list[int] | None:
        """One entry per layer, 1 = no rotary embedding; None where every layer has one."""
        rotated, interval = theirs.get("no_rope_layers"), theirs.get("no_rope_layer_interval") or 4
        if rotated is None:
            rotated = [(layer + 1) % interval for layer in range(theirs.get("num_hidden_layers") or 0)]
        return [int(not x) for x in rotated] if not all(rotated) else None

    def write(self, config: Config) -> HFConfig:
        return {"no_rope_layers": [1 - x for x in config.nope_indices or [0] * config.n_layer]}


def _slides(theirs: HFConfig, layer: int) -> bool:
    without = LayersWithoutRope.layers(theirs)
    return without is not None and bool(without[layer])


SMOLLM3 = llama_like(
    "SmolLM3ForCausalLM",
    "smollm3",
    context=Field("block_size", "max_position_embeddings", 32768),
    groups=Field("n_query_groups", "num_key_value_heads", 4),
    tied=Field("tie_embeddings", "tie_word_embeddings", True),
    rope=Rope(theta=2000000),
    extra=(LayersWithoutRope(), SlidingWindow(usual=_slides, switch="use_sliding_window")),
)
