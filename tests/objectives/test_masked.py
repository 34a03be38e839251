"""Background kept: exact against NumPy and torchmetrics, and blind to what happens inside the mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from rwopt.errors import UserError
from rwopt.objectives import Batch, make_objective
from rwopt.objectives.masked import make, specs

NAMES = list(specs())


def pictures(seed: int) -> Tensor:
    return torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch() -> Batch:
    mask = torch.zeros(3, 1, 32, 48)
    mask[0, :, 8:20, 10:30] = 1
    mask[1, :, :, 24:] = 1
    mask[2, :, :2] = 1
    return Batch(pictures(1), reference=(pictures(1) + 0.2 * pictures(2)).clamp(0, 1), mask=mask)


def test_the_mean_is_over_the_background_alone(batch: Batch) -> None:
    assert batch.reference is not None
    assert batch.mask is not None
    for i, score in enumerate(make("mask.mse")(batch)):
        outside = np.repeat(batch.mask[i].numpy() == 0, 3, 0)
        error = (batch.images[i].double().numpy() - batch.reference[i].double().numpy())[outside]
        assert score.item() == pytest.approx(np.square(error).mean(), rel=1e-5)
    torch.testing.assert_close(make("mask.psnr")(batch), -10 * make("mask.mse")(batch).log10())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", ["masked-mean", "pie-bench"])
def test_what_is_inside_the_mask_does_not_count(name: str, protocol: str, batch: Batch) -> None:
    assert batch.mask is not None
    objective, before = make(name, protocol=protocol), make(name, protocol=protocol)(batch)
    other = torch.where(batch.mask > 0, pictures(5), batch.images).requires_grad_()
    after = objective(Batch(other, reference=batch.reference, mask=batch.mask))
    assert torch.equal(after.detach(), before)
    gradient = torch.autograd.grad(after.sum(), other)[0]
    inside = (batch.mask > 0).expand_as(gradient)
    assert (gradient[inside] == 0).all()
    assert gradient[~inside].abs().sum() > 0
    outside = torch.where(batch.mask > 0, batch.images, pictures(5))
    assert (objective(Batch(outside, reference=batch.reference, mask=batch.mask)) != before).all()


def test_pie_bench_compares_multiplied_pictures_as_wholes(batch: Batch) -> None:
    assert batch.reference is not None
    assert batch.mask is not None
    kept = 1 - batch.mask
    a, b = batch.images * kept, batch.reference * kept
    psnr = peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(make("mask.psnr", protocol="pie-bench")(batch), psnr)
    ssim = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
    torch.testing.assert_close(make("mask.ssim", protocol="pie-bench")(batch), ssim)
    torch.testing.assert_close(make("mask.mse", protocol="pie-bench")(batch), (a - b).square().mean((1, 2, 3)))
    assert (psnr > make("mask.psnr")(batch)).all()  # the mask counts as perfect


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", ["masked-mean", "pie-bench"])
def test_no_background_is_no_score_and_no_mask_is_the_whole_picture(name: str, protocol: str, batch: Batch) -> None:
    assert batch.mask is not None
    batch.mask[0], batch.mask[1] = 1, 0
    batch.images.requires_grad_()
    scores = make(name, protocol=protocol)(batch)
    assert scores.isnan().tolist() == [True, False, False]
    assert torch.autograd.grad(scores.nan_to_num().sum(), batch.images)[0].isfinite().all()
    batch.truth = batch.reference
    whole = {"mask.psnr": "truth.psnr", "mask.ssim": "truth.ssim"}
    if name in whole:
        torch.testing.assert_close(scores[1], make_objective(whole[name])(batch)[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_background_has_the_end_of_the_range_and_a_finite_gradient(name: str, batch: Batch) -> None:
    assert batch.reference is not None
    for still in (pictures(1), torch.zeros(3, 3, 32, 48)):
        images = still.clone().requires_grad_()
        scores = make(name)(Batch(images, reference=still, mask=batch.mask))
        spec = specs()[name]
        best = spec.range[1] if spec.higher_is_better else spec.range[0]
        torch.testing.assert_close(scores.detach(), torch.full((3,), best))
        assert torch.autograd.grad(scores.sum(), images)[0].isfinite().all()


def test_wrong_masks_and_protocols_are_named(batch: Batch) -> None:
    assert batch.mask is not None
    batch.mask = batch.mask[..., ::2, ::2]
    with pytest.raises(UserError, match=r"^mask has shape \[3, 1, 16, 24\], its pictures want \[3, 1, 32, 48\]"):
        make("mask.mse")(batch)
    with pytest.raises(UserError, match="protocol=pie: did you mean pie-bench"):
        make("mask.mse", protocol="pie")
