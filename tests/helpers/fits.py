"""A schedule for any twin, what the twin must give under it, and a LoRA that wraps layers that are weighed."""

from __future__ import annotations

from typing import Any

from helpers.oracle import recompute
from helpers.samplers import meant, ramp, sampler
from helpers.twins import Twin, ids_of
from torch import Tensor

from rwopt.schedule import Schedule
from rwopt.schedule.noise import noise_block
from rwopt.unet.sites import SITE_KINDS

NOISE = noise_block(sampler("ddim"))


def bare(unet: Any, seed: int = 0, kinds: tuple[str, ...] = SITE_KINDS) -> Any:
    return ramp(ids_of(unet, kinds), seed, noise=NOISE)


def expected(twin: Twin, schedule: Schedule, t: int = 500) -> Tensor:
    """What the U-Net, as it is now, gives under a schedule: the oracle calls its layers, whatever they have become."""
    weights = dict(zip(schedule.sites, schedule.at(meant(sampler("ddim"), t)).tolist(), strict=True))
    return recompute(twin.unet, twin.x, t, weights, **twin.args())


LORA: dict[str, Any] = {
    "r": 2,
    "target_modules": ["to_q", "to_v", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "ff.net.2"],
    "init_lora_weights": False,
}
