"""Scores without a network against NumPy and SciPy, and what the guard against noise must see and must not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from rwopt.errors import UserError
from rwopt.objectives import Batch
from rwopt.objectives.quality import (
    colourfulness,
    contrast,
    flat_noise,
    flat_noise_excess,
    flatness,
    make,
    saturation,
    sharpness,
    specs,
)  # fmt: skip
from rwopt.tasks.cases import load_cases
from rwopt.tasks.pictures import to_tensor

ALL = [flat_noise, colourfulness, contrast, sharpness, saturation]


def noise(size: int = 64, n: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def flat(level: float = 0.5, n: int = 2) -> Tensor:
    return torch.full((n, 3, 64, 64), level)


def disc(edge: float = 0.7, radius: float = 18, at: tuple[float, float] = (31.5, 31.5)) -> Tensor:
    """A coloured disc with an outline of `edge` pixels on another colour, as a drawing has it."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    inside = torch.sigmoid((radius - ((x - at[0]) ** 2 + (y - at[1]) ** 2).sqrt()) / (edge / 2))
    colours = torch.tensor([[0.9, 0.3, 0.2], [0.3, 0.6, 0.9]])[:, :, None, None]
    return (colours[0] * inside + colours[1] * (1 - inside))[None]


def mottled(images: Tensor, levels: float, scale: float = 1.5) -> Tensor:
    """Soft blotches of that standard deviation, in levels of 255, in every channel."""
    raw = np.random.default_rng(0).normal(size=tuple(images.shape))
    soft = torch.from_numpy(ndimage.gaussian_filter(raw, (0, 0, scale, scale))).float()
    return (images + levels / 255 * soft / soft.std()).clamp(0, 1)


@pytest.fixture(scope="module")
def drawings() -> Tensor:
    pictures = to_tensor([case.truth for case in load_cases("avatars", "validation", "editing", 8)])
    assert pictures is not None
    return pictures


# --- flat_noise


def by_scipy(images: np.ndarray) -> float:
    """The module's formula of one picture [3, H, W], in SciPy."""

    def blur(x: np.ndarray) -> np.ndarray:
        return np.asarray(ndimage.gaussian_filter(x, 2, mode="nearest", truncate=3, axes=(-2, -1)))

    coarse = np.pad(blur(images), ((0, 0), (1, 1), (1, 1)), mode="edge")
    across, down = coarse[:, 1:-1, 2:] - coarse[:, 1:-1, :-2], coarse[:, 2:, 1:-1] - coarse[:, :-2, 1:-1]
    edges = ((across / 2) ** 2 + (down / 2) ** 2).max(0)
    fine = ((255 * (images - blur(images))) ** 2).mean(0)
    weight = np.exp(-blur(255**2 * edges) / 2.55**2 - (blur(fine) / 16**2) ** 2)
    return float((weight * (np.sqrt(fine + 1 / 16) - 1 / 4)).sum() / max(weight.sum(), 0.01 * weight.size))


def test_flat_noise_is_its_formula() -> None:
    pictures = torch.cat([mottled(disc(), 5), mottled(flat(n=1), 12), 0.2 * noise(n=1), disc(8.0)]).double()
    expected = [by_scipy(picture.numpy()) for picture in pictures]
    np.testing.assert_allclose(flat_noise(pictures).numpy(), expected, rtol=1e-9)


def test_flat_noise_of_white_noise_is_its_standard_deviation_less_what_the_blur_keeps() -> None:
    levels = 3.0
    white = flat() + levels / 255 * torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    kept = 1 - 2 / (8 * np.pi) + 1 / (16 * np.pi)  # variance of x - G x: 1 - 2 G(0) + sum G^2, for s = 2
    expected = levels * np.sqrt(kept) * 0.92 - 0.25  # 0.92: the mean of a chi with 3 degrees of freedom, over sqrt(3)
    torch.testing.assert_close(flat_noise(white), torch.full((2,), float(expected)), rtol=0.03, atol=0)


def test_what_is_flat_or_drawn_has_none(drawings: Tensor) -> None:
    assert (flat_noise(flat()) == 0).all()
    assert (flat_noise(torch.cat([disc(0.1), disc(0.7), disc(2.0)])) < 0.02).all()
    assert flat_noise(disc(6.0)) < 0.25  # an outline as soft as a shadow
    assert (flat_noise(drawings) < 0.6).all()


def test_it_grows_with_mottling_and_noise_in_every_picture(drawings: Tensor) -> None:
    for spoil in (mottled, lambda x, levels: (x + levels / 255 * (2 * noise(n=8) - 1) * 3**0.5).clamp(0, 1)):
        steps = torch.stack([flat_noise(spoil(drawings, levels)) for levels in (0, 2, 4, 8)])
        assert (steps.diff(dim=0) > 0.3).all()


