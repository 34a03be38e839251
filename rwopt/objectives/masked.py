"""How much of the background an edit left alone: distances to the reference outside the mask of what it should change.

`mask.psnr`, `mask.mse`, `mask.ssim`; the option `protocol` says how the mask counts:

- "masked-mean" (default): the mean over the background's pixels alone. SSIM compares windows of 11 x 11 pixels; inside
  the mask both pictures are given the reference's pixels first, so that what is edited next to the background does not
  count against it.
- "pie-bench", for numbers like the tables of Ju et al., 2023, arXiv:2310.01506: both pictures are multiplied by the
  background and compared as wholes, so that the edited area counts as perfect and large masks flatter.

A picture whose mask leaves no background has no score (NaN); a mask of zeros makes all of the picture background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rwopt.errors import UserError, one_of
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec
from rwopt.objectives.weights import options

PROTOCOLS = ("masked-mean", "pie-bench")
_NEEDS = frozenset({"reference", "mask"})
_SPECS = {
    spec.name: spec
    for spec in (
        ObjectiveSpec("mask.psnr", True, True, (0.0, 100.0), _NEEDS,
                      about="peak signal-to-noise ratio of the background to the reference's, dB"),
        ObjectiveSpec("mask.mse", False, True, (0.0, 1.0), _NEEDS,
                      about="mean squared distance of the background to the reference's"),
        ObjectiveSpec("mask.ssim", True, True, (-1.0, 1.0), _NEEDS,
                      about="structural similarity of the background to the reference's"),
    )
}  # fmt: skip


def specs() -> Mapping[str, ObjectiveSpec]:
    return _SPECS


def make(name: str, **given: Any) -> Objective:
    """The objective. Option: protocol, "masked-mean" or "pie-bench". Raises `UserError` for another one."""
    protocol: str = options(name, given, {"protocol": PROTOCOLS[0]})["protocol"]
    one_of(PROTOCOLS, f"objective {name}: protocol", protocol)
    compare = {"mask.psnr": _psnr, "mask.mse": _mse, "mask.ssim": _ssim}[name]
    return Objective(_SPECS[name], partial(_score, compare, protocol == "pie-bench"))


Compare = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Pictures, others, and the weights [N, 1, H, W] of their pixels to a number each [N]."""


def _score(compare: Compare, whole: bool, batch: Batch) -> Tensor:
    assert batch.reference is not None
    assert batch.mask is not None
    images, reference = batch.images, batch.reference
    expected = (len(images), 1, *images.shape[-2:])
    if batch.mask.shape != expected:
        raise UserError(f"mask has shape {list(batch.mask.shape)}, its pictures want {list(expected)}: resize it")
    background = 1 - batch.mask.to(images.dtype)
    seen = background.sum((1, 2, 3)) > 0
    if whole:
        scores = compare(images * background, reference * background, torch.ones_like(background))
    else:
        # pixels of the mask are taken from the reference: a weight of 0 alone would not keep windows from seeing them
        scores = compare(torch.where(background > 0, images, reference), reference, background)
    return torch.where(seen, scores, torch.nan)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Means [N] over channels and pixels of values [N, C, H, W] with weights [N, 1, H, W]; 0 where all weights are."""
    total = values.shape[1] * weights.sum((1, 2, 3))
    return (values * weights).sum((1, 2, 3)) / total.clamp(min=1e-6)


def _mse(images: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    return _mean((images - other).square(), weights)


def _psnr(images: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    return -10 * _mse(images, other, weights).clamp(min=1e-10).log10()  # equal pictures: 100, as everywhere here


def _ssim(images: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    found = ssim(images, other, data_range=1.0, reduction="none", return_full_image=True)
    assert isinstance(found, tuple)
    return _mean(found[1], weights)
