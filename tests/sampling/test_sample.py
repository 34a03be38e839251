"""Sampling: the stock pipeline as oracle, data whose ideal denoiser is known, gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.sampling.course import Course, course_at, course_by_rule
from rwopt.sampling.denoise import Condition, clean_in, condition, guide, noise_in, predict
from rwopt.sampling.sample import advance, invert, sample
from rwopt.schedule.weights import hat
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

KINDS = ("v_prediction", "epsilon")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "trailing"}


def scheduler(kind: str = "v_prediction", **changes: Any) -> DDIMScheduler:
    config = {**SD, "prediction_type": kind, "clip_sample": False, **changes}
    return DDIMScheduler(**config)  # type: ignore[no-untyped-call]


def model_of(unet: nn.Module, kind: str = "v_prediction", **changes: Any) -> Model:
    return Model("test", unet, None, None, None, scheduler(kind, **changes), torch.device("cpu"))


@pytest.fixture
def tiny(tiny_unet: Any) -> Model:
    return model_of(tiny_unet)


def attach(model: Model) -> Attachment:
    return Attachment(model.unet, [s.id for s in list_sites(model.unet)])


def inputs(n: int = 2, dtype: torch.dtype = torch.float32, guidance: float | Tensor = 3.0) -> tuple[Tensor, Condition]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, 8, 8, generator=g, dtype=torch.float64).to(dtype)
    text = torch.randn(2, n, 5, 12, generator=g, dtype=torch.float64).to(dtype)
    return x, Condition(text[0], text[1], guidance)


# --- timesteps


@pytest.mark.parametrize("steps", [1, 3, 4, 7, 20, 50, 999, 1000])
def test_timesteps_are_diffusers_trailing_ones(tiny: Model, steps: int) -> None:
    tiny.scheduler.set_timesteps(steps)
    assert list(course_by_rule(tiny, steps).told) == tiny.scheduler.timesteps.tolist()


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.65, 0.95])
def test_strength_lowers_the_start_and_keeps_the_number_of_steps(tiny: Model, strength: float) -> None:
    ts = course_by_rule(tiny, 8, strength=strength).told
    assert len(ts) == 8
    assert ts[0] == round(strength * 1000) - 1
    assert ts[-1] >= 0
    assert (np.diff(ts) < 0).all()


@pytest.mark.parametrize(
    ("steps", "strength"), [(0, 1.0), (1001, 1.0), (11, 0.01), (4, 0.0), (4, 1.01), (4, float("nan"))]
)
def test_impossible_timesteps_are_refused_in_one_line(tiny: Model, steps: int, strength: float) -> None:
    with pytest.raises(UserError, match=r"^(steps|strength)=[^\n]*$"):
        course_by_rule(tiny, steps, strength=strength)


# --- the stock pipeline


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sampling_equals_the_stock_pipeline(avatars: Model, kind: str, guidance: float) -> None:
    stock = StableDiffusionPipeline(
        avatars.vae, avatars.text_encoder, avatars.tokenizer, avatars.unet, scheduler(kind), None, None,
        requires_safety_checker=False,
    )  # type: ignore[no-untyped-call] # fmt: skip
    stock.set_progress_bar_config(disable=True)
    prompts = ["portrait, tan skin, short black hair", "portrait, beard"]
    x = torch.randn(2, *avatars.latent_shape, generator=torch.Generator().manual_seed(0))
    expected = stock(
        prompts, num_inference_steps=4, guidance_scale=guidance, latents=x.clone(), output_type="latent", eta=0.0
    ).images
    model = replace(avatars, scheduler=scheduler(kind))
    with Attachment(model.unet, ()) as attachment:
        got = sample(model, attachment, x, condition(model, prompts, guidance), course_by_rule(model, 4))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_and_noise_equal_the_scheduler(tiny_unet: Any, kind: str) -> None:
    model = model_of(tiny_unet, kind)
    g = torch.Generator().manual_seed(1)
    x, out = torch.randn(2, 2, 4, 8, 8, generator=g)
    model.scheduler.set_timesteps(5)
    expected = model.scheduler.step(out, 599, x).prev_sample
    got, _ = advance(model, course_at(model, [599, 399]), 0, out, Condition(x), x, ())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        course_at(model, [700]).noised(0, x, out), model.scheduler.add_noise(x, out, torch.tensor([700, 700]))
    )


def test_zero_terminal_snr_starts_from_pure_noise(tiny_unet: Any) -> None:
    model = model_of(tiny_unet, rescale_betas_zero_snr=True)
    x, cond = inputs()
    assert model.sigma(999) == pytest.approx(4096, rel=1e-3)
    assert sample(model, attach(model), x, cond, course_by_rule(model, 2)).isfinite().all()


def test_other_predictions_are_refused(tiny_unet: Any) -> None:
    x, cond = inputs()
    model = model_of(tiny_unet, "sample")
    course = course_at(model, [500])
    with pytest.raises(UserError, match="prediction_type=sample"):
        sample(model, Attachment(tiny_unet, ()), x, cond, course)


# --- data whose ideal denoiser is known: x0 ~ N(MEAN, STD^2), independent in each number

MEAN, STD = 0.4, 0.5


class Ideal:
    """The best prediction of v or the noise for that data, in place of a U-Net with hooks."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, x: Tensor, t: int, text: Tensor, weights: Tensor | None = None) -> Tensor:
        a = float(self.model.scheduler.alphas_cumprod[t])
        noise = (1 - a) ** 0.5 * (x - a**0.5 * MEAN) / (a * STD**2 + 1 - a)
        if self.model.scheduler.config.prediction_type == "epsilon":
            return noise
        return (noise - (1 - a) ** 0.5 * x) / a**0.5  # v = sqrt(a) noise - sqrt(1 - a) x0, x0 = (x - ...) / sqrt(a)


