"""One answer of a model with what LLaMA-Adapter or Adapter v2 has learned."""

from pathlib import Path

from litgpt.llm.llm import LLM
from litgpt.llm.loading import load_parts
from litgpt.llm.single_answer import Options, print_answers, read_prompt
from litgpt.sources.adapted import AdapterSource
from litgpt.sources.door import open_model


def answer_with_adapter(checkpoint_dir: Path, prompt: str, input: str, adapter_path: Path, options: Options) -> None:
    """Print what a model answers to a prompt, with the weights that `adapter_path` holds.

    Raises:
        FileNotFoundError: There are no such weights.
    """
    if not adapter_path.exists():
        raise FileNotFoundError(
            f"adapter_path={adapter_path} does not exist. Give the file or directory that `litgpt finetune_adapter` "
            "or `litgpt finetune_adapter_v2` has written."
        )
    prompt = read_prompt(prompt)
    base = open_model(checkpoint_dir, options.access_token)
    source = AdapterSource(base, adapter_path, base.files)
    finetuned = adapter_path if adapter_path.is_dir() else adapter_path.parent
    llm = LLM(load_parts(checkpoint_dir, options.loading, source=source, finetuned=finetuned))
    print_answers(llm, prompt, options, input)
