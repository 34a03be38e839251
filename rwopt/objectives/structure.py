"""Is the layout of the reference kept? From gradients and local statistics, and from a network's features.

- `structure.gmsd`: gradient magnitude similarity deviation (Xue, Zhang, Mou and Bovik, 2014, arXiv:1308.3052): where
  the two pictures' edges are alike to a changing degree, the layout has moved. 0 is the same; 0.3 a lot.
- `structure.ms_ssim`: multi-scale structural similarity (Wang, Simoncelli and Bovik, 2003). Pictures of 176 pixels and
  more get the paper's five scales; smaller ones, which those do not fit, three with the exponents 0.3, 0.4, 0.3.
- `structure.effnet`: mean squared difference of the two pictures' self-similarity, the cosines between all places of
  EfficientNet-lite0's features at stride 8 (the idea of Tumanyan et al. 2022, arXiv:2201.00424, with another network
  than theirs, so that numbers do not compare with `dino.structure`).

Each takes the option `against`: "reference" (default), "teacher" or "truth".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rwopt.errors import UserError
from rwopt.objectives import effnet
from rwopt.objectives.objective import Objective, ObjectiveSpec
from rwopt.objectives.quality import held_against, luma

FIVE = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM's scales, the finest first, as the paper fitted them."""

THREE = (0.3, 0.4, 0.3)
"""Those of pictures that are too small for five scales."""

CONSTANT = 0.0026
"""What keeps GMSD's ratio from dividing by nothing: the paper's 170 for levels of 255."""

_REFERENCE = frozenset({"reference"})


def specs() -> Mapping[str, ObjectiveSpec]:
    network = effnet.specs()["effnet.features"]
    return {
        spec.name: spec
        for spec in (
            ObjectiveSpec("structure.gmsd", False, True, (0.0, 0.5), _REFERENCE,
                          about="gradient magnitude similarity deviation from the reference"),
            ObjectiveSpec("structure.ms_ssim", True, True, (0.0, 1.0), _REFERENCE,
                          about="multi-scale structural similarity to the reference"),
            ObjectiveSpec("structure.effnet", False, True, (0.0, 4.0), _REFERENCE, network.licence,
                          "distance of the layouts of picture and reference, in EfficientNet-lite0's features",
                          weights=network.weights, sha256=network.sha256, size=network.size, extra=network.extra),
        )
    }  # fmt: skip


def make(name: str, **given: Any) -> Objective:
    """The objective. Raises `UserError` for an unknown option, and where the network's packages are missing."""
    compare = {"structure.gmsd": gmsd, "structure.ms_ssim": ms_ssim, "structure.effnet": moved}[name]
    lacking = missing(name)
    if lacking:
        raise UserError(lacking)
    return held_against(specs()[name], given, compare)


def missing(name: str, **given: Any) -> str:
    """What is not there, in one line; "" if all is."""
    return effnet.absent(name) if name == "structure.effnet" else ""


# --- functions of pictures [N, 3, H, W] in [0, 1] and others that give [N]


def gmsd(images: Tensor, other: Tensor) -> Tensor:
    """Gradient magnitude similarity deviation of the lumas, halved in size first. 0 is the same, 0.5 the most.

    Pictures go on beyond their border as they are there; the paper's code continues them with black.
    """
    first, second = _magnitude(images), _magnitude(other)
    alike = (2 * first * second + CONSTANT) / (first * first + second * second + CONSTANT)
    spread = (alike - alike.mean((1, 2, 3), keepdim=True)).square().mean((1, 2, 3))
    return (spread + 1e-10).sqrt() - 1e-5  # a root with a slope at 0


def _magnitude(images: Tensor) -> Tensor:
    """[N, 1, H / 2, W / 2] of Prewitt gradients of the luma, of averages of 2 x 2 pixels."""
    grey = functional.pad(functional.avg_pool2d(luma(images), 2), (1,) * 4, mode="replicate")
    edge = torch.tensor([1.0, 0.0, -1.0], device=images.device, dtype=images.dtype).repeat(3, 1) / 3
    slopes = functional.conv2d(grey, torch.stack([edge, edge.mT])[:, None])
    return (slopes.square().sum(1, keepdim=True) + 1e-12).sqrt()


def ms_ssim(images: Tensor, other: Tensor) -> Tensor:
    """Multi-scale structural similarity in [0, 1]; each scale's part is taken from torchmetrics.

    Parts are cut at 1e-4: where a power of them would have no slope, torchmetrics' own product gives NaN gradients.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    exponents = FIVE if min(images.shape[-2:]) >= 176 else THREE
    score = images.new_ones(len(images))
    for scale, exponent in enumerate(exponents):
        if scale:
            images, other = functional.avg_pool2d(images, 2), functional.avg_pool2d(other, 2)
        found = ssim(images, other, data_range=1.0, reduction="none", return_contrast_sensitivity=True)
        assert isinstance(found, tuple)
        whole, contrast = (part.reshape(len(images)) for part in found)
        score = score * (whole if scale == len(exponents) - 1 else contrast).clamp(1e-4, 1) ** exponent
    return score


def moved(images: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of self-similarities in [0, 4] of EfficientNet-lite0's features at stride 8."""
    first, second = (_self_similarity(effnet.network()(pictures).stages[2]) for pictures in (images, other))
    return (first - second).square().mean((1, 2))


def _self_similarity(features: Tensor) -> Tensor:
    """Cosines [N, T, T] between all T places of features [N, C, h, w]."""
    unit = functional.normalize(features.flatten(2), dim=1)
    return unit.mT @ unit
