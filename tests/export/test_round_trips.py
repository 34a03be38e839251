"""What can be read back is the same schedule: every export with an import, every folder that holds the file itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.twins import make

from rwopt.export import TARGETS, export, target
from rwopt.export.block_weight import transformers
from rwopt.export.imports import kinds, read_foreign
from rwopt.schedule import Schedule
from rwopt.schedule.actions import Actions
from rwopt.schedule.hub import Hub
from rwopt.schedule.steps import Steps

ROOT = Path(__file__).parents[2]
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
IMPORTED = sorted({*TARGETS} & {*kinds()})
Make = Callable[[], Schedule]


def random(sites: list[str], rows: int = 3, **fields: Any) -> Schedule:
    weights = np.random.default_rng(len(sites)).normal(1, 0.5, (rows, len(sites)))
    weights = np.vectorize(lambda w: float(f"{w:.6g}"))(weights)  # as a schedule file has them
    fields = {"noise": SD, "provenance": {"note": 'a, "b"'}, "extra": {"x-mine": [1, {"a": None}]}, **fields}
    return Schedule(tuple(sites), np.array([14.6, 1 / 3, 0.03])[:rows], weights, **fields)


def everything() -> Schedule:
    sites = ["down_blocks.0.attentions.1", "mid_block.attentions.0.cross", "up_blocks.1.resnets.2.skip"]
    steps = Steps("dpmpp_2m", (9.0, 1), told=(8, 1), guidance=(7.5, 2))
    plan = Actions.along(steps.sigmas, "Fh")
    return random(sites, interp="previous", cfg_branch="cond", steps=steps, actions=plan, calibrated={"n": [1, 2]})


def one_row() -> Schedule:
    return random(transformers("sd"), rows=1)


def without_comment(path: Path) -> list[bytes]:
    """Of preset lines the first names the schedule's digest, which counts noise levels and modes as well."""
    return [line for line in path.read_bytes().splitlines() if not line.startswith(b"# rwopt:")]


SOURCES: dict[str, Make] = {"csv": everything, "safetensors": everything, "lora-block-weight": one_row}


@pytest.mark.parametrize("name", IMPORTED)
def test_what_was_exported_and_read_again_is_the_same(tmp_path: Path, name: str) -> None:
    schedule = SOURCES[name]()
    suffix = {"csv": "csv", "safetensors": "safetensors", "lora-block-weight": "txt"}[name]
    (path,) = export(schedule, name, tmp_path / f"a.{suffix}")
    again = read_foreign(path, name)
    assert again.sites == schedule.sites
    np.testing.assert_array_equal(again.weights, schedule.weights)
    assert (again.mode, again.cfg_branch) == (schedule.mode, schedule.cfg_branch)
    if name != "lora-block-weight":  # whose lines have numbers alone
        assert again.exact() == schedule.exact()
    (second,) = export(again, name, tmp_path / f"b.{suffix}")
    assert without_comment(second) == without_comment(path)


FOLDERS = ("comfyui", "diffusers", "fold", "webui")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_for_a_tool_holds_the_schedule_itself(tmp_path: Path, name: str) -> None:
    unet = make("sd").unet
    rows = 1 if name == "fold" else 3
    schedule = random(["mid_block.attentions.0", "down_blocks.0.attentions.0"], rows, model={"layers_per_block": 1})
    options = {"unet": unet} if name == "fold" else {}
    written = export(schedule, name, tmp_path / "folder", **options)
    (file,) = [path for path in written if path.name in ("schedule.json", "rwopt-schedule.json")]
    assert Schedule.load(file) == schedule
    assert Schedule.load(file).digest() == schedule.digest()


def test_no_target_is_left_out() -> None:
    """The graphs, which need their extras, hold the file likewise: tests/export/test_graphs.py."""
    assert {*SOURCES} == {*IMPORTED}
    assert {*IMPORTED, *FOLDERS, "onnx", "openvino"} == {*TARGETS}
    assert all(target(name).FOLDER is not False for name in FOLDERS)


def test_the_hubs_folder_and_the_file_itself(tmp_path: Path) -> None:
    schedule = everything()
    Hub.save_pretrained(schedule, tmp_path)
    for again in (Schedule.load(tmp_path / "schedule.json"), Schedule.load(schedule.save(tmp_path / "again.json"))):
        assert again == schedule
        assert again.extra == {"x-mine": [1, {"a": None}]}
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "schedule.json").read_bytes()


def test_the_published_schema_is_the_packages() -> None:
    published, packaged = (ROOT / place for place in ("docs/schema", "rwopt/schedule/schema"))
    for file in packaged.glob("*.json"):
        same = (published / file.name).read_bytes() == file.read_bytes()
        assert same, f"copy rwopt/schedule/schema/{file.name} to docs/schema/{file.name}"
