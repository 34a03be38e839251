"""The teacher: what stock diffusers makes in many calls of the same noise, made once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from helpers.tiny import save_tiny_pipeline

from rwopt.models import Model, load_model
from rwopt.objectives import make_objective
from rwopt.sampling.course import course_by_rule
from rwopt.tasks import Dials, Task, make_task
from rwopt.tasks.cases import load_cases
from rwopt.tasks.teacher import teach, teacher_latents

DIALS = Dials(3.0, 0.7)
CALLS = 12


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def model(pipeline: Path) -> Model:
    return load_model(str(pipeline), device="cpu", dtype="float32")


def task_of(model: Model, name: str = "generation", **options: Any) -> Task:
    return make_task(name, model, load_cases("avatars", "train", name, 3), 2, draws=2, **options)


def test_it_is_the_stock_pipelines_picture_from_the_same_noise(model: Model, pipeline: Path) -> None:
    task = task_of(model, batch=4)
    assert teach(task, DIALS, course_by_rule(model, CALLS, "dpmpp_2m")) == 2 * CALLS  # six pictures, in two batches
    stock = StableDiffusionPipeline.from_pretrained(pipeline)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(
        stock.scheduler.config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="trailing"
    )
    stock.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": CALLS, "guidance_scale": DIALS.guidance}
    prompts = [c.caption for c in task.cases]
    latents = stock(prompts, latents=task.noise.clone(), output_type="latent", **call).images
    torch.testing.assert_close(task.teacher_latents, latents, rtol=1e-4, atol=1e-4)
    images = stock(prompts, latents=task.noise.clone(), output_type="pt", **call).images
    torch.testing.assert_close(task.teacher, images, rtol=0, atol=1e-4)
    assert not torch.allclose(task.images(DIALS), images, atol=1e-2)  # in two calls of DDIM


@pytest.mark.parametrize("name", ["generation", "editing"])
def test_it_is_kept_and_read_without_a_call(model: Model, tmp_path: Path, name: str) -> None:
    file, first, again = tmp_path / "teacher" / "a.safetensors", task_of(model, name), task_of(model, name)
    course = course_by_rule(model, CALLS, "dpmpp_2m", strength=first.reach(DIALS))
    before = model.calls
    assert teach(first, DIALS, course, file) == model.calls - before == CALLS
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    written = file.read_bytes()
    before = model.calls
    assert teach(again, DIALS, course, file) == CALLS  # what it took then
    assert model.calls == before
    assert file.read_bytes() == written
    assert first.teacher is not None
    assert first.teacher_latents is not None
    assert torch.equal(again.teacher, first.teacher)  # type: ignore[arg-type]
    assert torch.equal(again.teacher_latents, first.teacher_latents)  # type: ignore[arg-type]


def test_what_is_made_on_the_teachers_own_course_is_the_teachers(model: Model) -> None:
    """It is the plain model on the task's own start noise, and the pictures of a task know it."""
    task = make_task("editing", model, load_cases("avatars", "train", "editing", 3), CALLS, sampler="dpmpp_2m")
    bare = task.made(DIALS)
    assert bare.teacher is None
    assert bare.teacher_latents is None
    teach(task, DIALS, task.course(DIALS))
    made = task.made(DIALS)
    assert torch.equal(made.latents, made.teacher_latents)  # type: ignore[arg-type]
    assert (make_objective("teacher.latent")(made) == 0).all()
    assert (make_objective("teacher.psnr")(made) == 100).all()
    other = make_objective("teacher.latent")(task.made(Dials(3.0, 0.5)))
    assert (other > 0.01).all()
    latents = teacher_latents(task, DIALS, task.course(DIALS))
    assert torch.equal(latents, made.latents)  # type: ignore[arg-type]
    assert not latents.requires_grad


def test_it_can_be_made_by_a_sampler_with_noise_of_its_own(model: Model) -> None:
    """Each picture's noise on the way is its own, in whatever batch it is made."""
    latents = []
    for batch in (64, 4):
        task = task_of(model, batch=batch)
        teach(task, DIALS, course_by_rule(model, 5, "euler_ancestral"))
        latents.append(task.teacher_latents)
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-4, atol=1e-4)
