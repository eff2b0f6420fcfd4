"""`generate_adapter`, which looks for what `finetune_adapter_v2` has learned."""

from pathlib import Path
from typing import Annotated

from litgpt import cli
from litgpt.adaptation.adapter import ADAPTER_V2_WEIGHTS
from litgpt.llm.adapter_answer import answer_with_adapter
from litgpt.llm.single_answer import DEFAULT_PROMPT, Options


def setup(
    checkpoint_dir: Path,
    prompt: str = DEFAULT_PROMPT,
    input: str = "",
    adapter_path: Path = Path("out/finetune/adapter-v2/final") / ADAPTER_V2_WEIGHTS,
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    """Print what a model answers to a prompt that was finetuned with Adapter v2.

    `litgpt generate_adapter` does the same; it looks elsewhere where no --adapter_path is given.

    Args:
        checkpoint_dir: The model that was finetuned: a directory, a .gguf file, a known name or a Hub id.
        prompt: What to answer. Without this option a prompt that is piped in is taken, whole.
        input: What the prompt is about, for formats such as Alpaca's that have a place for it.
        adapter_path: What `litgpt finetune_adapter_v2` learned: its file, or the directory of it.
    """
    answer_with_adapter(checkpoint_dir, prompt, input, adapter_path, options)
