"""A prompt style as a chat template, so that other programs write prompts as a finetuned model was taught them."""

from __future__ import annotations

import json
import re

from litgpt.prompts.styles import Format

REFUSAL = "This model was taught an optional system message, then user and assistant in turn."


def as_chat_template(form: Format, adds_bos: bool) -> str:
    """The Jinja source that writes conversations as the style does.

    Args:
        form: The style.
        adds_bos: Whether the tokenizer puts BOS before a prompt of this style; a template writes it itself.
    """
    default = "none" if form.default is None else _literal(form.default)
    block = f"({_filled(form.system, system='system')} if system else '')" if form.system else "''"
    user = _filled(form.user, user="question", system="block")
    if "{system}" not in form.user:
        user = f"block + {user}"
    later = _filled(form.user, user="message['content']", system="''")
    question = "message['content']"
    if form.system is None:  # there is no place for it but before the first question
        question = f"(system + '\\n\\n' if system else '') + {question}"
    lines = [
        "{%- if messages and messages[0]['role'] == 'system' %}",
        "{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}",
        f"{{%- else %}}{{%- set system = {default} %}}{{%- set turns = messages %}}{{%- endif %}}",
        "{{- bos_token }}" if adds_bos else "",
        "{%- for message in turns %}",
        "{%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}",
        f"{{{{- raise_exception({_literal(REFUSAL)}) }}}}{{%- endif %}}",
        "{%- if loop.first %}",
        f"{{%- set block = {block} %}}{{%- set question = {question} %}}",
        f"{{{{- {_literal(form.start)} + {user} }}}}",
        "{%- elif message['role'] == 'user' %}",
        f"{{{{- {later} }}}}",
        "{%- else %}",
        f"{{{{- {_literal(form.assistant)} + message['content'] + {_literal(form.end)} }}}}",
        "{%- endif %}{%- endfor %}",
        "{%- if add_generation_prompt and turns and turns[-1]['role'] == 'user' %}",
        f"{{{{- {_literal(form.assistant)} }}}}{{%- endif %}}",
    ]
    return "\n".join(filter(None, lines))


def _filled(text: str, **slots: str) -> str:
    """The Jinja expression of a format's text, its {slots} being expressions."""
    parts = re.split(r"(\{(?:" + "|".join(slots) + r")\})", text)
    return " + ".join(slots[part[1:-1]] if i % 2 else _literal(part) for i, part in enumerate(parts) if part) or "''"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
