"""Resizing, cropping and padding against PIL, which the published pipelines use, and against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rwopt.objectives.preprocess import CLIP_MEAN, CLIP_STD, centre_crop, letterbox, normalise, resize, shorter


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth random picture of whole steps of 1/255, with some at both ends."""
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 1.6 - 0.3
    return (fine.clamp(0, 1) * 255).round() / 255


def as_pil(images: Tensor) -> Image.Image:
    return Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("size", [(90, 120), (120, 90), (40, 40), (17, 230)])
def test_crops_are_those_of_clips_own_processor(size: tuple[int, int]) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = picture(*size)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    expected = processor(as_pil(images), return_tensors="pt").pixel_values
    ours = normalise(centre_crop(images, 48), CLIP_MEAN, CLIP_STD)
    assert ours.shape == expected.shape == (1, 3, 48, 48)
    assert (ours - expected).abs().max() < 2 / 255 / min(CLIP_STD)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(24, 31), (130, 75)])
def test_filters_are_those_of_pil(mode: str, size: tuple[int, int]) -> None:
    images = picture(64, 80)
    resample = Image.Resampling.BICUBIC if mode == "bicubic" else Image.Resampling.BILINEAR
    expected = as_tensor(as_pil(images).resize(size[::-1], resample))
    assert (resize(images, *size, mode=mode) - expected).abs().max() < 1.5 / 255


def test_without_a_filter_fine_stripes_are_not_averaged() -> None:
    stripes = torch.zeros(1, 3, 8, 64)
    stripes[..., ::2] = 1
    assert resize(stripes, 8, 16, "bilinear").std() < 0.1
    assert resize(stripes, 8, 13, "bilinear", antialias=False).std() > 0.2


def test_the_shorter_side_and_the_longest() -> None:
    assert shorter(torch.rand(1, 3, 50, 100), 20).shape[-2:] == (20, 40)
    assert shorter(torch.rand(1, 3, 100, 50), 20).shape[-2:] == (40, 20)
    assert shorter(torch.rand(1, 3, 10, 100), 20, most=80).shape[-2:] == (8, 80)
    same = torch.rand(1, 3, 20, 40)
    assert shorter(same, 20, most=40) is same
    assert centre_crop(torch.rand(1, 3, 60, 90), 28, before=32).shape[-2:] == (28, 28)


def test_a_letterbox_keeps_the_whole_picture_between_black_bars() -> None:
    out = letterbox(torch.ones(1, 3, 30, 60), 32)
    assert out.shape == (1, 3, 32, 32)
    assert (out[..., :8, :] == 0).all()
    assert (out[..., 24:, :] == 0).all()
    torch.testing.assert_close(out[..., 8:24, :], torch.ones(1, 3, 16, 32))
    assert torch.equal(letterbox(out, 32), out)


def test_gradients_pass() -> None:
    images = picture(9, 10).double().clamp(0.2, 0.8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: centre_crop(x, 6), (images,))
