"""A schedule file's content before it is a schedule: read and checked in bounded time and memory.

Files are shared, so anything may be in one. What is no schedule gives one `UserError` of one line, and what is one can
be saved and looked up: numbers are finite and of a size to compute with, text can be encoded, nothing is nested deep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from os import PathLike
from typing import Any

import numpy as np

from rwopt.errors import UserError, one_line
from rwopt.files import read_head
from rwopt.schedule.noise import noise_table

FORMAT = "rwopt.schedule"
VERSION = "1.4"  # 1.1: noise.train_sigma, noise.timestep "flow"; 1.2: steps; 1.3: actions; 1.4: their cfg_branch, mean
LIMIT = 2_000_000
"""Bytes of a file. A thousand noise levels of two hundred sites take less."""
LARGEST = 1e30
"""Weights stay below: products of them are still numbers of single precision."""

_DEEPEST = 100
_HIGHEST = 1e300  # levels; their products with weights are numbers
_PLACES: tuple[tuple[str, str, int, float, float, str], ...] = (
    ("grid", "sigma", 10_000, 0.0, _HIGHEST, "a number above 0"),
    ("grid", "train_timestep", 10_000, -_HIGHEST, _HIGHEST, "a number"),
    ("noise", "train_sigma", 100_000, 0.0, _HIGHEST, "a number above 0"),
    ("steps", "sigmas", 1000, 0.0, _HIGHEST, "a number above 0"),
    ("steps", "told", 1000, 0.0, _HIGHEST, "a number above 0"),
    ("steps", "guidance", 1000, 1.0, _HIGHEST, "a number above 1"),
)
"""Lists of numbers: entry, name, most of them, between which bounds, what to give."""
_MOST_SITES = 2000
_MOST_NAMES = 10_000


def read_document(path: str | PathLike[str]) -> Any:
    """The JSON value in a file of at most `LIMIT` bytes. UserError if it cannot be read, or names an entry twice."""
    content = read_head(path, LIMIT + 1, "a schedule file")
    if len(content) > LIMIT:
        raise UserError(f"{path}: is longer than {LIMIT // 1_000_000} MB: a schedule file has fewer sites or levels")
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deep: give a file that rwopt wrote") from None
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({one_line(str(error))}): give a file that rwopt wrote") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise UserError(f"the entry {brief(name)} comes twice: keep one")
            seen.add(name)
    return made


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of the file."""
    text = (files("rwopt.schedule") / "schema" / "schedule-1.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def private_entries(document: Mapping[str, Any]) -> dict[str, Any]:
    """The file's own `x-...` entries at their places, without the rest: those of sites under the site's id, those of
    levels of actions under the level's sigma."""
    found = _private(document)
    for part in ("op", "grid", "steps", "actions"):
        found |= {part: own} if (own := _private(document.get(part, {}))) else {}
    if own := {site["id"]: own for site in document["sites"] if (own := _private(site))}:
        found["sites"] = own
    if own := {x["sigma"]: own for x in document.get("actions", {}).get("levels", ()) if (own := _private(x))}:
        found["actions"] = {**found.get("actions", {}), "levels": own}
    return found


def _private(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name.startswith("x-")}


def put_private(document: dict[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """`document` with `private_entries` at their places; those whose place is gone are left out."""
    for name, value in entries.items():
        if name.startswith("x-"):
            document[name] = value
        elif name in ("sites", "levels"):
            key = "id" if name == "sites" else "sigma"
            document[name] = [entry | value.get(entry[key], {}) for entry in document[name]]
        elif name in document:
            put_private(document[name], value)
    return document


def check(document: Any, notes: bool = False) -> None:
    """Raise UserError unless `document` fits the schema, with numbers to compute with; notes: and no NaN elsewhere."""
    from jsonschema import Draft202012Validator  # slow to import, and looking a schedule up does not need it
    from jsonschema.exceptions import best_match

    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        value = document.get("format") if isinstance(document, Mapping) else document
        raise UserError(f"format is {brief(value)}, not {FORMAT!r}: give a schedule file")
    version = document.get("version")
    if not isinstance(version, str) or version.split(".")[0] != VERSION.split(".")[0]:
        raise UserError(f"version is {brief(version)}: this rwopt reads 1.x, update it or write the file again")
    light = _without_numbers(document)
    _check_plain(light, notes)
    error = best_match(Draft202012Validator(schema()).iter_errors(light))
    if error is None:
        _check_noise(document.get("noise", {}))
        return
    where = one_line(error.json_path.removeprefix("$").lstrip("."))
    subject = where or "the file"
    if error.validator == "required":
        absent = [name for name in error.validator_value if name not in error.instance]
        raise UserError(f"{subject} lacks {absent[0]!r}: add it (schema: rwopt/schedule/schema/schedule-1.json)")
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        unknown = [name for name in error.instance if name not in known and not name.startswith("x-")]
        named = brief(f"x-{unknown[0]}")
        raise UserError(f"{subject} has the unknown entry {brief(unknown[0])}: remove it or name it {named}")
    expected = error.schema.get("description", f"what the schema asks for ({one_line(error.message)})")
    raise UserError(f"{subject} is {brief(error.instance)}: give {expected}")


def _without_numbers(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its lists of numbers checked and cut to the first: a schema takes long over each of them."""
    light = dict(document)
    sites, rows = light.get("sites"), light.get("weights")
    if isinstance(sites, list) and len(sites) > _MOST_SITES:
        raise UserError(f"sites has {len(sites)} entries: give at most {_MOST_SITES}")
    for part, name, most, low, high, expected in _PLACES:
        inner = light.get(part)
        if isinstance(inner, dict) and isinstance(inner.get(name), list):
            values = inner[name]
            if len(values) > most:
                raise UserError(f"{part}.{name} has {len(values)} numbers: give at most {most}")
            _check_numbers(values, f"{part}.{name}", low, high, expected)
            light[part] = {**light[part], name: [3.0, 4.0] if len(values) > 1 else values}
    if isinstance(rows, list):
        if len(rows) > _PLACES[0][2]:
            raise UserError(f"weights has {len(rows)} rows: give one a sigma, at most {_PLACES[0][2]}")
        for k, row in enumerate(rows):
            if not isinstance(row, list):
                raise UserError(f"weights[{k}] is {brief(row)}: give a row of weights, one a site")
            _check_numbers(row, f"weights[{k}]", -LARGEST, LARGEST, "a number (1 is the plain model)")
        light["weights"] = [row[:1] for row in rows[:1]]
    return light


def _check_numbers(values: list[Any], name: str, low: float, high: float, expected: str) -> None:
    for i, x in enumerate(values):
        sound = isinstance(x, int | float) and not isinstance(x, bool)  # true is 1 to Python
        if not (sound and low < x < high):
            large = sound and high <= x < math.inf
            raise UserError(f"{name}[{i}] is {brief(x)}: give {f'one below {high:g}' if large else expected}")


def _check_plain(document: Any, notes: bool) -> None:
    """UserError for what JSON cannot hold or a later step would stumble over. Without recursion."""
    stack = [iter((document,))]
    while stack:
        for value in stack[-1]:
            if value and isinstance(value, dict | list | tuple):
                if len(stack) > _DEEPEST:
                    raise UserError(f"the file is nested deeper than {_DEEPEST}: keep notes flat")
                if not isinstance(value, dict):
                    stack.append(iter(value))
                    break
                if len(value) > _MOST_NAMES:
                    raise UserError(f"the file has {len(value)} entries in one object: give at most {_MOST_NAMES}")
                for name in value:
                    _check_text(name)
                stack.append(iter(value.values()))
                break
            if isinstance(value, str):
                _check_text(value)
            elif notes and isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"the file holds the number {value}, which JSON has not: remove it")
        else:
            stack.pop()


def _check_text(text: Any) -> None:
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"the file holds {brief(text)}, half a character: remove it") from None


def _check_noise(noise: Mapping[str, Any]) -> None:
    """UserError if the levels of the training timesteps cannot be computed with."""
    if not noise.keys() - {"axis", "prediction", "timestep"} or noise.get("timestep", "index") != "index":
        return
    with np.errstate(all="ignore"):
        table = noise_table(noise)
        sound = bool((np.isfinite(table) & (table > 0) & (np.diff(table, prepend=0) >= 0)).all())
    if not sound:
        raise UserError("noise gives no rising noise levels above 0: give the betas that the model was trained with")


def brief(value: Any) -> str:
    """`repr` of anything, cut to fit into a message."""
    try:
        return one_line(repr(value))
    except (RecursionError, ValueError):  # nested deep; a whole number of thousands of digits
        return f"a very long {type(value).__name__}"
