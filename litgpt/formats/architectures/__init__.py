"""One module per family of architectures. What a module here defines is found, and can then be read and exported."""

from importlib import import_module
from pkgutil import iter_modules

from litgpt.formats.architecture import Architecture


def _defined() -> dict[str, Architecture]:
    """By name. Llama comes first: it is what a model is written as that several architectures could express."""
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found = {x.name: x for module in modules for x in vars(module).values() if isinstance(x, Architecture)}
    return dict(sorted(found.items(), key=lambda item: (item[0] != "LlamaForCausalLM", item[0])))


ARCHITECTURES = _defined()
