"""Print what a model answers to a prompt, its tokens drafted by a smaller model or taken from the text before."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from litgpt import cli
from litgpt.generation.speculative import SpeculativeEngine
from litgpt.llm import load_llm
from litgpt.llm.single_answer import DEFAULT_PROMPT, Options, answer
from litgpt.llm.terminal import say
from litgpt.model import GPT
from litgpt.sources.door import open_model
from litgpt.sources.load import load_model
from litgpt.sources.source import Source
from litgpt.tokenizer.tokenizer import Tokenizer


def setup(
    target_model_checkpoint_dir: Path,
    prompt: str = DEFAULT_PROMPT,
    draft_model_checkpoint_dir: Path | None = None,
    speculative_k: int = 3,
    options: Annotated[Options, cli.Flat()] = Options(),  # noqa: B008
) -> None:
    """Print a model's answer, several tokens of which are drafted and then checked at once by the model.

    The answer is what the model alone would say: the same one where it always takes the most likely token, and as
    likely a one where it draws. How much sooner it comes depends on how often the drafts are right.

    Args:
        target_model_checkpoint_dir: The model that answers: a directory, a .gguf file, a known name or a Hub id.
        prompt: What to answer. Without this option a prompt that is piped in is taken, whole.
        draft_model_checkpoint_dir: A smaller model with the same tokenizer, which drafts. Without one, drafts are what
            followed the last words earlier in the text, which suits answers that repeat much of the prompt.
        speculative_k: How many tokens are drafted at a time.
    """
    drafts: dict[str, Any] = {"count": speculative_k, "draft": None}

    def load(source: Source, **how: Any) -> GPT:
        if draft_model_checkpoint_dir is not None:
            draft = open_model(draft_model_checkpoint_dir, options.access_token)
            check_same_tokens(Tokenizer(source.files), Tokenizer(draft.files))
            drafts["draft"] = load_model(draft, **how | {"watch": iter})  # the bar is the larger model's
        return load_model(source, **how)

    def make_engine(model: GPT, **how: Any) -> SpeculativeEngine:
        return SpeculativeEngine(model, **drafts, **how)

    if speculative_k < 1:
        raise ValueError(f"--speculative_k {speculative_k} is not possible: give 1 or more.")
    if options.compile:
        raise ValueError("--compile true cannot act: each length of a draft would be compiled. Leave it out.")
    llm = answer(partial(load_llm, target_model_checkpoint_dir, load=load, make_engine=make_engine), prompt, options)
    engine = llm.engine
    rate = engine.accepted / max(1, engine.proposed)
    tokens = engine.accepted + engine.calls
    say(
        f"Acceptance rate: {rate:.2%} ({engine.accepted} of {engine.proposed} drafted tokens); "
        f"{tokens / engine.calls:.2f} tokens per call of the model"
    )


def check_same_tokens(target: Tokenizer, draft: Tokenizer) -> None:
    """Refuses a draft whose token ids mean something else. Control tokens may have other names, as in a chat model.

    Raises:
        ValueError: Some token differs.
    """
    if target.fingerprint() == draft.fingerprint():
        return
    for token_id in range(max(target.vocab_size, draft.vocab_size)):
        ours, theirs = (_token_of(tokenizer, token_id) for tokenizer in (target, draft))
        if None not in (ours, theirs) and ours != theirs:
            raise ValueError(
                f"--draft_model_checkpoint_dir {draft.dir} has another tokenizer than {target.dir}: the token id "
                f"{token_id} is {theirs!r} there and {ours!r} here. Give a smaller model of the same family."
            )


def _token_of(tokenizer: Tokenizer, token_id: int) -> bytes | None:
    """What a token stands for; None for a control token, or where there is none."""
    if token_id >= tokenizer.vocab_size or tokenizer.is_control(token_id):
        return None
    return tokenizer.token_bytes(token_id)
