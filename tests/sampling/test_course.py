"""Courses: which calls they make, and gradients of a whole run against finite differences in double precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from helpers.small import hooks_of, make_tiny_unet
from torch import Tensor, nn

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.sampling.backprop import GradientPath, unroll
from rwopt.sampling.batched import sample_batched
from rwopt.sampling.course import Course, course_by_rule, course_of_steps, learned_course
from rwopt.sampling.denoise import Condition, Row, Sided, predict
from rwopt.sampling.sample import Weights, advance, sample
from rwopt.schedule.noise import sigma_at, timestep_of
from rwopt.schedule.samplers import SAMPLERS
from rwopt.schedule.steps import DIALS, StepFunction, Steps
from rwopt.schedule.weights import hat
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
QUIET = [name for name, sampler in SAMPLERS.items() if not sampler.noisy]
KNOTS = np.array([10.0, 0.5])
FULL = GradientPath("full")


class Embedding(nn.Module):
    """Timesteps [N] as [N, C]; diffusers' own computes in single precision, which finite differences would see."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rate = torch.exp(torch.linspace(0, -9, channels // 2, dtype=torch.float64))

    def forward(self, t: Tensor) -> Tensor:
        phase = t.double()[:, None] * self.rate
        return torch.cat([phase.cos(), phase.sin()], 1)


def model_of(unet: Any, **options: Any) -> Model:
    options = {"prediction_type": "v_prediction", "clip_sample": False, **options}
    scheduler = DDIMScheduler(**SD, **options)
    return Model("test", unet, None, None, None, scheduler, torch.device("cpu"))


NET: dict[str, Any] = {
    "block_out_channels": (8, 8), "transformer_layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny() -> Iterator[Model]:
    """One for all tests, as is what it says of its memory."""
    model = model_of(make_tiny_unet(**NET))
    yield model
    assert not hooks_of(model.unet)


@pytest.fixture(scope="module")
def double() -> Iterator[Model]:
    unet: Any = make_tiny_unet(**NET).double()
    unet.time_proj = Embedding(8)
    yield model_of(unet)
    assert not hooks_of(unet)


def attach(model: Model) -> Attachment:
    return Attachment(model.unet, [site.id for site in list_sites(model.unet)])


def inputs(n: int = 2, dtype: torch.dtype = torch.float32, guidance: float = 3.0) -> tuple[Tensor, Condition]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, 8, 8, generator=draw, dtype=torch.float64).to(dtype)
    text = torch.randn(2, n, 5, 12, generator=draw, dtype=torch.float64).to(dtype)
    return x, Condition(text[0], text[1], guidance)


def course_of(model: Model, sampler: str, n: int = 2, steps: int = 4, **options: Any) -> Course:
    """By rule, with the noise of a noisy sampler."""
    course = course_by_rule(model, steps, sampler, **options)
    if not SAMPLERS[sampler].noisy:
        return course
    noises = torch.randn(steps, n, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return replace(course, noises=noises.to(model.dtype))


def table_of(model: Model, seed: int = 4) -> Tensor:
    """Weights [K, S] at `KNOTS`."""
    size = (len(KNOTS), len(list_sites(model.unet)))
    draw = torch.Generator().manual_seed(seed)
    return torch.empty(size, dtype=torch.float64).uniform_(0.5, 1.5, generator=draw).to(model.dtype)


def looked_up(table: Tensor) -> Callable[[float], Tensor]:
    return lambda sigma: torch.from_numpy(hat(KNOTS, sigma)).to(table) @ table


def function_of(model: Model, sampler: str, learn: Sequence[str] = DIALS, steps: int = 4) -> StepFunction:
    return StepFunction(sampler, course_by_rule(model, steps, sampler).sigmas, tuple(model.table), 3.0, learn)


def same(a: Course, b: Course, rtol: float = 1e-9) -> None:
    def numbers(values: Sequence[Any]) -> list[float]:
        return [float(v) for v in values]

    assert a.sampler == b.sampler
    for name in ("sigmas", "told"):
        np.testing.assert_allclose(numbers(getattr(a, name)), numbers(getattr(b, name)), rtol=rtol, atol=1e-6)
    for name in ("signal", "noise", "timesteps"):
        got, expected = (numbers(getattr(course.levels, name)) for course in (a, b))
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=1e-6 if name == "timesteps" else 1e-12)
    assert a.scale == pytest.approx(b.scale, rel=rtol)


