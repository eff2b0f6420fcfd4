"""Numbers of things in what people read."""


def counted(number: int, thing: str, things: str | None = None) -> str:
    """`1 sample`, `2,000 samples`; `things` where the plural does not end in a mere s."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
