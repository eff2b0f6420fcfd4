"""Print what a model answers to a prompt, its tokens drafted by a smaller model or taken from the text before."""

from pathlib import Path
from typing import Annotated

from litgpt import cli
from litgpt.cli.plural import counted
from litgpt.generation.speculative import SpeculativeEngine
from litgpt.llm.llm import LLM
from litgpt.llm.loading import load_parts
from litgpt.llm.single_answer import DEFAULT_PROMPT, Options, print_answers, read_prompt
from litgpt.llm.terminal import say
from litgpt.sources.door import open_model
from litgpt.sources.load import load_model
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
    likely a one where it draws. How much sooner it comes depends on how often the drafts are right; where they make it
    slower, nothing is drafted for a while.

    Args:
        target_model_checkpoint_dir: The model that answers: a directory, a .gguf file, a known name or a Hub id.
        prompt: What to answer. Without this option a prompt that is piped in is taken, whole.
        draft_model_checkpoint_dir: A smaller model with the same tokenizer, which drafts. Without one, drafts are what
            followed the last words earlier in the text, which suits answers that repeat much of the prompt.
        speculative_k: How many tokens are drafted at a time.
    """
    if speculative_k < 1:
        raise ValueError(f"--speculative_k {speculative_k} is not valid: give 1 or more.")
    if options.compile:
        raise ValueError(
            "--compile true is not supported here: each length of a draft would be compiled. Leave it out."
        )
    prompt = read_prompt(prompt)
    target = open_model(target_model_checkpoint_dir, options.access_token)
    smaller = None
    if draft_model_checkpoint_dir is not None:
        smaller = open_model(draft_model_checkpoint_dir, options.access_token)
        check_same_tokens(Tokenizer(target.files), Tokenizer(smaller.files))
    parts = load_parts(target_model_checkpoint_dir, options.loading, source=target)
    draft = None
    if smaller is not None:
        dtype = next(parts.model.parameters()).dtype
        draft = load_model(smaller, dtype=dtype, device=parts.placement.device, quantize=options.quantize)
    engine = SpeculativeEngine(parts.model, draft, count=speculative_k, autocast=parts.engine.autocast)
    parts.make_engine = lambda model, options: engine
    print_answers(LLM(parts), prompt, options)
    rate = engine.accepted / max(1, engine.proposed)
    tokens = engine.accepted + engine.calls
    say(
        f"Acceptance rate: {rate:.2%} ({engine.accepted} of {engine.proposed} drafted tokens); "
        f"{tokens / engine.calls:.2f} tokens per call of the model"
    )
    if engine.paused:
        say(f"In {counted(engine.paused, 'call')} nothing was drafted, since it had made the answer slower.")


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
