"""The program that renders chat templates, in a process of its own (`rendering` starts it).

A template is a program that came with a checkpoint. Jinja's sandbox keeps it from files and modules, but not from
looping for ever or filling the memory, in Python or in one step of C (`10 ** 10 ** 9`) that nothing within a process
can interrupt. So each request has a limit of processor time, which the kernel enforces, and one of memory.

It knows nothing of litgpt, and imports Jinja alone. Requests come on standard input, answers go to standard output:
a head and as many bytes as it says.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import signal
import struct
import sys
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

REQUEST = struct.Struct("<Qddd")  # bytes that follow, seconds, bytes of memory, characters of text
ANSWER = struct.Struct("<cQ")  # what it is, and the bytes that follow
TEXT, REFUSED, INVALID, TOO_LARGE, TOO_LONG = b"T", b"R", b"I", b"M", b"L"
MAX_MESSAGE = 1000  # characters of an error


@lru_cache(maxsize=16)
def compiled(source: str) -> Template:
    """A template, ready to be rendered."""
    return environment().from_string(source)


@lru_cache
def environment() -> ImmutableSandboxedEnvironment:
    """What the templates on the Hub are written for: the options and names that `transformers` gives them."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}...{% endgeneration %}` marks what the model wrote; for rendering it is just its content."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationBlock]
    )
    environment.filters["tojson"] = to_json
    names: dict[str, Any] = environment.globals
    names["raise_exception"] = raise_exception
    names["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


def to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    """What templates call to refuse a conversation."""
    import jinja2

    raise jinja2.TemplateError(message)


def answer(source: str, variables: dict[str, Any] | None, max_characters: float) -> tuple[bytes, str]:
    """What to say to a request.

    Args:
        source: The template.
        variables: What it is rendered with; None only checks that it is a template.
        max_characters: The longest text that is given back.
    """
    try:
        template = compiled(source)
    except MemoryError:
        raise
    except Exception as error:  # Jinja makes a Python program of it, and computes what is constant in it
        return INVALID, str(error)[:MAX_MESSAGE] or type(error).__name__
    if variables is None:
        return TEXT, ""
    try:
        text = template.render(variables)
    except MemoryError:
        raise
    except Exception as error:  # of Jinja, or of what it does with values of other types than it expects
        return REFUSED, str(error)[:MAX_MESSAGE]
    return (TOO_LONG, "") if len(text) > max_characters else (TEXT, text)


class ProcessLimits:
    """Of this process. Where a system has not the one or the other, that is left to the process that asks."""

    def __init__(self) -> None:
        self.resource, self.further = None, 0
        with contextlib.suppress(ImportError, OSError):
            import resource

            with open("/proc/self/statm") as file:
                self.held = int(file.read().split()[5]) * resource.getpagesize()
            self.hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
            self.resource = resource

    def memory(self, further: float) -> None:
        """Lets it have this many bytes more than it began with."""
        further = -(int(-further) >> 20) << 20  # in whole megabytes: most requests then have the same
        if self.resource is not None and further != self.further:
            self.further = further
            with contextlib.suppress(ValueError, OSError):
                self.resource.setrlimit(self.resource.RLIMIT_DATA, (self.held + further, self.hard))

    def time(self, seconds: float) -> None:
        """Ends it, in whatever it does, after this many seconds of processor time; 0 for never."""
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, seconds)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answers requests until there are no more."""
    environment()
    limits = ProcessLimits()
    while head := requests.read(REQUEST.size):
        length, seconds, memory, max_characters = REQUEST.unpack(head)
        limits.memory(memory)
        limits.time(seconds)
        try:
            source, variables = pickle.loads(requests.read(length))
            kind, text = answer(source, variables, max_characters)
            content = text.encode("utf-8", "surrogatepass")
        except MemoryError:
            kind, content = TOO_LARGE, b""
        except (pickle.UnpicklingError, ImportError, AttributeError) as error:  # values of classes that are not here
            kind, content = REFUSED, str(error).encode()[:MAX_MESSAGE]
        limits.time(0)
        answers.write(ANSWER.pack(kind, len(content)))
        answers.write(content)
        answers.flush()
        if kind == TOO_LARGE:
            return  # what is left of it is in the way


if __name__ == "__main__":
    sys.path += sys.argv[1:]
    serve(sys.stdin.buffer, sys.stdout.buffer)
