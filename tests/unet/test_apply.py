"""Schedules on bare U-Nets and pipelines: look-ups, stacking, removal, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from helpers import pipelines, samplers
from helpers.oracle import recompute
from helpers.samplers import SD
from helpers.small import hooks_of, inputs, make_tiny_unet
from helpers.twins import ids_of
from torch import Tensor, nn

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import noise_table
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import KINDS


def ramp(unet: nn.Module, **fields: Any) -> Schedule:
    """Weights that depend on the noise level and the site, over kinds of both sorts."""
    ids = ids_of(unet, ("transformer", "cross"))
    sigmas = np.array([12.0, 3.0, 1.0, 0.2, 0.04])
    weights = np.random.default_rng(0).uniform(0, 2, (5, len(ids)))
    return Schedule(tuple(ids), sigmas, weights, **fields)


def pipeline(unet: nn.Module, scheduler: Any) -> Any:
    """In single precision, as people have it."""
    return pipelines.build(StableDiffusionPipeline, unet, scheduler=scheduler).to(torch.float32)


def run(pipe: Any, **extra: Any) -> Tensor:
    _, _, text = inputs()
    return pipelines.run(
        pipe, {**pipelines.words(steps=5), "prompt_embeds": text[:1], "negative_prompt_embeds": text[1:], **extra}
    )


def test_a_pipeline_equals_a_loop_with_explicit_weights(tiny_unet: UNet2DConditionModel, tmp_path: Path) -> None:
    """The whole way: file, look-up, guidance in one batch, DDIM steps; against a loop written out here."""
    scheduler = DDIMScheduler(**SD)
    pipe = pipeline(tiny_unet, scheduler)
    path = ramp(tiny_unet).save(tmp_path / "schedule.json")
    start = inputs(1, seed=9)[0]
    with apply(pipe, path):
        actual = run(pipe, latents=start)
    schedule = Schedule.load(path)
    _, _, text = inputs()
    x, table = start, noise_table(SD)
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        weights = dict(zip(schedule.sites, schedule.at(float(table[t])), strict=True))
        negative, positive = (
            recompute(tiny_unet, x, t, weights, encoder_hidden_states=part) for part in (text[1:], text[:1])
        )
        x = scheduler.step(negative + 4 * (positive - negative), t, x).prev_sample
    torch.testing.assert_close(actual, x, rtol=1e-3, atol=1e-4)


def test_a_plain_schedule_changes_no_bit(tiny_unet: UNet2DConditionModel) -> None:
    pipe = pipeline(tiny_unet, EulerDiscreteScheduler(**SD))
    plain = run(pipe)
    with apply(pipe, Schedule.constant(ids_of(tiny_unet, KINDS), [10, 1, 0.1])):
        assert torch.equal(run(pipe), plain)


@pytest.fixture
def weighed(tiny_unet: UNet2DConditionModel) -> Iterator[tuple[UNet2DConditionModel, Schedule, Attachment]]:
    """A bare U-Net in double precision with a schedule on it, and a second one to call with explicit weights."""
    tiny_unet.double()
    schedule = ramp(tiny_unet, noise=SD)
    explicit = Attachment(copy.deepcopy(tiny_unet), schedule.sites)
    with apply(tiny_unet, schedule):
        yield tiny_unet, schedule, explicit


@pytest.mark.parametrize("form", ["int", "float", "0-d", "[1]", "half", "keyword", "all positional"])
def test_every_form_of_the_timestep(weighed: tuple[Any, Schedule, Attachment], form: str) -> None:
    unet, schedule, explicit = weighed
    x, _, text = inputs(dtype=torch.float64)
    t: Any = {
        "int": 500,
        "float": 500.0,
        "[1]": torch.tensor([500]),
        "half": torch.tensor(500.0).bfloat16(),
    }.get(form, torch.tensor(500))
    weights = torch.tensor(schedule.at(float(noise_table(SD)[500])), dtype=torch.float32)
    expected = explicit(x, t, text, weights)
    if form == "keyword":
        actual = unet(sample=x, timestep=t, encoder_hidden_states=text).sample
    elif form == "all positional":
        actual = unet(x, t, text, None, None, None, {}).sample
    else:
        actual = unet(x, t, text).sample
    assert torch.equal(actual, expected)


def test_timesteps_between_integers_and_one_a_row(weighed: tuple[Any, Schedule, Attachment]) -> None:
    unet, schedule, explicit = weighed
    x, _, text = inputs(dtype=torch.float64)
    times = torch.tensor([700.5, 33.25])
    table = np.log(noise_table(SD))
    sigmas = np.exp([(table[700] + table[701]) / 2, 0.75 * table[33] + 0.25 * table[34]])
    expected = explicit(x, times, text, torch.tensor(schedule.at(sigmas), dtype=torch.float32))
    torch.testing.assert_close(unet(x, times, text).sample, expected, rtol=1e-6, atol=1e-8)


def test_two_schedules_stack_and_each_handle_removes_its_own(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.double()
    x, t, text = inputs(dtype=torch.float64)
    plain = tiny_unet(x, t, text).sample
    ids = ids_of(tiny_unet)
    half, third, product = (Schedule.constant(ids, [1.0], value, noise=SD) for value in (0.5, 0.3, 0.15))
    with apply(tiny_unet, product):
        expected = tiny_unet(x, t, text).sample
    with apply(tiny_unet, half):
        alone = tiny_unet(x, t, text).sample
    first, second = apply(tiny_unet, half), apply(tiny_unet, third)
    torch.testing.assert_close(tiny_unet(x, t, text).sample, expected)
    second.remove()
    second.remove()
    assert torch.equal(tiny_unet(x, t, text).sample, alone)
    first.remove()
    assert torch.equal(tiny_unet(x, t, text).sample, plain)
    assert not hooks_of(tiny_unet)


def test_a_handle_takes_another_schedule_of_the_same_sites(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.double()
    x, t, text = inputs(dtype=torch.float64)
    first, second = (Schedule.constant(ids_of(tiny_unet), [1.0], value, noise=SD) for value in (0.5, 1.4))
    with apply(tiny_unet, second):
        expected = tiny_unet(x, t, text).sample
    with apply(tiny_unet, first) as handle:
        assert not torch.equal(tiny_unet(x, t, text).sample, expected)
        handle.schedule = second
        assert torch.equal(tiny_unet(x, t, text).sample, expected)
        for other in (Schedule.constant(ids_of(tiny_unet)[1:], [1.0], noise=SD), replace(second, mode="output")):
            with pytest.raises(UserError, match="takes the same"):
                handle.schedule = other
        assert torch.equal(tiny_unet(x, t, text).sample, expected)
    for gone in (handle, apply(tiny_unet, None)):
        assert gone.schedule is None
        with pytest.raises(UserError, match="holds no schedule"):
            gone.schedule = second


def test_none_takes_everything_off_but_foreign_hooks(tiny_unet: UNet2DConditionModel) -> None:
    foreign = tiny_unet.register_forward_pre_hook(lambda *_: None)
    handles = [apply(tiny_unet, ramp(tiny_unet, noise=SD)) for _ in range(3)]
    apply(tiny_unet, None).remove()
    assert len(hooks_of(tiny_unet)) == 1
    for handle in handles:
        handle.remove()
    foreign.remove()
    assert not hooks_of(tiny_unet)


def test_a_swapped_scheduler_brings_its_own_noise_table(tiny_unet: UNet2DConditionModel) -> None:
    pipe = pipeline(tiny_unet, DDIMScheduler(**SD))
    spy = samplers.ramp(ids_of(tiny_unet))
    x, t, text = inputs()
    with apply(pipe, spy):
        pipe.unet(x, t, text)
        pipe.scheduler = DDIMScheduler(beta_schedule="linear")
        pipe.unet(x, t, text)
    linear = noise_table({"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02})
    assert spy.seen == pytest.approx([noise_table(SD)[500], linear[500]], rel=1e-4)


def test_gradient_checkpointing_under_apply(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.double()
    _, _, text = inputs(dtype=torch.float64)
    gradients = []
    with apply(tiny_unet, ramp(tiny_unet, noise=SD)):
        for checkpointing in (False, True):
            if checkpointing:
                tiny_unet.enable_gradient_checkpointing()
            x = inputs(dtype=torch.float64)[0].requires_grad_()
            state = x - tiny_unet(x, 800, text).sample
            (state - tiny_unet(state, 100, text).sample).square().sum().backward()
            gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_bad_targets_are_refused_and_nothing_stays(tiny_unet: UNet2DConditionModel) -> None:
    foreign = Schedule.constant([f"up_blocks.8.attentions.{j}" for j in range(9)], [1.0], noise=SD)
    with pytest.raises(UserError, match="9 of 9 sites are absent") as error:
        apply(tiny_unet, foreign)
    assert "down_blocks.0.attentions.0" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="UNet2DConditionModel has no noise table"):
        apply(tiny_unet, ramp(tiny_unet))
    with pytest.raises(UserError, match=r"none.json: cannot be read"):
        apply(tiny_unet, "none.json")
    assert not hooks_of(tiny_unet)


# ----------------------------------------------------------------- samplers and pipelines that count in something else


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DPMSolverMultistepScheduler(**SD, **FLOW),
        diffusers.UniPCMultistepScheduler(**SD, **FLOW),
        diffusers.UniPCMultistepScheduler(**SD, **FLOW, flow_shift=3.0),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=lambda s: type(s).__name__,
)
def test_flow_samplers_are_looked_up_at_their_own_level(tiny_unet: UNet2DConditionModel, scheduler: Any) -> None:
    """x = (1 - s) x0 + s noise is the picture at VE sigma s / (1 - s), scaled."""
    pipe = SimpleNamespace(unet=tiny_unet, scheduler=scheduler)
    x, _, text = inputs()
    spy = samplers.ramp(ids_of(tiny_unet))
    with apply(pipe, spy):
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            tiny_unet(x, t, text)
    s = scheduler.sigmas[:5].double().clamp(max=1 - 1e-4).numpy()
    np.testing.assert_allclose(spy.seen, s / (1 - s), rtol=1e-4)


@pytest.mark.parametrize("kind", ["IPNDMScheduler", "CMStochasticIterativeScheduler", "KarrasVeScheduler"])
def test_samplers_without_training_timesteps_are_refused_whatever_the_file_says(
    tiny_unet: UNet2DConditionModel, kind: str
) -> None:
    pipe = SimpleNamespace(unet=tiny_unet, scheduler=getattr(diffusers, kind)())
    with pytest.raises(UserError, match=f"{kind} has no noise table") as caught:
        apply(pipe, ramp(tiny_unet, noise=SD))
    assert "\n" not in str(caught.value)
    assert not hooks_of(tiny_unet)


def test_pipelines_without_such_a_unet_are_refused_in_one_line() -> None:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (8, 16)}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "transformer_layers_per_block": (1, 1)}
    unet = make_tiny_unet(**blocks, layers_per_block=2)
    xs = diffusers.ControlNetXSAdapter.from_unet(unet, size_ratio=0.5, num_attention_heads=2)
    both = diffusers.UNetControlNetXSModel.from_unet(unet, xs)
    for target, name in (
        (SimpleNamespace(transformer=None), "SimpleNamespace has no U-Net"),
        (SimpleNamespace(unet=both, scheduler=DDIMScheduler(**SD)), "UNetControlNetXSModel is not built of"),
        (SimpleNamespace(unet=None), "has no U-Net"),
    ):
        with pytest.raises(UserError, match=name) as caught:
            apply(target, Schedule.constant(["mid_block.attentions.0"], [1.0]))
        assert "\n" not in str(caught.value)
