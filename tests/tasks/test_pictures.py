"""Pictures as people have them: turned by EXIF, transparent, of any shape, broken, or none at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from rwopt.errors import UserError
from rwopt.tasks.cases import fit_picture, read_picture


@pytest.fixture
def picture() -> Image.Image:
    """Not the same turned or mirrored in any way."""
    image = Image.new("RGB", (24, 16), (250, 250, 250))
    ImageDraw.Draw(image).rectangle((1, 2, 9, 6), fill=(200, 20, 30))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_as_a_viewer_shows_it(picture: Image.Image, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.png", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    read = read_picture(tmp_path / "a.png")
    assert np.array_equal(read, np.asarray(shown))
    assert read.shape[:2] == ((16, 24) if orientation < 5 else (24, 16))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path: Path, mode: str) -> None:
    """Black above, nothing below."""
    options: dict[str, Any] = {}
    if mode == "P":
        dark = Image.new("P", (24, 16), 0)
        dark.putpalette([0, 0, 0, 0, 0, 200])
        ImageDraw.Draw(dark).rectangle((0, 8, 23, 15), fill=1)
        options = {"transparency": 1}
    else:
        dark = Image.new(mode, (24, 16), "black")
        dark.putalpha(Image.fromarray(np.repeat([255, 0], 8).astype(np.uint8)[:, None].repeat(24, 1)))
    dark.save(tmp_path / "a.png", **options)
    read = read_picture(tmp_path / "a.png")
    assert (read[8:] == 255).all()
    assert (read[:8] < 10).all()


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "I;16"])
def test_other_kinds_of_pixel(tmp_path: Path, mode: str) -> None:
    name = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 8)).save(name)
    assert read_picture(name).shape == (8, 8, 3)


def test_sixteen_bits_keep_their_brightness(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.array_equal(read_picture(tmp_path / "a.png"), np.arange(256).reshape(16, 16, 1).repeat(3, 2))


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "folder", "absent"])
def test_what_is_no_picture_is_one_line(picture: Image.Image, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    if kind == "folder":
        path.mkdir()
    elif kind != "absent":
        picture.save(path)
        data = path.read_bytes()
        path.write_bytes({"text": b"no picture", "empty": b"", "cut": data[: len(data) // 2]}[kind])
    remedy = "there is no such file" if kind == "absent" else "give a PNG or JPEG file"
    with pytest.raises(UserError, match=rf"^picture [^\n]*a\.png cannot be read: {remedy}$"):
        read_picture(path)


@pytest.mark.parametrize(("width", "height"), [(192, 96), (96, 192), (300, 301), (100, 100), (70, 500)])
def test_a_circle_stays_a_circle(width: int, height: int) -> None:
    side = min(width, height)
    image = Image.new("RGB", (width, height), "white")
    x, y = (width - side) / 2, (height - side) / 2
    ImageDraw.Draw(image).ellipse((x + 0.2 * side, y + 0.2 * side, x + 0.8 * side, y + 0.8 * side), fill="black")
    fitted, done = fit_picture(np.asarray(image), (64, 64))
    assert fitted.shape == (64, 64, 3)
    rows, columns = np.nonzero(fitted[..., 0] < 128)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 2
    assert 36 <= np.ptp(rows) <= 40
    assert f"{width} x {height}" in done
    assert ("cropped to its centre" in done) == (width != height)


def test_a_picture_that_fits_is_left_alone() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
    same, done = fit_picture(picture, (32, 48))
    assert same is picture
    assert done == ""
    other, done = fit_picture(picture, (16, 24))
    assert other.shape == (16, 24, 3)
    assert "cropped" not in done


@pytest.mark.parametrize(("width", "height"), [(192, 96), (96, 192), (64, 20), (70, 500)])
def test_padding_keeps_all_of_a_picture(width: int, height: int) -> None:
    picture = np.zeros((height, width, 3), np.uint8)
    fitted, done = fit_picture(picture, (64, 64), "pad")
    assert fitted.shape == (64, 64, 3)
    assert done == f"{width} x {height}, scaled with white beside it to 64 x 64"
    dark = fitted.max(-1) < 128
    rows, columns = dark.any(1).sum(), dark.any(0).sum()
    assert (rows, columns) == (round(64 * min(1, height / width)), round(64 * min(1, width / height)))
    assert dark.sum() == rows * columns
    assert (fitted[~dark] == 255).all()
    assert abs(int(np.flatnonzero(dark.any(1))[0]) - (64 - rows) // 2) <= 1


def test_another_way_of_fitting_is_refused() -> None:
    with pytest.raises(UserError, match=r"task\.fit=padd: did you mean pad\?"):
        fit_picture(np.zeros((3, 4, 3), np.uint8), (4, 4), "padd")
