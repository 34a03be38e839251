"""Griffe extension: the lines of a docstring that explain one name each (`sigmas: [K] ...`) are shown as a list."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension, Function, Object

NAMES = re.compile(r"(\w+(?:, \w+)*): (.+)")


class Prose(Extension):
    def on_function(self, *, func: Function, **_: Any) -> None:
        mend(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: Class, **_: Any) -> None:
        mend(cls, set(cls.members) | {parameter.name for parameter in cls.parameters})


def mend(thing: Object, known: set[str]) -> None:
    """Two or more such lines in a paragraph become its items; what follows a line without a name is part of it."""
    if thing.docstring is None:
        return
    parts = []
    for part in thing.docstring.value.split("\n\n"):
        lines, count = [], 0
        for line in part.split("\n"):
            found = NAMES.match(line)
            if found and set(found[1].split(", ")) <= known:
                count += 1
                names = ", ".join(f"`{name}`" for name in found[1].split(", "))
                lines.append(f"- {names}: {found[2]}")
            else:
                lines.append(f"    {line}" if count else line)
        parts.append("\n".join(lines) if count > 1 and lines[0].startswith("- ") else part)
    thing.docstring.value = "\n\n".join(parts)
