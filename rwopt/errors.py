"""The one error that bad input raises, and checks that raise it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """A mistake that the user can mend: one line that names the thing, its value and the remedy.

    The command line prints it without a traceback and exits with 2. What is not printable in a value (a line break in a
    path, half a character) is shown as its escape.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


def check(ok: bool, key: str, value: object, remedy: str) -> None:
    """Raise unless `ok`."""
    if not ok:
        raise UserError(f"{key}={value}: {remedy}")


def at_least_one(settings: object, group: str, *names: str) -> None:
    """Raise unless the fields `names` of a recipe's group are 1 or more."""
    for name in names:
        check(getattr(settings, name) >= 1, f"{group}.{name}", getattr(settings, name), "must be at least 1")


def one_of(known: Sequence[str], key: str, value: str) -> None:
    """Raise unless `value` is known; the remedy is the nearest one."""
    if value not in known:
        near = difflib.get_close_matches(value, known, 1, 0)
        raise UserError(f"{key}={value}: did you mean {near[0]}? (one of {', '.join(known)})")


def one_line(text: str, limit: int = 120) -> str:
    """Text cut to fit into a message, white space made single, and what a terminal would act on a question mark."""
    text = " ".join(text[: 8 * limit].split())
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."
