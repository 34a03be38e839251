"""A table for spreadsheets: a row a noise level and site, with the site's names in other tools. Exact there and back.

The first row holds the rest of the file (JSON, in cells that a spreadsheet can hold), so that a table whose weights
were edited is a schedule again. Rows may be sorted in any way; a table without the first row is one of mode residual.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from rwopt.errors import UserError, one_line
from rwopt.export.plain import names, read_text
from rwopt.files import write_text
from rwopt.schedule import Schedule
from rwopt.schedule.document import FORMAT, LIMIT, VERSION, brief, check

ABOUT = "a CSV table: a row a noise level and site, with names as in diffusers, LDM and block-weight presets"
NEEDS = "any spreadsheet; expresses everything"
FOLDER = False

COLUMNS = ("sigma", "diffusers", "ldm", "lbw", "weight")
_CELL = 30_000  # characters; spreadsheets hold 32 767
_LIMIT = 10 * LIMIT


def export(schedule: Schedule, place: Path) -> list[Path]:
    """Write the table; the file written."""
    rest = {name: value for name, value in schedule.exact().items() if name not in ("sites", "weights")}
    rest["grid"] = {name: value for name, value in rest["grid"].items() if name not in ("sigma", "train_timestep")}
    text = json.dumps(rest)
    out = io.StringIO()
    table = csv.writer(out, lineterminator="\n")
    table.writerow([f"# {FORMAT}", *(text[i : i + _CELL] for i in range(0, len(text), _CELL))])
    table.writerow(COLUMNS)
    others = [(name.ldm or "", name.lbw or "") for name in names(schedule)]
    labels = [(site, *other) for site, other in zip(schedule.sites, others, strict=True)]
    for sigma, row in zip(schedule.sigmas.tolist(), schedule.weights.tolist(), strict=True):
        table.writerows([sigma, *label, weight] for label, weight in zip(labels, row, strict=True))
    return [write_text(place, out.getvalue())]


def read(path: str | Path) -> Schedule:
    """The schedule of a table. UserError of one line for anything else."""
    text = read_text(path, _LIMIT, "a CSV table")
    try:
        document = _document([*csv.reader(io.StringIO(text, newline=""))])
        check(document, notes=True)
        return Schedule.from_dict(document)
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: is no table of a schedule ({one_line(str(error))})") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _document(rows: list[list[str]]) -> dict[str, Any]:
    rest: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    if rows and rows[0] and rows[0][0] == f"# {FORMAT}":
        loaded = json.loads("".join(rows.pop(0)[1:]))
        if not isinstance(loaded, dict) or not isinstance(loaded.get("grid", {}), dict):
            raise UserError("the first row is no rest of a schedule file: export it again")
        rest = loaded
    if not rows or not {"sigma", "diffusers", "weight"} <= {*rows[0]}:
        raise UserError(f"the columns {', '.join(COLUMNS)} are not there: keep the row with their names")
    place = {name: i for i, name in enumerate(rows[0])}
    cells: dict[tuple[float, str], float] = {}
    for number, row in enumerate(rows[1:], 2):
        if not any(row):
            continue
        if len(row) < len(rows[0]):
            raise UserError(f"row {number} of the table has {len(row)} cells: give {len(rows[0])}")
        site = row[place["diffusers"]]
        sigma, weight = (_number(row[place[name]], name, number) for name in ("sigma", "weight"))
        if (sigma, site) in cells:
            raise UserError(f"{brief(site)} at sigma {sigma:g} comes twice: keep one row")
        cells[sigma, site] = weight
    if not cells:
        raise UserError("the table has no rows below its columns: give one a level and site")
    sigmas = sorted({sigma for sigma, _ in cells}, reverse=True)
    sites = [*dict.fromkeys(site for _, site in cells)]
    if len(sigmas) * len(sites) != len(cells):
        raise UserError(f"{len(cells)} rows for {len(sigmas)} levels and {len(sites)} sites: give each pair once")
    grid = {**rest.get("grid", {}), "sigma": sigmas}
    weights = [[cells[sigma, site] for site in sites] for sigma in sigmas]
    return {**rest, "sites": [{"id": site} for site in sites], "grid": grid, "weights": weights}


def _number(text: str, name: str, row: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{name} in row {row} is {brief(text)}: give a number with a decimal point") from None
