"""The sampler's own dials: what is no grid, files with and without them, and how numbers become timesteps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import noise_table, sigma_at, timestep_of
from rwopt.schedule.steps import DIALS, LEAST_GUIDANCE, REACH, StepFunction, Steps, steps_of, whole_timesteps

FILES = Path(__file__).parent / "files"
TABLE = noise_table({})
GRID = (999.0, 824.0, 649.0, 474.0, 299.0, 124.0)


def function(learn: Any = DIALS, grid: Any = GRID, guidance: float = 4.0) -> StepFunction:
    return StepFunction("dpmpp_2m", sigma_at(grid, TABLE), TABLE, guidance, learn)  # type: ignore[arg-type]


def numbers(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.4, 0.4, size)


# ------------------------------------------------------------------------------------------------------ Steps


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sigmas": ()}, "steps.sigmas is []: give strictly descending noise levels above 0"),
        ({"sigmas": (3, 3)}, "steps.sigmas is [3.0, 3.0]: give strictly descending"),
        ({"sigmas": (3, 4)}, "steps.sigmas is [3.0, 4.0]: give strictly descending"),
        ({"sigmas": (3, 0)}, "steps.sigmas is [3.0, 0.0]: give strictly descending noise levels above 0"),
        ({"sigmas": (float("inf"), 1)}, "steps.sigmas is [inf, 1.0]: give"),
        ({"sigmas": (float("nan"), 1)}, "steps.sigmas is [nan, 1.0]: give"),
        ({"sigmas": 3}, "steps.sigmas is 3: give a list of numbers"),
        ({"sigmas": ("a",)}, "steps.sigmas is ('a',): give a list of numbers"),
        ({"told": (1,)}, "steps.told has 1 numbers: give 2, one a call, or none"),
        ({"told": (1, 0)}, "steps.told holds 0: give finite numbers above 0"),
        ({"guidance": (4, 4, 4)}, "steps.guidance has 3 numbers: give 2, one a call, or none"),
        ({"guidance": (4, 1)}, "steps.guidance holds 1: give finite numbers above 1"),
        ({"guidance": (4, float("nan"))}, "steps.guidance holds nan: give finite numbers above 1"),
    ],
)
def test_what_no_sampler_can_use_is_refused_in_one_line(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        Steps(**{"sampler": "ddim", "sigmas": (9, 1), **change})
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [{}, {"told": (8.5, 1)}, {"guidance": (4, 5)}, {"told": (8, 1), "guidance": (2, 3)}])
def test_a_file_keeps_the_steps(tmp_path: Path, given: dict[str, Any]) -> None:
    schedule = Schedule.constant(["mid_block.attentions.0"], [9.0], steps=Steps("ddim", (9, 1.123456789), **given))
    path = schedule.save(tmp_path / "a.json")
    written = json.loads(path.read_text())
    assert set(written["steps"]) == {"sampler", "sigmas", *given}
    assert written["steps"]["sigmas"] == [9.0, 1.12346]
    loaded = Schedule.load(path)
    assert (loaded, loaded.digest()) == (schedule, schedule.digest())
    assert loaded.steps == Steps("ddim", (9, 1.12346), **given)
    assert loaded.save(tmp_path / "b.json").read_bytes() == path.read_bytes()
    assert steps_of(None) is None


def test_each_dial_changes_the_digest() -> None:
    plain = Schedule.constant(["mid_block.attentions.0"], [9.0])
    steps = [
        None,
        Steps("ddim", (9, 1)),
        Steps("euler", (9, 1)),
        Steps("ddim", (9, 1.1)),
        Steps("ddim", (9, 1), told=(9, 1)),
        Steps("ddim", (9, 1), guidance=(4, 4)),
    ]
    assert len({replace(plain, steps=one).digest() for one in steps}) == len(steps)
    assert plain.is_plain
    assert replace(plain, steps=steps[1]).is_plain


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ({"sampler": "ddim"}, "steps lacks 'sigmas'"),
        ({"sampler": "ddim", "sigmas": [9], "eta": 1}, "steps has the unknown entry 'eta'"),
        ({"sampler": "", "sigmas": [9]}, "steps.sampler is ''"),
        ({"sampler": "ddim", "sigmas": [9, -1]}, r"steps.sigmas\[1\] is -1: give a number above 0"),
        ({"sampler": "ddim", "sigmas": [1, 9]}, "strictly descending"),
        ({"sampler": "ddim", "sigmas": [9], "guidance": [1]}, r"steps.guidance\[0\] is 1: give a number above 1"),
        ({"sampler": "ddim", "sigmas": [9], "told": []}, r"steps.told is \[\]: give the VE noise levels"),
        ({"sampler": "ddim", "sigmas": [9], "guidance": []}, r"steps.guidance is \[\]: give guidance scales above 1"),
        ([], r"steps is \[\]: give an object with sampler and sigmas"),
    ],
)
def test_bad_steps_in_a_file_are_refused(tmp_path: Path, steps: Any, says: str) -> None:
    document = {**Schedule.constant(["mid_block.attentions.0"], [9.0]).to_dict(), "steps": steps}
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=says) as error:
        Schedule.load(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_a_file_of_version_1_1_is_read_as_it_was_meant() -> None:
    """Written by rwopt of before there were steps; its digest is what that rwopt said."""
    schedule = Schedule.load(FILES / "schedule-1.1.json")
    assert schedule.digest() == "46b58af10ef66046a42d070ceef4263716d63333967fdceb46fab3bedb8e0390"
    assert schedule.steps is None
    assert (schedule.interp, schedule.cfg_branch, schedule.extra) == ("previous", "cond", {"x-note": "kept"})
    assert schedule.noise["train_sigma"] == [0.03, 0.2, 0.7, 1.5, 3.0, 8.0]
    np.testing.assert_array_equal(schedule.at(0.9), [1.0, 1.3])


# ------------------------------------------------------------------------------------------------------ StepFunction


@pytest.mark.parametrize("grid", [GRID, (999.0,), (639.0, 420.0, 200.0), tuple(np.arange(999.0, 0, -20))])
def test_zeros_are_the_base_grid(grid: tuple[float, ...]) -> None:
    f = function(grid=grid)
    t, told, guidance = f(np.zeros(len(f.names)))
    np.testing.assert_allclose(t, grid, rtol=0, atol=1e-9)
    np.testing.assert_allclose(told, grid, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(guidance, 4.0)
    steps = f.steps(np.zeros(len(f.names)))
    np.testing.assert_allclose(steps.sigmas, f.sigmas, rtol=1e-12)
    np.testing.assert_allclose(steps.told, f.sigmas, rtol=1e-9)
    assert set(steps.guidance) == {4.0}
    assert function((), grid).steps(np.zeros(0)) == Steps("dpmpp_2m", f.sigmas)


def test_the_formulas_of_the_docstring() -> None:
    """By loops, where the code has arrays."""
    f, theta = function(), numbers(18)
    c, d, m = theta[:6], theta[6:12], theta[12:]
    gaps = [a - b for a, b in zip(GRID, (*GRID[1:], -1.0), strict=True)]
    parts = [gap / 1000 * np.exp(x) for gap, x in zip(gaps, c, strict=True)]
    t = [999 - 1000 * sum(parts[:i]) / sum(parts) for i in range(6)]
    actual = f(theta)
    np.testing.assert_allclose(actual[0], t, rtol=1e-12)
    np.testing.assert_allclose(actual[1], np.clip(np.array(t) + 100 * d, 0, 999), rtol=1e-12)
    np.testing.assert_allclose(actual[2], 4 * np.exp(m), rtol=1e-12)
    steps = f.steps(theta)
    np.testing.assert_allclose(timestep_of(steps.sigmas, TABLE), np.round(t), atol=1e-9)
    expected = np.clip(np.round(t) + actual[1] - t, 0, 999)  # what it is told keeps its distance
    np.testing.assert_allclose(timestep_of(steps.told, TABLE), expected, atol=1e-9)


@pytest.mark.parametrize("learn", [DIALS, ("clock",), ("told",), ("guidance",), ("guidance", "clock"), ()])
def test_numpy_and_torch_agree(learn: tuple[str, ...]) -> None:
    f = function(learn)
    theta = numbers(len(f.names))
    for ours, theirs in zip(f(theta), f(torch.tensor(theta)), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-13)


def test_gradients_equal_finite_differences() -> None:
    f = function(grid=(999.0, 700.0, 400.0, 100.0))
    theta = torch.tensor(numbers(12, seed=3), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: f(x), theta, eps=1e-6, rtol=1e-6)


def test_which_numbers_there_are() -> None:
    f = function(("guidance", "clock"), (999.0, 500.0))
    assert f.learn == ("clock", "guidance")
    assert f.names == ["clock0", "clock1", "guidance0", "guidance1"]
    assert f.reach.tolist() == [REACH["clock"]] * 2 + [REACH["guidance"]] * 2
    assert function(grid=(999.0,)).names == ["told0", "guidance0"]  # a single call has no clock
    assert function(guidance=1.0).learn == ("clock", "told")  # no guidance, no scale
    assert StepFunction(**f.to_dict()) == f
    with pytest.raises(UserError, match=r"steps\.learn=tould is unknown: use clock, told, guidance"):
        function(("tould",))


def test_only_what_is_learned_goes_into_the_file() -> None:
    steps = function(("clock",)).steps(numbers(6))
    assert (steps.told, steps.guidance) == ((), ())
    steps = function(("told", "guidance")).steps(numbers(12))
    np.testing.assert_array_equal(steps.sigmas, function().sigmas)
    assert len(steps.told) == len(steps.guidance) == 6


@pytest.mark.parametrize("count", [2, 6, 50])
@pytest.mark.parametrize("seed", range(8))
def test_at_the_ends_of_reach_there_are_steps_still(count: int, seed: int) -> None:
    """Many calls, and the clock nearly stopped at one end: timesteps stay whole, apart, and within the table."""
    f = function(grid=np.round(np.linspace(999, -1, count + 1))[:-1])
    rng = np.random.default_rng(seed)
    theta = f.reach * (rng.choice([-1, 1], len(f.names)) if seed > 1 else 1.0)
    if seed < 2:  # two calls at one end take next to no share
        theta[:count] = f.reach[:count]
        theta[[0, 1] if seed else [-1, -2]] *= 1 if count == 2 else -1
    steps = f.steps(theta)
    times = timestep_of(steps.sigmas, TABLE)
    np.testing.assert_allclose(times, np.round(times), atol=1e-6)
    assert times[0] == pytest.approx(999)
    assert min(steps.guidance) >= LEAST_GUIDANCE


def test_whole_timesteps() -> None:
    assert whole_timesteps([999, 500.4, 3.6]).tolist() == [999, 500, 4]
    assert whole_timesteps([999, 998.8, 998.7, 5]).tolist() == [999, 998, 997, 5]  # none above the first
    assert whole_timesteps([20, 0.2, 0.1, -0.7]).tolist() == [20, 2, 1, 0]
    assert whole_timesteps([0]).tolist() == [0]


# ------------------------------------------------------------------------------------------------------ another number


def test_as_many_calls_as_before_are_the_same() -> None:
    steps = function().steps(numbers(18))
    again = steps.resampled(6, TABLE)
    for name in ("sigmas", "told", "guidance"):
        np.testing.assert_allclose(getattr(again, name), getattr(steps, name), rtol=1e-9)
    loaded = steps_of(steps.to_dict())
    assert loaded is not None
    np.testing.assert_allclose(loaded.resampled(6, TABLE).sigmas, steps.sigmas, rtol=1e-9)


def test_more_calls_keep_the_course() -> None:
    steps = Steps("ddim", sigma_at([999, 599, 199], TABLE), sigma_at([999, 599, 199], TABLE) * 1.1, (2, 4, 8))  # type: ignore[arg-type]
    more = steps.resampled(6, TABLE)
    # half way between 199 and the end, -1, is 99
    np.testing.assert_allclose(timestep_of(more.sigmas, TABLE), [999, 799, 599, 399, 199, 99], atol=1e-6)
    np.testing.assert_allclose(np.array(more.told) / more.sigmas, 1.1)
    assert more.guidance[::2] == pytest.approx((2, 4, 8))
    assert more.guidance[-1] == pytest.approx(8)
    bare = Steps("ddim", steps.sigmas).resampled(1, TABLE)
    assert (bare.told, bare.guidance) == ((), ())
    assert bare.sigmas == pytest.approx(TABLE[999:])
