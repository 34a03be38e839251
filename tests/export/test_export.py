"""The room's door: names, options, places; and the promises that hold for every target."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rwopt.errors import UserError
from rwopt.export import MARKER, TARGETS, export, target, targets
from rwopt.export.imports import read_foreign
from rwopt.schedule import Schedule
from rwopt.schedule.actions import Actions
from rwopt.schedule.document import LIMIT
from rwopt.schedule.steps import Steps

SITES = ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.2")


def some(**fields: object) -> Schedule:
    weights = np.array([[1.25, 0.9, 1 / 3], [1.0, 1.1, 2.0]])
    return Schedule(SITES, np.array([9.0, 0.7]), weights, **fields)  # type: ignore[arg-type]


def test_every_target_is_as_the_contract_says() -> None:
    assert targets() == sorted(TARGETS)
    for name in targets():
        module = target(name)
        for text in (module.ABOUT, module.NEEDS):
            assert text
            assert "\n" not in text
        assert module.FOLDER in (True, False, None)
        assert module.__doc__


def test_targets_and_options_are_known_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="to=comfy: did you mean comfyui"):
        export(some(), "comfy", tmp_path / "a")
    with pytest.raises(UserError, match="delimiter=;: the export to csv takes no options"):
        export(some(), "csv", tmp_path / "a", delimiter=";")
    with pytest.raises(UserError, match="option of fold=att: did you mean at"):
        export(some(), "fold", tmp_path / "a", att=1)
    with pytest.raises(UserError, match=r"fold needs unet=\.\.\.: give it"):
        export(some(), "fold", tmp_path / "a")
    assert not [*tmp_path.iterdir()]


def test_files_that_are_no_exports_stay(tmp_path: Path) -> None:
    place = tmp_path / "table.csv"
    for _ in range(2):
        assert export(some(), "csv", place) == [place]
    place.write_text("my own table\n")
    with pytest.raises(UserError, match=r"table.csv: is there and no export"):
        export(some(), "csv", place)
    assert place.read_text() == "my own table\n"
    with pytest.raises(UserError, match="is a folder: give the name of a file"):
        export(some(), "csv", tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        export(some(), "csv", place / "inside.csv")


def test_folders_with_other_things_stay(tmp_path: Path) -> None:
    place = tmp_path / "folder"
    for _ in range(2):
        written = export(some(), "diffusers", place)
    assert {path.name for path in written} == {path.name for path in place.iterdir()} - {MARKER}
    (place / MARKER).unlink()
    with pytest.raises(UserError, match="holds other things"):
        export(some(), "diffusers", place)
    with pytest.raises(UserError, match=r"is a file, and diffusers is a folder"):
        export(some(), "diffusers", place / "README.md")
    other = tmp_path / "other"
    with pytest.raises(UserError, match="takes no grid"):
        export(some(steps=Steps("uni_pc", (9, 1))), "diffusers", other)
    assert not other.exists()


def test_actions_are_refused_or_left_behind(tmp_path: Path) -> None:
    acting = some(actions=Actions.along([9, 0.7], "Fh"))
    with pytest.raises(UserError, match="has actions, which diffusers cannot express: give actions=false"):
        export(acting, "diffusers", tmp_path / "a")
    assert not [*tmp_path.iterdir()]
    export(acting, "diffusers", tmp_path / "a", actions=False)
    assert Schedule.load(tmp_path / "a" / "schedule.json") == some()
    export(acting, "csv", tmp_path / "a.csv")
    assert read_foreign(tmp_path / "a.csv") == acting


@pytest.mark.parametrize("name", ["csv", "diffusers", "lora-block-weight", "safetensors"])
def test_what_is_written_says_nothing_of_this_machine(tmp_path: Path, name: str) -> None:
    schedule = Schedule.constant(SITES, [1.0], 1.5)
    for path in export(schedule, name, tmp_path / "deep" / "place"):
        content = path.read_bytes()
        assert len(content) < LIMIT
        assert str(tmp_path).encode() not in content
        assert not re.search(rb"/(home|work|tmp|root)/", content)


def test_the_door_loads_no_torch() -> None:
    code = (
        "import sys, rwopt.export, rwopt.export.csv_table, rwopt.export.tensors, rwopt.export.block_weight, "
        "rwopt.export.arithmetic; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
