"""Pictures side by side: one row a case, one column an arm."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rwopt import files
from rwopt.errors import UserError

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

__all__ = ["image_grid"]

INK, GREY, BLUE = "#1f2328", "#6b7280", "#0072b2"
MARGIN, GAP, TEXT, HEADER, LINE = 16, 8, 210, 34, 19  # pixels; captions are at most TEXT wide


def image_grid(
    columns: Mapping[str, Sequence[npt.NDArray[Any]]],
    path: str | os.PathLike[str],
    captions: Sequence[str],
    scale: int = 3,
    emphasis: str = "learned",
) -> Path:
    """Write one picture with a header for each column and a caption at the left of each row.

    Args:
        columns: header -> pictures [H, W, 3] uint8, all of one size, one per case; the order is kept.
        path: the file to write; its ending says the format.
        captions: one per case; long ones are wrapped, and cut where the row ends.
        scale: every pixel is drawn as `scale` x `scale` pixels.
        emphasis: header that is drawn in colour.

    Raises:
        ValueError: no pictures, or pictures of differing number, size or type.
    """
    from PIL import Image, ImageDraw

    shapes = {picture.shape for pictures in columns.values() for picture in pictures}
    if not columns or not captions or any(len(pictures) != len(captions) for pictures in columns.values()):
        counts = {name: len(pictures) for name, pictures in columns.items()}
        raise ValueError(f"every column needs one picture per caption: {len(captions)} captions, pictures {counts}")
    if len(shapes) != 1 or (len(shape := shapes.pop()) != 3 or shape[2] != 3):
        raise ValueError(f"all pictures must have one shape [H, W, 3], got {sorted(shapes) or shape}")
    if any(picture.dtype != np.uint8 for pictures in columns.values() for picture in pictures):
        raise ValueError("pictures must be uint8")

    high, wide = shape[0] * scale, shape[1] * scale
    font, ruler = _font(13), ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [_wrap(ruler, caption, font, TEXT, most=max(1, high // LINE)) for caption in captions]
    widest = max(ruler.textlength(line, font=font) for lines in texts for line in lines)
    left = MARGIN + round(widest) + 2 * GAP
    size = (
        left + len(columns) * (wide + GAP) - GAP + MARGIN,
        HEADER + len(captions) * (high + GAP) - GAP + MARGIN,
    )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, pictures) in enumerate(columns.items()):
        x = left + column * (wide + GAP)
        head = _fit(draw, name, _font(15, bold=True), wide)
        draw.text(
            (x + wide / 2, HEADER / 2 + 2),
            head,
            _ink(name == emphasis),
            font=_font(15, bold=True),
            anchor="mm",
        )
        for row, picture in enumerate(pictures):
            tile = Image.fromarray(np.ascontiguousarray(picture)).resize((wide, high), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, HEADER + row * (high + GAP)))
    for row, lines in enumerate(texts):
        y = HEADER + row * (high + GAP) + (high - len(lines) * LINE) / 2
        for index, line in enumerate(lines):
            draw.text((MARGIN, y + index * LINE), line, INK, font=font)
    buffer = io.BytesIO()
    kind = picture_format(path)
    sheet.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 95}))
    return files.write_bytes(path, buffer.getvalue())


FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def picture_format(path: str | os.PathLike[str]) -> str:
    """What the ending of a picture file's name says; `UserError` for another one."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise UserError(f"--out {path}: the ending says the format: use one of {', '.join(FORMATS)}")
    return FORMATS[ending]


def _ink(emphasised: bool) -> str:
    return BLUE if emphasised else INK


def _font(size: int, bold: bool = False) -> FreeTypeFont:
    """DejaVu Sans as it comes with matplotlib: the same glyphs on every machine."""
    import matplotlib as mpl
    from PIL import ImageFont

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)


def _fit(draw: ImageDraw, text: str, font: FreeTypeFont, width: float) -> str:
    """`text`, shortened with an ellipsis to at most `width` pixels."""
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "…", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _wrap(draw: ImageDraw, text: str, font: FreeTypeFont, width: float, most: int) -> list[str]:
    """At most `most` lines of at most `width` pixels; lines of `text` itself are kept."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and draw.textlength(longer, font=font) > width:
                lines.append(line)
                line = word
            else:
                line = longer
        lines.append(line)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " …"]
    return [_fit(draw, line, font, width) for line in lines]
