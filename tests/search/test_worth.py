"""What a score is worth in plain calls: exact interpolation, caps, intervals that hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from rwopt.search.worth import worth

PLAIN = {3: np.array([20.0, 22.0]), 4: np.array([24.0, 26.0]), 6: np.array([30.0, 32.0])}


@pytest.mark.parametrize(
    ("reached", "calls"), [([20, 22], 3), ([22, 24], 3.5), ([24, 26], 4), ([27, 29], 5), ([10, 10], 3)]
)
def test_calls_are_interpolated(reached: list[float], calls: float) -> None:
    found = worth(np.array(reached, dtype=float), PLAIN)
    assert found.calls == pytest.approx(calls)
    assert not found.capped


def test_beyond_the_most_calls_it_is_capped_and_says_so() -> None:
    found = worth(np.array([50.0, 50.0]), PLAIN)
    assert found.calls == 6
    assert found.capped
    assert str(found).startswith("more than 6.0")


def test_worse_with_more_calls_counts_as_the_best_so_far() -> None:
    plain = {2: np.array([20.0]), 3: np.array([10.0]), 4: np.array([30.0])}
    assert worth(np.array([25.0]), plain).calls == pytest.approx(3.5)


def test_the_interval_resamples_cases_together_and_seeds() -> None:
    rng = np.random.default_rng(0)
    level = rng.normal(0, 5, 200)  # hard and easy cases, the same on both sides
    plain = {n: 10.0 * n + level for n in (2, 3, 4)}
    sure = worth(25 + level, plain)
    assert (sure.low, sure.high) == pytest.approx((2.5, 2.5))
    unsure = worth(np.stack([23 + level, 27 + level], 1), plain)
    assert unsure.calls == pytest.approx(2.5)
    assert (unsure.low, unsure.high) == pytest.approx((2.3, 2.7))
