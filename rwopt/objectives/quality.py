"""What can be said of a picture without a network: noise in flat areas, colour, contrast, sharpness, clipping.

`quality.flat_noise` is a guard. Weights that were learned without a term against it buy a network's favour with mottled
flat areas. With G_s a Gaussian blur of s pixels, and x the picture in levels of 0 to 255,

    e = G_2 * max over channels of |gradient of G_2 * x|^2     how near an edge is, at a scale where fine noise is gone
    f = mean over channels of (x - G_2 * x)^2                  what is finer than about ten pixels
    m = exp(-e / 2.55^2 - (G_2 * f / 16^2)^2)                  1 in flat areas, 0 at outlines and in texture
    flat_noise = sum(m (sqrt(f + 1/16) - 1/4)) / max(sum(m), 1 % of the pixels)     in levels

Edges, and texture that is coarse or stronger than about 16 levels, have m near 0; a picture with hardly a flat pixel
scores near 0. Fine weak texture cannot be told from noise in one picture. `quality.flat_noise_excess` is the same of
the picture minus that of the reference, with m of both: what the candidate added, whatever noise and texture the
reference had. Colour fringes count as far as they reach beyond three or four pixels from an outline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rwopt.errors import one_of
from rwopt.objectives.objective import Objective, ObjectiveSpec, against
from rwopt.objectives.weights import options

Compare = Callable[[Tensor, Tensor], Tensor]

AGAINST = ("reference", "teacher", "truth")
"""Pictures of a batch that one can be held against."""

SCALE = 2.0  # standard deviation of all blurs, in pixels
EDGE = 0.01  # gradient, in shares of the full range a pixel, at which a flat area ends
TEXTURE = 16.0  # levels of 255 beyond which fine structure is texture, not noise
LEAST = 0.01  # share of the picture below which flat areas lose their say

_SPECS = {
    spec.name: spec
    for spec in (
        ObjectiveSpec("quality.flat_noise", False, True, (0.0, 255.0),
                      about="noise and mottling in flat areas, levels of 255"),
        ObjectiveSpec("quality.flat_noise_excess", False, True, (-255.0, 255.0), frozenset({"reference"}),
                      about="noise in flat areas beyond the reference's, levels of 255"),
        ObjectiveSpec("quality.colourfulness", True, True, (0.0, 376.5),
                      about="colourfulness of Hasler and Suesstrunk (15 slight, 45 average, 82 high)"),
        ObjectiveSpec("quality.contrast", True, True, (0.0, 0.5), about="standard deviation of the luma"),
        ObjectiveSpec("quality.sharpness", True, True, (0.0, 0.7072), about="root mean square gradient of the luma"),
        ObjectiveSpec("quality.saturation", False, True, (0.0, 1.0), about="share of values that are clipped"),
    )
}  # fmt: skip


def specs() -> Mapping[str, ObjectiveSpec]:
    return _SPECS


def make(name: str, **given: Any) -> Objective:
    """The objective. Option of `quality.flat_noise_excess`: against, "reference" (default), "teacher" or "truth"."""
    spec = _SPECS[name]
    if name != "quality.flat_noise_excess":
        options(name, given, {})
        function = _PLAIN[name]
        return Objective(spec, lambda batch: function(batch.images))
    return held_against(spec, given, flat_noise_excess)


def held_against(spec: ObjectiveSpec, given: Mapping[str, Any], compare: Compare) -> Objective:
    """The objective that compares pictures with those that its option `against` names, by default the reference."""
    field: str = options(spec.name, given, {"against": AGAINST[0]})["against"]
    one_of(AGAINST, f"objective {spec.name}: against", field)
    return Objective(replace(spec, needs=frozenset({field})), against(field, compare))


# --- functions of pictures [N, 3, H, W] in [0, 1] that give [N]


def flat_noise(images: Tensor) -> Tensor:
    """Noise in flat areas in levels of 255; the module says how."""
    fine = _fine(images)
    return _weighed(_root(fine, 0.25), _flatness(images, fine))


def flat_noise_excess(images: Tensor, other: Tensor) -> Tensor:
    """`flat_noise` of pictures minus that of others, where both are flat."""
    fine, others = _fine(images), _fine(other)
    flat = _flatness(images, fine) * _flatness(other, others)
    return _weighed(_root(fine, 0.25) - _root(others, 0.25), flat)


def flatness(images: Tensor) -> Tensor:
    """[N, 1, H, W] from 0, at an edge or in texture, to 1, flat: the module's m."""
    return _flatness(images, _fine(images))


