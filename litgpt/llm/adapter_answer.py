"""One answer of a model with what LLaMA-Adapter or Adapter v2 has learned."""

from functools import partial
from pathlib import Path
from typing import Any

from litgpt.adaptation.adapter import load_adapter, read_adapter
from litgpt.llm.llm import load_llm
from litgpt.llm.single_answer import Options, answer
from litgpt.model import GPT
from litgpt.sources.load import load_model
from litgpt.sources.source import Source


def answer_with_adapter(checkpoint_dir: Path, prompt: str, input: str, adapter_path: Path, options: Options) -> None:
    """Print what a model answers to a prompt, with the weights that `adapter_path` holds.

    Raises:
        FileNotFoundError: There are no such weights.
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
