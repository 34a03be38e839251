"""Paired evaluation: toy data whose answer is known, coverage of the interval, units of resampling."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from rwopt.objectives import Batch
from rwopt.results import Paired
from rwopt.search.evaluation import Scores, compare, interval, score


def scores(*values: float) -> Scores:
    return Scores({"m": np.array(values, dtype=float)})


def paired(a: list[Scores], b: list[Scores], higher: bool = True) -> Paired:
    return compare(a, b, "m", ("a", "b"), False, "test", higher)


def toy_task(owner: list[int]) -> Any:
    return SimpleNamespace(owner=np.array(owner), model=SimpleNamespace(name="avatars"))


def brightness(batch: Batch) -> torch.Tensor:
    return batch.images.mean((1, 2, 3))


# --- scores


def test_pictures_of_a_case_are_averaged_first() -> None:
    images = torch.tensor([0.0, 1.0, 0.5, 0.5, 0.2, 0.4]).view(6, 1, 1, 1).expand(6, 3, 2, 2)
    composites = {"bright": brightness, "dark": lambda b: 1 - brightness(b)}
    made = score(toy_task([0, 0, 1, 1, 2, 2]), Batch(images), composites)
    np.testing.assert_allclose(made.values["bright"], [0.5, 0.5, 0.3], atol=1e-6)
    assert made.mean("bright") == pytest.approx(1.3 / 3)
    assert made.means() == pytest.approx({"bright": 1.3 / 3, "dark": 1.7 / 3})


def test_undefined_scores_are_left_out() -> None:
    nan = float("nan")

    def half_defined(batch: Batch) -> torch.Tensor:
        return torch.tensor([1.0, nan, nan, nan, 0.5, 0.7])

    made = score(toy_task([0, 0, 1, 1, 2, 2]), Batch(torch.zeros(6, 3, 2, 2)), {"m": half_defined})
    np.testing.assert_allclose(made.values["m"], [1.0, nan, 0.6], atol=1e-6)
    assert made.mean("m") == pytest.approx(0.8)
    assert math.isnan(scores(nan, nan).mean("m"))


def test_single_objectives_are_scored_by_name() -> None:
    made = score(toy_task([0, 1]), Batch(torch.rand(2, 3, 64, 64)), {"bright": brightness}, ["scorer.realism"])
    assert list(made.values) == ["bright", "scorer.realism"]
    assert made.values["scorer.realism"].shape == (2,)


def test_scores_survive_json() -> None:
    made = Scores({"a": np.array([0.123456789, np.nan, -3.0]), "b": np.array([1.0, 2.0, 3.0])})
    again = Scores.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert list(again.values) == ["a", "b"]
    for name, value in made.values.items():
        np.testing.assert_allclose(again.values[name], value, atol=5e-7)  # NaN stays NaN; six decimals are kept
    assert Scores.from_json(again.to_json()).to_json() == again.to_json()


# --- the paired comparison


def test_a_known_difference() -> None:
    result = paired([scores(0.5, 0.7, 0.9, 0.1)], [scores(0.4, 0.6, 0.8, 0.0)])
    assert result.mean == pytest.approx(0.1)
    assert (result.low, result.high) == pytest.approx((0.1, 0.1))  # every case says the same
    assert result.win_rate == 1
    assert result.p == pytest.approx(2 * 0.5**4)
    assert (result.cases, result.seeds, result.a, result.b, result.split) == (4, 1, "a", "b", "test")


def test_the_difference_is_paired() -> None:
    """Cases differ a hundred times more than arms do: only pairs can tell."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 10, 50)
    result = paired([Scores({"m": base + 0.1 + rng.normal(0, 0.05, 50)})], [Scores({"m": base})])
    assert 0.07 < result.low < result.mean < result.high < 0.13