# --- courses


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zeros_are_the_base_grid(tiny: Model, sampler: str, zero_snr: bool) -> None:
    model = model_of(tiny.unet, rescale_betas_zero_snr=zero_snr)
    function = function_of(model, sampler)
    zeros = np.zeros(len(function.names))
    learned = learned_course(model, function, torch.from_numpy(zeros))
    same(learned, course_of_steps(model, function.steps(zeros)))
    assert learned.guidance is not None
    assert [float(g) for g in learned.guidance] == pytest.approx([3.0] * 4)
    if zero_snr and sampler == "ddim":  # a grid that is learned goes to DPM-Solver of first order, which floors abar
        assert course_by_rule(model, 4, sampler).levels.signal[0] == 0
        assert float(learned.levels.signal[0]) == pytest.approx(2**-12)
    else:
        same(learned, course_by_rule(model, 4, sampler))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_whole_timesteps_are_those_of_the_finished_steps(tiny: Model, sampler: str) -> None:
    function = function_of(tiny, sampler)
    ts = np.array([999.0, 700.0, 420.0, 90.0])
    shares = -np.diff([*ts, -1.0])
    clock = np.log(shares / -np.diff([*function.base, -1.0]))
    theta = np.concatenate([clock, [-0.3, 0.2, 0.15, -0.4], [0.5, -0.2, 0.1, 0.0]])
    learned = learned_course(tiny, function, torch.from_numpy(theta))
    finished = course_of_steps(tiny, function.steps(theta))
    np.testing.assert_allclose(timestep_of(learned.sigmas, tiny.table), ts, atol=1e-6)
    assert [float(t) for t in learned.told] == pytest.approx([969.0, 720.0, 435.0, 50.0])
    same(learned, finished, rtol=1e-7)
    assert learned.guidance is not None
    assert finished.guidance is not None
    assert [float(g) for g in learned.guidance] == pytest.approx([float(g) for g in finished.guidance])


def test_guidance_that_is_not_learned_is_the_conditions_own(tiny: Model) -> None:
    function = function_of(tiny, "ddim", ("clock", "told"))
    assert learned_course(tiny, function, torch.zeros(8, dtype=torch.float64)).guidance is None
    assert course_of_steps(tiny, function.steps(np.zeros(8))).guidance is None


@pytest.mark.parametrize("sampler", ["lcm", "tcd"])
@pytest.mark.parametrize("grid", ["karras", "exponential", "lnsigma", "ays", "12.5,2.9,0.3"])
def test_consistency_samplers_stay_on_whole_timesteps(tiny: Model, sampler: str, grid: str) -> None:
    course = course_by_rule(tiny, 3, sampler, grid)
    near = np.round(timestep_of(course_by_rule(tiny, 3, "dpmpp_2m", grid).sigmas, tiny.table))
    assert list(course.told) == near.tolist()
    np.testing.assert_allclose(course.sigmas, tiny.table[near.astype(int)], rtol=1e-12)
    np.testing.assert_allclose([float(t) for t in course.levels.timesteps], near, atol=1e-9)


def test_consistency_samplers_find_their_timesteps_in_rounded_files(tiny: Model) -> None:
    """0.7 times 700 is whole: a little below, TCD would go down to timestep 489 and not 490."""
    steps = Steps("tcd", tuple(float(f"{s:.6g}") for s in sigma_at([999, 700, 360, 90], tiny.table)))
    assert timestep_of(steps.sigmas[1], tiny.table) != 700
    same(course_of_steps(tiny, steps), course_of_steps(tiny, Steps("tcd", tuple(tiny.table[[999, 700, 360, 90]]))))


