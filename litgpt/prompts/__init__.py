"""The text that a model is given: prompt styles by name, and a checkpoint's own chat template.

Every style of styles.yaml is a class here (`litgpt.prompts.Alpaca`), made when it is first asked for. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from litgpt.cli.untrusted import read_yaml_mapping, shown
from litgpt.prompts.chat_template import DEFAULT, ChatTemplate, find_chat_templates, write_chat_templates
from litgpt.prompts.styles import (
    Format,
    Message,
    PromptStyle,
    Tokenizer,
    WrittenStyle,
    find_written_style,
    style_class,
    written_styles,
)
from litgpt.prompts.written_template import as_chat_template

if TYPE_CHECKING:
    from litgpt.config import Config

STYLE_FILE = "prompt_style.yaml"

__all__ = [
    "ChatTemplate",
    "Format",
    "Message",
    "NamedTemplate",
    "PromptStyle",
    "WrittenStyle",
    "carried_templates",
    "choose_prompt_style",
    "find_chat_template",
    "find_chat_templates",
    "format_of_options",
    "load_prompt_style",
    "save_prompt_style",
    "style_class",
    "style_names",
    "written_styles",
]


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and name in (styles := written_styles()):
        return styles[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def style_names() -> list[str]:
    """What `--prompt_style` takes, without one's own classes and templates."""
    return [style.format.name for style in written_styles().values()]


def find_chat_template(checkpoint_dir: Path) -> str | None:
    """The checkpoint's usual chat template."""
    templates = find_chat_templates(checkpoint_dir)
    return templates.get(DEFAULT) or next(iter(templates.values()), None)


@dataclass(frozen=True)
class NamedTemplate:
    """The one of a checkpoint's chat templates that the user names."""

    name: str


def format_of_options(prompt_style: str | None, chat_template: str | None) -> str | NamedTemplate | None:
    """What `--prompt_style` and `--chat_template` say together; the `explicit` of `choose_prompt_style`.

    Raises:
        ValueError: Both are given.
    """
    if chat_template is None:
        return prompt_style
    if prompt_style is not None:
        raise ValueError(
            f"prompt_style={prompt_style} and chat_template={chat_template} both say how prompts are written. Give "
            "only one of them."
        )
    return NamedTemplate(chat_template)


def choose_prompt_style(
    checkpoint_dir: Path,
    *,
    explicit: str | PromptStyle | NamedTemplate | None = None,
    config: Config | None = None,
    tokenizer: Tokenizer | None = None,
    finetuned: Path | None = None,
) -> PromptStyle:
    """The format of a checkpoint's prompts. The first of these that is there:

    1. `explicit`: a style's name, a dotted class path, the path of a .jinja file, or the name of one of the
       checkpoint's chat templates;
    2. prompt_style.yaml, what the model was finetuned with;
    3. the checkpoint's own chat template;
       both first in `finetuned`, the directory of weights that were finetuned from this checkpoint;
    4. the style that the model's name stands for;
    5. the bare prompt.
    """
    if isinstance(explicit, PromptStyle):
        return explicit
    if isinstance(explicit, NamedTemplate):
        return _named_template(explicit.name, (finetuned or checkpoint_dir, checkpoint_dir), tokenizer)
    if explicit is not None:
        return _explicit_style(explicit, checkpoint_dir, tokenizer)
    for directory in (finetuned or checkpoint_dir, checkpoint_dir):
        if (style := load_prompt_style(directory)) is not None:
            return style
        if (style := ChatTemplate.from_directory(directory, tokenizer)) is not None:
            return style
    return PromptStyle.from_config(config)


def _named_template(name: str, directories: tuple[Path, ...], tokenizer: Tokenizer | None) -> ChatTemplate:
    styles = [style for where in directories if (style := ChatTemplate.from_directory(where, tokenizer)) is not None]
    if not styles:
        raise ValueError(f"chat_template={name}: the checkpoint in {directories[0]} has no chat template.")
    style = next((style for style in styles if name in style.templates), styles[0])
    try:
        return style.named(name)
    except ValueError as error:
        raise ValueError(f"chat_template={name}: {error}") from None


def _explicit_style(name: str, checkpoint_dir: Path, tokenizer: Tokenizer | None) -> PromptStyle:
    if not name.endswith((".jinja", ".jinja2", ".j2")):
        return style_class(name)()
    try:
        source = Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise FileNotFoundError(f"prompt_style={name}: the template cannot be read ({error.strerror}).") from error
    return ChatTemplate(source, tokenizer.special_tokens if tokenizer else None)


def save_prompt_style(style: PromptStyle | str, checkpoint_dir: Path) -> None:
    """Leaves the style next to the model that was finetuned with it.

    A style is named by its class in prompt_style.yaml, as LitGPT 0.5.13 does; a chat template travels as
    chat_template.jinja, where everything that reads a checkpoint looks for it.
    """
    style = style_class(style)() if isinstance(style, str) else style
    file = checkpoint_dir / STYLE_FILE
    if isinstance(style, ChatTemplate):
        file.unlink(missing_ok=True)
        templates = {**style.templates, DEFAULT: style.template} if style.chosen else style.templates
        if find_chat_templates(checkpoint_dir) != templates:
            write_chat_templates(templates, checkpoint_dir)
        return
    kind = type(style)
    file.write_text(yaml.safe_dump({"class_path": f"{kind.__module__}.{kind.__qualname__}"}), encoding="utf-8")


def load_prompt_style(checkpoint_dir: Path) -> PromptStyle | None:
    """The style of prompt_style.yaml, None where there is no such file.

    The file came with a checkpoint, from whomever: it can name our own styles, and no class to import.

    Raises:
        ValueError: the file is damaged or names a style that is not one of ours.
    """
    file = checkpoint_dir / STYLE_FILE
    if not file.is_file():
        return None
    try:
        content = read_yaml_mapping(file, remedy="")
        name = content["class_path"]
        if not isinstance(name, str):
            raise ValueError(f"its class_path is {shown(name)}")
        if (style := find_written_style(name)) is None:
            raise ValueError(
                f"it names {name[:200]}, which is none of litgpt's own, and code that a checkpoint names is not run; "
                f"if you trust it, give prompt_style={name[:200]}"
            )
        return style(**(content.get("init_args") or {}))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"{file} names no usable prompt style ({error}). Correct it, delete it, or pass `prompt_style`."
        ) from error


def carried_templates(checkpoint_dir: Path, adds_bos: bool) -> tuple[dict[str, str], str]:
    """The chat templates by which other programs speak to a checkpoint as litgpt does, and what to say of them.

    Where the checkpoint was finetuned with a prompt style, that is the one; otherwise they are its own.

    Args:
        checkpoint_dir: The checkpoint.
        adds_bos: Whether its tokenizer puts BOS before a text, which other programs leave to the template.
    """
    if not (checkpoint_dir / STYLE_FILE).is_file():
        return find_chat_templates(checkpoint_dir), ""
    try:
        style = load_prompt_style(checkpoint_dir)
    except ValueError:
        style = None
    if not isinstance(style, WrittenStyle):
        return {}, (
            f"The export does not carry the prompt format of the training: {checkpoint_dir / STYLE_FILE} names one "
            "that cannot be written as a chat template. Other programs have to be told how to write prompts."
        )
    template = as_chat_template(style.format, adds_bos and not style.adds_bos)
    return {DEFAULT: template}, f"Its chat template is the prompt format of the training: {style.format.name}."
