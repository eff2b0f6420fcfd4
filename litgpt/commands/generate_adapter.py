"""Print what a model answers with what LLaMA-Adapter or Adapter v2 has learned."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from litgpt import cli
from litgpt.adapter import ADAPTER_WEIGHTS, load_adapter, read_adapter
from litgpt.commands.generate import DEFAULT_PROMPT, Options, answer
from litgpt.convert import Source, load_model
from litgpt.llm import load_llm
from litgpt.model import GPT


def setup(
    checkpoint_dir: Path,
    prompt: str = DEFAULT_PROMPT,
    input: str = "",
    adapter_path: Path = Path("out/finetune/adapter/final") / ADAPTER_WEIGHTS,
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    """Print what a model answers to a prompt that was finetuned with LLaMA-Adapter, or with Adapter v2.

    Args:
        checkpoint_dir: The model that was finetuned: a directory, a .gguf file, a known name or a Hub id.
        prompt: What to answer. Without this option a prompt that is piped in is taken, whole.
        input: What the prompt is about, for formats such as Alpaca's that have a place for it.
        adapter_path: What `litgpt finetune_adapter` or `litgpt finetune_adapter_v2` learned: its file, or the directory
            of it.
    """
    if not adapter_path.exists():
        raise FileNotFoundError(
            f"--adapter_path {adapter_path} does not exist. Give the file or directory that `litgpt finetune_adapter` "
            "or `litgpt finetune_adapter_v2` has written."
        )
    weights, _ = read_adapter(adapter_path)  # which say of what kind they are

    def load(source: Source, **how: Any) -> GPT:
        model = load_model(source, **how)
        load_adapter(model, weights)
        return model

    directory = adapter_path if adapter_path.is_dir() else adapter_path.parent
    answer(partial(load_llm, checkpoint_dir, load=load, finetuned=directory), prompt, options, input)
