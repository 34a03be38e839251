"""`rwopt show A B`: what differs, in numbers that can be counted by hand."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rwopt.cli.files import show
from rwopt.errors import UserError
from rwopt.schedule import Schedule

SITES = ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.resnets.2.skip")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def shown(tmp_path: Path, a: Schedule, b: Schedule, capsys: Any, png: Path | None = None) -> str:
    files = [schedule.save(tmp_path / f"{name}.json") for schedule, name in ((a, "old"), (b, "new"))]
    show(argparse.Namespace(schedule=files[0], other=files[1], png=png))
    text: str = capsys.readouterr().out
    return text


def test_differences_are_listed_by_size_at_the_levels_of_both(tmp_path: Path, capsys: Any) -> None:
    a = Schedule(SITES, np.array([4.0, 1.0]), np.array([[1.0, 1, 1], [2, 1, 1]]))
    b = Schedule(SITES, np.array([4.0]), np.array([[1.0, 0.5, 1]]), interp="nearest")
    text = shown(tmp_path, a, b, capsys)
    assert "3 sites in common (0 more in old, 0 more in new), at the 2 noise levels of both" in text
    assert "also different: interp" in text
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["down_blocks.0.attentions.0", "1", "2", "1", "-1"],
        ["mid_block.attentions.0", "4", "1", "0.5", "-0.5"],
        ["mid_block.attentions.0", "1", "1", "0.5", "-0.5"],
    ]
    assert f"the mean of all is {2 / 6:.4g}" in text


def test_common_sites_are_compared_and_it_is_said(tmp_path: Path, capsys: Any) -> None:
    a, b = Schedule.constant(SITES[:2], [1.0], 2.0), Schedule.constant(SITES[1:][::-1], [1.0], 2.0)
    text = shown(tmp_path, a, b, capsys)
    assert "1 sites in common (1 more in old, 1 more in new)" in text
    assert "all weights are the same" in text


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path, capsys: Any) -> None:
    a = Schedule.constant(SITES[:1], [1.0])
    for b, says in (
        (Schedule.constant(SITES[1:], [1.0]), "no site in common"),
        (Schedule.constant(SITES[:1], [1.0], mode="output"), "op.mode is residual in one file and output"),
    ):
        with pytest.raises(UserError, match=says) as error:
            shown(tmp_path, a, b, capsys)
        assert "\n" not in str(error.value)


def test_both_and_the_difference_are_drawn(tmp_path: Path, capsys: Any) -> None:
    a, b = Schedule.constant(SITES, [2.0, 1.0]), Schedule.constant(SITES, [3.0], 0.5)
    text = shown(tmp_path, a, b, capsys, tmp_path / "both.png")
    assert str(tmp_path / "both.png") in text.replace("\n", "")
    with Image.open(tmp_path / "both.png") as image:
        assert image.width > 1500  # three panels
