"""CSV, safetensors and preset lines: there and back without a digit lost, and one line for what is something else."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rwopt.errors import UserError
from rwopt.export import export
from rwopt.export.block_weight import layers, transformers
from rwopt.export.imports import read_foreign
from rwopt.schedule import Schedule
from rwopt.schedule.steps import Steps

SITES = ("down_blocks.0.attentions.1", "mid_block.attentions.0.cross", "up_blocks.1.resnets.2.skip")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
SUFFIX = {"csv": ".csv", "safetensors": ".safetensors"}


def full(seed: int = 0) -> Schedule:
    rng = np.random.default_rng(seed)
    return Schedule(
        SITES,
        np.array([14.6, 1 / 3, 0.03]),
        rng.normal(1, 1, (3, 3)) * 10.0 ** rng.integers(-9, 9, (3, 3)),
        mode="output" if seed % 2 else "residual",
        interp="previous",
        cfg_branch="cond",
        model={"family": "sd15", "layers_per_block": 2},
        noise=SD,
        calibrated={"timesteps": [1, 2]},
        provenance={"note": 'a, "b";\nc é'},
        extra={"x-mine": [1]},
        steps=Steps("ddim", (9.000000001, 1), guidance=(7.123456789, 2)),
    )


@pytest.mark.parametrize("kind", SUFFIX)
@pytest.mark.parametrize("seed", range(4))
def test_round_trips_are_exact(tmp_path: Path, kind: str, seed: int) -> None:
    schedule = full(seed)
    (path,) = export(schedule, kind, tmp_path / f"table{SUFFIX[kind]}")
    again = read_foreign(path)
    assert again.exact() == schedule.exact()
    np.testing.assert_array_equal(again.weights, schedule.weights)
    (second,) = export(again, kind, tmp_path / f"again{SUFFIX[kind]}")
    assert second.read_bytes() == path.read_bytes()


def test_a_table_of_many_training_levels_fits_into_cells(tmp_path: Path) -> None:
    noise = {"train_sigma": np.linspace(0.03, 150, 20_000).tolist()}
    schedule = Schedule.constant(SITES, [1.0], noise=noise)
    (path,) = export(schedule, "csv", tmp_path / "a.csv")
    assert max(map(len, next(csv.reader(path.open())))) <= 32767
    assert read_foreign(path) == schedule


def test_columns_name_the_sites_as_other_tools_do(tmp_path: Path) -> None:
    (path,) = export(full(), "csv", tmp_path / "a.csv")
    rows = [*csv.reader(path.open())]
    assert rows[1] == ["sigma", "diffusers", "ldm", "lbw", "weight"]
    assert [row[1:4] for row in rows[2:5]] == [
        ["down_blocks.0.attentions.1", "input_blocks.2.1", "IN02"],
        ["mid_block.attentions.0.cross", "middle_block.1", "M00"],
        ["up_blocks.1.resnets.2.skip", "output_blocks.5", "OUT05"],
    ]


def test_a_table_may_be_edited_and_sorted_and_lose_its_first_row(tmp_path: Path) -> None:
    (path,) = export(full(), "csv", tmp_path / "a.csv")
    first, columns, *rows = path.read_text().splitlines()
    random.Random(0).shuffle(rows)
    path.write_text("\ufeff" + "\r\n".join([first, columns, *rows, ",,,,", ""]))
    again = read_foreign(path)
    order = [again.sites.index(site) for site in SITES]
    np.testing.assert_array_equal(again.weights[:, order], full().weights)
    path.write_text("sigma,diffusers,weight\n1,mid_block.attentions.0,0.5\n")
    assert read_foreign(path) == Schedule(("mid_block.attentions.0",), np.array([1.0]), np.array([[0.5]]))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "the columns sigma, diffusers, ldm, lbw, weight are not there"),
        ("a,b\n1,2\n", "the columns"),
        ("sigma,diffusers,weight\n1,mid_block.attentions.0,a\n", "weight in row 2 is 'a': give a number"),
        ('sigma,diffusers,weight\n1,mid_block.attentions.0,"0,5"\n', "decimal point"),
        ("sigma,diffusers,weight\n1,mid_block.attentions.0\n", "row 2 of the table has 2 cells"),
        ("sigma,diffusers,weight\n" + "1,mid_block.attentions.0,1\n" * 2, "comes twice"),
        ("sigma,diffusers,weight\n1,a,1\n2,b,1\n", "2 rows for 2 levels and 2 sites"),
        ("sigma,diffusers,weight\n1,nowhere,1\n", "sites.0..id is 'nowhere'"),
        ("sigma,diffusers,weight\n1,mid_block.attentions.0,nan\n", "weights.0..0. is nan"),
        ("sigma,diffusers,weight\n", "has no rows below"),
        ("# rwopt.schedule,[]\nsigma,diffusers,weight\n", "the first row"),
        ("# rwopt.schedule,{\nsigma,diffusers,weight\n", "is no table"),
        ("# rwopt.schedule," + "[" * 20_000 + "\n", "is no table"),
        ("\x00", "the columns|is no table"),
    ],
)
def test_what_is_no_table_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        read_foreign(path)
    assert "\n" not in str(error.value)


def test_tensors_are_what_they_are_called(tmp_path: Path) -> None:
    (path,) = export(full(), "safetensors", tmp_path / "a.safetensors")
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["weights"], full().weights)
    np.testing.assert_array_equal(tensors["sigmas"], full().sigmas)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: save_file({"weights": np.ones((1, 1))}, path),
        lambda path: save_file({"weights": np.ones((1, 1)), "sigmas": np.ones(1)}, path),
        lambda path: save_file({"weights": np.ones((1, 1)), "sigmas": np.ones(1)}, path, {"rwopt.schedule": "{"}),
        lambda path: save_file({"weights": np.ones((1, 1)), "sigmas": np.ones(1)}, path, {"rwopt.schedule": "[]"}),
        lambda path: save_file({"weights": np.ones(1), "sigmas": np.ones(())}, path,
                               {"rwopt.schedule": json.dumps({**full().exact(), "weights": []})}),
        lambda path: path.mkdir(),
        lambda path: None,
    ],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused_in_one_line(tmp_path: Path, write: Callable[[Path], Any]) -> None:
    path = tmp_path / "a.safetensors"
    write(path)
    with pytest.raises(UserError) as error:
        read_foreign(path)
    assert "\n" not in str(error.value)
    assert "a.safetensors: " in str(error.value)


# ------------------------------------------------------------------------------------------------ preset lines


def test_the_numbers_stand_where_the_presets_have_them() -> None:
    sd = "IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
    xl = "IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
    assert (" ".join(layers(17)), " ".join(layers(12))) == (sd, xl)
    assert [sites for sites in layers(17).values()] == [[site] for site in transformers("sd")]
    assert [*layers(26)] == [*(f"IN{i:02d}" for i in range(12)), "M00", *(f"OUT{i:02d}" for i in range(12))]
    assert [*layers(20)] == [*(f"IN{i:02d}" for i in range(9)), "M00", *(f"OUT{i:02d}" for i in range(9))]
    assert [name for name, sites in layers(26).items() if not sites] == ["IN00", "IN03", "IN06", "IN09"]
    assert layers(26)["IN01"] == ["down_blocks.0.attentions.0", "down_blocks.0.resnets.0.resnet"]


@pytest.mark.parametrize("form", [17, 12, 26, 20])
def test_preset_lines_go_there_and_back(tmp_path: Path, form: int) -> None:
    sites = [site for group in layers(form).values() for site in group]
    values = {name: round(0.1 * i, 1) for i, name in enumerate(layers(form))}
    row = [values[name] for name, group in layers(form).items() for _ in group]
    schedule = Schedule(tuple(sites), np.array([3.0, 1.0]), np.array([row, row]))
    (path,) = export(schedule, "lora-block-weight", tmp_path / "p.txt", name="MINE", form=form)
    head, line, rest = path.read_text().split("\n")
    assert (head[:8], rest) == ("# rwopt:", "")
    expected = [values[name] if group else 1 for name, group in layers(form).items()]
    assert line == "MINE:" + ",".join(f"{w:g}" for w in [1, *expected])
    again = read_foreign(path)
    assert (again.sites, again.mode) == (tuple(sites), "residual")
    np.testing.assert_allclose(again.weights, [row], rtol=1e-6)


def test_what_a_preset_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    def refused(says: str, schedule: Schedule, **options: Any) -> None:
        with pytest.raises(UserError, match=says):
            export(schedule, "lora-block-weight", tmp_path / "p.txt", **options)
        assert not [*tmp_path.iterdir()]

    one = "mid_block.attentions.0"
    falling = Schedule((one,), np.array([2.0, 1.0]), np.array([[1.0], [0.5]]))
    refused(f"site {one} has weights from 0.5 to 1, .*at=SIGMA", falling)
    refused("site mid_block.attentions.0.cross has no number", Schedule.constant([f"{one}.cross"], [1.0], 0.5))
    refused("has no number in a preset of 12", Schedule.constant(["up_blocks.3.attentions.0"], [1.0], 0.5), form=12)
    refused("M00 has one number in a preset of 26", Schedule.constant([one], [1.0], 0.5), form=26)
    refused("op.mode is 'output'", Schedule.constant([one], [1.0], 0.5, mode="output"))
    refused("op.cfg_branch is 'cond'", Schedule.constant([one], [1.0], 0.5, cfg_branch="cond"))
    refused("has steps", Schedule.constant([one], [1.0], 0.5, steps=Steps("ddim", (1,))))
    refused("form=13", Schedule.constant([one], [1.0], 0.5), form=13)
    refused("name=a:b", Schedule.constant([one], [1.0], 0.5), name="a:b")
    (path,) = export(falling, "lora-block-weight", tmp_path / "p.txt", at=1.0)
    assert path.read_text().endswith("RWOPT:1,1,1,1,1,1,1,0.5,1,1,1,1,1,1,1,1,1\n")


def test_presets_of_others(tmp_path: Path) -> None:
    path = tmp_path / "lbwpresets.txt"
    lines = ["# a comment", "NONE:0,0", "MIDD:1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0", "XL:0.5" + ",0.25" * 11,
             "R:1" + ",R" * 16]  # fmt: skip
    path.write_text("\n".join(lines))
    middle = read_foreign(path, name="MIDD")
    assert dict(zip(middle.sites, middle.weights[0].tolist(), strict=True)) == {
        site: float(w) for site, w in zip(transformers("sd"), "0001111111100000", strict=True)
    }
    xl = read_foreign(path, name="XL")
    assert (xl.model["family"], xl.provenance["without a site"]) == ("sdxl", {"BASE": 0.5})
    for options, says in (
        ({}, "has 3 presets: give name=MIDD"),
        ({"name": "R"}, "R holds .*: give numbers only"),
        ({"name": "ALL"}, "has no preset 'ALL'"),
    ):
        with pytest.raises(UserError, match=says):
            read_foreign(path, **options)
