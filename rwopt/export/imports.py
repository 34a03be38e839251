"""Schedules from other tools' files.

`reference`: the `importance_weight_matrix` of UNetReweighting (YAML), a row a step, a number a block, mode output;
`freeu`: FreeU's four numbers; `lora-block-weight`: preset lines; `csv`, `safetensors`: what `rwopt export` wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwopt.errors import UserError, one_line, one_of
from rwopt.export import block_weight, csv_table, tensors
from rwopt.export.block_weight import transformers
from rwopt.export.plain import read_text
from rwopt.schedule import Schedule, noise_table
from rwopt.schedule.document import LARGEST
from rwopt.schedule.noise import sigma_at
from rwopt.unet.neighbours import freeu

SPACINGS = ("trailing", "leading", "linspace")
_BLOCKS = {7: ("sd", (2, 2, 2, 1, 3, 3, 3)), 5: ("sdxl", (2, 2, 1, 3, 3))}
"""Numbers a row -> family, and sites of each block in order of execution."""
_SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
_MOST_TEXT = 100_000  # bytes; a YAML reader takes long
_SUFFIXES = {".csv": "csv", ".safetensors": "safetensors", ".yaml": "reference", ".yml": "reference",
             ".txt": "lora-block-weight"}  # fmt: skip


def kinds() -> list[str]:
    """What `read_foreign` knows."""
    return sorted(_READERS)


def read_foreign(path: str | Path, kind: str = "", **options: Any) -> Schedule:
    """The schedule of another tool's file. kind: one of `kinds()`; "" goes by the file's suffix.

    Options: of `reference`, `spacing` (trailing, leading or linspace: of the sampler that it was made with) or `sigmas`
    (VE levels of its rows), and `mode`; of `freeu`, `unet` (a folder or live network), `variant` and `window` (high,
    low); of `lora-block-weight`, `name`. Raises UserError of one line for anything else.
    """
    import inspect

    kind = kind or _SUFFIXES.get(Path(path).suffix.lower(), "")
    if not kind:
        raise UserError(f"{path}: its suffix tells no kind: give from= one of {', '.join(kinds())}")
    one_of(kinds(), "from", kind)
    reader = _READERS[kind]
    known = [*inspect.signature(reader).parameters][1:]
    for name, value in options.items():
        if not known:
            raise UserError(f"{name}={value}: files of {kind} take no options")
        one_of(known, f"option of {kind}", name)
    return reader(path, **options)


def read_reference(
    path: str | Path, spacing: str = "trailing", sigmas: Sequence[float] | None = None, mode: str = "output"
) -> Schedule:
    """`importance_weight_matrix` [steps, blocks]: 7 blocks of SD or 5 of SDXL, each number for all sites of its block.

    The file has no noise levels. They are those of as many steps of a stock sampler, by `spacing`, or `sigmas`.
    """
    import yaml  # type: ignore[import-untyped]

    text = read_text(path, _MOST_TEXT, "rows of YAML")
    if re.search(r"(^|[\s\[,:{-])[&*][^\s]", text):  # they can make a small file a huge document
        raise UserError(f"{path}: has anchors (& or *): write the rows out")
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise UserError(f"{path}: is not YAML ({one_line(str(error))})") from None
    rows = document.get("importance_weight_matrix") if isinstance(document, Mapping) else document
    if not isinstance(rows, list) or not rows or len(rows) > 1000 or not all(isinstance(row, list) for row in rows):
        raise UserError(f"{path}: has no importance_weight_matrix: give rows of numbers, one a step, at most 1000")
    count = len(rows[0])
    for k, row in enumerate(rows):
        if len(row) != count or count not in _BLOCKS:
            raise UserError(f"{path}: row {k} has {len(row)} numbers: give 7 (SD) or 5 (SDXL) in each")
        for j, x in enumerate(row):
            if not isinstance(x, int | float) or isinstance(x, bool):
                raise UserError(f"{path}: row {k}, number {j} is no number but a {type(x).__name__}: give numbers")
            if not abs(x) < LARGEST:
                given = "too large" if isinstance(x, int) else f"{x:g}"
                raise UserError(f"{path}: row {k}, number {j} is {given}: give finite numbers")
    family, sizes = _BLOCKS[count]
    levels = _levels(len(rows), spacing) if sigmas is None else np.asarray(sigmas, dtype=np.float64)
    note = {"imported": "UNetReweighting", "levels": spacing if sigmas is None else "given"}
    try:
        return Schedule(
            tuple(transformers(family)),
            levels,
            np.repeat(np.array(rows, dtype=np.float64), sizes, axis=1),
            mode,
            interp="nearest",
            model={"family": "sdxl" if family == "sdxl" else "sd15", "unet_class": "UNet2DConditionModel"},
            noise=_SD,
            calibrated={"num_inference_steps": len(rows)},
            provenance=note,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _levels(steps: int, spacing: str) -> np.ndarray:
    """VE sigmas [N] of the timesteps that stock schedulers of Stable Diffusion take: whole, with `steps_offset` 1."""
    one_of(SPACINGS, "spacing", spacing)
    total = _SD["num_train_timesteps"]
    assert isinstance(total, int)
    if spacing == "trailing":
        times = np.round(total - np.arange(steps) * (total / steps)) - 1
    elif spacing == "leading":
        times = (np.arange(steps)[::-1] * (total // steps)) + 1
    else:
        times = np.round(np.linspace(0, total - 1, steps))[::-1]
    return sigma_at(times, noise_table(_SD))


def read_freeu(
    path: str | Path, unet: Any, variant: str = "constant", window: Sequence[float] = (np.inf, 0.0)
) -> Schedule:
    """FreeU's b1, b2, s1, s2: a file with `b1: 1.3` and so on, or the four as text, `1.3,1.4,0.9,0.2`."""
    from rwopt.export.fold import skeleton

    text = str(path) if re.fullmatch(r"[-+.\deE, ]+", str(path)) else read_text(path, _MOST_TEXT, "b1, b2, s1, s2")
    named = dict(re.findall(r"\b([bs][12])\b[\"']?\s*[:=]\s*([-+.\deE]+)", text))
    values = [named.get(name, "") for name in ("b1", "b2", "s1", "s2")] if named else text.split(",")
    try:
        b1, b2, s1, s2 = (float(value) for value in values)
    except ValueError:
        raise UserError(f"{one_line(str(path))}: has no b1, b2, s1, s2: give four numbers") from None
    high, low = window
    noise = _SD if np.isfinite(high) or low else None
    return freeu(skeleton(unet), b1, b2, s1, s2, variant, (high, low), noise)


_READERS: dict[str, Callable[..., Schedule]] = {
    "csv": csv_table.read,
    "freeu": read_freeu,
    "lora-block-weight": block_weight.read,
    "reference": read_reference,
    "safetensors": tensors.read,
}
