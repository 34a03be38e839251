"""Pictures as people have them, read as a viewer shows them and brought to the size that a model makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError, one_of

READABLE = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of the pictures that are looked for in a folder."""

UNREADABLE = (".heic", ".heif", ".avif", ".jxl", ".gif", ".svg", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")
"""Endings of pictures that are refused by name: passing over a phone's photos in silence would surprise."""

FITS = ("crop", "pad")
"""How a picture of another shape takes the model's: its centre, or all of it with white beside it."""


def read_picture(path: Path) -> np.ndarray:
    """uint8 [H, W, 3], upright as a viewer shows it (EXIF), transparency on white; `UserError` if it is no picture."""
    from PIL import Image

    with _upright(path) as picture:
        if picture.mode.startswith("I;16"):  # Pillow would clip all that is brighter than 255 of 65535
            grey = (np.asarray(picture).astype(np.float32) / 257).round().astype(np.uint8)
            return np.repeat(grey[..., None], 3, 2)
        if _has_alpha(picture):
            whole = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
        return np.asarray(picture.convert("RGB"))


@contextmanager
def _upright(path: Path) -> Iterator[Any]:
    """A Pillow image turned as a viewer shows it; inside too, what cannot be read is a `UserError`."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            yield ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise UserError(f"picture {path} cannot be read: there is no such file") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise UserError(f"picture {path} cannot be read: give a PNG or JPEG file") from None


def _has_alpha(picture: Any) -> bool:
    return "A" in picture.getbands() or "transparency" in picture.info


def read_mask(path: Path) -> np.ndarray:
    """bool [H, W], true where a mask picture is white (half of it or more): there an edit may paint."""
    grey: np.ndarray = read_picture(path).mean(-1) >= 127.5
    return grey


def transparent(path: Path) -> np.ndarray | None:
    """bool [H, W], true where a picture is transparent (half of it or more): there an edit may paint, as where a mask
    is white. None for a picture without transparency."""
    with _upright(path) as picture:
        if not _has_alpha(picture):
            return None
        hole: np.ndarray = np.asarray(picture.convert("RGBA"))[..., 3] < 128
    return hole if hole.any() else None


def what_is_done(shape: tuple[int, ...], size: tuple[int, int], how: str = "crop") -> str:
    """What `fit_picture` does to a picture of this shape (height, width, ...); "" for nothing."""
    one_of(FITS, "task.fit", how)
    if shape[:2] == size:
        return ""
    cut = {"crop": "cropped to its centre and scaled", "pad": "scaled with white beside it"}[how]
    if shape[0] * size[1] == shape[1] * size[0]:
        cut = "scaled"
    return f"{cut} to {size[1]} x {size[0]}"


def fit_picture(picture: np.ndarray, size: tuple[int, int], how: str = "crop") -> tuple[np.ndarray, str]:
    """A picture uint8 [H, W, 3] brought to `size` (height, width); what was done, "" for nothing.

    Nothing is squashed. `how`: "crop" keeps the largest part of the wanted shape around the centre; "pad" keeps all of
    the picture, in the middle of white. Raises `UserError` for another `how`.
    """
    from PIL import Image, ImageOps

    height, width = picture.shape[:2]
    done = what_is_done(picture.shape, size, how)
    if not done:
        return picture, ""
    image, wanted, smooth = Image.fromarray(picture), (size[1], size[0]), Image.Resampling.LANCZOS
    fitted = ImageOps.fit(image, wanted, smooth) if how == "crop" else ImageOps.pad(image, wanted, smooth, "white")
    return np.asarray(fitted), f"{width} x {height}, {done}"


def fit_mask(mask: np.ndarray, size: tuple[int, int], how: str = "crop") -> np.ndarray:
    """A mask bool [H, W] brought to `size` as `fit_picture` brings its picture; nothing is painted beside it."""
    from PIL import Image, ImageOps

    if not what_is_done(mask.shape, size, how):
        return mask
    image, wanted, nearest = Image.fromarray(mask.astype(np.uint8)), (size[1], size[0]), Image.Resampling.NEAREST
    fitted = ImageOps.fit(image, wanted, nearest) if how == "crop" else ImageOps.pad(image, wanted, nearest, 0)
    return np.asarray(fitted) > 0


def mask_of_runs(runs: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
    """A mask bool [H, W] of pairs (first, length) of runs that are true, in rows from left to right, as PIE-Bench has
    them. Raises ValueError for runs that are none or lie outside."""
    if len(runs) % 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in runs):
        raise ValueError("mask is no list of pairs of whole numbers")
    flat = np.zeros(shape[0] * shape[1], bool)
    for first, length in zip(runs[::2], runs[1::2], strict=True):
        if first >= len(flat):
            raise ValueError(f"mask begins a run at {first}, outside of the picture")
        flat[first : first + length] = True  # the last may be cut, as its authors' reader cuts it
    return flat.reshape(shape)


def to_masks(masks: Sequence[np.ndarray | None]) -> Tensor | None:
    """bool [H, W] each to float [N, 1, H, W] of 0 and 1; None if one is missing."""
    if any(m is None for m in masks):
        return None
    return torch.from_numpy(np.stack([np.asarray(m) for m in masks]))[:, None].float()


def to_tensor(pictures: Sequence[np.ndarray | None]) -> Tensor | None:
    """uint8 [H, W, 3] each to float [N, 3, H, W] in [0, 1]; None if one is missing."""
    if any(p is None for p in pictures):
        return None
    stacked = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
    return stacked.permute(0, 3, 1, 2).float() / 255


def to_pictures(images: Tensor) -> list[np.ndarray]:
    """Float [N, 3, H, W] in [0, 1] to uint8 [H, W, 3] each."""
    return list((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
