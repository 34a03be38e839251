"""The main job on models and pictures of one's own: twins of each family, prompts in a text file, photos in a folder.

What the search scored is what stock diffusers makes of the file that it leaves behind.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from helpers.families import FAMILIES, save_family, save_single_file
from PIL import Image

from rwopt import config
from rwopt.progress import Silent
from rwopt.schedule import Schedule
from rwopt.schedule.samplers import SAMPLERS
from rwopt.search.search import Search
from rwopt.tasks import Dials
from rwopt.unet.apply import apply

WORDS = ("portrait, beard", "tan skin", "short black hair", "pale skin, glasses", "hoodie", "brown hair, calm eyes")
SMALL = ["task.batch=2", "task.steps=2", "task.teacher.steps=4", "tuner.trials=2", "gradient.updates=1",
         "gradient.batch=2", "weights.group_by=kind", "steps.samplers=[ddim]", "steps.grids=[trailing]",
         "probe.cases=1", "arms=[plain,learned]", "track.wandb=off", "model.dtype=float32"]  # fmt: skip
NO_JUDGES = ["objective.report={teacher.ssim: true}"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"{words}, number {i}" for i in range(15) for words in WORDS) + "\n")
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of unlike sizes, with one wish for all."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for i, (width, height) in enumerate([(80, 64), (64, 96), (128, 70), (65, 65), (200, 64)] * 3):
        pixels = draw.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"photo {i}.png")
    (folder / "instruction.txt").write_text("portrait, pale skin\n")
    return folder


def searched(folder: Path, recipe: str, *changes: str) -> Search:
    settings = config.load(recipe, [*SMALL, *NO_JUDGES, *changes])
    settings.objective.report = {"teacher.ssim": True}
    search = Search(settings, folder, Silent())
    assert search.preflight().lines
    search.run("rwopt search")
    return search


def stock_latents(search: Search, pipe: Any, file: Path) -> torch.Tensor:
    """What a stock pipeline makes of the test cases with the file that a search left, and with its arguments alone."""
    task, schedule = search.experiment.splits.task("test"), Schedule.load(file)
    assert schedule.steps is not None
    sampler = SAMPLERS[schedule.steps.sampler]
    kind = getattr(diffusers, sampler.scheduler)
    options = {**sampler.options, "timestep_spacing": "trailing"}
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(torch.float32)
    with apply(pipe, file) as handle:
        call = {"guidance_scale": search.experiment.base.guidance, **handle.arguments}
        found: torch.Tensor = pipe(
            [case.caption for case in task.cases], latents=task.noise.clone(), output_type="latent",
            generator=task.generators("/fresh"), **call,
        ).images  # fmt: skip
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_search_on_each_family_gives_a_file_that_stock_diffusers_makes_the_same_of(
    tmp_path: Path, prompts: Path, family: str
) -> None:
    place = save_family(family, tmp_path / "model")
    sampler = "lcm" if family == "lcm" else "dpmpp_2m"
    guidance = ["steps.learn=[clock,told]"] if family == "lcm" else []  # its U-Net is told the scale, and has no rows
    search = searched(
        tmp_path / "run", "few-steps", f"model.name={place}", f"task.cases={prompts}", f"task.sampler={sampler}",
        "task.train=3", "task.validation=2", "task.test=3", *guidance,
    )  # fmt: skip
    file = tmp_path / "run" / "schedule.json"
    task = search.experiment.splits.task("test")
    mine = task.made(Dials(search.experiment.base.guidance), Schedule.load(file)).latents
    assert mine is not None
    pipe = diffusers.DiffusionPipeline.from_pretrained(place)
    torch.testing.assert_close(stock_latents(search, pipe, file), mine, rtol=2e-3, atol=2e-3)
    assert not math.isnan(float(mine.sum()))


def test_a_single_file_and_a_folder_give_the_same_schedule(tmp_path: Path, prompts: Path) -> None:
    place = save_family("sd1", tmp_path / "model")
    single = save_single_file(place, tmp_path / "model.safetensors")
    cases = [f"task.cases={prompts}", "task.train=3", "task.validation=2", "task.test=3"]
    searched(tmp_path / "folder", "few-steps", f"model.name={place}", *cases)
    searched(tmp_path / "file", "few-steps", f"model.name={single}", f"model.config={place}", *cases)
    one, other = (Schedule.load(tmp_path / run / "schedule.json") for run in ("folder", "file"))
    np.testing.assert_allclose(one.weights, other.weights, rtol=1e-4)
    assert one.steps is not None
    assert other.steps is not None
    np.testing.assert_allclose(one.steps.told, other.steps.told, rtol=1e-4)


def test_photos_of_unlike_sizes_are_edited_and_what_was_done_is_said(tmp_path: Path, photos: Path) -> None:
    place = save_family("sdxl", tmp_path / "model")
    search = searched(
        tmp_path / "run", "few-steps-editing", f"model.name={place}", f"task.cases={photos}", "task.train=3",
        "task.validation=1", "task.test=2", "task.size=[64,80]",
    )  # fmt: skip
    assert search.experiment.model.picture_size == (64, 80)
    assert (tmp_path / "run" / "grid.png").exists()
    said = [line for line in search.preflight().lines if line.startswith("pictures:")]
    assert any("cropped" in line for line in said)
    schedule = Schedule.load(tmp_path / "run" / "schedule.json")
    assert schedule.calibrated["resolution"] == [64, 80]


def test_changed_cases_are_noticed_on_resume(tmp_path: Path, prompts: Path) -> None:
    from rwopt.errors import UserError

    own = tmp_path / "own.txt"
    own.write_text(prompts.read_text())
    place = save_family("sd1", tmp_path / "model")
    changes = [*SMALL, f"model.name={place}", f"task.cases={own}", "task.train=3", "task.validation=2", "task.test=3"]
    settings = config.load("few-steps", changes)
    Search(settings, tmp_path / "run", Silent())
    own.write_text(prompts.read_text().replace("beard", "moustache"))
    with pytest.raises(UserError, match=r"^task.cases=[^\n]* has changed[^\n]*use a new folder$"):
        Search(settings, tmp_path / "run", Silent())
