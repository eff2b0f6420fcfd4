"""Print what a model answers whose blocks lie on several devices."""

from pathlib import Path
from typing import Annotated

from litgpt import cli
from litgpt.llm.llm import LLM
from litgpt.llm.loading import load_parts
from litgpt.llm.placement import place
from litgpt.llm.single_answer import DEFAULT_PROMPT, Options, print_answers, read_prompt


def setup(
    checkpoint_dir: Path,
    prompt: str = DEFAULT_PROMPT,
    devices: int | str = "auto",
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    """Print a model's answer, its blocks on several devices, for a model that is larger than one of them.

    The devices work in turn: this makes room. `litgpt generate_tp` has them work at once.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
            weights, a known name or a Hub id.
        prompt: What to answer. Without this option a prompt that is piped in is taken, whole.
        devices: Number of devices, or their numbers as 0,2; auto takes all.
    """
    placement = place(devices=devices, strategy="sequential")
    prompt = read_prompt(prompt)
    llm = LLM(load_parts(checkpoint_dir, options.loading, placement=placement))
    print_answers(llm, prompt, options)
