"""ComfyUI: a folder for `custom_nodes/` with two nodes, the schedule in it.

`rwopt: apply schedule` weighs a MODEL's blocks; `rwopt: sampler steps` gives SamplerCustom the file's own sampler,
noise levels, told levels and guidance. Sites are weighed by object patches of `forward`, exact at each site, which
work with the patches of others; weights are looked up by sigma in a wrapper of `apply_model`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rwopt.errors import UserError
from rwopt.export.ldm import check, listed, template, write
from rwopt.schedule import Schedule
from rwopt.unet.sites import BRANCHES, SITE_KINDS

ABOUT = "a custom node folder for ComfyUI (SD 1.x, 2.x and SDXL): copy it into custom_nodes/"
NEEDS = "ComfyUI of December 2024 or later; no FreeU sites (it has a node), branch sites in mode residual only"
FOLDER = True

KINDS = {"residual": SITE_KINDS, "output": tuple(kind for kind in SITE_KINDS if kind not in BRANCHES)}
SAMPLERS = ("euler", "dpmpp_2m", "ddim", "uni_pc", "euler_ancestral", "lcm")
"""Samplers of a file's steps that ComfyUI has."""


def export(schedule: Schedule, place: Path, *, steps: bool = True) -> list[Path]:
    """Write the node folder `place`; the files written.

    steps: take the file's steps along; without them the weights are used with any sampler. UserError for sites, modes
    and samplers that ComfyUI cannot express.
    """
    check(schedule, "ComfyUI", KINDS, ("both", "cond", "uncond"))
    schedule = schedule if steps else replace(schedule, steps=None)
    if schedule.steps is not None and schedule.steps.sampler not in SAMPLERS:
        raise UserError(f"steps.sampler is {schedule.steps.sampler}, which ComfyUI has not: give steps=false")
    return write(schedule, place, {
        "__init__.py": template("comfyui_init.py.txt"),
        "nodes.py": template("comfyui_nodes.py.txt"),
        "pyproject.toml": template("comfyui_pyproject.toml.txt"),
        "README.md": template("comfyui_readme.md.txt", **listed(schedule)),
        "example_workflow.json": json.dumps(workflow(schedule), indent=2) + "\n",
    })  # fmt: skip


def workflow(schedule: Schedule) -> dict[str, dict[str, Any]]:
    """A workflow in ComfyUI's API format, text to picture; with the file's own sampler if it has steps."""
    size = 1024 if "xl" in str(schedule.model.get("family", "")).lower() else 512
    nodes: dict[str, dict[str, Any]] = {}

    def node(name: str, kind: str, **inputs: Any) -> None:
        nodes[name] = {"class_type": kind, "inputs": inputs}  # no title of its own: the window shows the display name

    node("1", "CheckpointLoaderSimple", ckpt_name="model.safetensors")
    node("2", "RwoptApplySchedule", model=["1", 0], schedule="schedule.json", strength=1.0, start_percent=0.0,
         end_percent=1.0)  # fmt: skip
    node("3", "CLIPTextEncode", clip=["1", 1], text="a photo of a lighthouse at dawn")
    node("4", "CLIPTextEncode", clip=["1", 1], text="")
    node("5", "EmptyLatentImage", width=size, height=size, batch_size=1)
    common = {"positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0], "cfg": 7.0}
    if schedule.steps is None:
        calls = schedule.calibrated.get("num_inference_steps", 20)
        node("6", "KSampler", model=["2", 0], seed=0, steps=int(calls), sampler_name="dpmpp_2m", scheduler="simple",
             denoise=1.0, **common)  # fmt: skip
    else:
        node("9", "RwoptSamplerSteps", model=["2", 0], schedule="schedule.json")
        node("6", "SamplerCustom", model=["9", 0], add_noise=True, noise_seed=0, sampler=["9", 1], sigmas=["9", 2],
             **common)  # fmt: skip
    node("7", "VAEDecode", samples=["6", 0], vae=["1", 2])
    node("8", "SaveImage", images=["7", 0], filename_prefix="rwopt")
    return nodes
