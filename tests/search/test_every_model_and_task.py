"""Every group of models with every group of tasks that it can do: a whole search, to the report and the schedule file,
and the pictures that were scored are those that a stock pipeline makes with that file.

The models are small twins in the layout of the real ones. What decides is the score: that of the stock pipeline's
pictures of the test cases is the one that the search wrote down.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from helpers.families import UNETS, save_family
from PIL import Image
from torch import Tensor

from rwopt import config
from rwopt.config.groups import groups
from rwopt.embedded import FOLDERS
from rwopt.progress import Silent
from rwopt.schedule import Schedule
from rwopt.schedule.samplers import SAMPLERS
from rwopt.search.arms import LEARNED, Arm
from rwopt.search.evaluation import OBJECTIVE
from rwopt.search.search import Search
from rwopt.tasks.task import attach
from rwopt.unet.apply import apply

PLAIN = {"sd15": "sd1", "sd21": "sd2", "sd-turbo": "sd1", "sdxl": "sdxl", "sdxl-turbo": "sdxl", "lcm": "lcm"}
"""A twin for each group of models that make pictures of text."""

FAMILY = PLAIN | {"instruct-pix2pix": "sd1", "sdxl-instruct-pix2pix": "sdxl", "sd15-inpainting": "sd1",
                  "sdxl-inpainting": "sdxl"}  # fmt: skip
"""And for each that is made for edits."""

ANY = ("few-steps", "generation", "sdedit", "inversion")
"""Groups of tasks for every plain model."""

MADE_FOR: dict[str, tuple[tuple[str, int], ...]] = {
    "instruct": (("instruct-pix2pix", 8), ("sdxl-instruct-pix2pix", 8)),
    "inpaint": (("sd15-inpainting", 9), ("sdxl-inpainting", 9), ("sd15", 4), ("sd-turbo", 4), ("sdxl", 4)),
    "speed": (("sd15", 4), ("sd-turbo", 4), ("sdxl", 4)),
}
"""Groups of tasks that some models are made for, or (speed) that differ with guidance and family: group of models and
channels of the U-Net."""

CELLS = [(model, task, 4) for model in PLAIN for task in ANY]
CELLS += [(model, task, channels) for task, models in MADE_FOR.items() for model, channels in models]

SMALL = ["task.batch=4", "task.steps=2", "task.teacher.steps=4", "task.train=1", "task.validation=1", "task.test=2",
         "tuner.name=spsa", "tuner.trials=2", "gradient.batch=1", "weights.kinds=[cross]", "weights.group_by=kind",
         "probe.cases=1", "probe.start=none", "arms=[plain,learned]", "track.wandb=off", "model.dtype=float32",
         "model.checkpointing=off"]  # fmt: skip
OWN = {
    "lcm": ["task.sampler=lcm", "steps.learn=[clock,told]"],  # its U-Net is told the scale, and has no rows for it
    "sdxl-instruct-pix2pix": ["task.size=[64,64]"],
    "speed": ["task.steps=4", "task.budget=0.6", "speed.cases=1", "speed.proposals=2", "tuner.dial_trials=0",
              "tuner.name=gradient", "gradient.updates=1", "arms=[plain,plan,learned]"],
}


def test_every_group_has_its_place() -> None:
    known = [name.partition("/")[::2] for name in groups()]
    assert {model for model, _, _ in CELLS} == {name for group, name in known if group == "model"} - {*FOLDERS}
    assert {task for _, task, _ in CELLS} == {name for group, name in known if group == "task"}


Twin = Callable[[str, int], Path]


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Twin:
    """The folder of a family's twin with a U-Net of so many channels, made once."""
    known: dict[tuple[str, int], Path] = {}

    def make(family: str, channels: int) -> Path:
        if (family, channels) not in known:
            place = known[family, channels] = save_family(family, tmp_path_factory.mktemp(family) / "model")
            # stock pipelines draw from the posterior of what they encode, rwopt takes its mean: it has no width here
            vae = AutoencoderKL.from_pretrained(place, subfolder="vae").requires_grad_(False)
            vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -60
            vae.save_pretrained(place / "vae")
            if channels != 4:
                torch.manual_seed(channels)
                UNet2DConditionModel(**UNETS[family], in_channels=channels).save_pretrained(place / "unet")
        return known[family, channels]

    return make


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of the twins' size with captions, wishes and masks."""
    folder, draw, rows = tmp_path_factory.mktemp("cases"), np.random.default_rng(0), []
    words = {"beard": "train", "tan skin": "validation", "short black hair": "test", "pale skin, glasses": "test"}
    for i, (about, split) in enumerate(words.items()):
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")
        mask = np.zeros((64, 64), np.uint8)
        mask[8 : 30 + 4 * i, 16:50] = 255
        Image.fromarray(mask).save(folder / f"{i}.mask.png")
        rows.append({"source_image": f"{i}.png", "mask": f"{i}.mask.png", "split": split,
                     "source_caption": f"portrait, {about}", "caption": f"portrait, {about}, smile mouth"})  # fmt: skip
    (folder / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "cases.jsonl"


def searched(folder: Path, model: str, task: str, place: Path, cases: Path) -> Search:
    changes = [f"model={model}", f"task={task}", *SMALL, f"model.name={place}", f"task.cases={cases}"]
    search = Search(config.load("few-steps", [*changes, *OWN.get(model, []), *OWN.get(task, [])]), folder, Silent())
    assert search.preflight().lines
    search.run("rwopt search")
    return search


def stock(search: Search, place: Path, file: Path) -> Tensor:
    """Latents of the test cases from a stock pipeline with a file, in the way that its pictures are made."""
    task: Any = search.experiment.splits.task("test")
    settings, schedule = search.settings, Schedule.load(file)
    family, kind = search.experiment.model.family, getattr(task, "method", "generation")
    name = f"StableDiffusion{'XL' if family == 'sdxl' else ''}{{}}Pipeline"
    call: dict[str, Any] = {"guidance_scale": search.experiment.base.guidance, "output_type": "latent"}
    if settings.task.sampler == "lcm":  # edits too: its own pipeline for those draws all noise from one generator
        pipe, start = diffusers.LatentConsistencyModelPipeline.from_pretrained(place), started(search)
        call |= {"latents": start, "generator": task.generators("/fresh")}
    elif kind == "sdedit":
        pipe = getattr(diffusers, name.format("Img2Img")).from_pretrained(place)
        call |= {"image": task.latents, "generator": task.generators()}
    elif kind == "instruct":
        pipe = getattr(diffusers, name.format("InstructPix2Pix")).from_pretrained(place)
        call |= {"image": task.references, "latents": task.noise.clone(), "image_guidance_scale": 1.5}
        call |= {"num_inference_steps": settings.task.steps}
    elif kind == "inpaint":
        pipe = getattr(diffusers, name.format("Inpaint")).from_pretrained(place)
        call |= {"image": task.references, "mask_image": task.masks, "latents": task.noise.clone(), "height": 64,
                 "width": 64}  # fmt: skip
    else:
        pipe, start = getattr(diffusers, name.format("")).from_pretrained(place), started(search)
        call |= {"latents": start}
    sampler = SAMPLERS[settings.task.sampler]
    options = {**sampler.options, "timestep_spacing": "trailing"}
    pipe.scheduler = getattr(diffusers, sampler.scheduler).from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    with apply(pipe, schedule) as handle:
        found: Tensor = pipe([case.caption for case in task.cases], **{**call, **handle.arguments}).images
    return found


def started(search: Search) -> Tensor:
    """Where the pictures of the test cases start: noise, or for an inversion what it ended in."""
    task = search.experiment.splits.task("test")
    arm = Arm.load(search.folder / "arms" / f"{LEARNED}.json")
    with attach(search.experiment.model, None) as hooks:
        course = task.course(arm.dials, None if arm.schedule is None else arm.schedule.steps)
        x, _, _ = task.inputs(hooks, arm.dials, slice(None), course)
    return x


@pytest.mark.parametrize(("model", "task", "channels"), CELLS, ids=lambda value: str(value))
def test_a_search_scores_what_a_stock_pipeline_makes_of_its_file(
    tmp_path: Path, twin: Twin, cases: Path, model: str, task: str, channels: int
) -> None:
    place = twin(FAMILY[model], channels)
    search = searched(tmp_path / "run", model, task, place, cases)
    for name in ("schedule.json", "report.html", "grid.png"):
        assert (tmp_path / "run" / name).exists(), name
    latents = stock(search, place, tmp_path / "run" / "schedule.json")
    prepared = search.experiment.splits.task("test")
    scored = search.experiment.objective(prepared.describe(prepared.decoded(latents), latents))
    written = json.loads((tmp_path / "run" / "arms" / f"{LEARNED}.test.json").read_text())[OBJECTIVE]
    np.testing.assert_allclose(scored.numpy(), written, rtol=2e-3, atol=2e-3)
    mine = prepared.made(search.experiment.base, Schedule.load(tmp_path / "run" / "schedule.json")).latents
    torch.testing.assert_close(latents, mine, rtol=5e-3, atol=5e-3)
