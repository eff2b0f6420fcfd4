"""What it costs that chat templates are rendered in a process of their own, when a large dataset is made ready.

    python extensions/benchmarks/render_templates.py --checkpoint DIR [--conversations 20000] [--rounds 3]

makes training samples of conversations in the checkpoint's own chat template, in turn as `litgpt finetune` does and
with the template rendered in this process, without bounds (A B A B), on one core; prints seconds, medians and their
ratio.
"""

import argparse
import random
import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from litgpt.data.records import Conversation
from litgpt.data.sample_encoding import ConversationEncoder, _encode_chunk
from litgpt.prompts import ChatTemplate, chat_template, sandbox
from litgpt.tokenizer.tokenizer import Tokenizer

TEXT = "a model learns to write what people ask for in few and plain words because long ones tire those who read them"


def conversations(count: int) -> list[Conversation]:
    """Of one to three questions of 20 words, each with an answer of 100."""
    draw = random.Random(0)

    def said(words: int) -> str:
        return " ".join(draw.choices(TEXT.split(), k=words))

    made = []
    for index in range(count):
        messages = []
        for _ in range(draw.randint(1, 3)):
            messages += [{"role": "user", "content": said(20)}, {"role": "assistant", "content": said(100)}]
        made.append(Conversation(messages, "messages", f"conversation {index}"))
    return made


def render_here(source: str, variables: Mapping[str, Any]) -> str:
    """As `litgpt.prompts.rendering.render_template`, in this process."""
    kind, text = sandbox.answer(source, dict(variables), float("inf"))
    assert kind == sandbox.TEXT, text
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--conversations", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer = Tokenizer(arguments.checkpoint)
    style = ChatTemplate.from_directory(arguments.checkpoint, tokenizer)
    encoder = ConversationEncoder(tokenizer, style, True, None)
    rows = conversations(arguments.conversations)
    apart = chat_template.render_template, ChatTemplate.ahead
    here = render_here, lambda *_, **__: nullcontext()
    seconds, made = {"a process of its own": [], "in this process": []}, []
    for _ in range(arguments.rounds):
        for name, way in zip(seconds, (apart, here), strict=True):
            chat_template.render_template, ChatTemplate.ahead = way
            start = time.perf_counter()
            made.append(_encode_chunk(encoder, rows))
            seconds[name].append(time.perf_counter() - start)
            assert made[-1] == made[0]
            del made[1:]
            print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    medians = [statistics.median(each) for each in seconds.values()]
    print(f"medians {medians[0]:.1f} and {medians[1]:.1f} s, ratio {medians[0] / medians[1]:.2f}")


if __name__ == "__main__":
    main()
