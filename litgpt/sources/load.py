"""A model with a checkpoint's weights."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from litgpt.model import GPT
from litgpt.quantization.block_weight import KIND as BLOCKS
from litgpt.quantization.layers import replace_linears, same_form
from litgpt.sources.checkpoint import open_checkpoint
from litgpt.sources.meta import give_memory, meta_model
from litgpt.sources.part import PartSource, check_whole
from litgpt.sources.source import Place, Source, Watch


def load_model(
    source: Source | str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: Place = "cpu",
    quantize: str | None = None,
    split: Callable[[GPT], Callable[[str, Tensor], Tensor]] | None = None,
    plain: bool = False,
    watch: Watch = iter,
) -> GPT:
    """A model with a checkpoint's weights, in evaluation mode.

    Memory stays at the size of the model, quantised if it is, plus the checkpoint's largest tensor.

    Args:
        source: An opened checkpoint or its path.
        dtype: The type of the weights; None keeps that of the checkpoint.
        device: Where the model goes, or where each weight does, by its name.
        quantize: How to quantise the linear layers of the blocks, such as bnb.nf4; see
            `litgpt.quantization.layers`. None keeps them as the checkpoint has them.
        split: Leaves a model without memory a part of its weights, and returns what takes that part of a whole weight,
            by its name.
        plain: De-quantise weights that the checkpoint has quantised.
        watch: Wraps the stream of weights, to show progress.

    Raises:
        ValueError: The checkpoint is quantised in another way.
    """
    source = source if isinstance(source, Source) else open_checkpoint(source)
    dtype = dtype or source.dtype
    quantize = None if plain else kind_for(source, quantize)
    model = meta_model(source.config)
    if split is not None:
        check_whole(source)
        source = PartSource(source, split(model))
    if quantize is not None:
        replace_linears(model, quantize, dtype)
    give_memory(model, dtype, device)
    source.load_into(model, watch)
    return model.eval()


def kind_for(source: Source, quantize: str | None) -> str | None:
    """How a model is quantised that gets a checkpoint's weights: as is asked for, or else as the checkpoint is.

    Raises:
        ValueError: The checkpoint is quantised in another way.
    """
    own = source.quantized
    if quantize == BLOCKS and not source.has_blocks:
        raise ValueError(
            f"quantize={BLOCKS} uses the blocks of a GGUF file as they lie there, and '{source.files}' holds none. "
            "Write such a file with `litgpt convert --to gguf --quantize q4_k_m`, or take int4 or int8."
        )
    if own is None or quantize is None:
        return quantize or own
    if not same_form(quantize, own):
        raise ValueError(
            f"quantize={quantize} has no effect here: the weights in '{source.files}' are {own} already. Leave it "
            "out, or give the checkpoint that they were made from."
        )
    return quantize
