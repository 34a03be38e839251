"""Verbs that carry schedules to other tools and back: export, import, edit-schedule."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwopt.cli.screen import quiet
from rwopt.config.recipe import read_value
from rwopt.errors import UserError

if TYPE_CHECKING:
    from rwopt.schedule import Schedule

EDITS = ("scale=...", "clamp=...", "window=...", "resample=...", "merge=...", "steps=false")


def export(args: argparse.Namespace) -> None:
    """`rwopt export FILE to=TARGET out=PLACE option=value ...`."""
    from rwopt.export import export as write
    from rwopt.export import targets
    from rwopt.schedule import Schedule

    given = _values(args.settings)
    to, out = _taken(given, "to", f"one of {', '.join(targets())}"), _taken(given, "out", "the place to write to")
    quiet()
    for path in write(Schedule.load(args.schedule), to, out, **given):
        print(path)


def read_foreign(args: argparse.Namespace) -> None:
    """`rwopt import PATH out=FILE [from=KIND] option=value ...`."""
    from rwopt.export import imports

    given = _values(args.settings)
    out, kind = _taken(given, "out", "the schedule file to write"), str(given.pop("from", ""))
    quiet()
    print(_saved(imports.read_foreign(args.source, kind, **given), out))


def edit_schedule(args: argparse.Namespace) -> None:
    """`rwopt edit-schedule FILE scale=0.5 out=FILE`: edits in the order in which they are given."""
    from rwopt.export import arithmetic
    from rwopt.schedule import Schedule

    given = _values(args.settings)
    out, share = _taken(given, "out", "the schedule file to write"), given.pop("share", 0.5)
    if not given:
        raise UserError(f"edit-schedule: nothing to do: give one of {', '.join(EDITS)}")
    schedule = Schedule.load(args.schedule)
    for name, value in given.items():
        if name == "scale":
            schedule = arithmetic.scale(schedule, _number(name, value))
        elif name == "clamp":
            schedule = arithmetic.clamp(schedule, *_numbers(name, value, 2))
        elif name == "window":
            schedule = arithmetic.window(schedule, *_numbers(name, value, 2))
        elif name == "resample":
            schedule = arithmetic.resample(schedule, _numbers(name, value))
        elif name == "merge":
            schedule = arithmetic.merge(schedule, Schedule.load(str(value)), _number("share", share))
        elif name == "steps" and value is False:
            schedule = arithmetic.without_steps(schedule)
        else:
            raise UserError(f"{name}={value} is no edit: one of {', '.join(EDITS)}")
    print(_saved(schedule, out))


def _saved(schedule: Schedule, out: str) -> Path:
    path = Path(out)
    if path.suffix != ".json":
        raise UserError(f"out={out}: a schedule file's name ends in .json")
    return schedule.save(path)


def _values(items: Sequence[str]) -> dict[str, Any]:
    """key=value words, values as `read_value` has them."""
    from omegaconf.errors import OmegaConfBaseException

    out: dict[str, Any] = {}
    for item in items:
        key, sign, text = item.partition("=")
        if not sign or not key.isidentifier():
            raise UserError(f"{item} is not key=value, for example out=file.json")
        if key in out:
            raise UserError(f"{key} is given twice: once is enough")
        try:
            out[key] = read_value(text)
        except (OmegaConfBaseException, ValueError) as error:
            raise UserError(f"{item} cannot be read: {' '.join(str(error).split())}") from None
        if text[:1].isdigit() and "," in text:  # FreeU's four numbers and the like stay text
            out[key] = text
    return out


def _taken(given: dict[str, Any], key: str, remedy: str) -> str:
    if key not in given:
        raise UserError(f"{key}=... is missing: give {remedy}")
    return str(given.pop(key))


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}={value}: give a number")
    return float(value)


def _numbers(name: str, value: Any, count: int = 0) -> list[float]:
    if not isinstance(value, list) or (count and len(value) != count):
        raise UserError(f"{name}={value}: give {count or 'some'} numbers, as {name}=[5,0.7]")
    return [_number(name, one) for one in value]
