"""A1111's web UI and Forge: one extension folder for both.

In Forge a modifier around each layer weighs transformers and resnets, its attention and output-block patches the rest;
in A1111, which has no patches, torch hooks on the layers do, for as long as pictures are made. ControlNet replaces the
U-Net's forward in both, and these layers are still called. Neither host's code was run here: the tests use stand-ins.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rwopt.errors import UserError, one_of
from rwopt.export.ldm import check, listed, template, write
from rwopt.schedule import Schedule

ABOUT = "an extension for Stable Diffusion web UI, A1111's or Forge: copy it into extensions/"
NEEDS = "SD 1.x, 2.x or SDXL; no FreeU sites; A1111 weighs no skips and all rows alike, Forge no feed-forward"
FOLDER = True

HOSTS = {
    "a1111": ({"residual": ("transformer", "self", "cross", "ff", "resnet"), "output": ("transformer", "resnet")},
              ("both",)),
    "forge": ({"residual": ("transformer", "self", "cross", "skip"), "output": ("transformer", "resnet", "skip")},
              ("both", "cond", "uncond")),
}  # fmt: skip
"""Host -> (kinds of site by mode, values of op.cfg_branch)."""


def export(schedule: Schedule, place: Path, *, host: str = "both", steps: bool = True) -> list[Path]:
    """Write the extension folder `place`; the files written.

    host: a1111, forge, or both: what it has to work in. steps: false leaves the file's steps out, which a web UI cannot
    follow: with them the export is refused.
    """
    one_of((*HOSTS, "both"), "host", host)
    for name in HOSTS if host == "both" else (host,):
        check(schedule, {"a1111": "A1111", "forge": "Forge"}[name], *HOSTS[name])
    if schedule.steps is not None:
        if steps:
            raise UserError("steps cannot be followed by a web UI, whose samplers have their own: give steps=false")
        schedule = replace(schedule, steps=None)
    return write(schedule, place, {
        "scripts/rwopt_schedule.py": template("webui_script.py.txt"),
        "README.md": template("webui_readme.md.txt", **listed(schedule)),
    })  # fmt: skip
