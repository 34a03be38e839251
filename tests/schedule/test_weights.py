"""The weight function: theta = 0 is the plain model, `fit` undoes `schedule`, NumPy and torch agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from helpers.samplers import SD
from helpers.small import weight_function

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import sigma_of
from rwopt.schedule.steps import StepFunction
from rwopt.schedule.weights import WeightFunction, hat
from rwopt.unet.sites import KINDS, list_sites

KNOTS = [12.0, 1.5, 0.1]


@pytest.fixture
def function(tiny_unet: Any) -> WeightFunction:
    return weight_function(list_sites(tiny_unet, KINDS[1:]), KNOTS, "stage_kind")


def theta_of(function: WeightFunction, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, function.dimension)


def test_shape_and_names(function: WeightFunction) -> None:
    assert function.dimension == 3 * 9 == len(function.names) == len(set(function.names))
    assert function.names[0] == "k0/down.self"
    assert function.names[-1] == "k2/up.ff"
    assert function.membership.shape == (9, 21)
    assert (function.membership.sum(0) == 1).all()  # each site is moved by one group


def test_theta_zero_is_the_plain_model_exactly(function: WeightFunction) -> None:
    assert (function.table(np.zeros(function.dimension)) == 1).all()
    assert (function.table(torch.zeros(function.dimension)) == 1).all()
    assert function.schedule(np.zeros(function.dimension)).is_plain


def test_a_coefficient_moves_its_group_at_its_knot_alone(function: WeightFunction) -> None:
    index = function.names.index("k1/mid.cross")
    theta = np.zeros(function.dimension)
    theta[index] = np.log(1.25)
    table = function.table(theta)
    moved = np.zeros(table.shape, bool)
    moved[1, function.groups["mid.cross"]] = True
    np.testing.assert_allclose(table[moved], 1.25)
    assert (table[~moved] == 1).all()


@pytest.mark.parametrize("by", ["site", "block", "stage", "kind", "stage_kind", "block_kind", "all"])
def test_fit_undoes_schedule(tiny_unet: Any, by: str) -> None:
    function = weight_function(list_sites(tiny_unet, KINDS[1:]), KNOTS, by)
    theta = theta_of(function)
    np.testing.assert_allclose(function.fit(function.schedule(theta)), theta, atol=1e-12)


def test_fit_is_the_mean_log_gain_of_a_group(tiny_unet: Any) -> None:
    sites = list_sites(tiny_unet)
    weights = np.random.default_rng(1).uniform(0.3, 2, (2, len(sites)))
    schedule = Schedule(tuple(s.id for s in sites), np.array([8.0, 0.2]), weights)
    function = weight_function(sites, [8.0, 0.2], "stage")
    expected = [np.log(weights[k, members]).mean() for k in range(2) for members in function.groups.values()]
    np.testing.assert_allclose(function.fit(schedule), expected, atol=1e-12)


def test_fit_takes_absent_sites_as_one_and_cuts_at_the_floor(tiny_unet: Any) -> None:
    sites = list_sites(tiny_unet)
    function = weight_function(sites, [1.0], "site")
    schedule = Schedule((sites[2].id, sites[4].id), np.array([1.0]), np.array([[0.0, -3.0]]))
    theta = function.fit(schedule)
    np.testing.assert_allclose(np.exp(theta), [1, 1, 0.05, 1, 0.05, 1, 1], rtol=1e-12)
    np.testing.assert_allclose(np.exp(function.fit(schedule, floor=0.2)[2]), 0.2)


def test_numpy_and_torch_tables_agree(function: WeightFunction) -> None:
    theta = np.stack([theta_of(function, 0), theta_of(function, 1)])
    tables = function.table(theta)
    assert tables.shape == (2, 3, 21)
    np.testing.assert_allclose(function.table(torch.from_numpy(theta)).numpy(), tables, rtol=1e-12)
    np.testing.assert_allclose(tables[1], function.table(theta[1]), rtol=1e-12)
    assert function.table(torch.zeros(function.dimension)).dtype == torch.float32


def test_torch_table_is_differentiable(function: WeightFunction) -> None:
    theta = torch.from_numpy(theta_of(function)).requires_grad_()
    assert torch.autograd.gradcheck(function.table, (theta,))


@pytest.fixture
def low(tiny_unet: Any) -> WeightFunction:
    return weight_function(list_sites(tiny_unet, KINDS[1:]), KNOTS, "stage_kind", rank=2)


def test_low_rank_is_a_product_around_the_plain_model(low: WeightFunction) -> None:
    assert low.dimension == len(low.names) == len(set(low.names)) == 2 * (3 + 9)
    assert (low.table(np.zeros(low.dimension)) == 1).all()
    theta = theta_of(low)
    logs = np.log(low.table(theta))
    assert np.linalg.matrix_rank(logs, 1e-9) == 2
    a, b = theta[:6].reshape(3, 2), theta[6:].reshape(2, 9)
    cosines = np.array([[1, np.cos(np.pi * (k + 0.5) / 3)] for k in range(3)])
    np.testing.assert_allclose(logs, (cosines + a) @ b @ low.membership)
    both = torch.from_numpy(np.stack([theta, np.zeros_like(theta)]))
    np.testing.assert_allclose(low.table(both)[0].numpy(), low.table(theta), rtol=1e-12)
    slope = torch.zeros(low.dimension, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(low.table, (slope,))
    (gradient,) = torch.autograd.grad(low.table(slope).sum(), slope)
    assert (gradient[6:15] != 0).all()  # the plain model is no dead end: each group moves as a constant


def test_low_rank_fits_what_has_it_and_the_nearest_of_the_rest(low: WeightFunction, function: WeightFunction) -> None:
    for seed in range(5):
        made = low.schedule(theta_of(low, seed))
        np.testing.assert_allclose(low.schedule(low.fit(made)).weights, made.weights, rtol=1e-6)
        full = theta_of(function, seed).reshape(3, 9)
        left, sizes, right = np.linalg.svd(full)
        near = left[:, :2] * sizes[:2] @ right[:2]  # Eckart-Young, in the log-gains of groups
        found = low.table(low.fit(function.schedule(full.ravel())))
        np.testing.assert_allclose(np.log(found), near @ low.membership, atol=1e-9)
    constant = Schedule.constant(low.sites, [1.0], 1.2)
    np.testing.assert_allclose(low.fit(constant)[:6].reshape(3, 2)[:, 0], 0, atol=1e-9)  # a constant needs no a
    assert (low.fit(Schedule.constant(low.sites, [1.0])) == 0).all()


def test_a_rank_too_high_is_refused(tiny_unet: Any) -> None:
    with pytest.raises(UserError, match=r"weights\.rank=4 is outside 0 \(full\) \.\. 3"):
        weight_function(list_sites(tiny_unet, KINDS[1:]), KNOTS, rank=4)


def test_schedule_carries_the_notes(function: WeightFunction) -> None:
    schedule = function.schedule(theta_of(function), provenance={"seed": 3})
    assert schedule.sites == function.sites
    assert schedule.mode == function.mode == "residual"
    assert schedule.provenance == {"seed": 3}


def test_hats_are_a_partition_of_unity() -> None:
    sigmas = np.array(KNOTS)
    for sigma in np.geomspace(0.01, 100, 41):
        values = hat(sigmas, sigma)
        assert values.sum() == pytest.approx(1, abs=1e-12)
        assert (values >= 0).all()
        assert (values > 0).sum() <= 2
    np.testing.assert_allclose([hat(sigmas, s) for s in sigmas], np.eye(3), atol=1e-12)
    assert hat(sigmas, 1e6).tolist() == [1, 0, 0]  # held outside
    assert hat(sigmas, 1e-6).tolist() == [0, 0, 1]
    assert hat(np.array([2.0]), 0.3).tolist() == [1]


def test_hats_times_table_is_what_the_schedule_looks_up(function: WeightFunction) -> None:
    """A schedule is linear in the weights over ln sigma; the log-gains are linear in theta at the knots only."""
    schedule = function.schedule(theta_of(function))
    for sigma in np.geomspace(0.05, 20, 17):
        np.testing.assert_allclose(hat(function.sigmas, sigma) @ schedule.weights, schedule.at(sigma), rtol=1e-10)


# --- with the sampler's dials

TABLE = sigma_of(DDIMScheduler(**SD).alphas_cumprod.double().numpy())
CALLS = TABLE[[999, 749, 499, 249]]


def with_steps(function: WeightFunction, *learn: str, **changes: Any) -> WeightFunction:
    return replace(function, steps=StepFunction("dpmpp_2m", CALLS, TABLE, 4.0, learn), **changes)


def test_dials_follow_the_weights(function: WeightFunction) -> None:
    whole = with_steps(function, "guidance", "clock", "told")
    dials = [f"{dial}{i}" for dial in ("clock", "told", "guidance") for i in range(4)]
    assert whole.names == [*function.names, *dials]
    assert whole.dimension == len(whole.names) == function.dimension + 12
    assert whole.weight_count == function.weight_count == function.dimension
    np.testing.assert_array_equal(whole.reach(0.4), [0.4] * 27 + [2.0] * 4 + [3.0] * 4 + [1.5] * 4)
    np.testing.assert_array_equal(function.reach(0.4), [0.4] * 27)
    theta = theta_of(whole)
    np.testing.assert_array_equal(whole.table(theta), function.table(theta[:27]))
    np.testing.assert_allclose(whole.table(torch.from_numpy(theta)).numpy(), whole.table(theta), rtol=1e-12)
    with pytest.raises(UserError, match="theta has 27 numbers, this weight function takes 39"):
        whole.table(theta[:27])


def test_zeros_are_the_plain_model_on_the_base_grid(function: WeightFunction) -> None:
    whole = with_steps(function, "clock", "told", "guidance")
    schedule = whole.schedule(np.zeros(whole.dimension))
    assert schedule.is_plain
    assert schedule.steps is not None
    np.testing.assert_allclose(schedule.steps.sigmas, CALLS)
    np.testing.assert_allclose(schedule.steps.told, CALLS)
    np.testing.assert_allclose(schedule.steps.guidance, 4.0)
    np.testing.assert_allclose(schedule.sigmas, KNOTS)
    assert function.schedule(np.zeros(27)).steps is None


def test_knots_move_with_the_clock(function: WeightFunction) -> None:
    """A knot at a call stays at it; one between two calls keeps its share of the way; one beyond its distance."""
    between = np.sqrt(CALLS[1] * CALLS[2])
    whole = with_steps(function, "clock", sigmas=[*CALLS[:2], between, *CALLS[2:]])
    np.testing.assert_allclose(whole.knots(CALLS), whole.sigmas)
    theta = np.zeros(whole.dimension)
    theta[whole.weight_count :] = [0.8, -0.5, 0.3, -0.4]
    schedule = whole.schedule(theta)
    assert schedule.steps is not None
    moved = np.array(schedule.steps.sigmas)
    assert (np.abs(np.log(moved[1:] / CALLS[1:])) > 0.05).all()
    assert moved[0] == pytest.approx(CALLS[0])
    np.testing.assert_allclose(schedule.sigmas[[0, 1, 3, 4]], moved)
    assert schedule.sigmas[2] == pytest.approx(np.sqrt(moved[1] * moved[2]))
    # so the weights of each call are the row that is its own, whatever the clock
    rows = theta_of(whole)
    rows[whole.weight_count :] = theta[whole.weight_count :]
    np.testing.assert_allclose(whole.schedule(rows).at(moved), whole.table(rows)[[0, 1, 3, 4]], rtol=1e-10)
    wide = with_steps(function, "clock", sigmas=[3 * CALLS[0], CALLS[1]])
    np.testing.assert_allclose(wide.knots(moved), [3 * moved[0], moved[1]])
    low = with_steps(function, "clock", sigmas=[CALLS[3] / 2, CALLS[3] / 4])
    np.testing.assert_allclose(low.knots(moved), [moved[3] / 2, moved[3] / 4])
    np.testing.assert_array_equal(function.knots(moved), KNOTS)  # without dials knots are where they are


def test_without_groups_weights_are_one_and_only_dials_move(function: WeightFunction) -> None:
    dials = with_steps(function, "clock", "told", groups={})
    assert dials.names == dials.steps.names  # type: ignore[union-attr]
    assert (dials.dimension, dials.weight_count) == (8, 0)
    theta = theta_of(dials)
    assert (dials.table(theta) == 1).all()
    assert (dials.table(torch.from_numpy(theta)) == 1).all()
    assert dials.table(theta).shape == (3, 21)
    schedule = dials.schedule(theta)
    assert schedule.is_plain
    assert schedule.steps == dials.steps.steps(theta)  # type: ignore[union-attr]
    assert (dials.fit(Schedule.constant(dials.sites, [1.0], 1.2)) == 0).all()


@pytest.mark.parametrize("rank", [0, 2])
def test_fit_leaves_dials_where_they_are(function: WeightFunction, rank: int) -> None:
    whole, bare = with_steps(function, "told", "guidance", rank=rank), replace(function, rank=rank)
    made = bare.schedule(theta_of(bare))
    theta = whole.fit(made)
    assert theta.shape == (whole.dimension,)
    assert (theta[whole.weight_count :] == 0).all()
    np.testing.assert_allclose(whole.schedule(theta).weights, made.weights, rtol=1e-6)
    assert (whole.fit(Schedule.constant(whole.sites, [1.0]))[whole.weight_count :] == 0).all()


def test_low_rank_with_dials(low: WeightFunction) -> None:
    whole = with_steps(low, "clock", "told")
    assert whole.weight_count == low.dimension == 24
    assert whole.names == [*low.names, *whole.steps.names]  # type: ignore[union-attr]
    theta = theta_of(whole)
    np.testing.assert_array_equal(whole.table(theta), low.table(theta[:24]))
    slope = torch.from_numpy(theta).requires_grad_()
    (gradient,) = torch.autograd.grad(whole.table(slope).sum(), slope)
    assert (gradient[24:] == 0).all()  # the table is of the weights alone


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "knots", [[], [1.0, 2.0], [1.0, 1.0], [1.0, 0.0], [1.0, -1.0], [NAN], [2.0, NAN], [INFINITY, 1.0]]
)
def test_bad_knots_are_refused(tiny_unet: Any, knots: list[float]) -> None:
    with pytest.raises(UserError, match=r"^knots=[^\n]*descending order$"):
        weight_function(list_sites(tiny_unet), knots)


def test_bad_theta_and_grouping_are_refused(function: WeightFunction, tiny_unet: Any) -> None:
    with pytest.raises(UserError, match="theta has 5 numbers, this weight function takes 27"):
        function.table(np.zeros(5))
    with pytest.raises(UserError, match="grouping 'sort' is unknown"):
        weight_function(list_sites(tiny_unet), KNOTS, "sort")
