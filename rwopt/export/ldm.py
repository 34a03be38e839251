"""What the exports to ComfyUI, Forge and A1111 share: their U-Nets count layers as LDM's did, and take node sources.

The sources are in `templates/`, as text: they run inside of the host, without rwopt. `rwopt_reader.py` is
`rwopt.export.reader` as it is, `rwopt_weigh.py` holds names and arithmetic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

from rwopt.errors import UserError
from rwopt.export import reader
from rwopt.files import write_text
from rwopt.schedule import Schedule
from rwopt.unet.sites import BRANCHES, FREEU_KINDS, SITE_KINDS

SHARED = {"rwopt_weigh.py": "weigh.py.txt"}

_KIND = re.compile(r".*\.(attentions|resnets)\.\d+(?:\.(\w+))?")


def kind_of(site: str) -> str:
    """The kind of a site by its name: transformer, cross, skip, ..."""
    match = _KIND.fullmatch(site)
    if match is None:
        raise UserError(f"site {site!r} is no place of a U-Net: see `rwopt sites`")
    return match[2] or ("transformer" if match[1] == "attentions" else "resnet")


def check(schedule: Schedule, host: str, kinds: Mapping[str, Collection[str]], branches: Collection[str]) -> None:
    """Raise UserError, naming the site or entry, unless `host` can express all of a schedule.

    kinds: of site, by mode; branches: values of op.cfg_branch.
    """
    model, timestep = schedule.model.get("unet_class", "UNet2DConditionModel"), schedule.noise.get("timestep", "index")
    if model != "UNet2DConditionModel":
        raise UserError(f"model.unet_class is {model}: {host} takes those of UNet2DConditionModel (SD 1.x, 2.x, XL)")
    if timestep != "index":
        raise UserError(f"noise.timestep is {timestep!r}: {host} takes schedules for models that count in timesteps")
    if schedule.cfg_branch not in branches:
        raise UserError(f"op.cfg_branch is {schedule.cfg_branch!r}: {host} weighs all rows alike, use 'both'")
    for site in schedule.sites:
        kind = kind_of(site)
        if kind in kinds[schedule.mode]:
            continue
        if kind in FREEU_KINDS:
            raise UserError(f"site {site} is FreeU's: {host} has FreeU of its own, export the schedule without it")
        if schedule.mode == "output" and kind in (*BRANCHES, *SITE_KINDS) and kind in kinds["residual"]:
            raise UserError(f"site {site} has no mode 'output' in {host}: use residual")
        raise UserError(f"site {site} cannot be weighed in {host}: export the schedule without it")


def template(name: str, **values: str) -> str:
    """The text of a file in `templates/`; `$name` stands for values, if there are any."""
    text = (files("rwopt.export") / "templates" / name).read_text(encoding="utf-8")
    return Template(text).substitute(values) if values else text


def write(schedule: Schedule, place: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write the schedule, reader, shared sources and `texts` (file name -> content) into the folder `place`."""
    shared = {name: template(source) for name, source in SHARED.items()}
    written = [write_text(place / name, text) for name, text in {**shared, **texts}.items()]
    written.append(write_text(place / "rwopt_reader.py", reader.source()))
    return [*written, schedule.save(place / "schedule.json")]


def listed(schedule: Schedule) -> dict[str, str]:
    """What the READMEs say about a schedule."""
    about = schedule.model.get("base_model") or schedule.model.get("family") or "an unnamed model"
    steps = schedule.steps
    return {
        "model": str(about),
        "sites": str(len(schedule.sites)),
        "levels": str(len(schedule.sigmas)),
        "mode": schedule.mode,
        "branch": schedule.cfg_branch,
        "digest": schedule.digest(),
        "steps": "none" if steps is None else json.dumps(steps.to_dict()),
    }
