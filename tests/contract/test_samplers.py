"""What a search scores is what the user gets: its own loop on every sampler and grid against the stock pipeline.

Stock schedulers are made as `rwopt.schedule.samplers` says, and get the grid in the first of these ways that there is:
their own configuration ("own"); what the pipeline's call takes ("timesteps", "sigmas"); by hand, in a subclass that
still steps as stock does ("hand"). In one float32, from the same start and with each picture's own generator.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
from helpers.tiny import save_tiny_pipeline
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model, load_model
from rwopt.sampling.course import Course, course_by_rule
from rwopt.sampling.grids import GRIDS
from rwopt.schedule import Schedule
from rwopt.schedule.noise import timestep_of
from rwopt.schedule.samplers import SAMPLERS
from rwopt.schedule.steps import Steps, whole_timesteps
from rwopt.tasks.cases import Case
from rwopt.tasks.editing import Editing
from rwopt.tasks.generation import Generation
from rwopt.tasks.task import Dials, Task
from rwopt.unet.apply import apply
from rwopt.unet.sites import list_sites

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
KINDS: dict[str, dict[str, Any]] = {
    "epsilon": {"prediction_type": "epsilon"},
    "v": {"prediction_type": "v_prediction"},
    "v-zero-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}
STRENGTHS = {"generation": 1.0, "editing": 0.5}
LISTS = {1.0: "12,2.9,0.3", 0.5: "1.5,0.6,0.1"}
"""A grid of one's own, by strength."""

CONFIGURED = {
    "ddim": ("trailing", "leading"),
    "euler": ("trailing", "leading", "karras", "exponential"),
    "dpmpp_2m": ("trailing", "linspace", "karras", "exponential"),
    "uni_pc": ("trailing", "linspace", "karras", "exponential"),
    "euler_ancestral": ("trailing", "leading"),
    "lcm": (),
    "tcd": (),
}
"""Grids that the configuration of a stock scheduler has (`rwopt.sampling.grids`); below full strength trailing alone,
whose lower part a pipeline takes."""

TAKES = {"ddim": "timesteps", "euler": "sigmas", "dpmpp_2m": "timesteps", "lcm": "timesteps", "tcd": "timesteps"}
"""How a pipeline is given other grids. DDIM's goes to `FIRST_ORDER`, the same solver."""

FIRST_ORDER = ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 1})
PROMPTS = ("portrait, tan skin, short black hair", "portrait, beard")


def number_of_steps(sampler: str, grid: str) -> int:
    """3; stock DDIM steps to T // N below, which on a trailing grid is the next level where N divides T."""
    return 4 if (sampler, grid) == ("ddim", "trailing") else 3


def scheduler_of(sampler: str, grid: str, kind: str, course: Course, full: bool) -> tuple[Any, str]:
    """The stock scheduler for a sampler on a grid, and the way that it gets the grid. `course`: rwopt's own."""
    name, options = SAMPLERS[sampler].scheduler, dict(SAMPLERS[sampler].options)
    known = grid in CONFIGURED[sampler] and (full or grid == "trailing")
    if sampler == "ddim" and not known:
        name, options = FIRST_ORDER[0], dict(FIRST_ORDER[1])
        known = full and grid in CONFIGURED["dpmpp_2m"]
    if sampler.startswith("euler"):
        options["timestep_spacing"] = "linspace"  # of `sigmas` too: how a picture starts hangs on it
    if known and grid in ("karras", "exponential"):
        options[f"use_{grid}_sigmas"] = True
    elif known:
        options |= {"timestep_spacing": grid, "steps_offset": 1}
    how = "own" if known else TAKES.get(sampler, "hand")
    stock = getattr(diffusers, name)
    return (with_grid(stock, course) if how == "hand" else stock)(**SD, **KINDS[kind], **options), how


def with_grid(stock: Any, course: Course) -> Any:
    """A class of schedulers that a grid is put into: nothing else of stock's is another's."""

    def set_timesteps(self: Any, num_inference_steps: int, device: Any = None) -> None:
        stock.set_timesteps(self, num_inference_steps, device)
        assert len(self.timesteps) == len(course)
        self.sigmas = torch.tensor([*course.sigmas, 0.0], dtype=self.sigmas.dtype)
        self.timesteps = torch.tensor([float(t) for t in course.told]).to(self.timesteps.dtype)

    return type("ByHand", (stock,), {"set_timesteps": set_timesteps})


def ddim(**options: Any) -> Any:
    return DDIMScheduler(**SD, steps_offset=1, clip_sample=False, **options)


