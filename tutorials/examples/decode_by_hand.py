"""What `litgpt generate` does for one prompt, by hand: prefill, decode, sample.

python tutorials/examples/decode_by_hand.py CHECKPOINT "What food do llamas eat?"

The engine (litgpt/generation/engine.py) does the same for many prompts at a time. Shapes: T tokens of the prompt, C the
width of the model, V its padded vocabulary.
"""

import sys
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from litgpt import GPT, Tokenizer
from litgpt.prompts import choose_prompt_style
from litgpt.sources.door import open_model
from litgpt.sources.load import load_model


def sample(logits: Tensor, temperature: float) -> int:
    """The next token from (V,) logits: the most likely one at temperature 0, otherwise one drawn by probability."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)  # (V,)
    return int(torch.multinomial(probabilities, num_samples=1))


@torch.inference_mode()
def generate(
    model: GPT, prompt: list[int], max_new_tokens: int, stops: Collection[int] = (), temperature: float = 0
) -> Iterator[int]:
    """The tokens that follow a prompt, one at a time, up to one of `stops` or the end of the context."""
    device = model.lm_head.weight.device
    length = min(len(prompt) + max_new_tokens, model.config.block_size)
    cache = model.new_cache(batch_size=1, max_length=length)

    # Prefill: one call for the whole prompt. Every layer stores its keys and values in the cache.
    hidden = model.hidden_states(torch.tensor([prompt], device=device), cache=cache)  # (1, T, C)
    logits = model.logits(hidden[0, -1])  # (V,): only the last token predicts something new

    for position in range(len(prompt), length):
        token = sample(logits, temperature)
        if token in stops:
            return
        yield token
        # Decode: one token per call. It attends to the cache, and its own keys and values are added to it.
        token_ids, positions = torch.tensor([[token], [position]], device=device)[:, None]  # (1, 1) each
        logits = model(token_ids, positions, cache=cache)[0, -1]  # (V,)


def main(checkpoint: str, prompt: str, max_new_tokens: int = 256, temperature: float = 0) -> None:
    source = open_model(checkpoint)  # a directory, a .gguf file, a known name or a Hub id
    model, tokenizer = load_model(source), Tokenizer(source.files)
    style = choose_prompt_style(source.files, config=source.config, tokenizer=tokenizer)
    ids = style.encode(tokenizer, [{"role": "user", "content": prompt}])
    # A few prompt styles end with several tokens; the engine waits for all of them (litgpt/generation/sequence.py).
    stops = {sequence[0] for sequence in style.stop_sequences(tokenizer) if len(sequence) == 1}
    for piece in tokenizer.decode_stream(generate(model, ids, max_new_tokens, stops, temperature)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:3])
