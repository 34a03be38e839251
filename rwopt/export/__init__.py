"""Schedules for other tools: one target a module, none of which needs rwopt where its files are used.

A target is a module with

    ABOUT   one line: what it writes and who reads that
    NEEDS   one line: what the host must have, and what it cannot express
    FOLDER  whether `place` is a folder (else a file); None: a file if it is called .safetensors
    export(schedule, place, *, option=default, ...) -> list of the files written

It is entered in `TARGETS` and called through `export` here, which checks the name, the options and the place. Options
have types that a command line can fill (text, numbers, booleans, paths), but for `unet`, which may be a live network.
A target writes each file by `rwopt.files.write_bytes`, and refuses what its host cannot express by a `UserError` that
names the site or feature: nothing is left out. What nodes and scripts need of a schedule file is in
`rwopt.export.reader`, whose source they carry. `rwopt.export.imports` reads other tools' files,
`rwopt.export.arithmetic` changes a schedule.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwopt.errors import UserError, one_of
from rwopt.files import write_text

if TYPE_CHECKING:
    from rwopt.schedule import Schedule

TARGETS = {
    "comfyui": "rwopt.export.comfyui",
    "csv": "rwopt.export.csv_table",
    "diffusers": "rwopt.export.diffusers_folder",
    "fold": "rwopt.export.fold",
    "lora-block-weight": "rwopt.export.block_weight",
    "onnx": "rwopt.export.onnx_graph",
    "openvino": "rwopt.export.openvino_graph",
    "safetensors": "rwopt.export.tensors",
    "webui": "rwopt.export.webui",
}
"""Name -> module."""

WHOLE = ("csv", "safetensors")
"""Targets that hold all of a schedule. No other one can do what its `actions` say."""

MARKER = ".rwopt-export"
"""A file in every folder that an export wrote; it holds the target's name."""

_MARK = b"rwopt"  # every file of an export has the word near its start
_NEAR = 4096


def targets() -> list[str]:
    """The names that `export` knows."""
    return sorted(TARGETS)


def target(name: str) -> Any:
    """The module of a target. UserError with the nearest name if there is none."""
    one_of(targets(), "to", name)
    return import_module(TARGETS[name])


def export(schedule: Schedule, to: str, place: str | Path, *, actions: bool = True, **options: Any) -> list[Path]:
    """Write `schedule` for the host tool `to` at `place`; the files written. actions=False leaves its actions behind.

    `place` is a file or a folder (`target(to).FOLDER`); an export of the same target that is there is replaced, any
    other content is refused. Raises UserError for an unknown target or option, for a place that cannot be written, and
    for what the host cannot express.
    """
    module, place = target(to), Path(place)
    _check_options(to, module.export, options)
    if not actions:
        schedule = replace(schedule, actions=None)
    elif schedule.actions is not None and to not in WHOLE:
        raise UserError(f"the schedule has actions, which {to} cannot express: give actions=false to leave them behind")
    folder = place.suffix != ".safetensors" if module.FOLDER is None else module.FOLDER
    try:
        if folder:
            _check_folder(place, to)
            write_text(place / MARKER, f"{to}\n")
        else:
            _check_file(place)
        written: list[Path] = module.export(schedule, place, **options)
    except OSError as error:
        raise UserError(f"out={place}: cannot be written ({error.strerror or error}): give another place") from None
    except UserError:
        _sweep(place, to)
        raise
    return written


def _check_options(to: str, function: Any, options: dict[str, Any]) -> None:
    known = {name: p for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    for name, value in options.items():
        if not known:
            raise UserError(f"{name}={value}: the export to {to} takes no options")
        if name not in known:
            one_of([*known], f"option of {to}", name)
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in options:
            raise UserError(f"the export to {to} needs {name}=...: give it ({import_module(TARGETS[to]).NEEDS})")


def _check_folder(place: Path, to: str) -> None:
    if place.is_file():
        raise UserError(f"out={place}: is a file, and {to} is a folder: give another place")
    if not place.is_dir():
        return
    marker = place / MARKER
    if marker.is_file():
        if marker.read_text(encoding="utf-8", errors="replace").strip() == to:
            return
    elif not any(place.iterdir()):
        return
    raise UserError(f"out={place}: holds other things than an export to {to}: give an empty or new folder")


def _check_file(place: Path) -> None:
    if place.is_dir():
        raise UserError(f"out={place}: is a folder: give the name of a file")
    if place.exists():
        with place.open("rb") as content:
            if _MARK not in content.read(_NEAR):
                raise UserError(f"out={place}: is there and no export of rwopt: give another name")


def _sweep(place: Path, to: str) -> None:
    """After a refusal: take a marker away that stands alone."""
    marker = place / MARKER
    if place.is_dir() and [*place.iterdir()] == [marker]:
        marker.unlink()
        place.rmdir()
