"""FreeU and Skip-Tuning as schedules, so that they can be compared with and given a window of noise levels.

FreeU (Si et al. 2023, arXiv 2309.11497): `constant` is what `pipe.enable_freeu` does, to the last bit; `structure` is
the authors' own code, with a gain that follows the stream's channel mean. The constants that are passed around belong
to `structure`, and are stronger under `constant`. Skip-Tuning (Ma et al. 2024, arXiv 2402.15170): each skip tensor
times a factor, linear from the deepest skip to the shallowest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.unet.sites import find_sites, list_sites, skip_channels

Window = tuple[float, float]
"""VE sigmas (high, low) between which a method acts; (inf, 0) is always."""

ALWAYS: Window = (math.inf, 0.0)


def freeu(
    unet: Any,
    b1: float,
    b2: float,
    s1: float,
    s2: float,
    variant: str = "constant",
    window: Window = ALWAYS,
    noise: Mapping[str, Any] | None = None,
) -> Schedule:
    """FreeU with backbone gains `b1`, `b2` and skip gains `s1`, `s2` in `variant` constant or structure.

    constant: stage 1 and 2 are the first two up blocks. structure: stage 1 is where the stream is as wide as in the
    middle, stage 2 where it is half as wide. Raises UserError for an unknown variant.
    """
    if variant not in ("constant", "structure"):
        raise UserError(f"FreeU variant {variant!r} is unknown: choose from constant, structure")
    joins = skip_channels(unet)
    widest = max(stream for stream, _ in joins.values())
    weights = {}
    for path, (stream, _) in joins.items():
        stage = int(path.split(".")[1]) if variant == "constant" else {widest: 0, widest // 2: 1}.get(stream, 2)
        if stage < 2:
            weights[f"{path}.{'backbone' if variant == 'constant' else 'structure'}"] = (b1, b2)[stage]
            weights[f"{path}.low"] = (s1, s2)[stage]
    note = {"method": "freeu", "variant": variant, "b1": b1, "b2": b2, "s1": s1, "s2": s2}
    return _windowed(unet, weights, window, note, noise)


def skip_tuning(
    unet: Any, deep: float, shallow: float = 1.0, window: Window = ALWAYS, noise: Mapping[str, Any] | None = None
) -> Schedule:
    """Skip-Tuning with factors from `deep` (the first skip of the up path) to `shallow` (the last)."""
    names = [site.id for site in list_sites(unet, ("skip",))]
    weights = dict(zip(names, np.linspace(deep, shallow, len(names)).tolist(), strict=True))
    return _windowed(unet, weights, window, {"method": "skip-tuning", "deep": deep, "shallow": shallow}, noise)


def _windowed(
    unet: Any, weights: Mapping[str, float], window: Window, note: dict[str, Any], noise: Mapping[str, Any] | None
) -> Schedule:
    """Constant weights inside of the window, 1 outside."""
    high, low = window
    if not high > low >= 0:
        raise UserError(f"the window {high:g} .. {low:g} is empty: give VE sigmas, the higher one first")
    find_sites(unet, list(weights))
    inside, plain = list(weights.values()), [1.0] * len(weights)
    # The last knot that sampling has passed holds, so the steps at the window's ends are sharp.
    rows = [(2 * high, plain), (high, inside)] if math.isfinite(high) else [(max(1.0, 2 * low), inside)]
    rows += [(low, plain)] if low > 0 else []
    return Schedule(
        tuple(weights),
        np.array([sigma for sigma, _ in rows]),
        np.array([row for _, row in rows]),
        interp="previous",
        noise=noise or {},
        provenance={**note, "window": [high if math.isfinite(high) else "inf", low]},
    )