def test_outlines_and_textures_count_little_beside_mottling(drawings: Tensor) -> None:
    plain, spoilt = flat_noise(drawings), flat_noise(mottled(drawings, 4)) - flat_noise(drawings)
    sharper = (1.8 * drawings - 0.8 * torch.nn.functional.avg_pool2d(drawings, 3, 1, 1, False, False)).clamp(0, 1)
    assert (flat_noise(sharper) - plain).abs().mean() < 0.1 * spoilt.mean()
    assert (flat_noise(0.8 * drawings) - plain).abs().mean() < 0.1 * spoilt.mean()
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    stripes = (0.5 + 0.3 * torch.sin(2 * np.pi * x / 9)).expand(1, 3, 64, 64)
    weave = (0.5 + 0.25 * torch.sin(x) * torch.sin(0.8 * y)).expand(1, 3, 64, 64)
    for texture in (stripes, weave):
        half = disc()
        half[..., 32:, :] = texture[..., 32:, :]
        amplitude = 255 * (texture - texture.mean()).std()
        assert flat_noise(texture) < 0.06 * amplitude
        assert (flat_noise(half) - flat_noise(disc())).abs() < 0.03 * amplitude


def test_fringes_that_leave_an_outline_are_seen() -> None:
    halo = disc(0.7) + (disc(0.7, 27) - disc(0.7, 22)) * 0.08  # a ring of another tint, 4 to 9 pixels outside
    assert flat_noise(halo) > flat_noise(disc()) + 0.3


# --- the excess over a reference


def test_the_excess_is_what_was_added(drawings: Tensor) -> None:
    noisy, worse = mottled(drawings, 3), mottled(drawings, 6)
    assert (flat_noise_excess(noisy, noisy) == 0).all()
    assert (flat_noise_excess(worse, noisy) > 0.5).all()
    torch.testing.assert_close(flat_noise_excess(noisy, worse), -flat_noise_excess(worse, noisy))
    two = disc(0.7, 8, (12, 12)) * 0.5 + disc(0.7, 8, (50, 50)) * 0.5
    assert flat_noise_excess(two, disc()).abs() < 0.1  # other outlines are no noise, whichever picture has them


def test_it_is_held_against_what_is_asked_for(drawings: Tensor) -> None:
    batch = Batch(mottled(drawings, 4), reference=drawings, teacher=mottled(drawings, 2), truth=drawings)
    default, teacher = make("quality.flat_noise_excess"), make("quality.flat_noise_excess", against="teacher")
    assert default.spec.needs == {"reference"}
    assert teacher.spec.needs == {"teacher"}
    assert (default(batch) > teacher(batch)).all()
    torch.testing.assert_close(make("quality.flat_noise_excess", against="truth")(batch), default(batch))
    with pytest.raises(UserError, match="against=latents: did you mean"):
        make("quality.flat_noise_excess", against="latents")


# --- the others


def test_colourfulness_is_the_papers() -> None:
    for picture in (noise(), disc()):
        red, green, blue = 255 * picture[0].double().numpy()
        rg, yb = red - green, (red + green) / 2 - blue
        expected = np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())
        assert colourfulness(picture)[0].item() == pytest.approx(expected, rel=1e-5)
    assert colourfulness(flat())[0] == pytest.approx(0, abs=1e-4)
    assert colourfulness(torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)).item() == pytest.approx(
        0.3 * 255 * np.hypot(1, 0.5), rel=1e-6
    )


def test_contrast_sharpness_and_saturation_of_what_is_known() -> None:
    halves = torch.zeros(1, 3, 64, 64)
    halves[..., 32:] = 1
    assert contrast(halves).item() == pytest.approx(0.5, abs=1e-4)
    assert contrast(flat()).tolist() == [0, 0]
    slope = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    expected = np.sqrt((62 + 2 * 0.25) / 64) / 63  # the first and last column have half the slope
    assert sharpness(slope).item() == pytest.approx(expected, rel=1e-2)
    assert sharpness(disc(0.7)) > 1.5 * sharpness(disc(4.0))
    torch.testing.assert_close(saturation(torch.cat([halves, flat(0.5, 1)])), torch.tensor([1.0, 0.0]))
    part = flat(0.5, 1)
    part[:, 0, :16] = 1  # a third of a quarter
    assert saturation(part).item() == pytest.approx(1 / 12, abs=1e-6)


@pytest.mark.parametrize("function", ALL)
def test_gradients_are_right_and_finite_where_nothing_is_to_see(function: Callable[[Tensor], Tensor]) -> None:
    smooth = (0.3 + 0.4 * torch.nn.functional.interpolate(noise(3), (12, 12), mode="bilinear")).double()
    smooth = (smooth + 0.01 * noise(12).double()).requires_grad_()
    assert torch.autograd.gradcheck(function, smooth, fast_mode=True)
    for still in (flat(0.0), flat(0.5), flat(1.0), noise(), noise(7)):
        pixels = still.clone().requires_grad_()
        assert torch.autograd.grad(function(pixels).sum(), pixels)[0].isfinite().all()
        same = torch.autograd.grad(flat_noise_excess(pixels, still).sum(), pixels)[0]
        assert same.isfinite().all()


def test_flatness_ends_at_outlines() -> None:
    found = flatness(disc())[0, 0]
    assert found[31, 31] > 0.99
    assert found[31, 13] < 0.01
    assert found[31, 9] < 0.5 < found[31, 2]


def test_options_are_refused_where_there_are_none() -> None:
    for name in specs():
        with pytest.raises(UserError, match=f"{name} has no option scale"):
            make(name, scale=2)
