"""Print what a model answers to a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from litgpt import cli
from litgpt.llm.llm import LLM
from litgpt.llm.loading import load_parts
from litgpt.llm.single_answer import DEFAULT_PROMPT, Options, print_answers, read_prompt


def setup(
    checkpoint_dir: Path,
    prompt: str = DEFAULT_PROMPT,
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    """Print a model's answer to a prompt on stdout; timing and the like go to stderr.

    Args:
        checkpoint_dir: A checkpoint directory, a Hugging Face directory, a .gguf file, a directory of LoRA or adapter
            weights, a known name or a Hub id.
        prompt: What to answer. Without this option a prompt that is piped in is taken, whole.
    """
    prompt = read_prompt(prompt)
    llm = LLM(load_parts(checkpoint_dir, options.loading))
    print_answers(llm, prompt, options)
