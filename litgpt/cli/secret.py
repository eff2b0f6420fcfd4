"""Tokens and keys: a type that shows none of them, a text without them, a command line without them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, overload

REDACTED = "***"
NAME = re.compile(
    r"(?!(.*_)?(bos|eos|eot|pad|unk|sep|cls|mask|stop|special)_token)(.*_)?(token|key|password|secret)", re.IGNORECASE
)
"""What settings and variables of the environment are called that hold one; `eos_token` is a token of another kind."""
ENDS = ("TOKEN", "KEY", "PASSWORD", "SECRET")
MIN_LENGTH = 6  # of what is looked for in texts: "none" or "test" stand for no secret
IN_ADDRESS = re.compile(
    r"""(?<=://)[^/\s@'"]+(?=@) | (?<=[?&])((?:[\w-]*(?:token|key|secret|signature|password))=)[^&\s'"]+""",
    re.IGNORECASE | re.VERBOSE,
)
OPTION = re.compile(r"--(?:[\w-]+\.)*([\w-]+)(=.*)?\Z", re.DOTALL)
NO_SECRET = ("true", "false", "yes", "no", "on", "off", "null", "none", "0", "1")  # `--lora_key true`
VARIABLE = "LITGPT_SECRET_"  # of the environment, for the processes that go by this one's command line
_known: set[str] = set()


class Secret:
    """A token or key. Only `reveal` gives it: wherever it is printed, formatted or written, *** stands in its place.

    An option of this type is a secret: it is never recorded.
    """

    __slots__ = ("_value",)

    def __init__(self, value: Secret | str) -> None:
        self._value = reveal(value)

    def __repr__(self) -> str:
        return REDACTED

    def __format__(self, form: str) -> str:
        return REDACTED

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> tuple[type[Secret], tuple[str]]:
        return Secret, (self._value,)


@overload
def reveal(secret: Secret | str) -> str: ...
@overload
def reveal(secret: None) -> None: ...
@overload
def reveal(secret: Secret | str | None) -> str | None: ...
def reveal(secret: Secret | str | None) -> str | None:
    """The text itself, for the one who needs it; `hide` knows it from now on."""
    if isinstance(secret, Secret):
        return secret._value
    if secret is not None:
        _known.add(secret)
    return secret


def is_secret(name: str, value: object) -> bool:
    """Whether a setting is not for people or files: a `Secret`, or text (or nothing) under the name of a token, key,
    password or secret. `lora_key: false` is none.
    """
    named = NAME.fullmatch(name) is not None and (value is None or isinstance(value, str | list))
    return named or isinstance(value, Secret)


def learn(settings: Any) -> None:
    """Have `hide` know what is secret among settings, however they are shown."""
    if isinstance(settings, list):
        for entry in settings:
            learn(entry)
    elif isinstance(settings, dict):
        for name, value in settings.items():
            if is_secret(str(name), value):
                for secret in value if isinstance(value, list) else [value]:
                    reveal(secret if isinstance(secret, Secret) else None if secret is None else str(secret))
            else:
                learn(value)


def hide(text: str) -> str:
    """A text for people or files, without what this process knows to be secret, nor what looks so in an address."""
    text = IN_ADDRESS.sub(lambda match: f"{match[1] or ''}{REDACTED}", text)
    for secret in sorted({*_known, *_of_environment()}, key=len, reverse=True):
        if len(secret) >= MIN_LENGTH:
            text = text.replace(secret, REDACTED)
    return text


class HidingStream:
    """A stream for text that passes it on, by whole lines, without secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begun, self._lock = stream, "", threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:
            whole, end, rest = (self._begun + text).rpartition("\n")
            self._begun = rest
            if end:
                self._stream.write(hide(whole + end))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Passes on what has begun of a line, too."""
        with self._lock:
            begun, self._begun = self._begun, ""
            self._stream.write(hide(begun))
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def hidden_secrets() -> Generator[None]:
    """Whatever is printed or logged meanwhile, of libraries and of threads that fail too, shows no secrets."""
    out, err = HidingStream(sys.stdout), HidingStream(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            yield
        finally:
            for stream in (out, err):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()


def _of_environment() -> Generator[str]:
    """What variables hold that are named so; what is short there, or a path, is rather a setting."""
    for name in os.environ:
        if name.upper().endswith(ENDS) and NAME.fullmatch(name):  # the former is quick
            value = os.environ[name]
            if len(value) >= 2 * MIN_LENGTH and not value.startswith(("/", "~")):
                yield value


# -- the command line, which every user of the machine can read


def command_line() -> list[str]:
    """The words of this process's command line. The secrets among them are taken off it: off `sys.argv`, which loggers
    record, and off what `ps` shows. Processes that are started with `sys.argv` find them in their environment.
    """
    words = [re.sub(rf"\${VARIABLE}\d+", lambda match: os.environ.get(match[0][1:], match[0]), w) for w in sys.argv[1:]]
    found = list(_secrets(words))
    for number, (place, secret) in enumerate(found):
        os.environ[f"{VARIABLE}{number}"] = reveal(secret)
        before, _, after = sys.argv[1 + place].rpartition(secret)
        if secret in sys.argv[1 + place]:  # not so where it has come by the environment
            sys.argv[1 + place] = f"{before}${VARIABLE}{number}{after}"
    if found and not _overwrite(found, len(words)):
        _set_title(words, found)
    return words


def _secrets(words: list[str]) -> Iterator[tuple[int, str]]:
    """The number of the word and the secret in it, of every secret."""
    for place, word in enumerate(words):
        for match in IN_ADDRESS.finditer(word):
            if match[1] or ":" in match[0]:  # not a mere user's name
                yield place, match[0].removeprefix(match[1] or "")
        match = OPTION.match(word)
        if not match or not NAME.fullmatch(match[1].replace("-", "_")):
            continue
        if match[2] is not None:
            place, secret = place, match[2][1:]
        elif place + 1 < len(words) and not OPTION.match(words[place + 1]):
            place, secret = place + 1, words[place + 1]
        else:
            continue
        if secret.lower() not in ("", *NO_SECRET):
            yield place, secret


def _overwrite(found: list[tuple[int, str]], count: int) -> bool:
    """Overwrites them where the system keeps the command line of this process (Linux); whether that was possible.

    Args:
        found: The secrets and the words that they are in.
        count: Of the words, which are the last ones of the command line.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # the 48th and 49th, see proc(5)
        shown = Path("/proc/self/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return False
    if not start or end - start != len(shown):
        return False
    import ctypes

    parts = shown[:-1].split(b"\0")
    first = len(parts) - count
    for place, secret in found:
        encoded, word = os.fsencode(secret), parts[first + place]
        offset = sum(len(part) + 1 for part in parts[: first + place]) + word.rfind(encoded)
        if encoded in word:
            ctypes.memset(start + offset, ord("*"), len(encoded))
    return True


def _set_title(words: list[str], found: list[tuple[int, str]]) -> None:
    if importlib.util.find_spec("setproctitle"):
        import setproctitle

        setproctitle.setproctitle(" ".join(["litgpt", *sys.argv[1:]]))
        return
    places = {place for place, _ in found}
    names = [
        word.partition("=")[0] for place, word in enumerate(words) if OPTION.match(word) and {place, place + 1} & places
    ]
    print(
        f"Note: all users of this machine can see {', '.join(names)} in its list of processes. HF_TOKEN and "
        "LITGPT_API_KEY of the environment are not shown there.",
        file=sys.stderr,
    )
