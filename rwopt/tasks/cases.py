"""Cases: what a picture is made from. One JSON line a case; see `data/README.md` for the fields.

A set of cases is a folder with `train.jsonl`, `validation.jsonl`, `test.jsonl`, disjoint by identity. Pictures are
either cells of a sheet (`<split>_source.png`, 16 a row) or files that the case names (`source_image`, `truth_image`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rwopt.errors import UserError
from rwopt.files import package_folder

SPLITS = ("train", "validation", "test")


@dataclass
class Case:
    """One case. Pictures are uint8 [H, W, 3] or None."""

    id: str
    caption: str
    source_caption: str = ""
    kind: str = ""
    change: dict[str, str] = field(default_factory=dict)
    hidden: list[str] = field(default_factory=list)
    target: dict[str, str] = field(default_factory=dict)
    source: np.ndarray | None = None
    truth: np.ndarray | None = None


def read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], upright as a viewer shows it (EXIF), transparency on white; `UserError` if it is no picture."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if "A" in picture.getbands() or "transparency" in picture.info:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"picture {path} cannot be read: give a PNG or JPEG file") from None


def fit_picture(picture: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, str]:
    """A picture [H, W, 3] cut to its centre and scaled to `size` (height, width); what was done, "" for nothing.

    Nothing is squashed: the largest part of the wanted shape is kept.
    """
    from PIL import Image, ImageOps

    height, width = picture.shape[:2]
    if (height, width) == size:
        return picture, ""
    image = ImageOps.fit(Image.fromarray(picture), (size[1], size[0]), Image.Resampling.LANCZOS)
    cut = "scaled" if height * size[1] == width * size[0] else "cropped to its centre and scaled"
    return np.asarray(image), f"{width} x {height}, {cut} to {size[1]} x {size[0]}"


def load_cases(place: str, split: str, task: str, limit: int | None = None) -> list[Case]:
    """The first `limit` cases of one split for one task. `place` is "avatars" or a folder.

    Raises `UserError` naming the file and line that does not fit.
    """
    folder = package_folder("data") / "avatars" if place == "avatars" else Path(place)
    path = folder / f"{split}.jsonl"
    if not path.exists():
        raise UserError(f"task.cases={place}: {path} is missing; give 'avatars' or a folder with {split}.jsonl")
    sheets = {
        name: read_picture(folder / f"{split}_{name}.png")
        for name in ("source", "truth")
        if (folder / f"{split}_{name}.png").exists()
    }
    cases: list[Case] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            if row.get("task", task) != task:
                continue
            case = Case(row["id"], row["caption"], row.get("source_caption", ""), row.get("kind", ""),
                        row.get("change", {}), row.get("hidden", []), row.get("target", {}))  # fmt: skip
            cell = int(row["cell"]) if "cell" in row else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} line {number} is no case ({error}): it needs id and caption") from None
        for name, sheet in sheets.items():
            if cell is not None:
                y, x = divmod(cell, 16)
                picture = sheet[y * 64 : y * 64 + 64, x * 64 : x * 64 + 64]
                if cell < 0 or picture.shape != (64, 64, 3):
                    raise UserError(f"{path} line {number}: cell {cell} lies outside the sheet of {name} pictures")
                setattr(case, name, picture)
        for name in ("source", "truth"):
            if f"{name}_image" in row:
                setattr(case, name, read_picture(folder / row[f"{name}_image"]))
        cases.append(case)
        if limit is not None and len(cases) == limit:
            return cases
    if limit is not None and len(cases) < limit:
        raise UserError(f"{path} has {len(cases)} {task} cases, {limit} were asked for: ask for fewer")
    return cases
