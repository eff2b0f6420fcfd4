"""Conversations for training under real tokenizers and templates: what precedes a reply is what `transformers` feeds."""

import pytest

from litgpt.data.records import Conversation
from litgpt.data.sample_encoding import ConversationEncoder
from litgpt.prompts import choose_prompt_style
from litgpt.tokenizer.tokenizer import Tokenizer

MESSAGES = [
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "Fine, thanks. <|im_end|>"},
    {"role": "user", "content": "And the dog?\n"},
    {"role": "assistant", "content": "Lazy,\nas always."},
]
# Tokens of a format that a reply begins with, and how many samples two turns make: Qwen 3 drops earlier reasoning.
FAMILIES = {
    "llama3_2": ("", 1),
    "gemma3": ("", 1),
    "qwen2_5": ("", 1),
    "qwen3": ("<think>\n\n</think>\n\n", 2),
    "mistral_nemo": ("", 1),
    "deepseek_v3": ("", 1),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_holds_the_prompts_of_the_reference_and_the_replies(family, npm_tokenizer):
    from transformers import AutoTokenizer

    directory = npm_tokenizer(family)
    tokenizer, reference = Tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    begins, count = FAMILIES[family]
    style = choose_prompt_style(directory, tokenizer=tokenizer)
    messages = [{**message, "content": message["content"].replace(" <|im_end|>", "")} for message in MESSAGES]
    samples = ConversationEncoder(tokenizer, style, True, None).encode(Conversation(messages, "messages", "here"))
    assert len(samples) == count
    stretches = {}
    for sample in samples:
        starts = [i for i, target in enumerate(sample.targets) if target and not sample.targets[i - 1]]
        for start in starts:
            end = next((i for i in range(start, len(sample.ids)) if not sample.targets[i]), len(sample.ids))
            stretches[tuple(sample.ids[:start])] = sample.ids[start:end]
    for turn, (prompt, reply) in zip((1, 3), stretches.items(), strict=True):
        expected = reference.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
        assert list(prompt) == expected
        assert reply[-1] in tokenizer.stop_ids
        text = tokenizer.decode(reply[:-1], skip_special=False)
        assert text == begins + messages[turn]["content"]
    spelled = ConversationEncoder(tokenizer, style, True, None).encode(Conversation(MESSAGES, "messages", "here"))
    assert spelled[0].targets.count(True) > samples[0].targets.count(True)
