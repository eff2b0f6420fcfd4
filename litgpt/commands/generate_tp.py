"""Print what a model answers that is split over several devices, each with a part of every layer."""

import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from litgpt import cli
from litgpt.commands.generate import DEFAULT_PROMPT, Options, answer
from litgpt.convert import Source, load_model
from litgpt.distributed import count_devices, make_fabric, rank_from_environment
from litgpt.generation.ranks import RankEngine, Ranks
from litgpt.llm import LLM, load_llm
from litgpt.loading import open_model
from litgpt.model import GPT
from litgpt.quantize import FOUR_BIT_KINDS
from litgpt.tensor_parallel import check_split, split_model


def setup(
    checkpoint_dir: Path,
    prompt: str = DEFAULT_PROMPT,
    devices: int | str = "auto",
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    """Print a model's answer, computed by several devices at once, each of which holds a part of every layer.

    One process per device is started; each reads its part of the weights alone, and the first one prints.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a known name or a Hub id.
        prompt: What to answer. Without this option a prompt that is piped in is taken, whole.
        devices: Number of devices; auto takes all. On a CPU, the number of processes.
    """
    ranks = count_devices(devices)
    if options.quantize not in (None, *FOUR_BIT_KINDS):
        raise ValueError(
            f"--quantize {options.quantize} cannot act in generate_tp, where bitsandbytes' 4 bits alone "
            f"are stored in parts. Choose one of: {', '.join(FOUR_BIT_KINDS)}."
        )
    if options.compile:
        raise ValueError("--compile true cannot act in generate_tp: what the ranks exchange is not compiled.")
    if ranks == 1:
        answer(partial(load_llm, checkpoint_dir), prompt, options)
        return
    load = partial(load_rank, checkpoint_dir, devices, ranks)
    if rank_from_environment() > 0:
        follow(load, options)
        return
    channels: list[Ranks] = []
    try:
        answer(partial(load, loaded=channels), prompt, options)
    finally:
        for channel in channels:
            channel.tell(None)


def follow(load: Callable[..., LLM], options: Options) -> None:
    """What the other ranks do; the first one speaks for all."""
    how = ("precision", "compile", "prompt_style", "access_token", "quantize")
    with contextlib.redirect_stderr(io.StringIO()):
        engine = load(**{name: getattr(options, name) for name in how}).engine
    engine.follow()


def load_rank(
    checkpoint_dir: Path, devices: int | str, ranks: int, loaded: list[Ranks] | None = None, **how: Any
) -> LLM:
    """Starts the ranks, and loads this one's part of the model; then adds the channel between them to `loaded`."""
    check_split(open_model(checkpoint_dir, how["access_token"]).config, ranks)  # said once, before there are others
    fabric = make_fabric(devices, precision="32-true", strategy="ddp")
    fabric.launch()
    channel = Ranks()

    def load(source: Source, **how: Any) -> GPT:
        return load_model(source, split=partial(split_model, rank=fabric.global_rank, ranks=ranks), **how)

    make_engine = partial(RankEngine, ranks=channel)
    llm = load_llm(checkpoint_dir, load=load, make_engine=make_engine, device=fabric.device, **how)
    if loaded is not None:
        loaded.append(channel)
    return llm
