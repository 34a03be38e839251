"""Stock pipelines: every task under every sampler sees the schedule at the noise levels of its own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from helpers.oracle import oracle_of
from helpers.pipelines import EXTRA, TASKS, Call, absent, run
from helpers.samplers import SAMPLERS, close, level, meant, ramp, sampler
from helpers.twins import ids_of, state
from torch import Tensor

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import sigma_of, timestep_of
from rwopt.unet.apply import apply

KINDS = ("transformer", "resnet", "skip", "cross")
CASES = [(task, how) for task in TASKS for how in (*SAMPLERS, *EXTRA.get(task, ()))]
PARTIAL = ("image to image", "inpainting", "sdxl base", "sdxl refiner", "video to video")


@pytest.fixture(scope="module")
def pipelines() -> Callable[[str], tuple[Any, Call]]:
    built: dict[str, tuple[Any, Call]] = {}

    def get(name: str) -> tuple[Any, Call]:
        if name not in built:
            built[name] = TASKS[name]()
        return built[name]

    return get


@pytest.mark.filterwarnings("ignore:Should have t")  # of DPM++ SDE's noise: one rounding outside of its range
@pytest.mark.parametrize(("task", "how"), CASES)
def test_every_task_under_every_sampler(pipelines: Any, task: str, how: str) -> None:
    """All ones, an oracle, the sampler's noise levels, no trace."""
    pipe, call = pipelines(task)
    pipe.scheduler = sampler(how)
    if absent(pipe, pipe.scheduler):
        with pytest.raises((TypeError, AttributeError)):
            run(pipe, call)
        return
    unet = pipe.unet
    before, plain, ids = state(unet), run(pipe, call), ids_of(unet, KINDS)
    with apply(pipe, Schedule.constant(ids, [10.0, 0.1])):
        assert torch.equal(run(pipe, call), plain)

    spy, levels = ramp(ids), []
    with apply(pipe, spy):
        spy.seen.clear()

        def ask(unet: Any, args: Any, kwargs: Any) -> None:
            if task == "latent upscaling":
                levels.append(float(pipe.scheduler.sigmas[len(levels)]))
            else:
                levels.append(level(pipe.scheduler, args[1] if len(args) > 1 else kwargs["timestep"]))

        asked = unet.register_forward_pre_hook(ask, with_kwargs=True)
        changed = run(pipe, call)
        asked.remove()
        seen = list(spy.seen)
    assert state(unet) == before
    assert torch.equal(run(pipe, call), plain)
    assert not torch.allclose(changed, plain)

    def weights(t: Any) -> dict[str, float]:
        sigma = float(t.double().mul(4).exp()) if task == "latent upscaling" else meant(pipe.scheduler, t)
        return dict(zip(ids, spy.at(sigma).tolist(), strict=True))

    try:
        pipe.unet = oracle_of(unet, weights)
        close(run(pipe, call), changed)
    finally:
        pipe.unet = unet

    assert len(seen) == len(levels) > 1
    assert (len(seen) < len(pipe.scheduler.timesteps)) == any(word in task for word in PARTIAL)
    if how.startswith(("edm", "svd")) or task == "latent upscaling":
        np.testing.assert_allclose(seen, levels, rtol=1e-4)
    else:  # at most half a timestep beside the sampler's, which some round when they tell the U-Net
        table = sigma_of(pipe.scheduler.alphas_cumprod.numpy())
        off = np.abs(timestep_of(seen, table) - timestep_of(levels, table)).max()
        assert off <= (0.51 if how.startswith(("dpm++ 2m", "unipc")) else 0.02)


