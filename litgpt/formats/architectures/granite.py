"""Granite 3 (https://huggingface.co/ibm-granite): Llama with four multipliers, as in muP (https://arxiv.org/abs/2203.03466)."""

from litgpt.formats.architectures.llama import llama_like
from litgpt.formats.fields import Field


def _scalar(multiplier: float) -> float:
    """Scores times m are scores divided by the square root of 1 / m^2."""
    return 1 / multiplier**2


def _multiplier(scalar: float) -> float:
    return float(f"{scalar**-0.5:.12g}")  # without the last digits' error, so that reading it again gives the same


GRANITE = llama_like(
    "GraniteForCausalLM",
    "granite",
    extra=(
        Field("embedding_multiplier", "embedding_multiplier", 1.0),
        Field("residual_multiplier", "residual_multiplier", 1.0),
        Field("logits_scaling", "logits_scaling", 1.0),
        Field("attention_scores_scalar", "attention_multiplier", 1.0, to_ours=_scalar, to_theirs=_multiplier),
    ),
)
