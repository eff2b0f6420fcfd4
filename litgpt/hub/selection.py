"""Which of a repository's files a checkpoint needs."""

from collections.abc import Callable, Collection, Iterable
from fnmatch import fnmatch

from litgpt.checkpoint.weight_index import parse_weight_index
from litgpt.hub.hub_error import HubError

# Everything that a tokenizer, a prompt style and a converted checkpoint's description may need.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "config.json",
)
# Of the forms that weights come in, the first that a repository has: safetensors execute nothing and load by mmap.
WEIGHT_FORMS = (
    ("model.safetensors", "model.safetensors.index.json", "*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin"),
)
# Files of those forms that hold other things than a model's weights under Hugging Face's names.
OTHER_WEIGHTS = {"adapter": "an adapter for another model", "consolidated": "weights under another program's names"}
# What PEFT writes: a description, and the weights in one of these.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def tokenizer_files(names: Iterable[str]) -> list[str]:
    """Of a repository's files, those of the tokenizer, and the small ones that say how to use the model."""

    def is_wanted(name: str, pattern: str) -> bool:
        return fnmatch(name, pattern) and name.count("/") == pattern.count("/")

    return [name for name in names if any(is_wanted(name, pattern) for pattern in TOKENIZER_FILES)]


def weight_files(title: str, names: Collection[str], read: Callable[[str], bytes]) -> list[str]:
    """Of a repository's files, those that hold the weights; of sharded weights, the index and the shards it lists.

    Args:
        title: What to call the repository in messages.
        names: Its files.
        read: Gives the content of one, for the index.

    Raises:
        HubError: no weights in a form that can be loaded.
    """
    names = [name for name in names if "/" not in name]
    for whole, index, pattern in WEIGHT_FORMS:
        if index in names:
            return [index, *_shards(title, index, read(index), names)]
        if whole in names:
            return [whole]
        others = [name for name in names if fnmatch(name, pattern) and not name.startswith(tuple(OTHER_WEIGHTS))]
        if others:
            return others
    raise HubError(_no_weights(title, names))


def adapter_files(names: Collection[str]) -> list[str]:
    """Of the files of a repository that holds an adapter of PEFT's and no model, those of the adapter; else none."""
    weights = next((name for name in ADAPTER_WEIGHTS if name in names), None)
    models = [name for _, _, pattern in WEIGHT_FORMS for name in names if fnmatch(name, pattern) and "/" not in name]
    alone = all(name.startswith(tuple(OTHER_WEIGHTS)) for name in models)
    return [ADAPTER_CONFIG, weights] if weights and alone and ADAPTER_CONFIG in names else []


def _no_weights(title: str, names: Collection[str]) -> str:
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return (
            f"{title} holds GGUF files only: {_listed(gguf)}. Fetch one of them with `hf download {title} "
            f"{gguf[0]} --local-dir .`; every command takes the path of a .gguf file."
        )
    for start, what in OTHER_WEIGHTS.items():
        if any(name.startswith(start) for name in names):
            return f"{title} holds no model in Hugging Face's format but {what}: {_listed(names)}."
    return f"{title} holds no weights as .safetensors or pytorch_model.bin. It has: {_listed(names)}."


def _listed(names: Collection[str], at_most: int = 12) -> str:
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(list(names)[:at_most]) + more


def _shards(title: str, index: str, content: bytes, names: Collection[str]) -> list[str]:
    """The shards that an index lists."""
    try:
        shards = sorted(set(parse_weight_index(content, index).values()))
    except ValueError as error:
        raise HubError(f"{title}: {error}") from None
    missing = [shard for shard in shards if shard not in names]
    if missing:
        raise HubError(f"{title}: its {index} lists files that are not there: {_listed(missing)}.")
    return shards
