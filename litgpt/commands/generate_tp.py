"""Print what a model answers that is split over several devices, each with a part of every layer."""

from pathlib import Path
from typing import Annotated

from litgpt import cli
from litgpt.llm.llm import LLM
from litgpt.llm.loading import load_parts
from litgpt.llm.placement import place
from litgpt.llm.single_answer import DEFAULT_PROMPT, Options, print_answers, read_prompt
from litgpt.parallel.ranks import rank_from_environment


def setup(
    checkpoint_dir: Path,
    prompt: str = DEFAULT_PROMPT,
    devices: int | str = "auto",
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    """Print a model's answer, computed by several devices at once, each of which holds a part of every layer.

    One process per device is started; each reads its part of the weights alone, and the first one prints.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
            weights, a known name or a Hub id.
        prompt: What to answer. Without this option a prompt that is piped in is taken, whole.
        devices: Number of devices, or their numbers as 0,2; auto takes all. On a CPU, the number of processes.
    """
    placement = place(devices=devices, strategy="tensor_parallel")
    if rank_from_environment() == 0:  # under torchrun or srun the first one starts the others, too
        prompt = read_prompt(prompt)
        llm = LLM(load_parts(checkpoint_dir, options.loading, placement=placement))
        print_answers(llm, prompt, options)
