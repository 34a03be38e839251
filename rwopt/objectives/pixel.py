"""Pixel fidelity to the true edited picture: PSNR, and SSIM from torchmetrics' functional form."""

from __future__ import annotations

from torch import Tensor

from rwopt.objectives import Batch, Objective, ObjectiveSpec


def _psnr(batch: Batch) -> Tensor:
    assert batch.truth is not None
    error = (batch.images - batch.truth).square().mean((1, 2, 3))
    return -10 * error.clamp(min=1e-10).log10()  # equal pictures: 100, where infinity would survive no mean or gradient


def _ssim(batch: Batch) -> Tensor:
    from torchmetrics.functional.image import structural_similarity_index_measure

    assert batch.truth is not None
    value = structural_similarity_index_measure(batch.images, batch.truth, data_range=1.0, reduction="none")
    assert isinstance(value, Tensor)
    return value.reshape(len(batch.images))


_ALL = {
    "truth.psnr": (_psnr, (0.0, 100.0), "peak signal-to-noise ratio to the true edit, dB"),
    "truth.ssim": (_ssim, (-1.0, 1.0), "structural similarity to the true edit"),
}


def names() -> list[str]:
    return list(_ALL)


def make(name: str) -> Objective:
    function, span, about = _ALL[name]
    return Objective(ObjectiveSpec(name, True, True, span, frozenset({"truth"}), about=about), function)
