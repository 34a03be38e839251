"""What several targets ask: other tools' names of a schedule's sites, its one row of weights, a foreign file's text,
and a folder that is written whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rwopt.errors import UserError
from rwopt.export.ldm import kind_of
from rwopt.files import read_head
from rwopt.schedule import Schedule
from rwopt.schedule.noise import Array
from rwopt.unet.names import Names, foreign_names

_LIKE_LDM = ("UNet2DConditionModel", "UNetMotionModel")
_SD_LAYERS = 2
_MOST_BLOCKS = 16


def names(schedule: Schedule) -> list[Names]:
    """Names [S] of the sites, without the model: by its note `layers_per_block`, else two layers a down block."""
    layers = schedule.model.get("layers_per_block", _SD_LAYERS)
    down = [*layers] if isinstance(layers, Sequence) else [layers] * _MOST_BLOCKS
    if schedule.model.get("unet_class", _LIKE_LDM[0]) not in _LIKE_LDM or not all(isinstance(n, int) for n in down):
        return [Names() for _ in schedule.sites]
    up = [n + 1 for n in reversed(down)]
    return [foreign_names(place_of(site), kind_of(site), down, up) for site in schedule.sites]


def place_of(site: str) -> str:
    """The module path of a site's id."""
    return site if kind_of(site) == "transformer" else site.rsplit(".", 1)[0]


def read_text(path: str | Path, most: int, what: str) -> str:
    """The text in UTF-8 of a foreign file of at most `most` bytes. UserError, that asks for `what`, if it is none."""
    content = read_head(path, most + 1, what)
    if len(content) > most:
        raise UserError(f"{path}: is longer than {most} bytes: give {what}")
    try:
        return content.decode("utf-8-sig")
    except ValueError:
        raise UserError(f"{path}: is no text in UTF-8: give {what}") from None


def write_folder(place: Path, fill: Callable[[Path], object]) -> list[Path]:
    """The files that `fill` writes into the folder that it is given, moved to `place` once all of them are there."""
    place.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory(dir=place, prefix=".rwopt") as folder:
        fill(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            os.replace(file, place / file.name)
            written.append(place / file.name)
    return written


def one_row(schedule: Schedule, host: str, at: float | None, steps: bool) -> Array:
    """Weights [S] for a host that has one a site: those of all levels if alike, or those at VE sigma `at`.

    steps: whether the file's steps have to be expressed as well. UserError for what one row cannot say.
    """
    if schedule.cfg_branch != "both":
        raise UserError(f"op.cfg_branch is {schedule.cfg_branch!r}: {host} weighs both sides of guidance alike")
    if steps and schedule.steps is not None:
        raise UserError(f"the schedule has steps, which {host} cannot express: give steps=false to leave them behind")
    if at is not None:
        return schedule.at(at)
    for site, column in zip(schedule.sites, schedule.weights.T, strict=True):
        if (column != column[0]).any():
            raise UserError(
                f"site {site} has weights from {column.min():g} to {column.max():g}, and {host} takes one for all "
                "noise levels: give at=SIGMA to take those of one level"
            )
    row: Array = schedule.weights[0]
    return row
