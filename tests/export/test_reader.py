"""The standalone reader: the same weights as `rwopt.Schedule`, in a file that needs no rwopt."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwopt.export import reader
from rwopt.schedule import Schedule
from rwopt.schedule.document import LARGEST, LIMIT
from rwopt.schedule.schedule import _KNOT_TOLERANCE, INTERPOLATIONS
from rwopt.schedule.steps import Steps

SITES = ("down_blocks.0.attentions.0", "mid_block.attentions.0.cross", "up_blocks.1.resnets.2.skip")


def random_schedule(seed: int) -> Schedule:
    rng = np.random.default_rng(seed)
    knots = int(rng.integers(1, 9))
    return Schedule(
        SITES,
        np.sort(np.exp(rng.uniform(-4, 4, knots)))[::-1],
        rng.normal(1, 1, (knots, 3)),
        interp=INTERPOLATIONS[seed % 3],
        mode=("residual", "output")[seed % 2],
    )


def table(**changes: Any) -> reader.Table:
    return reader.parse(json.dumps({**random_schedule(1).exact(), **changes}))


def test_ten_thousand_look_ups_are_those_of_the_schedule() -> None:
    for seed in range(500):
        schedule = random_schedule(seed)
        read = reader.parse(json.dumps(schedule.exact()))
        rng = np.random.default_rng(seed)
        sigmas = [*np.exp(rng.uniform(-5, 5, 12)), *rng.choice(schedule.sigmas, 4), *(schedule.sigmas[:1] * 1.0005)]
        sigmas += [math.inf, 0.0, float(schedule.sigmas[-1]) * 1.0009]
        assert (read.sites, read.mode, read.interp) == ([*schedule.sites], schedule.mode, schedule.interp)
        got = [read.at(float(sigma)) for sigma in sigmas]
        np.testing.assert_allclose(got, schedule.at(np.array(sigmas)), rtol=1e-12, atol=1e-12)


def test_its_limits_are_those_of_the_package() -> None:
    assert (reader.LIMIT, reader.BIG, reader.KNOT) == (LIMIT, LARGEST, _KNOT_TOLERANCE)


def test_strength_and_window() -> None:
    read, plain = table(), [1.0] * 3
    weights = read.at(0.5)
    assert read.at(0.5, strength=0) == plain
    assert read.at(0.5, strength=0.25) == [1 + 0.25 * (w - 1) for w in weights]
    assert read.at(0.5, high=0.5) == read.at(0.5, low=0.4) == read.at(0.5, high=0.4999) == weights
    assert read.at(0.5, low=0.5) == read.at(0.5, low=0.4999) == read.at(0.5, high=0.49) == plain
    assert read.at(0.0, low=0.0) == read.at(0.0)


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_a_window_in_shares_of_the_way_holds_for_the_calls_that_it_says(count: int) -> None:
    sigmas = [10 * 0.7**i for i in range(count)]
    for start in np.linspace(0, 1, 11):
        for end in np.linspace(start, 1, 5):
            high, low = reader.window(float(start), float(end), [*sigmas, 0.0])
            inside = [low * math.exp(1e-3) * (low > 0) < s <= high * math.exp(1e-3) for s in sigmas]
            expected = [start - 1e-9 <= i / count < end - 1e-9 for i in range(count)]
            assert inside == expected, (start, end)
    with pytest.raises(ValueError, match="0 <= start <= end <= 1"):
        reader.window(0.5, 0.4, sigmas)


def test_dials_are_those_of_the_call() -> None:
    steps = Steps("ddim", (9, 1), (8, 1.5), (4, 3))
    read = reader.parse(json.dumps(Schedule.constant(SITES, [1.0], steps=steps).to_dict()))
    assert read.steps == steps.to_dict()
    assert read.dials(9.05) == {"told": 8, "guidance": 4}
    assert read.dials(1) == {"told": 1.5, "guidance": 3}
    assert read.dials(3) == read.dials(0) == table().dials(9) == {}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "x"}, "no rwopt schedule"),
        ({"version": "2.0"}, "another version"),
        ({"version": 1.0}, None),  # read as it is meant
        ({"sites": []}, "sites is empty"),
        ({"sites": [{"id": "a"}] * 3}, "names one twice"),
        ({"weights": [[1, 1, 1]]}, "one row a sigma"),
        ({"grid": {"sigma": [1]}, "weights": [[1, 1]]}, "one column a site"),
        ({"grid": {"sigma": [1]}, "weights": [[1, 1, float("nan")]]}, r"weights\[0\]\[2\] is 'nan'"),
        ({"grid": {"sigma": [1]}, "weights": [[1, True, 1]]}, r"weights\[0\]\[1\] is 'True'"),
        ({"grid": {"sigma": [1, 2]}}, r"grid.sigma\[1\] is '2'"),
        ({"grid": {"sigma": [10**400]}}, r"grid.sigma\[0\]"),
        ({"op": {"mode": "add"}}, "mode is none of residual, output"),
        ({"steps": {"sampler": "ddim", "sigmas": [2, 1], "told": [1]}}, "steps.told has not one number a call"),
        ({"steps": {"sampler": "ddim", "sigmas": [2, 1], "told": []}}, "steps.told is no list of numbers"),
        ({"steps": []}, "are objects"),
    ],
)
def test_what_is_no_schedule_is_refused(change: dict[str, Any], says: str | None) -> None:
    if says is None:
        assert table(**change).sites == [*SITES]
    else:
        with pytest.raises(ValueError, match=says):
            table(**change)


def test_it_stands_alone(tmp_path: Path) -> None:
    text = reader.source()
    assert len(text.splitlines()) <= 120
    names = {a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    assert names <= set(sys.stdlib_module_names)
    (tmp_path / "alone.py").write_text(text)
    schedule = random_schedule(0)
    schedule.save(tmp_path / "s.json")
    code = "import alone; print(alone.load('s.json').at(1.0))"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, '.'); {code}"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    np.testing.assert_allclose(json.loads(done.stdout), schedule.at(1.0), rtol=1e-5)