def test_levels_that_meet_on_whole_timesteps_are_parted(tiny: Model) -> None:
    course = course_by_rule(tiny, 8, "lcm", "karras", strength=0.008)
    assert list(course.told) == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("sampler", "grid", "signal"),
    [
        ("ddim", "trailing", 0.0), ("ddim", "karras", 2**-12), ("lcm", "karras", 0.0), ("tcd", "trailing", 0.0),
        ("euler", "trailing", 2**-12), ("dpmpp_2m", "trailing", 2**-12), ("uni_pc", "exponential", 2**-12),
    ],
)  # fmt: skip
def test_the_signal_of_zero_terminal_snr(tiny: Model, sampler: str, grid: str, signal: float) -> None:
    model = model_of(tiny.unet, rescale_betas_zero_snr=True)
    course = course_by_rule(model, 4, sampler, grid)
    assert course.levels.signal[0] == pytest.approx(signal, rel=1e-6)
    assert course.levels.noise[0] == pytest.approx(1.0)
    assert course_by_rule(model, 4, sampler, grid, 0.9).levels.signal[0] > 0.01
    plain = course_by_rule(tiny, 4, sampler, grid)
    assert plain.levels.signal[0] == pytest.approx(float(tiny.scheduler.alphas_cumprod[-1]) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_noise_starts_with(tiny: Model, sampler: str) -> None:
    """Stock Euler's noise is sigma times unit noise, but sqrt(sigma^2 + 1) times on a leading grid."""
    for grid in ("trailing", "karras", "leading"):
        course = course_by_rule(tiny, 3, sampler, grid)
        ve = course.sigmas[0] / (course.sigmas[0] ** 2 + 1) ** 0.5
        assert course.scale == pytest.approx(ve if sampler.startswith("euler") and grid != "leading" else 1.0)


@pytest.mark.parametrize(
    ("sigmas", "says"),
    [((157.4, 3.0), "157.4 .. 3 reach beyond the noise of test, 14.61 .. 0.02917"), ((14.0, 0.002), "14 .. 0.002 ")],
)
def test_levels_beyond_the_models_are_refused(tiny: Model, sigmas: tuple[float, ...], says: str) -> None:
    with pytest.raises(UserError, match=rf"^steps.sigmas {says}[^\n]*$"):
        course_of_steps(tiny, Steps("dpmpp_2m", sigmas))


def test_unknown_samplers_are_refused(tiny: Model) -> None:
    with pytest.raises(UserError, match=r"^steps.sampler=dpmpp_2s[^\n]*$"):
        course_of_steps(tiny, Steps("dpmpp_2s", (3.0, 1.0)))
    with pytest.raises(UserError, match=r"^task.sampler=heun[^\n]*$"):
        course_by_rule(tiny, 3, "heun")


# --- gradients


def slope_of(loss: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, size: float) -> Tensor:
    with torch.no_grad():
        return (loss(at + size * direction) - loss(at - size * direction)) / (2 * size)


def direction_like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("sampler", QUIET)
def test_gradient_of_weights(double: Model, sampler: str) -> None:
    x, cond = inputs(2, torch.float64)
    course = course_of(double, sampler)

    def loss(table: Tensor) -> Tensor:
        return (unroll(double, hooks, x, cond, course, looked_up(table), FULL) * direction_like(x, 5)).sum()

    table = table_of(double).requires_grad_()
    with attach(double) as hooks:
        (slope,) = torch.autograd.grad(loss(table), table)
        for seed in (6, 7):
            way = direction_like(table, seed)
            expected = slope_of(loss, table.detach(), way, 1e-5)
            torch.testing.assert_close((slope * way).sum(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sampler", QUIET)
def test_gradient_of_clock_told_and_guidance(double: Model, sampler: str) -> None:
    """Weights are the same at all noise levels here: that a clock moves their look-up is no part of its gradient."""
    x, cond = inputs(2, torch.float64)
    function = function_of(double, sampler)
    row = table_of(double)[0]

    def loss(theta: Tensor) -> Tensor:
        course = learned_course(double, function, theta)
        return (unroll(double, hooks, x, cond, course, lambda sigma: row, FULL) * direction_like(x, 5)).sum()

    theta = 0.3 * direction_like(torch.zeros(12), 8)
    theta[4] = -0.2  # what the first call is told may not lie above the last timestep
    theta.requires_grad_()
    with attach(double) as hooks:
        (slope,) = torch.autograd.grad(loss(theta), theta)
        for i in range(len(DIALS)):
            part = slice(4 * i, 4 * i + 4)
            assert (slope[part] != 0).all()
            way = torch.zeros(12, dtype=torch.float64)
            way[part] = direction_like(way[part], 9 + i)
            expected = slope_of(loss, theta.detach(), way, 1e-6)
            torch.testing.assert_close((slope * way).sum(), expected, rtol=1e-5, atol=1e-8)


def stored(
    model: Model, hooks: Attachment, x: Tensor, cond: Condition, course: Course, weights: Weights
) -> Tensor:
    """The loop with nothing run again."""
    memory: tuple[Tensor, ...] = ()
    for i, sigma in enumerate(course.sigmas):
        out = predict(model, hooks, x, course.told[i], cond, weights(sigma))
        x, memory = advance(model, course, i, out, cond, x, memory)
    return x


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_memory_and_noise_survive_checkpoints(double: Model, sampler: str) -> None:
    """auto keeps all activations here, off runs each step again; on: five pictures in two parts, each block again."""
    x, cond = inputs(5, torch.float64)
    course = course_of(double, sampler, 5, steps=4)
    direction = direction_like(x, 5)
    with attach(double) as hooks:
        ends = {"loop": stored(double, hooks, x, cond, course, looked_up(table := table_of(double).requires_grad_()))}
        ends["sample"] = sample(double, hooks, x, cond, course, looked_up(table), grad=True)
        for switch in ("auto", "off", "on"):
            model = replace(double, checkpointing=switch)
            ends[switch] = unroll(model, hooks, x, cond, course, looked_up(table), FULL)
        (expected,) = torch.autograd.grad((ends["loop"] * direction).sum(), table)
        for end in ends.values():
            torch.testing.assert_close(end, ends["loop"], rtol=1e-9, atol=1e-11)
            if end is not ends["loop"]:
                (slope,) = torch.autograd.grad((end * direction).sum(), table)
                torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-11)


# --- the same pictures


@pytest.mark.parametrize("mode", ["full", "truncated", "detached"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_unroll_is_sample_to_the_bit(tiny: Model, sampler: str, mode: str) -> None:
    x, cond = inputs()
    course = course_of(tiny, sampler)
    path = GradientPath(mode, stride=2)
    with attach(tiny) as hooks:
        weights = looked_up(table_of(tiny).requires_grad_())
        expected = sample(tiny, hooks, x, cond, course, weights)
        for switch in ("auto", "off"):
            end = unroll(replace(tiny, checkpointing=switch), hooks, x, cond, course, weights, path)
            assert end.requires_grad
            assert torch.equal(end, expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_crowded_unroll_is_sample(tiny: Model, sampler: str) -> None:
    model = replace(tiny, checkpointing="on")
    x, cond = inputs(6)
    course = course_of(model, sampler, 6)
    with attach(model) as hooks:
        given = model, hooks, x, cond, course, looked_up(table_of(model).requires_grad_())
        expected = sample(*given)
        for path in (FULL, GradientPath("truncated")):
            torch.testing.assert_close(unroll(*given, path), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_trajectory_has_its_own_memory(tiny: Model, sampler: str) -> None:
    """Candidates that part at the first call, at a later one, by scale alone, and not at all."""
    x, cond = inputs()
    course = course_of(tiny, sampler)
    first, second = table_of(tiny), table_of(tiny, 5)

    def late(sigma: float) -> Tensor:
        return looked_up(first if sigma > 3 else second)(sigma)

    def sided(sigma: float) -> Row:
        return Sided(torch.ones(first.shape[1]), looked_up(second)(sigma))

    candidates: list[tuple[float, Weights | None]] = [
        (3.0, looked_up(first)), (3.0, late), (5.0, looked_up(first)), (2.0, None), (3.0, sided), (3.0, late),
    ]  # fmt: skip
    with attach(tiny) as hooks:
        alone = [sample(tiny, hooks, x, replace(cond, guidance=g), course, w) for g, w in candidates]
        together = sample_batched(tiny, hooks, x, cond, course, candidates)
        single = sample_batched(tiny, hooks, x, cond, course, candidates, batch=1)
    for a, b, c in zip(alone, together, single, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        assert torch.equal(c, a)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