def test_sign_test_and_ties() -> None:
    a, b = scores(1, 1, 1, 1, 0, 2, 2), scores(0, 0, 0, 0, 1, 2, 2)
    result = paired([a], [b])
    assert result.p == pytest.approx(binomtest(4, 5).pvalue)  # the two ties say nothing
    assert result.win_rate == pytest.approx((4 + 1) / 7)  # and count half here
    mirrored = paired([b], [a])
    assert mirrored.p == pytest.approx(result.p)
    assert mirrored.win_rate == pytest.approx(1 - result.win_rate)
    assert mirrored.mean == pytest.approx(-result.mean)
    same = paired([a], [a])
    assert (same.mean, same.low, same.high, same.win_rate, same.p) == (0, 0, 0, 0.5, 1)


def test_lower_is_better_wins() -> None:
    result = paired([scores(1, 2, 3)], [scores(2, 3, 2)], higher=False)
    assert result.win_rate == pytest.approx(2 / 3)
    assert result.mean == pytest.approx(-1 / 3)  # the difference itself keeps its sign


def test_cases_without_a_value_are_left_out() -> None:
    nan = float("nan")
    result = paired([scores(1, nan, 3, 5)], [scores(0, 1, nan, 2)])
    assert result.cases == 2
    assert result.mean == pytest.approx(2)
    nothing = paired([scores(nan, nan)], [scores(0, 1)])
    assert nothing.cases == 0
    assert all(math.isnan(v) for v in (nothing.mean, nothing.low, nothing.high))
    assert nothing.p == 1


def test_repeats_are_paired_by_seed_or_averaged() -> None:
    a, b = [scores(1, 2), scores(3, 6)], [scores(0, 0), scores(1, 1)]
    both = paired(a, b)
    assert both.seeds == 2
    assert both.mean == pytest.approx((1 + 2 + 2 + 5) / 4)
    assert paired(a, [scores(0.5, 0.5)]).mean == pytest.approx(2.5)  # one b for all seeds of a
    assert paired([scores(2, 4)], b).mean == pytest.approx(2.5)  # the mean b for the one a


# --- the interval


def test_the_interval_of_the_mean_is_the_textbook_one_for_many_cases() -> None:
    values = np.random.default_rng(0).normal(1, 2, 200)
    low, high = interval(values)
    half = 1.96 * values.std() / 200**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval(values) == (low, high)  # seeded
    narrow = interval(values, level=0.5)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_coverage() -> None:
    """95 % intervals of skewed differences of 40 cases: percentile bootstraps are a little short there."""
    rng = np.random.default_rng(1)
    hits = 0
    for repeat in range(200):
        low, high = interval(rng.exponential(1, 40) - 1, resamples=500, seed=repeat)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_coverage_with_search_seeds() -> None:
    """Case, seed and residual effects: leaving the seeds' share out would cover far too little."""
    rng = np.random.default_rng(2)
    both, cases_only = 0, 0
    for repeat in range(200):
        table = rng.normal(0, 1, (30, 1)) + rng.normal(0, 0.6, (1, 6)) + rng.normal(0, 1, (30, 6))
        low, high = interval(table, resamples=500, seed=repeat)
        both += low <= 0 <= high
        low, high = interval(table.mean(1), resamples=500, seed=repeat)
        cases_only += low <= 0 <= high
    assert 0.85 <= both / 200 <= 0.99  # six seeds are few
    assert cases_only < both - 20


def test_cases_are_resampled_not_pictures() -> None:
    """16 draws that agree inside their case are 12 facts, not 192: the interval is 4 times that of pictures."""
    values = np.random.default_rng(3).normal(0, 1, 12)
    images = torch.from_numpy(np.repeat(values, 16)).view(192, 1, 1, 1).expand(192, 3, 1, 1)
    clustered = score(toy_task(np.repeat(np.arange(12), 16).tolist()), Batch(images), {"m": brightness}).values["m"]
    low, high = interval(clustered)
    first, last = interval(np.repeat(values, 16))
    assert (high - low) / (last - first) == pytest.approx(4, rel=0.1)


def test_no_case_has_no_interval() -> None:
    assert all(math.isnan(v) for v in interval(np.array([])))
