"""Grids: stock diffusers schedulers as oracle, then what only ours have."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import AysSchedules

from rwopt.errors import UserError
from rwopt.sampling.grids import AYS, GRIDS, grid_sigmas, told_timesteps, trailing
from rwopt.schedule.noise import Array, noise_table, sigma_of, timestep_of

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COUNTS = (1, 2, 3, 5, 8, 20, 50)
TABLE = noise_table({})
MULTISTEP = {"dpmpp_2m": DPMSolverMultistepScheduler, "uni_pc": UniPCMultistepScheduler}


def table_of(scheduler: Any) -> Array:
    return sigma_of(scheduler.alphas_cumprod.double().numpy())


def holds(sampler: str, grid: str, scheduler: Any, steps: int, told: str = "") -> None:
    """The levels and what the U-Net is told are the scheduler's. told: the grid whose rule the latter follows."""
    scheduler.set_timesteps(steps)
    table = table_of(scheduler)
    sigmas = grid_sigmas(grid, steps, table)
    np.testing.assert_allclose(sigmas, scheduler.sigmas[:-1].numpy(), rtol=1e-6)
    got, expected = told_timesteps(sampler, told or grid, sigmas, table), scheduler.timesteps.numpy()
    if scheduler.timesteps.is_floating_point():
        # Euler's are in single precision, and a spacing's are whole already
        np.testing.assert_allclose(got, expected, atol=2e-3)
    else:
        np.testing.assert_array_equal(got, expected)


# --- stock schedulers


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("sampler", MULTISTEP)
@pytest.mark.parametrize("steps", COUNTS)
def test_multistep_schedulers(sampler: str, steps: int, zero_snr: bool) -> None:
    options = {**SD, "rescale_betas_zero_snr": zero_snr}
    for spacing in ("trailing", "linspace"):
        holds(sampler, spacing, MULTISTEP[sampler](**options, timestep_spacing=spacing), steps)
    holds(sampler, "karras", MULTISTEP[sampler](**options, use_karras_sigmas=True), steps)
    holds(sampler, "exponential", MULTISTEP[sampler](**options, use_exponential_sigmas=True), steps)


BETAS = (("linear", 1e-4, 0.02), ("scaled_linear", 0.002, 0.01), ("scaled_linear", 1e-3, 0.02), ("linear", 1e-3, 0.01))


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("sampler", MULTISTEP)
def test_other_betas(sampler: str, betas: tuple[str, float, float]) -> None:
    """Whether `exponential` tells 998 or 999 first hangs on the last digit of these."""
    options = dict(zip(("beta_schedule", "beta_start", "beta_end"), betas, strict=True))
    for steps in (1, 4, 30):
        holds(sampler, "karras", MULTISTEP[sampler](**options, use_karras_sigmas=True), steps)
        holds(sampler, "exponential", MULTISTEP[sampler](**options, use_exponential_sigmas=True), steps)


@pytest.mark.parametrize("steps", COUNTS)
def test_lu_is_exponential_and_rounds(steps: int) -> None:
    holds("dpmpp_2m", "exponential", DPMSolverMultistepScheduler(**SD, use_lu_lambdas=True), steps, told="karras")


@pytest.mark.parametrize("steps", COUNTS)
def test_euler(steps: int) -> None:
    for spacing in ("trailing", "leading"):
        options = {**SD, "timestep_spacing": spacing, "steps_offset": 1}
        holds("euler", spacing, EulerDiscreteScheduler(**options), steps)
        holds("euler_ancestral", spacing, EulerAncestralDiscreteScheduler(**options), steps)
    if steps > 1:  # of one step Euler's own spacing leaves t = 0 alone, so that it starts from no noise
        holds("euler", "karras", EulerDiscreteScheduler(**SD, use_karras_sigmas=True), steps)
        holds("euler", "exponential", EulerDiscreteScheduler(**SD, use_exponential_sigmas=True), steps)