def test_pipelines_that_share_a_unet_do_not_mix() -> None:
    first, call = TASKS["text to image"]()
    parts = {name: part for name, part in first.components.items() if name != "scheduler"}
    second = StableDiffusionImg2ImgPipeline(**parts, scheduler=sampler("euler"), requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    late = TASKS["image to image"]()[1]
    ids = ids_of(first.unet, KINDS)
    alone = []
    for pipe, seed, how in ((first, 0, call), (second, 1, late)):
        with apply(pipe, ramp(ids, seed)):
            alone.append(run(pipe, how))
    with apply(first, ramp(ids, 0)), apply(second, ramp(ids, 1)):
        assert torch.equal(run(first, call), alone[0])
        assert torch.equal(run(second, late), alone[1])
        assert torch.equal(run(first, call), alone[0])


# ------------------------------------------------------------------------------- weights of one side of guidance


STILLS = ("text to image", "several per prompt", "image to image", "inpainting", "controlnet", "sdxl base")
PAIRED = (*STILLS, "sdxl refiner", "sdxl inpainting", "sdxl controlnet", "animatediff", "animatediff video to video")


@pytest.mark.parametrize("task", PAIRED)
def test_weights_of_one_side_of_guidance(pipelines: Any, task: str) -> None:
    """Against an oracle that weighs the rows of one half of the batch."""
    pipe, call = pipelines(task)
    pipe.scheduler = sampler("euler")
    unet, ids, plain = pipe.unet, ids_of(pipe.unet, KINDS), run(pipe, call)
    results: dict[str, Tensor] = {}
    rows = 2 * call.get("num_images_per_prompt", 1)
    for branch in ("cond", "uncond", "both"):
        spy = ramp(ids, cfg_branch=branch)
        with apply(pipe, spy):
            results[branch] = run(pipe, call)

        def weights(t: Any, spy: Any = spy, branch: str = branch) -> dict[str, Tensor]:
            table = torch.tensor(spy.at(level(pipe.scheduler, t))).expand(rows, -1).clone()
            if branch != "both":
                table[: rows // 2] = 1 if branch == "cond" else table[: rows // 2]
                table[rows // 2 :] = 1 if branch == "uncond" else table[rows // 2 :]
            return dict(zip(ids, table.T, strict=True))

        try:
            pipe.unet = oracle_of(unet, weights)
            close(run(pipe, call), results[branch])
        finally:
            pipe.unet = unet
    assert not any(torch.allclose(results["both"], other) for other in (results["cond"], results["uncond"], plain))
    with apply(pipe, ramp(ids, cfg_branch="cond")), apply(pipe, ramp(ids, cfg_branch="uncond")):
        close(run(pipe, call), results["both"])


def test_unguided_calls_are_all_conditional(pipelines: Any) -> None:
    pipe, call = pipelines("unguided")
    pipe.scheduler = sampler("euler")
    ids, plain = ids_of(pipe.unet, KINDS), run(pipe, call)
    results = {}
    for branch in ("cond", "uncond", "both"):
        with apply(pipe, ramp(ids, cfg_branch=branch)):
            results[branch] = run(pipe, call)
    assert torch.equal(results["uncond"], plain)
    close(results["cond"], results["both"])
    assert not torch.allclose(results["cond"], plain)


UNKNOWN = ("instruct pix2pix", "stable video diffusion", "kandinsky", "deepfloyd if", "text to video")


@pytest.mark.parametrize("task", UNKNOWN)
@pytest.mark.parametrize("bare", [False, True])
def test_one_side_is_refused_where_the_batch_is_not_known(pipelines: Any, task: str, bare: bool) -> None:
    pipe, _ = pipelines(task)
    before = state(pipe.unet)
    target = pipe.unet if bare else pipe
    schedule = ramp(ids_of(pipe.unet, KINDS), cfg_branch="cond", noise={"beta_schedule": "scaled_linear"})
    with pytest.raises(UserError, match="order of guidance in the batch") as error:
        apply(target, schedule)
    assert type(target).__name__ in str(error.value)
    assert "use 'both'" in str(error.value)
    assert "\n" not in str(error.value)
    assert state(pipe.unet) == before