def ideal(kind: str) -> tuple[Model, Any]:
    model = model_of(nn.Linear(1, 1).double(), kind)
    return model, Ideal(model)


def flow(model: Model, x: Tensor, t: int) -> Tensor:
    """Where the probability-flow equation of that data, which DDIM discretises, ends from `x` at `t`."""
    a = float(model.scheduler.alphas_cumprod[t])
    return MEAN + STD * (x - a**0.5 * MEAN) / (a * STD**2 + 1 - a) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_known_data_are_sampled(kind: str) -> None:
    model, attachment = ideal(kind)
    x = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = Condition(torch.zeros(64, 1, 1, dtype=torch.float64))
    error = {}
    for steps in (125, 250):
        got = sample(model, attachment, x, cond, course_by_rule(model, steps))
        error[steps] = float((got - flow(model, x, 999)).abs().max())
    assert error[125] < 0.1
    assert error[250] < 0.6 * error[125]  # a first-order method: half the step, about half the error
    # the start at abar = 0.0047 leaves a bias of about 0.03 MEAN; 16384 numbers leave STD / 128 by chance
    assert float(got.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(got.std()) == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("kind", KINDS)
def test_inversion_is_undone_by_sampling_in_the_limit(kind: str) -> None:
    model, attachment = ideal(kind)
    z = MEAN + STD * torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = Condition(torch.zeros(4, 1, 1, dtype=torch.float64))
    error = {}
    for steps in (20, 200, 400):
        course = course_by_rule(model, steps, strength=0.7)
        up = invert(model, attachment, z, cond, course)
        error[steps] = float((sample(model, attachment, up, cond, course) - z).square().mean().sqrt())
    # 0.037 at 20 steps; a v-prediction read at the lower level, not at the one it was asked for, would give 0.061
    assert error[20] < 0.045
    assert error[400] < 0.6 * error[200] < 0.1 * error[20]


@pytest.mark.parametrize("kind", KINDS)
def test_inversion_of_a_network(tiny_unet: Any, kind: str) -> None:
    model = model_of(tiny_unet, kind)
    z, cond = inputs(1)
    cond = Condition(cond.positive)
    course = course_by_rule(model, 25, strength=0.6)
    before = model.calls
    up = invert(model, Attachment(tiny_unet, ()), z, cond, course)
    assert model.calls - before == 25
    back = sample(model, Attachment(tiny_unet, ()), up, cond, course)
    assert (up - z).square().mean() > 0.01  # it went somewhere
    assert (back - z).square().mean().sqrt() < 0.05  # of latents of unit variance: 25 first-order steps each way


# --- rows


def test_rows_have_their_own_weights_and_guidance(tiny: Model) -> None:
    scale = torch.tensor([1.0, 2.5, 6.0])
    x, cond = inputs(3, guidance=scale)
    table = torch.empty(3, 7).uniform_(0.2, 1.8, generator=torch.Generator().manual_seed(3))
    course = course_by_rule(tiny, 2)
    with attach(tiny) as attachment:
        together = sample(tiny, attachment, x, cond, course, lambda sigma: table)
        for i in range(3):
            row = slice(i, i + 1)
            alone = replace(cond.rows(row), guidance=float(scale[i]))
            single = sample(tiny, attachment, x[row], alone, course, lambda sigma, i=i: table[i])  # type: ignore[misc]
            torch.testing.assert_close(together[row], single, rtol=1e-4, atol=1e-5)
        assert torch.equal(cond.rows(slice(1, 3)).guidance, scale[1:])  # type: ignore[arg-type]
        equal = sample(tiny, attachment, x, cond, course, lambda sigma: table[:1].expand(3, 7))
        one = sample(tiny, attachment, x, cond, course, lambda sigma: table[0])
        torch.testing.assert_close(equal, one)


def test_weights_of_a_guided_call(tiny: Model) -> None:
    x, cond = inputs(2)
    table = torch.empty(2, 7).uniform_(0.2, 1.8, generator=torch.Generator().manual_seed(3))
    with attach(tiny) as attachment:
        both = predict(tiny, attachment, x, 500, cond, table)
        assert torch.equal(both, predict(tiny, attachment, x, 500, cond, torch.cat([table, table])))
        assert both.shape == (4, 4, 8, 8)
        halves = predict(tiny, attachment, x, 500, Condition(cond.positive), table)
        torch.testing.assert_close(both[2:], halves)  # negative rows first
        assert torch.equal(guide(both, cond), both[:2] + 3 * (both[2:] - both[:2]))
        assert guide(halves, Condition(cond.positive)) is halves


def test_weights_are_looked_up_at_the_noise_level_of_each_step(tiny: Model) -> None:
    x, cond = inputs(1)
    seen: list[float] = []
    told: list[int] = []
    states: list[int] = []

    def weights(sigma: float) -> None:
        seen.append(sigma)

    with attach(tiny) as attachment:
        tiny.unet.register_forward_pre_hook(lambda unet, args: told.append(args[1]))
        course = course_at(tiny, [900, 400, 3])
        sample(tiny, attachment, x, cond, course, weights, callback=lambda i, x: states.append(i))
    assert seen == [tiny.sigma(t) for t in (900, 400, 3)]
    assert told == [900, 400, 3]
    assert states == [0, 1, 2]


def test_scale_one_needs_no_negative_rows(avatars: Model) -> None:
    assert condition(avatars, ["a", "b"], 1.0).negative is None
    guided = condition(avatars, ["a", "b"], 2.0, "blurred")
    assert guided.negative is not None
    assert torch.equal(guided.negative, avatars.encode(["blurred", "blurred"]))
    assert condition(avatars, ["a"], torch.ones(1)).negative is not None


# --- gradients


def loss_of(run: Callable[..., Tensor], model: Model, table: Tensor) -> Tensor:
    x, cond = inputs(2, torch.float64)
    knots = np.array([10.0, 0.5])
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def weights(sigma: float) -> Tensor:
        return torch.from_numpy(hat(knots, sigma)) @ table

    with attach(model) as attachment:
        return (run(model, attachment, x, cond, course_by_rule(model, 3), weights) * direction).sum()


def checkpointed(*args: Any) -> Tensor:
    return sample(*args, grad=True)


def stored(
    model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course, weights: Callable[[float], Tensor]
) -> Tensor:
    for i, (t, sigma) in enumerate(zip(course.told, course.sigmas, strict=True)):
        out = guide(predict(model, attachment, x, t, cond, weights(sigma)), cond)
        level = course.levels.signal[i], course.levels.noise[i]
        clean, noise = clean_in(model, out, x, *level), noise_in(model, out, x, *level)
        x = course.levels.signal[i + 1] * clean + course.levels.noise[i + 1] * noise
    return x


def test_gradients_equal_finite_differences(tiny: Model) -> None:
    tiny.unet.double()
    start = torch.empty(2, 7, dtype=torch.float64).uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(4))
    table = start.clone().requires_grad_()
    x, cond = inputs(2, torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    knots = np.array([10.0, 0.5])
    before = tiny.calls
    with attach(tiny) as attachment:  # also in the backward pass, which runs the steps again
        course = course_by_rule(tiny, 3)
        out = sample(tiny, attachment, x, cond, course, lambda s: torch.from_numpy(hat(knots, s)) @ table, grad=True)
        assert out.dtype == torch.float64
        assert tiny.calls - before == 3
        (out * direction).sum().backward()
        assert tiny.calls - before == 6  # the steps that are run again are calls, and are paid for
    assert table.grad is not None
    plain = start.clone().requires_grad_()
    loss_of(stored, tiny, plain).backward()
    torch.testing.assert_close(table.grad, plain.grad, rtol=1e-9, atol=1e-12)
    for seed in (6, 7):
        step = 1e-5 * torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slope = (loss_of(sample, tiny, start + step) - loss_of(sample, tiny, start - step)) / 2
        torch.testing.assert_close((table.grad * step).sum(), slope, rtol=1e-5, atol=1e-12)


def test_without_grad_no_graph_is_built(tiny: Model) -> None:
    x, cond = inputs(1)
    table = torch.ones(7, requires_grad=True)
    before = tiny.calls
    with attach(tiny) as attachment:
        got = sample(tiny, attachment, x.requires_grad_(), cond, course_by_rule(tiny, 2), lambda sigma: table)
        assert got.grad_fn is None
        assert not got.requires_grad
        assert torch.is_grad_enabled()
        assert tiny.calls - before == 2
        with torch.no_grad():  # grad is what the argument says, whatever is around
            kept = sample(tiny, attachment, x, cond, course_by_rule(tiny, 2), lambda sigma: table, grad=True)
        assert kept.requires_grad
        torch.testing.assert_close(kept, got)
