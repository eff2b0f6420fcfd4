"""Print what a model answers whose weights were all finetuned."""

from pathlib import Path
from typing import Annotated

from litgpt import cli
from litgpt.checkpoint import WEIGHTS
from litgpt.llm.llm import LLM
from litgpt.llm.loading import load_parts
from litgpt.llm.single_answer import DEFAULT_PROMPT, Options, print_answers, read_prompt
from litgpt.sources.door import open_model
from litgpt.sources.lit import LitSource


def setup(
    checkpoint_dir: Path,
    prompt: str = DEFAULT_PROMPT,
    input: str = "",
    finetuned_path: Path = Path("out/finetune/full/final/lit_model.pth"),
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    """Print what a model answers to a prompt, with the weights that finetuning gave it.

    `litgpt generate` does the same with the directory that `litgpt finetune_full` wrote, which is a whole checkpoint;
    this is for weights that are apart from their checkpoint.

    Args:
        checkpoint_dir: The model that was finetuned: a directory, a .gguf file, a known name or a Hub id.
        prompt: What to answer. Without this option a prompt that is piped in is taken, whole.
        input: What the prompt is about, for formats such as Alpaca's that have a place for it.
        finetuned_path: The finetuned weights: a .pth file, or the directory of one.
    """
    file = finetuned_path / WEIGHTS if finetuned_path.is_dir() else finetuned_path
    if not file.is_file():
        raise FileNotFoundError(
            f"--finetuned_path {finetuned_path}: there is no file '{file}'. Give the weights that "
            "`litgpt finetune_full` has written, or their directory."
        )
    prompt = read_prompt(prompt)
    source = LitSource(file.parent, base=open_model(checkpoint_dir, options.access_token), weights=file)
    llm = LLM(load_parts(checkpoint_dir, options.loading, source=source, finetuned=file.parent))
    print_answers(llm, prompt, options, input)
