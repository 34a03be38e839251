"""What is done to a picture before a reward network looks: resize, crop or pad, normalise; differentiable.

Pictures are [N, 3, H, W] in [0, 1]. The published pipelines resize 8-bit PIL pictures and round in between; here
nothing is rounded, so that gradients pass: pixels are within a step or two of 1/255 of theirs, not equal to the bit.
The anti-aliased filters are PIL's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def resize(images: Tensor, height: int, width: int, mode: str = "bicubic", antialias: bool = True) -> Tensor:
    """Pictures of that size. Bicubic overshoot is cut, as in an 8-bit picture."""
    if images.shape[-2:] == (height, width):
        return images
    out = functional.interpolate(images, (height, width), mode=mode, antialias=antialias, align_corners=False)
    return out.clamp(0, 1) if mode == "bicubic" else out


def shorter(images: Tensor, side: int, mode: str = "bicubic", antialias: bool = True, most: int = 0) -> Tensor:
    """Resized so that the shorter side is `side`, and the longer one at most `most` unless that is 0."""
    height, width = images.shape[-2:]
    low, high = min(height, width), max(height, width)
    longer = int(side * high / low)
    if most and longer > most:
        side, longer = int(most * side / longer), most
    size = (side, longer) if height <= width else (longer, side)
    return resize(images, *size, mode, antialias)


def centre_crop(images: Tensor, side: int, before: int = 0) -> Tensor:
    """The middle square [N, 3, side, side] of pictures whose shorter side is made `before` (0: `side`) first."""
    images = shorter(images, before or side)
    top, left = (round((size - side) / 2) for size in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def letterbox(images: Tensor, side: int) -> Tensor:
    """The whole pictures, with black bars to a square [N, 3, side, side]."""
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    small = resize(images, round(height * scale), round(width * scale))
    down, right = side - small.shape[-2], side - small.shape[-1]
    return functional.pad(small, (right // 2, right - right // 2, down // 2, down - down // 2))


def normalise(images: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """(x - mean) / std for each channel."""
    shift, scale = (torch.tensor(value, device=images.device).reshape(3, 1, 1) for value in (mean, std))
    return (images - shift) / scale
