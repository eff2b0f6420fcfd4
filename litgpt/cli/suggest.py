"""What a mistyped name may have meant."""

import difflib
from collections.abc import Callable, Iterable


def did_you_mean(word: str, candidates: Iterable[str], written: Callable[[str], str] = str) -> str:
    """`" Did you mean 'x' or 'y'?"` with the nearest candidates, or `""` where none is near.

    Args:
        word: What was typed.
        candidates: What there is.
        written: How a candidate is typed, where that is not its mere name: `--x`.
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    close = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    if not close:
        return ""
    quoted = [repr(written(by_lower[match])) for match in close]
    return f" Did you mean {', '.join(quoted[:-1])}{' or ' if quoted[1:] else ''}{quoted[-1]}?"


def nearly(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that differs in case and punctuation only (`phi2`, `phi-2`); None where there is none."""
    wanted = _letters(word)
    return next((candidate for candidate in candidates if _letters(candidate) == wanted), None)


def _letters(text: str) -> str:
    return "".join(character for character in text.lower() if character.isalnum() or character == "/")
