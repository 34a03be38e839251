"""Nearness to the teacher, the plain model's own picture from the same noise in many calls.

These objectives need no reward network, work on any model, and cannot be bought with artefacts: the truth is known.
`teacher.latent` is a distance of latents, before the decoder; `teacher.psnr` and `teacher.ssim` compare pictures;
`teacher.features.*` compare the last features of judges (`rwopt.objectives.judges`, with the same option).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from rwopt.embedded import DEFAULT
from rwopt.models.judge import NETWORKS
from rwopt.objectives.judges import feature_distance, panel
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec, against, check_options
from rwopt.objectives.pixel import likeness, psnr


def _latent(batch: Batch) -> Tensor:
    assert batch.latents is not None
    assert batch.teacher_latents is not None
    error = (batch.latents - batch.teacher_latents).square().flatten(1).sum(1)
    return error / batch.teacher_latents.square().flatten(1).sum(1).clamp(min=1e-12)


_FEATURES = "teacher.features."
_INF = float("inf")
# name -> (function, higher is better, range, what it is)
_PLAIN: dict[str, tuple[Callable[[Batch], Tensor], bool, tuple[float, float], str]] = {
    "teacher.latent": (_latent, False, (0.0, _INF), "relative squared distance to the teacher's latents"),
    "teacher.psnr": (
        against("teacher", psnr), True, (0.0, 100.0), "peak signal-to-noise ratio to the teacher's picture, dB",
    ),
    "teacher.ssim": (against("teacher", likeness), True, (0.0, 1.0), "structural similarity to the teacher's picture"),
}  # fmt: skip


def specs(judges: str = DEFAULT) -> Mapping[str, ObjectiveSpec]:
    """What each objective declares."""
    out = {}
    for name, (_, higher, span, about) in _PLAIN.items():
        latent = name == "teacher.latent"
        needs = frozenset({"latents", "teacher_latents"} if latent else {"teacher"})
        out[name] = ObjectiveSpec(name, higher, True, span, needs, about=about, pictures=not latent)
    for network in NETWORKS:
        name, about = _FEATURES + network, f"relative distance of the {network}'s last features"
        out[name] = ObjectiveSpec(name, False, True, (0.0, _INF), frozenset({"teacher"}), about=about, judges=judges)
    return out


def make(name: str, **options: Any) -> Objective:
    """The objective of that name. Option of `teacher.features.*`: judges, as `rwopt.objectives.judges.make`."""
    if name in _PLAIN:
        check_options(name, options)
        return Objective(specs()[name], _PLAIN[name][0])
    check_options(name, options, ("judges",))
    spec = specs(**options)[name]
    compare = partial(feature_distance, panel(name.removeprefix(_FEATURES), spec.judges))
    return Objective(spec, against("teacher", compare))
