"""A schedule's steps in stock pipelines, `pipe(..., **handle.arguments)`, against loops written out here."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from helpers import pipelines
from helpers.samplers import SD
from helpers.small import hooks_of
from helpers.twins import ids_of, make
from torch import Tensor

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import noise_table, sigma_at
from rwopt.schedule.steps import Steps
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment

TABLE = noise_table(SD)
GRID, TOLD, GUIDANCE = (999, 700, 420, 90), (999.0, 660.25, 433.5, 40.0), (5.0, 2.0, 7.5, 3.0)
DPM = {"algorithm_type": "dpmsolver++", "solver_order": 2}


def steps(sampler: str = "dpmpp_2m", grid: Sequence[float] = GRID, **given: Any) -> Steps:
    dials = {"told": sigma_at(TOLD[-len(grid) :], TABLE), "guidance": GUIDANCE[-len(grid) :]} | given
    return Steps(sampler, tuple(sigma_at(grid, TABLE)), **dials)


def ramp(unet: Any, of: Steps) -> Schedule:
    ids = ids_of(unet, ("transformer", "cross", "resnet"))
    weights = np.random.default_rng(0).uniform(0.6, 1.4, (4, len(ids)))
    return Schedule(tuple(ids), np.array([12.0, 3.0, 0.5, 0.05]), weights, steps=of)


def build(kind: Any, scheduler: Any, net: str = "sd") -> tuple[Any, dict[str, Any]]:
    """A pipeline and a call of it without guidance and steps, which the file brings."""
    pipe = pipelines.build(kind, make(net).unet, scheduler=scheduler)
    call = pipelines.words() | (pipelines.pooled() if "XL" in kind.__name__ else {})
    if "Img2Img" in kind.__name__:
        call["image"] = pipelines.IMAGE
    return pipe, {name: value for name, value in call.items() if name not in ("guidance_scale", "num_inference_steps")}


def loop(pipe: Any, scheduler: Any, schedule: Schedule, x: Tensor, **extra: Any) -> Tensor:
    """The oracle: grid, told timesteps, guidance and weights [S] of each call by hand. `scheduler` has its grid."""
    explicit = Attachment(copy.deepcopy(pipe.unet), schedule.sites)
    text = torch.cat([pipelines.WORDS[1:], pipelines.WORDS[:1]]).double()
    assert schedule.steps is not None
    told = TOLD[-len(schedule.steps) :] if schedule.steps.told else scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps):
        weights = torch.tensor(schedule.at(float(TABLE[int(t)])), dtype=torch.float32)
        pair = scheduler.scale_model_input(torch.cat([x, x]), t)
        negative, positive = explicit(pair, torch.tensor(told[i]), text, weights, **extra).chunk(2)
        out = negative + schedule.steps.guidance[i] * (positive - negative)
        x = scheduler.step(out, t, x).prev_sample
    return x


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


SAMPLERS = {
    "dpmpp_2m": DPMSolverMultistepScheduler(**SD, **DPM),
    "ddim": DPMSolverMultistepScheduler(**SD, solver_order=1),
    "euler": EulerDiscreteScheduler(**SD, timestep_spacing="trailing"),
}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_text_to_picture_equals_a_loop_by_hand(sampler: str, told: bool) -> None:
    pipe, call = build(StableDiffusionPipeline, copy.deepcopy(SAMPLERS[sampler]))
    schedule = ramp(pipe.unet, steps(sampler, **({} if told else {"told": ()})))
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(timesteps=list(GRID))
    expected = loop(pipe, scheduler, schedule, pipelines.START.double() * scheduler.init_noise_sigma)
    with apply(pipe, schedule) as handle, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        close(pipelines.run(pipe, call | {"latents": pipelines.START.double()} | handle.arguments), expected)
        again = pipelines.run(pipe, call | {"latents": pipelines.START.double()} | handle.arguments)
        close(again, expected)  # nothing of the first picture is left
    assert not hooks_of(pipe.unet)


def test_first_order_dpm_is_ddim() -> None:
    """So a file for `ddim` may be applied to it; against the DDIM formula, written out."""
    pipe, call = build(StableDiffusionPipeline, copy.deepcopy(SAMPLERS["ddim"]))
    schedule = ramp(pipe.unet, steps("ddim"))
    abar = [float(a) for a in pipe.scheduler.alphas_cumprod[list(GRID)]] + [1.0]

    class Ddim:
        timesteps = torch.tensor(GRID)
        calls = 0

        def scale_model_input(self, x: Tensor, t: Tensor) -> Tensor:
            return x

        def step(self, out: Tensor, t: Tensor, x: Tensor) -> Any:
            here, there = abar[self.calls : self.calls + 2]
            self.calls += 1
            clean = (x - (1 - here) ** 0.5 * out) / here**0.5
            return SimpleNamespace(prev_sample=there**0.5 * clean + (1 - there) ** 0.5 * out)

    expected = loop(pipe, Ddim(), schedule, pipelines.START.double())
    with apply(pipe, schedule) as handle:
        close(pipelines.run(pipe, call | {"latents": pipelines.START.double()} | handle.arguments), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_starts_at_the_level_of_its_grid(sampler: str) -> None:
    pipe, call = build(StableDiffusionImg2ImgPipeline, copy.deepcopy(SAMPLERS[sampler]))
    schedule = ramp(pipe.unet, steps(sampler, GRID[1:]))
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(timesteps=list(GRID[1:]))
    # the pipeline's own start: picture to latents, and then noise, from one generator
    draw = torch.Generator().manual_seed(0)
    picture = pipe.image_processor.preprocess(pipelines.IMAGE).double()
    latents = pipe.vae.encode(picture).latent_dist.sample(draw) * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=draw, dtype=torch.float64)
    x = scheduler.add_noise(latents, noise, scheduler.timesteps[:1])
    expected = loop(pipe, scheduler, schedule, x)
    with apply(pipe, schedule) as handle:
        assert handle.arguments["strength"] == 1
        close(pipelines.run(pipe, call | handle.arguments), expected)


@pytest.mark.parametrize("kind", [StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline])
def test_sdxl_is_told_what_the_file_says(kind: Any) -> None:
    pipe, call = build(kind, copy.deepcopy(SAMPLERS["dpmpp_2m"]), "sdxl")
    seen: list[tuple[float, float]] = []
    pipe.unet.time_proj.register_forward_pre_hook(
        lambda _, args: seen.append((float(args[0][0]), pipe.guidance_scale))
    )
    with apply(pipe, ramp(pipe.unet, steps())) as handle:
        pipelines.run(pipe, call | handle.arguments)
    np.testing.assert_allclose(seen, np.stack([TOLD, GUIDANCE], 1), atol=0.01)


@pytest.mark.parametrize(("name", "scheduler"), [("lcm", LCMScheduler(**SD)), ("tcd", TCDScheduler(**SD))])
def test_samplers_of_few_steps(name: str, scheduler: Any) -> None:
    pipe, call = build(StableDiffusionPipeline, scheduler)
    schedule = ramp(pipe.unet, steps(name))
    told: list[float] = []
    with apply(pipe, schedule) as handle:
        pipe.unet.time_proj.register_forward_pre_hook(lambda _, args: told.append(float(args[0][0])))
        pipelines.run(pipe, call | handle.arguments)
    assert pipe.scheduler.timesteps.tolist() == list(GRID)
    np.testing.assert_allclose(told, TOLD, atol=0.01)


def test_guidance_that_is_an_input_of_the_unet_is_one_number() -> None:
    pipe = pipelines.build(
        LatentConsistencyModelPipeline, make("sd", time_cond_proj_dim=8).unet, scheduler=LCMScheduler(**SD)
    )
    call = {"prompt_embeds": pipelines.WORDS[:1].double(), "output_type": "latent"}
    with apply(pipe, ramp(pipe.unet, steps("lcm", guidance=(3.0,) * 4))) as handle:
        assert handle.arguments == {"timesteps": list(GRID), "guidance_scale": 3.0}
        pipelines.run(pipe, call | handle.arguments)
        handle.schedule = ramp(pipe.unet, steps("lcm"))
        with pytest.raises(UserError, match=r"guides all calls by one scale, and steps\.guidance has 4"):
            assert handle.arguments


def test_pipelines_that_copy_their_scale_are_refused() -> None:
    """The XL pipeline with a ControlNet takes the same arguments, and its loop reads its own copy of the scale."""
    pipe, _ = pipelines.TASKS["sdxl controlnet"]()
    pipe.scheduler = copy.deepcopy(SAMPLERS["dpmpp_2m"])
    with apply(pipe, ramp(pipe.unet, steps())) as handle, pytest.raises(UserError, match="by one scale"):
        assert handle.arguments
    with apply(pipe, ramp(pipe.unet, steps(guidance=()))) as handle:
        assert handle.arguments == {"timesteps": list(GRID)}


def test_an_inpainting_pipeline_takes_a_grid_from_the_top_only() -> None:
    pipe = pipelines.build(StableDiffusionInpaintPipeline, make("sd").unet, scheduler=SAMPLERS["dpmpp_2m"])
    with apply(pipe, ramp(pipe.unet, steps())) as handle:
        assert handle.arguments["strength"] == 1
        handle.schedule = ramp(pipe.unet, steps(grid=GRID[1:]))
        with pytest.raises(UserError, match="steps start at timestep 700, and StableDiffusionInpaintPipeline starts"):
            assert handle.arguments


# ------------------------------------------------------------------------------------------------------ refusals


def refused(pipe: Any, of: Steps) -> str:
    with apply(pipe, ramp(pipe.unet, of)) as handle, pytest.raises(UserError) as error:
        assert handle.arguments
    assert "\n" not in str(error.value)
    return str(error.value)


WRONG = {
    "another class": ("dpmpp_2m", DDIMScheduler(**SD), "dpmpp_2m needs DPMSolverMultistepScheduler, not DDIMScheduler"),
    "ddim's own": ("ddim", DDIMScheduler(**SD), "a grid for ddim needs DPMSolverMultistepScheduler, not DDIMScheduler"),
    "order": ("dpmpp_2m", DPMSolverMultistepScheduler(**SD, solver_order=3), "has solver_order=3, and a grid for"),
    "order of ddim": ("ddim", DPMSolverMultistepScheduler(**SD), "has solver_order=2, and a grid for ddim needs 1"),
    "noisy": ("dpmpp_2m", DPMSolverMultistepScheduler(**SD, algorithm_type="sde-dpmsolver++"), "algorithm_type='sde-"),
    "karras": ("dpmpp_2m", DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True), "has use_karras_sigmas=True"),
    "lu": ("ddim", DPMSolverMultistepScheduler(**SD, solver_order=1, use_lu_lambdas=True), "has use_lu_lambdas=True"),
    "heun": ("dpmpp_2m", DPMSolverMultistepScheduler(**SD, solver_type="heun"), "has solver_type='heun'"),
    "end": ("euler", EulerDiscreteScheduler(**SD, final_sigmas_type="sigma_min"), "has final_sigmas_type='sigma_min'"),
    "log": ("euler", EulerDiscreteScheduler(**SD, interpolation_type="log_linear"), "interpolation_type='log_linear'"),
    "beta": ("euler", EulerDiscreteScheduler(**SD, use_beta_sigmas=True), "has use_beta_sigmas=True"),
    "leading": ("euler", EulerDiscreteScheduler(**SD, timestep_spacing="leading"), "has timestep_spacing='leading'"),
    "karras of another": ("euler", DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True), "needs EulerDiscrete"),
    "bh2": ("dpmpp_2m", diffusers.UniPCMultistepScheduler(**SD), "not UniPCMultistepScheduler"),
    "flow": ("dpmpp_2m", DPMSolverMultistepScheduler(**SD, use_flow_sigmas=True), "has use_flow_sigmas=True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_scheduler_that_is_not_the_files_is_refused_with_a_line_that_mends_it(name: str) -> None:
    sampler, scheduler, says = WRONG[name]
    pipe, call = build(StableDiffusionPipeline, scheduler)
    message = refused(pipe, steps(sampler))
    assert says in message
    remedy = message.split(": write ")[1]
    exec(remedy, {"pipe": pipe, **{k.__name__: k for k in (DPMSolverMultistepScheduler, EulerDiscreteScheduler)}})
    with apply(pipe, ramp(pipe.unet, steps(sampler))) as handle:
        assert handle.arguments["timesteps"] == list(GRID)
        assert pipelines.run(pipe, call | handle.arguments).isfinite().all()


@pytest.mark.parametrize("sampler", ["uni_pc", "euler_ancestral"])
def test_samplers_that_take_no_grid_are_refused(sampler: str) -> None:
    pipe, _ = build(StableDiffusionPipeline, DDIMScheduler(**SD))
    message = refused(pipe, steps(sampler))
    assert "takes no grid from a pipeline" in message
    assert message.endswith("use its weights without its steps, dataclasses.replace(schedule, steps=None)")
    assert refused(pipe, steps("dpmpp_2s")).startswith("steps.sampler=dpmpp_2s: did you mean dpmpp_2m?")


def test_targets_without_such_a_call_are_refused() -> None:
    pipe, _ = build(StableDiffusionPipeline, copy.deepcopy(SAMPLERS["dpmpp_2m"]))
    bare = replace(ramp(pipe.unet, steps()), noise=SD)
    with apply(pipe.unet, bare) as handle, pytest.raises(UserError, match="UNet2DConditionModel is no pipeline"):
        assert handle.arguments
    named = SimpleNamespace(unet=pipe.unet, scheduler=pipe.scheduler)
    assert "the call of SimpleNamespace takes no timesteps" in refused(named, steps())
    other, _ = pipelines.TASKS["instruct pix2pix"]()
    other.scheduler = pipe.scheduler
    assert "InstructPix2PixPipeline takes no timesteps" in refused(other, steps())


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [
        ((157.4, 3.0), r"steps.sigmas\[0\] is 157.4, at no whole timestep of this pipeline's noise \(14.6146 to"),
        (tuple(sigma_at([999, 500.5], TABLE)), r"steps.sigmas\[1\] is 1.62098, at no whole timestep"),
        (tuple(sigma_at([999, 500.1, 499.9], TABLE)), r"steps.sigmas\[2\] is"),
    ],
)
def test_levels_of_another_models_noise_are_refused(sigmas: tuple[float, ...], says: str) -> None:
    pipe, _ = build(StableDiffusionPipeline, copy.deepcopy(SAMPLERS["dpmpp_2m"]))
    with apply(pipe, ramp(pipe.unet, Steps("dpmpp_2m", sigmas))) as handle, pytest.raises(UserError, match=says):
        assert handle.arguments


@pytest.mark.parametrize("noise", [{}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "linear"}])
def test_levels_that_a_file_rounds_are_found_again(noise: dict[str, Any]) -> None:
    """At every timestep, and by the table of a scheduler in single precision."""
    pipe, _ = build(StableDiffusionPipeline, DPMSolverMultistepScheduler(**SD | noise, **DPM))
    table = noise_table({**SD, **noise, "zero_snr": bool(noise.get("rescale_betas_zero_snr"))})
    schedule = ramp(pipe.unet, Steps("dpmpp_2m", tuple(table[::-1])))
    with apply(pipe, Schedule.from_dict(schedule.to_dict())) as handle:
        assert handle.arguments["timesteps"] == list(range(999, -1, -1))