def colourfulness(images: Tensor) -> Tensor:
    """M^(3) of Hasler and Suesstrunk, 2003 ("Measuring colourfulness in natural images"), in levels of 255:
    sigma + 0.3 mu of the opponent colours R - G and (R + G) / 2 - B."""
    red, green, blue = (255 * images).unbind(1)
    opponent = torch.stack([red - green, (red + green) / 2 - blue], 1).flatten(2)
    mean = opponent.mean(2)
    spread = (opponent - mean[..., None]).square().mean(2).sum(1)
    return _root(spread) + 0.3 * _root(mean.square().sum(1))


def contrast(images: Tensor) -> Tensor:
    """Root mean square contrast (Peli, 1990): the standard deviation of the luma."""
    grey = luma(images).flatten(1)
    return _root((grey - grey.mean(1, keepdim=True)).square().mean(1))


def sharpness(images: Tensor) -> Tensor:
    """Root mean square of the luma's gradient a pixel, by central differences. Noise is sharp, too: see `flat_noise`.

    The square is Tenengrad (Krotkov, 1988) but for the filter.
    """
    across, down = _slopes(luma(images))
    return _root((across.square() + down.square()).mean((1, 2, 3)))


def saturation(images: Tensor) -> Tensor:
    """Share of values at 0 or 1; one that is d levels of 255 away from the nearer counts exp(-d / 2), for a slope."""
    away = torch.minimum(images, 1 - images).clamp(min=0)
    return (-away * (255 / 2)).exp().mean((1, 2, 3))


_PLAIN = {
    "quality.flat_noise": flat_noise,
    "quality.colourfulness": colourfulness,
    "quality.contrast": contrast,
    "quality.sharpness": sharpness,
    "quality.saturation": saturation,
}


# --- parts


def luma(images: Tensor) -> Tensor:
    """[N, 1, H, W], ITU-R BT.601."""
    weights = images.new_tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def blur(images: Tensor, scale: float) -> Tensor:
    """A Gaussian of standard deviation `scale` pixels, cut at three of them; the border's values go on outside."""
    reach = round(3 * scale)
    steps = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = (-(steps**2) / (2 * scale**2)).exp()
    kernel = kernel / kernel.sum()
    planes = images.flatten(0, 1)[:, None]
    planes = functional.pad(planes, (reach,) * 4, mode="replicate")
    planes = functional.conv2d(functional.conv2d(planes, kernel[None, None, None]), kernel[None, None, :, None])
    return planes.reshape(images.shape)


def _slopes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences across and down, of the size of the pictures."""
    wide = functional.pad(images, (1,) * 4, mode="replicate")
    across, down = wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2], wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]
    return across / 2, down / 2


def _fine(images: Tensor) -> Tensor:
    """[N, 1, H, W], squared levels: how far pixels are from their blurred neighbourhood, the module's f."""
    return (255 * (images - blur(images, SCALE))).square().mean(1, keepdim=True)


def _flatness(images: Tensor, fine: Tensor) -> Tensor:
    across, down = _slopes(blur(images, SCALE))
    edges = (across.square() + down.square()).amax(1, keepdim=True)
    return (-blur(edges, SCALE) / EDGE**2 - (blur(fine, SCALE) / TEXTURE**2).square()).exp()


def _weighed(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3)).clamp(min=LEAST * weights[0].numel())


def _root(square: Tensor, soft: float = 1e-5) -> Tensor:
    """The square root, with a slope at 0: 0 for 0, and at most `soft` too little."""
    return (square + soft**2).sqrt() - soft
