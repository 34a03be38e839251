"""Operations on schedules: exact answers, and nothing at identity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from rwopt.errors import UserError
from rwopt.export.arithmetic import clamp, merge, resample, scale, window, without_steps
from rwopt.schedule import Schedule
from rwopt.schedule.schedule import INTERPOLATIONS
from rwopt.schedule.steps import Steps

A, B = "mid_block.attentions.0", "up_blocks.1.attentions.0"
LEVELS = np.exp(np.linspace(-4, 4, 2001))


def some(interp: str = "linear", **fields: Any) -> Schedule:
    weights = np.array([[1.25, 1 / 3], [0.5, 2.0], [1.0, 0.7], [3.0, 0.0]])
    return Schedule((A, B), np.array([12.0, 5.0, 1.0, 0.2]), weights, interp=interp, **fields)


IDENTITIES: dict[str, Callable[[Schedule], Schedule]] = {
    "scale": lambda s: scale(s, 1),
    "clamp": lambda s: clamp(s, -math.inf, math.inf),
    "resample": lambda s: resample(s, s.sigmas.tolist()),
    "window": lambda s: window(s, math.inf, 0),
    "merge itself": lambda s: merge(s, s, 0.3),
    "merge none": lambda s: merge(s, scale(s, 0.5), 0),
    "merge all": lambda s: merge(s, s, 1),
    "steps": without_steps,
}


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("interp", INTERPOLATIONS)
def test_identities_are_exact_and_noted(name: str, interp: str) -> None:
    schedule = some(interp, provenance={"seed": 3})
    same = IDENTITIES[name](schedule)
    assert same.exact() == {**schedule.exact(), "provenance": same.provenance}
    assert same.digest() == schedule.digest()
    assert same.provenance["seed"] == 3
    assert len(same.provenance["edits"]) == 1
    assert len(IDENTITIES[name](same).provenance["edits"]) == 2
    assert "edits" not in schedule.provenance


def test_scale_and_clamp() -> None:
    assert scale(some(), 0).is_plain
    np.testing.assert_array_equal(scale(some(), 0.5).weights, 1 + 0.5 * (some().weights - 1))
    np.testing.assert_array_equal(scale(some(), -1).weights, 2 - some().weights)
    np.testing.assert_array_equal(clamp(some(), 0.5, 1.2).weights, np.clip(some().weights, 0.5, 1.2))
    assert scale(scale(some(), 0.5), 2).provenance["edits"] == ["scale 0.5", "scale 2"]


@pytest.mark.parametrize("interp", INTERPOLATIONS)
def test_resampled_weights_are_those_of_the_levels(interp: str) -> None:
    grid = [20.0, 3.0, 0.9]
    schedule = resample(some(interp), grid)
    np.testing.assert_array_equal(schedule.at(np.array(grid)), some(interp).at(np.array(grid)))
    finer = resample(some(), np.unique([*LEVELS, *some().sigmas])[::-1].tolist())
    np.testing.assert_allclose(finer.at(LEVELS), some().at(LEVELS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interp", INTERPOLATIONS)
@pytest.mark.parametrize(
    ("start", "end"), [(3, 0.4), (math.inf, 0.4), (3, 0), (5, 1), (100, 50), (0.1, 0.05), (0.9, 0.8), (12, 0.2)]
)
def test_a_window_keeps_what_is_inside_and_nothing_else(interp: str, start: float, end: float) -> None:
    schedule = window(some(interp), start, end)
    far = 2e-3 if interp != "linear" else 2e-6  # what `previous` takes for a knot
    middles = np.sqrt(some().sigmas[1:] * some().sigmas[:-1])
    for sigma in LEVELS:
        edges = [start, end] if interp == "linear" else [start, end, *some().sigmas, *middles]
        if any(0 < edge < math.inf and abs(math.log(sigma / edge)) < far for edge in edges):
            continue
        expected = some(interp).at(float(sigma)) if end < sigma <= start else np.ones(2)
        np.testing.assert_allclose(schedule.at(float(sigma)), expected, rtol=1e-10, atol=1e-10, err_msg=str(sigma))
    if end > 0:
        assert (schedule.at(end) == 1).all()
    if start < math.inf:
        np.testing.assert_allclose(schedule.at(start), some(interp).at(start), rtol=1e-9)


def test_merged_weights_are_means_of_log_gains() -> None:
    a = Schedule((A,), np.array([4.0]), np.array([[4.0]]))
    b = Schedule((A, B), np.array([8.0, 2.0]), np.array([[1.0, 2.0], [1.0, 1.0]]))
    merged = merge(a, b)
    assert (merged.sites, merged.sigmas.tolist()) == ((A, B), [8.0, 4.0, 2.0])
    np.testing.assert_allclose(merged.weights, [[2, 2**0.5], [2, 1.5**0.5], [2, 1]], rtol=1e-14)
    np.testing.assert_allclose(merge(a, b, 0.25).weights[:, 0], 4**0.75)
    np.testing.assert_array_equal(merge(a, b, 1).at(b.sigmas), b.weights)
    nearest = [Schedule((A,), np.array(s), np.array([[w] for w in ws]), interp="nearest")
               for s, ws in (([8.0, 2.0], [4.0, 1.0]), ([6.0], [9.0]))]  # fmt: skip
    mixed = merge(*nearest)
    assert [mixed.at(s)[0] for s in (8.0, 4.1, 3.9, 2.0)] == pytest.approx([6, 6, 3, 3])


def test_what_makes_no_sense_is_refused() -> None:
    steps = Steps("ddim", (9, 1))
    for call, says in (
        (lambda: scale(some(), math.nan), "scale=nan"),
        (lambda: clamp(some(), 2, 1), "clamp=2,1"),
        (lambda: resample(some(), [1, 2]), "strictly descending"),
        (lambda: resample(some(), []), "strictly descending"),
        (lambda: window(some(), 1, 1), "window=1,1: give VE sigmas, the higher one first"),
        (lambda: window(some(), 1, -1), "window=1,-1"),
        (lambda: window(some(), math.nan, 0), "window=nan,0"),
        (lambda: merge(some(), some(), 1.5), "share=1.5"),
        (lambda: merge(some(), some("nearest")), "grid.interp differs"),
        (lambda: merge(some(), some(mode="output")), "op.mode differs"),
        (lambda: merge(some(), some(steps=steps)), "steps differs"),
        (lambda: merge(some(), scale(some(), 2)), f"site {B} has weights 0.333333 and -0.333333"),
        (lambda: scale(some(), 1e31), "give finite numbers"),
    ):
        with pytest.raises(UserError, match=says) as error:
            call()  # type: ignore[no-untyped-call]
        assert "\n" not in str(error.value)
    assert without_steps(some(steps=steps)).steps is None
    assert scale(some(steps=steps), 0.5).steps == steps
