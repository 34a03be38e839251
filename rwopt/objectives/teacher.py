"""Nearness to the teacher, the plain model's own picture from the same noise in many calls.

These objectives need no reward network, work on any model, and cannot be bought with artefacts: the truth is known.
`teacher.latent` is a distance of latents, before the decoder; `teacher.psnr` and `teacher.ssim` compare pictures;
`teacher.features.*` compare the last features of the embedded model's judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from rwopt.objectives.avatar import NETWORKS, feature_distance
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec, against
from rwopt.objectives.pixel import likeness, psnr


def _latent(batch: Batch) -> Tensor:
    assert batch.latents is not None
    assert batch.teacher_latents is not None
    error = (batch.latents - batch.teacher_latents).square().flatten(1).sum(1)
    return error / batch.teacher_latents.square().flatten(1).sum(1).clamp(min=1e-12)


_ALL = {
    "teacher.latent": (_latent, False, (0.0, float("inf")), "relative squared distance to the teacher's latents"),
    "teacher.psnr": (
        against("teacher", psnr), True, (0.0, 100.0), "peak signal-to-noise ratio to the teacher's picture, dB",
    ),
    "teacher.ssim": (against("teacher", likeness), True, (0.0, 1.0), "structural similarity to the teacher's picture"),
    **{
        f"teacher.features.{network}": (
            against("teacher", partial(feature_distance, network)), False, (0.0, float("inf")),
            f"relative distance of the {network}'s last features",
        )
        for network in NETWORKS
    },
}  # fmt: skip


def specs() -> Mapping[str, ObjectiveSpec]:
    """What each objective declares."""
    out = {}
    for name, (_, higher, span, about) in _ALL.items():
        latent = name == "teacher.latent"
        needs = frozenset({"latents", "teacher_latents"} if latent else {"teacher"})
        out[name] = ObjectiveSpec(name, higher, True, span, needs, about=about, pictures=not latent)
    return out


def make(name: str) -> Objective:
    """The objective of that name."""
    return Objective(specs()[name], _ALL[name][0])
