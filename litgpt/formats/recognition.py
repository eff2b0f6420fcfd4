"""Which of our architectures a `config.json` describes, and where its text model is in a multimodal one."""

import re
from typing import Any

from litgpt.formats.architecture import Architecture
from litgpt.formats.architectures import ARCHITECTURES

_TEXT_KEYS = ("text_config", "llm_config")
_DTYPE_KEYS = ("dtype", "torch_dtype")
# What the whole says for its text model too, as in transformers.
_SHARED_KEYS = (*_DTYPE_KEYS, "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id")
# Where the text model is called `text_model`; elsewhere it is `language_model`.
_TEXT_MODEL = ("idefics2", "idefics3", "smolvlm")
# `language_model.model.layers` is `model.layers`, and so is `model.language_model.layers` (transformers since 4.52).
_WHOLE, _INSIDE = re.compile(r"(language_model|text_model)\."), re.compile(r"model\.(language_model|text_model)\.")
# Entries that only models with some feature have, which none of our architectures has.
_FEATURES = {
    "cross_attention_layers": "cross-attention layers",
    "hidden_size_per_layer_input": "an embedding of its own in every layer",
    "altup_num_inputs": "alternating updates (AltUp)",
    "linear_num_value_heads": "linear attention layers",
    "mamba_d_state": "state-space (Mamba) layers",
    "ssm_state_size": "state-space (Mamba) layers",
    "state_size": "state-space (Mamba) layers",
    "conv_L_cache": "convolution layers",
    "index_topk": "sparse attention by an indexer",
    "encoder_layers": "an encoder",
    "is_encoder_decoder": "an encoder",
}


def architecture_of(config_json: dict[str, Any]) -> Architecture:
    """The architecture that a `config.json` names, or that of its text model.

    Raises:
        ValueError: It is not supported; says which are, and what is missing where that is known.
    """
    architecture = _find(text_model(config_json))
    if architecture is not None:
        return architecture
    model_type = config_json.get("model_type")
    inner = _text_config(config_json) or {}
    given = ", ".join(class_names(config_json)) or (f"model_type '{model_type}'" if model_type else "none named")
    if inner:
        given += f", whose text model is '{inner.get('model_type', 'not named')}'"
    features = dict.fromkeys(feature for key, feature in _FEATURES.items() if (inner or config_json).get(key))
    missing = f" It has {' and '.join(features)}." if features else ""
    raise ValueError(
        f"The architecture of this checkpoint ({given}) is not supported.{missing} "
        f"Supported: {', '.join(sorted(ARCHITECTURES))}."
    )


def text_model(config_json: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` that the text model of a multimodal one would have alone; any other as it is.

    Whether the embedding is tied, the whole says. Where it says nothing, or only the text model says that it is, the
    weights have the last word: a head of its own is found there.
    """
    inner = _text_config(config_json)
    if inner is None or _find(config_json) is not None:
        return config_json
    # Its class may be that of a model without a head (`LlamaModel`).
    architecture = _find(inner) or _find({"model_type": inner.get("model_type")})
    if architecture is None:
        return config_json
    shared = {key: config_json[key] for key in _SHARED_KEYS if config_json.get(key) is not None}
    if any(key in shared for key in _DTYPE_KEYS):
        inner = {key: value for key, value in inner.items() if key not in _DTYPE_KEYS}
    tied = config_json.get("tie_word_embeddings") is not False or inner.get("tie_word_embeddings") is True
    names = {"architectures": [architecture.name], "model_type": architecture.model_type}
    return {**architecture.defaults, **inner, **shared, **names, "tie_word_embeddings": tied}


def text_attribute(config_json: dict[str, Any]) -> str | None:
    """What the text model is called in the class of transformers that a multimodal `config.json` describes; None where
    it describes no other parts."""
    if text_model(config_json) is config_json:
        return None
    return "text_model" if config_json.get("model_type") in _TEXT_MODEL else "language_model"


def text_name(name: str) -> str | None:
    """The name of a multimodal checkpoint's tensor in the text model alone; None if it belongs to another part."""
    if name.startswith("lm_head."):
        return name
    if _WHOLE.match(name):
        return name.split(".", 1)[1]
    return _INSIDE.sub("model.", name) if _INSIDE.match(name) else None


def _text_config(config_json: dict[str, Any]) -> dict[str, Any] | None:
    found = (config_json.get(key) for key in _TEXT_KEYS)
    return next((value for value in found if isinstance(value, dict)), None)


def alias_in(config_json: dict[str, Any]) -> str | None:
    """The class that `architectures` names where the model is read as another one; None where it is that one."""
    classes = class_names(config_json)
    return None if not classes or architecture_of(config_json).name in classes else classes[0]


def class_names(config_json: dict[str, Any]) -> list[str]:
    """What `architectures` names."""
    names = config_json.get("architectures")
    return [names] if isinstance(names, str) else list(map(str, names)) if isinstance(names, list) else []


def _find(config_json: dict[str, Any]) -> Architecture | None:
    """By `model_type`, as the reference does it: `architectures` may hold an alias, or the class for another task. By
    that, where `model_type` is missing or unknown."""
    model_type = config_json.get("model_type")
    named = (ARCHITECTURES[name] for name in class_names(config_json) if name in ARCHITECTURES)
    return next((each for each in ARCHITECTURES.values() if each.model_type == model_type), next(named, None))
