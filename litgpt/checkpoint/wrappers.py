"""What tensors are called without what wrapped the model when it was saved."""

import re
from collections.abc import Iterable

# What compiling, sharding, checkpointing of activations and PEFT put before or between names.
_WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module|module"
    r"|base_model\.model|base_layer)\."
)


def plain_names(names: Iterable[str], known: str | None = None) -> dict[str, str]:
    """What the tensors of a checkpoint are called without what wrapped the model when it was saved.

    Args:
        names: Their names in the file.
        known: The plain name of one that is there. Whatever else stands before it is taken off all names; what is
            missing before it, as in a model that was saved without its head, is put before them.

    Returns:
        The plain name of each.

    Raises:
        ValueError: Two tensors have the same.
    """
    plain = {name: _unwrapped(name) for name in names}
    if known is not None and known not in plain.values():
        outer, _, inner = known.partition(".")
        before = next((name.removesuffix(known) for name in plain.values() if name.endswith(f".{known}")), "")
        if before:
            plain = {name: short.removeprefix(before) for name, short in plain.items()}
        elif inner in plain.values():
            plain = {n: short if short.startswith("lm_head.") else f"{outer}.{short}" for n, short in plain.items()}
    first: dict[str, str] = {}
    for name, short in plain.items():
        if first.setdefault(short, name) != name:
            raise ValueError(f"The files hold {short} twice, as {name} and as {first[short]}. Remove one of them.")
    return plain


def _unwrapped(name: str) -> str:
    while (plain := _WRAPPERS.sub("", name)) != name:
        name = plain
    return name
