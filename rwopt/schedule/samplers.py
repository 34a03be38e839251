"""The samplers that a search runs and a schedule may name, each with the stock diffusers scheduler that it equals.

Names are those of k-diffusion and ComfyUI. A stock scheduler is made as `SAMPLERS[name].options` say; how a pipeline is
given a grid of one's own differs from one to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sampler:
    """scheduler: class of diffusers; options: of its configuration, beside the model's own noise.

    takes_grid: whether a pipeline can be given one, as whole `timesteps`. whole: whether it tells the U-Net whole
    timesteps. scaled: whether a picture starts from noise times sigma / sqrt(sigma^2 + 1) instead of noise.
    noisy: whether it adds fresh noise on the way. call: further arguments of a pipeline's call.
    """

    scheduler: str
    options: Mapping[str, Any] = field(default_factory=dict)
    takes_grid: bool = True
    whole: bool = True
    scaled: bool = False
    noisy: bool = False
    call: Mapping[str, Any] = field(default_factory=dict)


TCD_GAMMA = 0.3
"""TCD's share of fresh noise, called eta in diffusers: its scheduler's default, where pipelines say 0 unless told."""


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}, takes_grid=False),
    "euler": Sampler("EulerDiscreteScheduler", whole=False, scaled=True),
    "dpmpp_2m": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "uni_pc": Sampler("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}, takes_grid=False),
    "euler_ancestral": Sampler(
        "EulerAncestralDiscreteScheduler", takes_grid=False, whole=False, scaled=True, noisy=True
    ),
    "lcm": Sampler("LCMScheduler", noisy=True),
    "tcd": Sampler("TCDScheduler", noisy=True, call={"eta": TCD_GAMMA}),
}
"""A grid of one's own for `ddim` goes to `DPMSolverMultistepScheduler(solver_order=1)`, which is the same solver."""
