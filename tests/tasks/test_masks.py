"""Masks of cases: where they come from, how they follow their pictures, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rwopt.errors import UserError
from rwopt.tasks.cases import SPLITS, Case, digest, fit_cases, load_cases
from rwopt.tasks.pictures import fit_mask, fit_picture, mask_of_runs, to_masks, transparent


def picture(path: Path, seed: int, size: tuple[int, int] = (12, 8)) -> Path:
    """A picture of that width and height."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def white(path: Path, box: tuple[int, int, int, int], size: tuple[int, int] = (12, 8)) -> np.ndarray:
    """A mask picture that is white in (left, top, right, bottom); the same as bool."""
    mask = np.zeros((size[1], size[0]), bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    Image.fromarray(np.where(mask, 200, 90).astype(np.uint8)).save(path)  # not quite white and black, as after JPEG
    return mask


def every(place: Path) -> dict[str, Case]:
    return {case.id: case for split in SPLITS for case in load_cases(str(place), split, "editing")}


def test_masks_lie_beside_the_photos_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "instruction.txt").write_text("a cat")
    for i in range(12):
        picture(tmp_path / f"{i}.jpg", i)
    masks = {f"{i}.jpg": white(tmp_path / f"{i}.mask.png", (i, 2, 12, 6)) for i in range(6)}
    found = every(tmp_path)
    assert set(found) == {f"{i}.jpg" for i in range(12)}  # a mask is no case
    for name, case in found.items():
        assert (case.mask is None) == (name not in masks)
        assert case.mask is None or (case.mask == masks[name]).all()


def test_a_mask_of_no_picture_is_told(tmp_path: Path) -> None:
    (tmp_path / "instruction.txt").write_text("a cat")
    picture(tmp_path / "a.png", 0)
    white(tmp_path / "b.mask.png", (0, 0, 4, 4))
    with pytest.raises(UserError, match=r"^[^\n]*b.mask.png is the mask of no picture[^\n]*$"):
        load_cases(str(tmp_path), "train", "editing")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_name_masks(tmp_path: Path, kind: str) -> None:
    picture(tmp_path / "a.png", 0)
    mask = white(tmp_path / "hole.png", (1, 1, 5, 5))
    rows = [{"source_image": "a.png", "mask": "hole.png", "caption": f"cat {i}", "id": split, "split": split}
            for i, split in enumerate(SPLITS)]  # fmt: skip
    for i, row in enumerate(rows):
        row["source_image"] = picture(tmp_path / f"{i}.png", i).name
    text = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    if kind == "jsonl":
        text = [json.dumps(row) for row in rows]
    (tmp_path / f"cases.{kind}").write_text("\n".join(text))
    for split in SPLITS:
        (case,) = load_cases(str(tmp_path / f"cases.{kind}"), split, "editing")
        assert case.mask is not None
        assert (case.mask == mask).all()
        (case,) = load_cases(str(tmp_path / f"cases.{kind}"), split, "generation")
        assert case.mask is None


def test_transparency_is_a_mask(tmp_path: Path) -> None:
    alpha = np.full((8, 12), 255, np.uint8)
    assert transparent(picture(tmp_path / "a.png", 0)) is None
    opaque = np.dstack([np.zeros((8, 12, 3), np.uint8), alpha])
    Image.fromarray(opaque).save(tmp_path / "b.png")
    assert transparent(tmp_path / "b.png") is None
    opaque[2:4, 3:9, 3] = 10
    Image.fromarray(opaque).save(tmp_path / "c.png")
    found = transparent(tmp_path / "c.png")
    assert found is not None
    assert found.sum() == 2 * 6
    assert found[2:4, 3:9].all()
    (tmp_path / "c.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        transparent(tmp_path / "c.png")


def test_runs_are_those_of_pie_bench(tmp_path: Path) -> None:
    mask = mask_of_runs([3, 2, 10, 6], (4, 4))
    assert np.flatnonzero(mask).tolist() == [3, 4, 10, 11, 12, 13, 14, 15]
    assert mask_of_runs([14, 9], (4, 4)).sum() == 2  # cut at the end, as its authors' reader does
    wrong: Any = ([1], [-1, 2], [16, 1], ["a", 1], [True, 1])
    for runs in wrong:
        with pytest.raises(ValueError, match="mask"):
            mask_of_runs(runs, (4, 4))
    (tmp_path / "annotation_images").mkdir()
    rows = {}
    for i in range(24):
        picture(tmp_path / "annotation_images" / f"{i}.png", i)
        rows[str(i)] = {"original_prompt": "a [cat]", "editing_prompt": "a [dog]", "image_path": f"{i}.png",
                        "editing_type_id": "1", "mask": [12 * i % 96, 5]}  # fmt: skip
    (tmp_path / "mapping_file.json").write_text(json.dumps(rows))
    for name, case in every(tmp_path).items():
        assert case.mask is not None
        assert np.flatnonzero(case.mask).tolist() == list(range(12 * int(name) % 96, 12 * int(name) % 96 + 5))
    rows["0"]["mask"] = [96, 1]
    (tmp_path / "mapping_file.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=r"^[^\n]* 0: mask begins a run at 96, outside of the picture[^\n]*$"):
        every(tmp_path)


def test_a_mask_of_another_size_is_told(tmp_path: Path) -> None:
    (tmp_path / "instruction.txt").write_text("a cat")
    for i in range(12):
        picture(tmp_path / f"{i}.png", i)
        white(tmp_path / f"{i}.mask.png", (0, 0, 2, 2), (8, 12))
    with pytest.raises(UserError, match=r"^mask [^\n]*\.mask.png is 8 x 12, its picture 12 x 8: give both the same"):
        every(tmp_path)


@pytest.mark.parametrize("how", ["crop", "pad"])
@pytest.mark.parametrize("size", [(8, 8), (16, 16), (8, 24), (24, 8)])
def test_a_mask_goes_where_its_picture_goes(how: str, size: tuple[int, int]) -> None:
    mask = np.zeros((16, 32), bool)
    mask[4:12, 8:24] = True
    shown = np.repeat(np.where(mask, 255, 0).astype(np.uint8)[..., None], 3, 2)
    fitted, expected = fit_mask(mask, size, how), fit_picture(shown, size, how)[0][..., 0] > 127
    if how == "pad":  # white beside the picture, which is nothing to paint
        scale = min(size[0] / 16, size[1] / 32)
        height, width = round(16 * scale), round(32 * scale)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        inside = np.zeros(size, bool)
        inside[top : top + height, left : left + width] = True
        expected &= inside
    assert fitted.shape == size
    assert fitted.dtype == bool
    assert (fitted != expected).mean() <= 0.1  # nearest and smooth differ at an edge


def test_masks_are_fitted_and_are_part_of_what_cases_are() -> None:
    mask = np.zeros((16, 32), bool)
    mask[:, 16:] = True
    case = Case("a", "cat", source=np.zeros((16, 32, 3), np.uint8), mask=mask)
    (fitted,) = fit_cases([case], (16, 16))
    assert fitted.mask is not None
    assert fitted.mask[:, 8:].all()
    assert not fitted.mask[:, :8].any()
    assert case.mask is mask
    others = [Case("a", "cat", source=case.source, mask=m) for m in (None, ~mask, mask)]
    assert len({digest([other]) for other in others}) == 3
    assert digest([case]) == digest([others[2]])
    tensor = to_masks([mask, ~mask])
    assert tensor is not None
    assert tensor.shape == (2, 1, 16, 32)
    assert torch.equal(tensor[0], 1 - tensor[1])
    assert to_masks([mask, None]) is None