@pytest.mark.parametrize("steps", [*COUNTS, 7, 999, 1000])
def test_ddim(steps: int) -> None:
    for spacing in ("trailing", "leading"):
        if (spacing, steps) == ("leading", 1000):
            continue
        scheduler = DDIMScheduler(**SD, timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(steps)
        sigmas = grid_sigmas(spacing, steps, table_of(scheduler))
        ts = scheduler.timesteps.tolist()
        np.testing.assert_array_equal(sigmas, table_of(scheduler)[ts])
        assert told_timesteps("ddim", spacing, sigmas, table_of(scheduler)).tolist() == ts
        if spacing == "trailing":
            assert trailing(1000, steps) == ts


# --- what is ours


def test_lnsigma_is_even_up_to_the_end_that_it_leaves_out() -> None:
    logs = np.log(grid_sigmas("lnsigma", 4, TABLE))
    whole = np.linspace(np.log(TABLE[-1]), np.log(TABLE[0]), 5)
    np.testing.assert_allclose(logs, whole[:4])


@pytest.mark.parametrize("whose", AYS)
def test_ays_passes_through_the_published_levels(whose: str) -> None:
    published = AysSchedules[AYS[whose]][:10]
    got = grid_sigmas("ays", 10, TABLE, ays=whose)
    # SD's table ends at 14.6146 and 0.0292, where the published one has 14.615 and 0.029: the index shifts by 0.01
    np.testing.assert_allclose(got, published, rtol=6e-3)
    five = grid_sigmas("ays", 5, TABLE, ays=whose)
    np.testing.assert_allclose(five, got[::2], rtol=1e-9)
    wide = np.append(np.insert(TABLE, 0, 1e-3), 50.0)  # a model that reaches beyond: exactly the published ones
    np.testing.assert_allclose(grid_sigmas("ays", 10, wide, ays=whose), published)
    twenty = grid_sigmas("ays", 20, wide, ays=whose)
    np.testing.assert_allclose(twenty[1:-1:2], np.sqrt(twenty[:-2:2] * twenty[2::2]))  # half way in ln sigma


def test_ays_from_a_lower_start() -> None:
    full = grid_sigmas("ays", 10, TABLE)
    strength = (round(float(timestep_of(full[4], TABLE))) + 1) / 1000
    half = grid_sigmas("ays", 6, TABLE, strength)
    np.testing.assert_allclose(half, full[4:], rtol=5e-3)  # the same curve, met at its fifth level
    assert half[0] == pytest.approx(TABLE[round(strength * 1000) - 1])


@pytest.mark.parametrize("strength", [1.0, 0.65, 0.3, 0.05])
@pytest.mark.parametrize("grid", GRIDS)
def test_strength_lowers_the_start_and_keeps_the_number_of_steps(grid: str, strength: float) -> None:
    first = TABLE[round(strength * 1000) - 1]
    for steps in (1, 2, 8, 20):
        sigmas = grid_sigmas(grid, steps, TABLE, strength)
        assert sigmas.shape == (steps,)
        assert sigmas.dtype == np.float64
        assert (np.diff(sigmas) < 0).all()
        assert sigmas[-1] >= TABLE[0] * (1 - 1e-12)
        if grid == "leading":
            assert sigmas[0] <= first
        else:
            assert sigmas[0] == pytest.approx(first, rel=1e-9)
        for sampler in ("ddim", "euler"):
            told = told_timesteps(sampler, grid, sigmas, TABLE)
            assert (np.diff(told) <= 0).all()
            assert 0 <= told[-1] <= told[0] <= 999


def test_a_list_of_ones_own() -> None:
    np.testing.assert_array_equal(grid_sigmas("12.5, 2.9,0.3", 3, TABLE), [12.5, 2.9, 0.3])
    # published and rounded numbers may lie a little outside
    np.testing.assert_array_equal(grid_sigmas("14.615,0.02915", 2, TABLE), [TABLE[-1], TABLE[0]])


def test_a_list_knows_no_whole_timesteps_but_is_told_them() -> None:
    sigmas = np.array([5.0, 0.7])
    exact = timestep_of(sigmas, TABLE)
    np.testing.assert_array_equal(told_timesteps("euler", "5,0.7", sigmas, TABLE), exact)
    for sampler in ("ddim", "dpmpp_2m", "uni_pc", "lcm", "tcd"):
        np.testing.assert_array_equal(told_timesteps(sampler, "5,0.7", sigmas, TABLE), np.round(exact))
    # the stock consistency samplers have no exponential grid of their own: they are handed rounded timesteps
    np.testing.assert_array_equal(told_timesteps("lcm", "exponential", sigmas, TABLE), np.round(exact))


@pytest.mark.parametrize(
    ("grid", "steps", "strength", "message"),
    [
        ("trailing", 0, 1.0, "steps=0"),
        ("karras", 1001, 1.0, "steps=1001"),
        ("karras", 11, 0.01, "steps=11"),
        ("ays", 4, 0.0, "strength=0"),
        ("lnsigma", 4, 1.01, "strength=1.01"),
        ("14,3", 2, float("nan"), "strength=nan"),
        ("leading", 1000, 1.0, "steps=1000 is too many"),
        ("linspace", 1000, 1.0, "steps=1000 is too many"),
        ("linspace", 20, 0.02, "steps=20 is too many"),
        ("karass", 4, 1.0, "grid=karass is unknown: one of trailing"),
        ("14,x", 2, 1.0, "grid=14,x is unknown"),
        ("14,3,1", 2, 1.0, "has 3 noise levels: give 2"),
        ("3,14", 2, 1.0, "not strictly descending"),
        ("3,3", 2, 1.0, "not strictly descending"),
        ("14,nan", 2, 1.0, "not strictly descending"),
        ("nan", 1, 1.0, "no noise level"),
        ("20,3", 2, 1.0, r"leaves the noise levels that there are: stay within 0\.029\d* \.\. 14\.6146"),
        ("14,0.01", 2, 1.0, "leaves the noise levels"),
        ("14,3", 2, 0.5, "leaves the noise levels"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(grid: str, steps: int, strength: float, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        grid_sigmas(grid, steps, TABLE, strength)
    assert "\n" not in str(error.value)


def test_unknown_ays_is_refused() -> None:
    with pytest.raises(UserError, match="ays=svd is unknown: use sd or sdxl"):
        grid_sigmas("ays", 4, TABLE, ays="svd")


def test_importing_it_loads_no_torch() -> None:
    code = "import rwopt.sampling.grids, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
