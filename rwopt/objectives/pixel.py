"""Pixel fidelity: PSNR and SSIM (torchmetrics' functional form) to the true edit; SSIM to the source."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from rwopt.objectives.objective import Objective, ObjectiveSpec, against


def psnr(images: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [N] in dB of pictures [N, 3, H, W] in [0, 1]."""
    error = (images - other).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()  # equal pictures: 100, where infinity would survive no mean or gradient


def ssim(images: Tensor, other: Tensor) -> Tensor:
    """Structural similarity [N] in [-1, 1] (torchmetrics)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(images, other, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(len(images))


def likeness(images: Tensor, other: Tensor) -> Tensor:
    """`ssim` from 0 on."""
    return ssim(images, other).clamp(min=0)


_ALL = {
    "truth.psnr": (against("truth", psnr), (0.0, 100.0), "peak signal-to-noise ratio to the true edit, dB"),
    "truth.ssim": (against("truth", ssim), (-1.0, 1.0), "structural similarity to the true edit"),
    "source.ssim": (against("reference", likeness), (0.0, 1.0),
                    "structural similarity to the source: pose and place are kept, too"),
}  # fmt: skip


def specs() -> Mapping[str, ObjectiveSpec]:
    """What each objective declares."""
    out = {}
    for name, (_, span, about) in _ALL.items():
        needs = frozenset({"reference" if name.startswith("source.") else "truth"})
        out[name] = ObjectiveSpec(name, True, True, span, needs, about=about)
    return out


def make(name: str) -> Objective:
    """The objective of that name."""
    return Objective(specs()[name], _ALL[name][0])
