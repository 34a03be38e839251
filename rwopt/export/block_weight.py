"""A preset line of LoRA block weights, `NAME:1,0.5,...`, as sd-webui-lora-block-weight and its kin read it.

There the numbers scale a LoRA's part of each block, here the block itself: what is carried over is the profile over
depth, one number a block. Forms: 17 (text encoder and 16 transformers: SD 1.x, 2.x), 12 (and 11: SDXL), 26 and 20 (and
all layers of SD, of SDXL: there a number holds for a layer's resnet and transformer).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from rwopt.errors import UserError, one_line
from rwopt.export.ldm import kind_of
from rwopt.export.plain import one_row, place_of, read_text
from rwopt.files import write_text
from rwopt.schedule import Schedule
from rwopt.schedule.document import LIMIT
from rwopt.schedule.noise import Array
from rwopt.unet.names import foreign_names

ABOUT = "a line for LoRA block-weight presets (A1111, Forge, ComfyUI's Inspire pack)"
NEEDS = "one weight a block for all noise levels (or at=SIGMA), in mode residual; there it scales a LoRA's blocks"
FOLDER = False

_DOWN, _UP = [2] * 4, [3] * 4
_ATTENTION = {  # (block, layers) with transformers, of the down and of the up path
    "sd": ([(0, 2), (1, 2), (2, 2)], [(1, 3), (2, 3), (3, 3)]),
    "sdxl": ([(1, 2), (2, 2)], [(0, 3), (1, 3)]),
}
_BLOCKS = {"sd": 4, "sdxl": 3}
FORMS = {17: ("sd", False), 12: ("sdxl", False), 26: ("sd", True), 20: ("sdxl", True)}
"""Count of numbers -> family, and whether all layers have one."""


def transformers(family: str) -> list[str]:
    """The transformer sites of SD or SDXL in order of execution: 16 or 11."""
    down, up = _ATTENTION[family]
    return [
        *(f"down_blocks.{i}.attentions.{j}" for i, n in down for j in range(n)),
        "mid_block.attentions.0",
        *(f"up_blocks.{i}.attentions.{j}" for i, n in up for j in range(n)),
    ]


def layers(form: int) -> dict[str, list[str]]:
    """Name of each number but the first, in order -> the sites that it stands for: none for a layer without."""
    family, full = FORMS[form]
    blocks = _BLOCKS[family]
    sites = transformers(family)
    names: dict[str, list[str]] = {}
    if full:
        names |= {f"IN{n:02d}": [] for n in range(3 * blocks)} | {"M00": []}
        names |= {f"OUT{n:02d}": [] for n in range(3 * blocks)}
        sites = [*sites, *(f"down_blocks.{i}.resnets.{j}.resnet" for i in range(blocks) for j in range(2)),
                 "mid_block.resnets.0.resnet", "mid_block.resnets.1.resnet",
                 *(f"up_blocks.{i}.resnets.{j}.resnet" for i in range(blocks) for j in range(3))]  # fmt: skip
    for site in sites:
        names.setdefault(foreign_names(place_of(site), kind_of(site), _DOWN, _UP).lbw or "", []).append(site)
    return names


def export(
    schedule: Schedule, place: Path, *, name: str = "RWOPT", form: int = 0, at: float | None = None, steps: bool = True
) -> list[Path]:
    """Write the line; the file written.

    form: 17, 12, 26 or 20 numbers, 0 for the first that fits; at: the VE sigma whose weights are taken; steps=False
    leaves the schedule's steps behind. UserError for weights that change with the level and for sites without number.
    """
    if not re.fullmatch(r"[^\s:,#][^:,\n\r]{0,60}", name):
        raise UserError(f"name={one_line(name)}: give up to 60 characters without colon or comma")
    if form not in (0, *FORMS):
        raise UserError(f"form={form}: choose from {', '.join(map(str, FORMS))}, or 0 for the first that fits")
    if schedule.mode != "residual":
        raise UserError(f"op.mode is {schedule.mode!r}: block weights are of branches, use residual")
    row = one_row(schedule, "a block-weight preset", at, steps)
    refused: UserError | None = None
    for count in [form] if form else _likely(schedule):
        try:
            numbers = _numbers(schedule, row, count)
        except UserError as error:
            refused = refused or error
            continue
        values = ",".join(f"{w:.6g}" for w in [1.0, *numbers])
        head = f"# rwopt: {one_line(str(schedule.model.get('base_model', 'block weights')))}, {schedule.digest()[:12]}"
        return [write_text(place, f"{head}\n{name}:{values}\n")]
    assert refused is not None
    raise refused


def _likely(schedule: Schedule) -> list[int]:
    xl = "xl" in str(schedule.model.get("family", "")).lower()
    return [12, 20, 17, 26] if xl else [17, 12, 26, 20]


def _numbers(schedule: Schedule, row: Array, form: int) -> list[float]:
    """The numbers behind BASE."""
    known = layers(form)
    weights = dict(zip(schedule.sites, row.tolist(), strict=True))
    for site in schedule.sites:
        if not any(site in sites for sites in known.values()):
            raise UserError(f"site {site} has no number in a preset of {form}: export the schedule without it")
    numbers = []
    for name, sites in known.items():
        given = {weights.get(site, 1.0) for site in sites}
        if len(given) > 1:
            raise UserError(f"{name} has one number in a preset of {form}, and {', '.join(sites)} have several weights")
        numbers.append(given.pop() if given else 1.0)
    return numbers


def read(path: str | Path, name: str = "") -> Schedule:
    """The schedule of a preset line in a file, which may hold others: the one called `name`, or the only one.

    One level, mode residual. Numbers of the text encoder and of layers without a site are kept as notes.
    """
    found: dict[str, list[str]] = {}
    for line in read_text(path, LIMIT, "a file of preset lines").splitlines():
        label, colon, text = line.partition(":")
        if colon and not line.startswith("#") and text.count(",") + 1 in FORMS:
            found[label.strip()] = text.split(",")
    if not found or (name and name not in found):
        raise UserError(f"{path}: has no preset {one_line(name)!r} of {', '.join(map(str, FORMS))} numbers")
    if not name and len(found) > 1:
        raise UserError(f"{path}: has {len(found)} presets: give name={one_line(next(iter(found)))}, or another one")
    label, values = (name, found[name]) if name else next(iter(found.items()))
    try:
        base, *numbers = (float(value) for value in values)
    except ValueError:
        raise UserError(f"{path}: {one_line(label)} holds {one_line(','.join(values))!r}: give numbers only") from None
    weights: dict[str, float] = {}
    rest: dict[str, float] = {"BASE": base}  # layers without a site: their convolutions are no residual branches
    for (layer, sites), number in zip(layers(len(values)).items(), numbers, strict=True):
        weights |= {site: number for site in sites}
        rest |= {} if sites else {layer: number}
    left = {layer: number for layer, number in rest.items() if number != 1}
    model = {"family": "sdxl" if FORMS[len(values)][0] == "sdxl" else "sd15"}
    note = {"imported": "lora-block-weight", "preset": label, **({"without a site": left} if left else {})}
    table = np.array([[*weights.values()]])
    return Schedule(tuple(weights), np.array([1.0]), table, model=model, provenance=note)