class Stage:
    """One tiny model: its tasks, and the stock pipelines of its parts."""

    def __init__(self, loaded: Model, kind: str) -> None:
        self.kind = kind
        self.model = replace(loaded, scheduler=ddim(**KINDS[kind]))
        self.sites = [site.id for site in list_sites(self.model.unet)]
        parts = (loaded.vae, loaded.text_encoder, loaded.tokenizer, loaded.unet, self.model.scheduler, None, None)
        self.pipes: dict[str, Any] = {
            "generation": StableDiffusionPipeline(*parts, requires_safety_checker=False),
            "editing": StableDiffusionImg2ImgPipeline(*parts, requires_safety_checker=False),
        }
        for pipe in self.pipes.values():
            pipe.set_progress_bar_config(disable=True)
        draw, size = np.random.default_rng(0), (*self.model.picture_size, 3)
        cases = [Case(f"c{i}", p, source=draw.integers(0, 256, size, np.uint8)) for i, p in enumerate(PROMPTS)]
        self.tasks: dict[str, Task] = {
            "generation": Generation(self.model, cases, 1, sampler="uni_pc", plain=Dials(1.0)),
            "editing": Editing(self.model, cases, 1),
        }

    def ours(
        self, task: str, sampler: str, grid: str, strength: float, schedule: Schedule | None = None
    ) -> Tensor:
        """Latents [2, C, h, w] as a search makes them; a schedule's steps take the place of the grid."""
        made = self.tasks[task]
        made.sampler, made.grid, made.steps = sampler, grid, number_of_steps(sampler, grid)
        latents = made.made(Dials(3.0, strength), schedule).latents
        assert latents is not None
        return latents

    def stock(self, task: str, sampler: str, scheduler: Any, call: dict[str, Any], strength: float) -> Tensor:
        """Latents [2, C, h, w] of the stock pipeline."""
        made, pipe = self.tasks[task], self.pipes[task]
        pipe.scheduler = scheduler
        call = {"prompt": list(PROMPTS), "guidance_scale": 3.0, "output_type": "latent", **call}
        if SAMPLERS[sampler].noisy:
            call["generator"] = made.generators("/fresh")
        if sampler == "tcd":
            call["eta"] = 0.3  # the scheduler's default; pipelines hand it their own, 0
        if task == "generation":
            return torch.as_tensor(pipe(latents=made.noise.clone(), **call).images)
        assert isinstance(made, Editing)
        with pytest.MonkeyPatch.context() as patch:  # the noise of the start; a scheduler's own comes from elsewhere
            patch.setattr(img2img, "randn_tensor", lambda *args, **kwargs: made.noise.clone())
            return torch.as_tensor(pipe(image=made.latents, strength=strength, **call).images)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    folder = save_tiny_pipeline(tmp_path_factory.mktemp("model"))
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    loaded = replace(loaded, unet=unet.eval().requires_grad_(False))  # one level of blocks: half the time
    return {kind: Stage(loaded, kind) for kind in KINDS}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def tolerance(sampler: str, kind: str, strength: float) -> float:
    """Euler's latents are 4096 times as large at first if there is no signal, and lose that in single precision."""
    return 5e-4 if sampler.startswith("euler") and kind == "v-zero-snr" and strength == 1 else 2e-5


def agrees(
    stage: Stage, task: str, sampler: str, grid: str, strength: float, weights: Schedule | None = None,
    limit: float | None = None,
) -> None:  # fmt: skip
    """Holds the contract. weights: of the blocks, None for the plain model; limit: of the distance, None for that of
    float error."""
    table = stage.model.table
    course = course_by_rule(stage.model, number_of_steps(sampler, grid), sampler, grid, strength)
    scheduler, how = scheduler_of(sampler, grid, stage.kind, course, full=strength == 1)
    schedule, call = weights, dict[str, Any](num_inference_steps=len(course))
    if how == "own":
        call = {"num_inference_steps": round(len(course) / strength)}
    elif how == "sigmas":
        call = {"sigmas": [*course.sigmas, 0.0]}
    elif how == "timesteps":  # a file's steps are at whole ones too
        ts = whole_timesteps(timestep_of(course.sigmas, table)).astype(int)
        call = {"timesteps": ts.tolist()}
        if not np.allclose(table[ts], course.sigmas, rtol=1e-9):
            assert sampler not in ("lcm", "tcd")
            steps = Steps(sampler, tuple(table[ts]))
            schedule = replace(weights or Schedule.constant(stage.sites, [10.0, 0.1]), steps=steps)
    got = stage.ours(task, sampler, grid, strength, schedule)
    with apply(stage.pipes[task], weights) if weights is not None else nullcontext():
        # a grid that is given, and not made by stock, starts at the level of the edit
        expected = stage.stock(task, sampler, scheduler, call, strength if how == "own" else 1.0)
    assert got.shape == expected.shape == (2, *stage.model.latent_shape)
    assert got.isfinite().all()
    assert distance(got, expected) < (limit or tolerance(sampler, stage.kind, strength))


