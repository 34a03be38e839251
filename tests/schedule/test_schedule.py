"""Schedule: look-up, file, validation and the noise axis."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.actions import Actions
from rwopt.schedule.noise import edm_noise, edm_sigma, noise_block, noise_table, sigma_at, sigma_of, timestep_of
from rwopt.schedule.schedule import INTERPOLATIONS
from rwopt.schedule.steps import Steps

NAMES = [
    f"{block}.attentions.{j}{kind}"
    for block in ("down_blocks.0", "mid_block", "up_blocks.10")
    for j in (0, 1)
    for kind in ("", ".self", ".cross", ".ff")
] + [f"up_blocks.1.resnets.0.{kind}" for kind in ("resnet", "skip", "low", "backbone", "structure")]
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def random_schedule(seed: int) -> Schedule:
    rng = np.random.default_rng(seed)
    knots, sites = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    return Schedule(
        sites=tuple(rng.permutation(NAMES)[:sites].tolist()),
        sigmas=np.sort(np.exp(rng.uniform(-4, 4, knots)))[::-1],
        weights=rng.normal(1, 2, (knots, sites)) * 10.0 ** rng.integers(-8, 4),
        mode=str(rng.choice(["residual", "output"])),
        interp=str(rng.choice(INTERPOLATIONS)),
        cfg_branch=str(rng.choice(["both", "cond", "uncond"])),
        model={"family": "sd15"},
        noise={} if seed % 2 else SD,
        calibrated={"num_inference_steps": int(rng.integers(1, 50)), "timesteps": [1, 2, 3]},
        provenance={"note": "1,  2 [3,  4]", "nested": {"deep": [1, [2.5, "é"], []]}},
        extra={"x-mine": {"kept": [True, None]}} if seed % 3 else {},
    )


@pytest.mark.parametrize("seed", range(25))
def test_save_and_load_are_inverse(tmp_path: Path, seed: int) -> None:
    schedule = random_schedule(seed)
    path = schedule.save(tmp_path / "deep" / "s.json")
    loaded = Schedule.load(path)
    assert loaded == schedule
    assert loaded.digest() == schedule.digest()
    assert hash(loaded) == hash(schedule)
    for name in ("sites", "mode", "interp", "model", "noise", "calibrated", "provenance", "extra"):
        assert getattr(loaded, name) == getattr(schedule, name)
    np.testing.assert_array_equal(loaded.sigmas, schedule.sigmas)
    np.testing.assert_allclose(loaded.weights, schedule.weights, rtol=6e-6, atol=0)
    again = loaded.save(tmp_path / "again.json")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("seed", range(10))
def test_linear_lookup_equals_numpy_interp_in_ln_sigma(seed: int) -> None:
    schedule = random_schedule(seed)
    schedule = Schedule(schedule.sites, schedule.sigmas, schedule.weights)
    sigmas = np.exp(np.random.default_rng(seed + 99).uniform(-6, 6, (3, 5)))
    expected = np.stack(
        [np.interp(np.log(sigmas), np.log(schedule.sigmas[::-1]), column[::-1]) for column in schedule.weights.T],
        axis=-1,
    )
    np.testing.assert_allclose(schedule.at(sigmas), expected, rtol=1e-9, atol=1e-12 * abs(expected).max())
    np.testing.assert_array_equal(schedule.at(float(sigmas[0, 0])), schedule.at(sigmas)[0, 0])


@pytest.mark.parametrize("interp", INTERPOLATIONS)
@pytest.mark.parametrize("seed", range(5))
def test_knots_ends_and_ones_are_exact(interp: str, seed: int) -> None:
    base = random_schedule(seed)
    schedule = Schedule(base.sites, base.sigmas, base.weights, interp=interp)
    np.testing.assert_array_equal(schedule.at(schedule.sigmas), schedule.weights)
    for far, row in ((np.inf, 0), (1e9, 0), (0.0, -1), (1e-9, -1)):
        np.testing.assert_array_equal(schedule.at(far), schedule.weights[row])
    plain = Schedule.constant(base.sites, base.sigmas, interp=interp)
    assert plain.is_plain
    assert not Schedule.constant(base.sites, base.sigmas, 0.9).is_plain
    assert (plain.at(np.exp(np.linspace(-5, 5, 1001))) == 1).all()


def test_nearest_and_previous() -> None:
    table = np.array([[1.0], [2.0], [3.0]])
    nearest = Schedule(("mid_block.attentions.0",), np.array([10, 1, 0.1]), table, interp="nearest")
    assert [nearest.at(s)[0] for s in (3.2, 3.1, 0.32, 0.31)] == [1, 2, 2, 3]
    previous = Schedule(nearest.sites, nearest.sigmas, table, interp="previous")
    assert [previous.at(s)[0] for s in (9, 1.1, 1, 0.2, 0.1)] == [1, 1, 2, 2, 3]
    assert previous.at(1.0003)[0] == 2, "a knot that a file gives in 3 digits still counts as reached"


def test_arrays_are_own_and_read_only() -> None:
    weights = np.ones((1, 1))
    schedule = Schedule(("mid_block.attentions.0",), np.array([1.0]), weights)
    weights[:] = 5
    assert schedule.is_plain
    with pytest.raises(ValueError, match="read-only"):
        schedule.weights[0, 0] = 2


def test_digest_ignores_notes_and_sees_weights() -> None:
    base = random_schedule(0)
    fields = {"noise": base.noise, "cfg_branch": base.cfg_branch}
    same = Schedule(base.sites, base.sigmas, base.weights, base.mode, base.interp, **fields)
    other = Schedule(base.sites, base.sigmas, base.weights * 1.01, base.mode, base.interp, noise=base.noise)
    assert same.digest() == base.digest() != other.digest()
    assert same != base
    assert same != "text"


def document(**changes: Any) -> dict[str, Any]:
    schedule = Schedule(("down_blocks.0.attentions.0", "mid_block.attentions.0"), np.array([9.0, 1.0]), np.ones((2, 2)))
    return {**schedule.to_dict(), **changes}


BAD = {
    "major version": ({"version": "2.0"}, "version is '2.0'"),
    "version as a number": ({"version": 1.0}, "version is 1.0"),
    "format": ({"format": "other"}, "format is 'other'"),
    "NaN weight": ({"weights": [[1, 1], [1, float("nan")]]}, r"weights\[1\]\[1\] is nan"),
    "infinite weight": ({"weights": [[float("inf"), 1], [1, 1]]}, r"weights\[0\]\[0\] is inf"),
    "text weight": ({"weights": [[1, 1], [1, "a"]]}, r"weights\[1\]\[1\] is 'a'"),
    "too few rows": ({"weights": [[1, 1]]}, r"weights has shape \[1, 2\]: give \[2, 2\]"),
    "too few columns": ({"weights": [[1], [1]]}, r"weights has shape \[2, 1\]: give \[2, 2\]"),
    "ragged rows": ({"weights": [[1, 1], [1]]}, r"rows of \[1, 2\]"),
    "ascending": ({"grid": {"sigma": [1, 9]}}, r"grid.sigma\[1\] is 9 after 1"),
    "repeated knot": ({"grid": {"sigma": [9, 9]}}, r"grid.sigma\[1\] is 9 after 9"),
    "NaN knot": ({"grid": {"sigma": [float("nan"), 1]}}, r"grid.sigma\[0\] is nan"),
    "zero knot": ({"grid": {"sigma": [9, 0]}}, r"grid.sigma\[1\] is 0: give a number above 0"),
    "no knots": ({"grid": {"sigma": []}}, "grid.sigma is"),
    "no grid": ({"grid": {}}, "grid lacks 'sigma'"),
    "interpolation": ({"grid": {"sigma": [9, 1], "interp": "cubic"}}, "grid.interp is 'cubic'"),
    "mode": ({"op": {"mode": "add"}}, "op.mode is 'add': give residual"),
    "duplicate": ({"sites": [{"id": "mid_block.attentions.0"}] * 2}, r"sites\[1\] repeats"),
    "site name": (
        {"sites": [{"id": "nowhere"}, {"id": "mid_block.attentions.0"}]},
        r"sites\[0\].id is 'nowhere'",
    ),
    "unknown entry": ({"weigths": []}, "unknown entry 'weigths'"),
    "unknown inner entry": ({"noise": {"beta": 1}}, "noise has the unknown entry 'beta'"),
    "beta schedule": ({"noise": {"beta_schedule": "cosine"}}, "noise.beta_schedule is 'cosine'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    change, expected = BAD[name]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document(**change)))
    with pytest.raises(UserError, match=expected) as error:
        Schedule.load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert len(message) < 400


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.json: cannot be read \(No such file"):
        Schedule.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("weights: 1")
    with pytest.raises(UserError, match="is not JSON"):
        Schedule.load(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match=r"format is \[1\]"):
        Schedule.load(tmp_path / "list.json")


def test_minor_versions_and_private_entries_are_read() -> None:
    loaded = Schedule.from_dict(document(version="1.7", **{"x-tool": 3}))
    assert loaded.extra == {"x-tool": 3}
    assert loaded.to_dict()["x-tool"] == 3


def test_private_entries_are_kept_at_their_places() -> None:
    plan = Actions.along([9.0, 3.0, 1.0], "FFo")
    plain = Schedule.constant(tuple(NAMES[:2]), [9.0, 1.0], steps=Steps("ddim", (9.0, 3.0, 1.0)), actions=plan)
    given = plain.to_dict() | {"x-tool": [3]}
    for part in ("op", "grid", "steps", "actions"):
        given[part]["x-note"] = {"of": part}
    given["sites"][1]["x-note"] = "b's"
    given["actions"]["levels"][2]["x-note"] = "of the last"
    kept = Schedule.from_dict(given)
    assert kept.to_dict() == given
    assert kept.digest() == plain.digest()
    assert kept != plain
    moved = replace(kept, sites=(NAMES[1], NAMES[2]), steps=None, actions=None).to_dict()
    assert moved["sites"] == [{"id": NAMES[1], "x-note": "b's"}, {"id": NAMES[2]}]
    assert not moved.keys() & {"steps", "actions"}


def test_notes_that_are_not_json_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    schedule = Schedule.constant(("mid_block.attentions.0",), [1.0], provenance={"bad": object()})
    with pytest.raises(UserError, match="not plain JSON"):
        schedule.save(tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


def test_bad_lookup_and_bad_arguments_are_refused() -> None:
    schedule = Schedule.constant(("mid_block.attentions.0",), [1.0])
    with pytest.raises(UserError, match="NaN"):
        schedule.at(float("nan"))
    with pytest.raises(UserError, match=r"op\.mode"):
        Schedule.constant(("mid_block.attentions.0",), [1.0], mode="skip")
    with pytest.raises(UserError, match=r"op\.cfg_branch is 'left'"):
        Schedule.constant(("mid_block.attentions.0",), [1.0], cfg_branch="left")
    with pytest.raises(UserError, match=r"grid\.interp"):
        Schedule.constant(("mid_block.attentions.0",), [1.0], interp="cubic")
    with pytest.raises(UserError, match="sites is empty"):
        Schedule.constant((), [1.0])
    with pytest.raises(UserError, match="regular table"):
        Schedule(("mid_block.attentions.0",), np.array([1.0]), [[1.0], [1.0, 2.0]])  # type: ignore[arg-type]


CONFIGS = [
    SD,
    {**SD, "zero_snr": True},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 500},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000},
]


@pytest.mark.parametrize("config", CONFIGS)
def test_noise_table_equals_that_of_diffusers(config: dict[str, Any]) -> None:
    options = {name: value for name, value in config.items() if name != "zero_snr"}
    scheduler = DDIMScheduler(**options, rescale_betas_zero_snr=config.get("zero_snr", False))
    expected = sigma_of(scheduler.alphas_cumprod.numpy())
    np.testing.assert_allclose(noise_table(config)[:-2], expected[:-2], rtol=2e-3)
    assert noise_table(noise_block(scheduler)) == pytest.approx(noise_table(config))
    assert np.isfinite(noise_table(config)).all()


def test_edm_timesteps_are_a_quarter_of_ln_sigma() -> None:
    for scheduler in (
        EDMEulerScheduler(),
        EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
    ):
        noise = noise_block(scheduler)
        assert noise["timestep"] == "edm"
        assert edm_noise(noise)
    assert not edm_noise(noise_block(DDIMScheduler()))
    np.testing.assert_allclose(edm_sigma(0.25 * np.log([80.0, 0.002])), [80.0, 0.002])


def test_sigmas_of_stable_diffusion() -> None:
    table = noise_table(SD)
    assert table[[0, 249, 499, 749, 999]] == pytest.approx([0.0292, 0.6932, 1.6129, 4.0817, 14.6146], abs=1e-4)
    times = np.array([0, 0.5, 17.25, 998.9, 999])
    np.testing.assert_allclose(timestep_of(sigma_at(times, table), table), times, atol=1e-9)
    np.testing.assert_array_equal(timestep_of([1e9, 1e-9], table), [999, 0])


def test_import_needs_neither_torch_nor_jsonschema() -> None:
    code = "import sys, rwopt.schedule.weights, rwopt.unet.sites; assert not {'torch', 'jsonschema'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_deep_notes_that_indent_into_megabytes_are_saved_compactly(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(40):
        deep = [deep]
    notes = {"deep": [deep] * 2000}
    schedule = Schedule.constant(["mid_block.attentions.0"], [1.0], provenance=notes)
    path = schedule.save(tmp_path / "deep.json")
    assert len(json.dumps(schedule.to_dict(), indent=2)) > 2_000_000
    assert path.stat().st_size < 300_000
    assert Schedule.load(path).provenance == notes
