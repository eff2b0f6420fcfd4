"""Options that name a class: `--data TextFiles`, `--optimizer SGD`, a user's own `my_module.MyClass`."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeGuard

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from litgpt.cli.hints import constructor_hints
from litgpt.cli.own_code import find_named
from litgpt.cli.suggest import did_you_mean
from litgpt.cli.usage_error import UsageError
from litgpt.cli.values import as_hinted, explain

# Given by the command and not by the user: an optimizer's parameters.
PROVIDED = {"params"}


@dataclass(frozen=True)
class ClassChoice:
    """The classes that an option takes."""

    package: str
    """Where short names are looked up."""
    base: type
    """What every choice is a subclass of."""

    @classmethod
    def subclasses_of(cls, base: type) -> "ClassChoice":
        """Subclasses of `base`, exported where it is: by the package around its module, else by the module."""
        module = base.__module__
        package = module.rpartition(".")[0]
        exported = package and getattr(importlib.import_module(package), base.__name__, None) is base
        return cls(package if exported else module, base)

    @classmethod
    def like(cls, class_path: str) -> "ClassChoice":
        """Relatives of a class, exported where it is: for `torch.optim.AdamW`, the `Optimizer`s of `torch.optim`."""
        package, _, name = class_path.rpartition(".")
        relative = getattr(importlib.import_module(package), name)
        return cls(package, [c for c in relative.__mro__ if c is not object][-1])

    def names(self) -> list[str]:
        """The short names."""
        module = importlib.import_module(self.package)
        exported = getattr(module, "__all__", None) or dir(module)
        return sorted(name for name in exported if self._is_choice(getattr(module, name, None)))

    def _is_choice(self, value: Any) -> TypeGuard[type]:
        return inspect.isclass(value) and issubclass(value, self.base) and value is not self.base

    def canonical(self, name: str) -> str:
        """The class path for a short name; what is unknown as it is, since a later layer may name another class."""
        try:
            return self.resolve(name)[0]
        except UsageError:
            return name

    def resolve(self, name: str) -> tuple[str, type]:
        """A short name or dotted path -> the canonical class path and the class.

        Raises:
            UsageError: no such class, or not a subclass of the base.
        """
        package, _, last = name.rpartition(".")
        module = find_named(package or self.package)
        value = getattr(module, last, None) if module else None
        if self._is_choice(value):
            return f"{package or self.package}.{last}", value
        if value is not None and package:
            raise UsageError(f"{name!r} is not a subclass of {self.base.__name__}.")
        if (options := getattr(self.base, "option_for", lambda _: None)(name)) is not None:
            raise UsageError(f"{name!r} is not a name of a {self.base.__name__}. Use one of: {options}")
        known = self.names()
        if package in ("", self.package):
            hint = did_you_mean(last, known)
        elif module is None:
            hint = f" There is no module {package!r}, neither installed nor in the current directory."
        else:
            hint = did_you_mean(last, [other for other in dir(module) if self._is_choice(getattr(module, other))])
        listing = f"Known: {', '.join(known)}; or" if len(known) <= 40 and known else "Give"
        raise UsageError(
            f"there is no {self.base.__name__} {name!r}.{hint} {listing} your own as package.module.Class."
        )

    def having(self, settings: set[str]) -> list[str]:
        """Short names of the choices that take all these init args."""
        return [name for name in self.names() if settings <= set(accepted(self.resolve(name)[1]))]

    def meant_by(self, init_args: dict[str, Any], names: list[str]) -> str | None:
        """Which of several choices that take some init args is meant, where their base class has a `choose` for that.

        Raises:
            ValueError, FileNotFoundError: What the init args name cannot be used.
        """
        choose = getattr(self.base, "choose", None)
        return choose(init_args, names) if choose is not None and names else None


def class_parser(cls: type, nested_key: str | None = None, **settings: Any) -> ArgumentParser:
    """A parser whose options are the init args of a class, under a nested key if one is given."""
    parser = ArgumentParser(exit_on_error=False, **settings)
    provided = PROVIDED & set(inspect.signature(cls).parameters)
    parser.add_class_arguments(cls, nested_key, skip=provided, fail_untyped=False, sub_configs=False)
    return parser


@lru_cache
def accepted(cls: type) -> tuple[str, ...]:
    """The names of a class's init args; those of its bases too where it passes `**kwargs` on."""
    return tuple(name for name in vars(class_parser(cls).get_defaults()) if name != "help")


def takes_anything(cls: type) -> bool:
    """Whether init args that nothing names are accepted: `**kwargs` that lead nowhere known."""
    kinds = [p.kind for p in inspect.signature(cls).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds and not accepted(cls)


def unknown_init_args(
    option: str, cls: type, init_args: dict[str, Any], written: Callable[[str], str] = str
) -> list[str]:
    """One message for each init arg that the class does not take; `written` is how one is typed."""
    if takes_anything(cls):
        return []
    known = accepted(cls)
    return [
        f"{option}.{name}: {cls.__name__} has no such setting.{did_you_mean(name, known, written)}"
        for name in init_args
        if name not in known
    ]


def parse_init_args(option: str, cls: type, init_args: dict[str, Any], *, defaults: bool) -> tuple[Any, ArgumentParser]:
    """Check the types of init args.

    Returns:
        The typed values (with those not given, if `defaults`), and the parser, which can instantiate nested classes.
    """
    parser = class_parser(cls)
    if takes_anything(cls):
        return {name: yaml.safe_load(v) if isinstance(v, str) else v for name, v in init_args.items()}, parser
    hints = constructor_hints(cls)
    given = {name: as_hinted(value, hints.get(name, Any)) for name, value in init_args.items()}
    try:
        values = parser.parse_object(given, defaults=defaults)
    except ArgumentError as error:
        raise UsageError(explain(error, option, lambda name: hints.get(name, Any))) from None
    return values, parser
