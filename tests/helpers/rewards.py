"""Objectives with networks in a small size, random weights in them."""

from __future__ import annotations

from typing import Any

from rwopt.errors import UserError
from rwopt.objectives.registry import family_of, missing


def small(name: str) -> tuple[dict[str, Any], str]:
    """Options with which an objective can be made here, in a small size where it has a large one, and what it lacks."""
    try:
        tiny = getattr(family_of(name), "tiny", None)
        options: dict[str, Any] = {} if tiny is None else tiny(name)
        return options, missing(name, **options)
    except UserError as error:
        return {}, str(error)
