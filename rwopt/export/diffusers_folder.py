"""A folder for people with diffusers and no rwopt: the schedule, one Python file that applies it, ten lines to read."""

from __future__ import annotations

import inspect
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from rwopt.errors import UserError
from rwopt.export import reader
from rwopt.export.ldm import kind_of, listed
from rwopt.files import write_text
from rwopt.schedule import Schedule
from rwopt.schedule.samplers import SAMPLERS
from rwopt.unet.dials import OPTIONS, STEPS_LIKE, stock_of
from rwopt.unet.sites import BRANCHES, FREEU_KINDS

ABOUT = "a folder with the schedule and one Python file that applies it to a diffusers pipeline, without rwopt"
NEEDS = "torch and diffusers; no FreeU sites, both sides of guidance alike, samplers that count in timesteps"
FOLDER = True

CODE = "rwopt_apply.py"
_FROM = "PART = "  # where the part of `hook` begins that the exported file has
_STOCK = "STOCK: dict[str, Any] = {}"  # what it says of a sampler


def export(schedule: Schedule, place: Path, *, steps: bool = True) -> list[Path]:
    """Write the folder; the files written. steps=False leaves the schedule's steps behind.

    UserError for FreeU's sites, weights of one side of guidance, models that do not count in timesteps, and steps of a
    sampler that takes no grid from a pipeline.
    """
    timestep = schedule.noise.get("timestep", "index")
    schedule = schedule if steps else replace(schedule, steps=None)
    stock = {} if schedule.steps is None else _scheduler(schedule.steps.sampler)
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
    return [
        write_text(place / CODE, code(stock)),
        write_text(place / "README.md", _readme(schedule, stock)),
        schedule.save(place / "schedule.json"),
    ]


def _scheduler(sampler: str) -> dict[str, Any]:
    """The scheduler of diffusers that steps like `sampler` on a grid of one's own, and further arguments of a call."""
    import diffusers

    kind, options = stock_of(sampler)[0]
    if not SAMPLERS[sampler].takes_grid and sampler not in STEPS_LIKE:
        raise UserError(f"steps.sampler is {sampler}, and {kind} takes no grid from a pipeline: give steps=false")
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    further = {name: value for name, value in OPTIONS.items() if name in known and name not in options}
    return {"scheduler": kind, "options": {**further, **options}, "call": dict(SAMPLERS[sampler].call)}


def code(stock: dict[str, Any]) -> str:
    """The Python file: the reader as it is, and the hooks. stock: see `_scheduler`."""
    text = (files("rwopt.export") / "hook.py").read_text(encoding="utf-8")
    text = text[text.index(_FROM) :].replace(_STOCK, f"{_STOCK[:-2]}{stock!r}")
    return f"{reader.source()}\n\nimport inspect  # noqa: E402\nimport warnings\n\nimport torch  # noqa: E402\n\n{text}"


def _readme(schedule: Schedule, stock: dict[str, Any]) -> str:
    about, top = listed(schedule), schedule.sigmas[0]
    call, sampler, free = 'pipe("a cat")', "", "any sampler that counts in timesteps, any number of steps"
    if stock:
        call, free = 'pipe("a cat", **hooks.arguments)', "the file's own steps"
        options = "".join(f", {name}={value!r}" for name, value in stock["options"].items())
        sampler = f"""
    from diffusers import {stock["scheduler"]} as Sampler
    pipe.scheduler = Sampler.from_config(pipe.scheduler.config, timestep_spacing="trailing"{options})"""
    made = f"mode {about['mode']}, made for {about['model']}; digest {about['digest'][:12]}"
    return f"""# A schedule of block weights for diffusers

{about["sites"]} sites at {about["levels"]} noise levels, {made}.
Copy this folder beside your script; torch and diffusers are all it needs. Load LoRA and ControlNet before `apply`,
compile after it. Sites are weighed at the noise level of each call{"" if stock else ", so any scheduler will do"}.

    from {CODE.removesuffix(".py")} import apply{sampler}
    hooks = apply(pipe, "schedule.json", strength=1.0)   # high=, low=: VE sigmas of a window (this file: to {top:g})
    image = {call}.images[0]   # {free}
    hooks.remove()
"""