@pytest.mark.parametrize("task", STRENGTHS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [*GRIDS, "list"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_scores_what_the_user_gets(
    stages: dict[str, Stage], sampler: str, grid: str, kind: str, task: str
) -> None:
    strength = STRENGTHS[task]
    agrees(stages[kind], task, sampler, LISTS[strength] if grid == "list" else grid, strength)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_of_full_strength(stages: dict[str, Stage], sampler: str, kind: str) -> None:
    agrees(stages[kind], "editing", sampler, "trailing", 1.0)


@pytest.mark.parametrize("task", STRENGTHS)
@pytest.mark.parametrize("grid", ["trailing", "karras", "lnsigma"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_weights_of_blocks_too(stages: dict[str, Stage], sampler: str, grid: str, task: str) -> None:
    """By `rwopt.apply`, which sees what the U-Net is told: half a timestep off where a scheduler rounds that."""
    stage = stages["v"]
    table = np.random.default_rng(0).uniform(0.6, 1.4, (4, len(stage.sites)))
    weights = Schedule(tuple(stage.sites), np.array([12.0, 3.0, 0.5, 0.05]), table)
    rounds = SAMPLERS[sampler].whole and grid != "trailing"
    agrees(stage, task, sampler, grid, STRENGTHS[task], weights, limit=1e-3 if rounds else None)
    plain, got = (stage.ours(task, sampler, grid, STRENGTHS[task], of) for of in (None, weights))
    assert distance(got, plain) > 1e-2


@pytest.mark.parametrize("task", STRENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_contract_tells_samplers_and_grids_apart(stages: dict[str, Stage], kind: str, task: str) -> None:
    stage, strength = stages[kind], STRENGTHS[task]
    ends = {name: stage.ours(task, name, "lnsigma", strength) for name in SAMPLERS}
    ends |= {grid: stage.ours(task, "dpmpp_2m", grid, strength) for grid in GRIDS if grid != "lnsigma"}
    for one, other in combinations(ends, 2):
        limit = max(tolerance(name, kind, strength) for name in (one, other))
        assert distance(ends[one], ends[other]) > 3 * limit, (one, other)


# --- what neither has


@pytest.mark.parametrize("sampler", ["ddim", "lcm", "tcd"])
def test_noise_in_pure_noise_is_refused(stages: dict[str, Stage], sampler: str) -> None:
    """A model of epsilon with zero terminal SNR: stock divides by zero, but where it floors abar."""
    stage = stages["v"]
    options: dict[str, Any] = {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}
    model = replace(stage.model, scheduler=ddim(**options))
    with pytest.raises(UserError, match=f"^task.sampler={sampler} finds no signal[^\n]*$"):
        course_by_rule(model, 4, sampler)
    options |= {**SAMPLERS[sampler].options, "timestep_spacing": "trailing"}
    stock = getattr(diffusers, SAMPLERS[sampler].scheduler)(**SD, **options)
    call = {"num_inference_steps": 4} if sampler == "ddim" else {"timesteps": [999, 749, 499, 249]}
    assert not stage.stock("generation", sampler, stock, call, 1.0).isfinite().all()
    assert len(course_by_rule(model, 4, sampler, strength=0.5)) == 4  # below the top there is signal
    assert len(course_by_rule(model, 4, "dpmpp_2m")) == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_list_above_the_start_of_an_edit_is_refused(stages: dict[str, Stage], sampler: str) -> None:
    with pytest.raises(UserError, match="leaves the noise levels"):
        stages["v"].ours("editing", sampler, LISTS[1.0], 0.5)


def test_every_sampler_and_grid_has_its_way(stages: dict[str, Stage]) -> None:
    assert set(CONFIGURED) == set(SAMPLERS)
    ways: dict[str, set[str]] = {}
    for sampler in SAMPLERS:
        for grid in (*GRIDS, LISTS[1.0]):
            course = course_by_rule(stages["v"].model, 3, sampler, grid)
            ways.setdefault(scheduler_of(sampler, grid, "v", course, full=True)[1], set()).add(sampler)
    assert ways["hand"] == {"uni_pc", "euler_ancestral"} == {s for s in SAMPLERS if s not in TAKES}
