"""A folder for people with diffusers and no rwopt: the schedule, one Python file that applies it, ten lines to read."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from rwopt.errors import UserError
from rwopt.export import reader
from rwopt.export.ldm import kind_of, listed
from rwopt.files import write_text
from rwopt.schedule import Schedule
from rwopt.unet.sites import BRANCHES, FREEU_KINDS

ABOUT = "a folder with the schedule and one Python file that applies it to a diffusers pipeline, without rwopt"
NEEDS = "torch and diffusers; no FreeU sites, no steps, both sides of guidance alike, samplers that count in timesteps"
FOLDER = True

CODE = "rwopt_apply.py"
_FROM = "PART = "  # where the part of `hook` begins that the exported file has


def export(schedule: Schedule, place: Path, *, steps: bool = True) -> list[Path]:
    """Write the folder; the files written. steps=False leaves the schedule's steps behind.

    UserError for FreeU's sites, steps, weights of one side of guidance, and models that do not count in timesteps.
    """
    timestep = schedule.noise.get("timestep", "index")
    if schedule.steps is not None and steps:
        raise UserError("the schedule has steps, which diffusers' hooks do not set: give steps=false, or use rwopt")
    if schedule.cfg_branch != "both":
        raise UserError(f"op.cfg_branch is {schedule.cfg_branch!r}: the hooks for diffusers weigh both sides alike")
    if timestep != "index":
        raise UserError(f"noise.timestep is {timestep!r}: the hooks for diffusers look levels up by training timestep")
    for site in schedule.sites:
        kind = kind_of(site)
        if kind in FREEU_KINDS:
            raise UserError(f"site {site} is FreeU's: use pipe.enable_freeu, and export the schedule without it")
        if kind in BRANCHES and schedule.mode == "output":
            raise UserError(f"site {site} has no mode output: use residual")
    plain = replace(schedule, steps=None)
    return [
        write_text(place / CODE, code()),
        write_text(place / "README.md", _readme(plain)),
        plain.save(place / "schedule.json"),
    ]


def code() -> str:
    """The Python file: the reader as it is, and the hooks."""
    text = (files("rwopt.export") / "hook.py").read_text(encoding="utf-8")
    return f"{reader.source()}\n\nimport torch  # noqa: E402\n\n{text[text.index(_FROM) :]}"


def _readme(schedule: Schedule) -> str:
    about, top = listed(schedule), schedule.sigmas[0]
    made = f"mode {about['mode']}, made for {about['model']}; digest {about['digest'][:12]}"
    return f"""# A schedule of block weights for diffusers

{about["sites"]} sites at {about["levels"]} noise levels, {made}.
Copy this folder beside your script; torch and diffusers are all it needs. Load LoRA and ControlNet before `apply`,
compile after it. Sites are weighed at the noise level of each call, so any scheduler and number of steps will do.

    from {CODE.removesuffix(".py")} import apply
    hooks = apply(pipe, "schedule.json", strength=1.0)   # high=, low=: VE sigmas of a window (this file: to {top:g})
    image = pipe("a cat").images[0]                      # any sampler that counts in timesteps, any number of steps
    hooks.remove()
"""
