"""The samplers that people use, the noise level that each is at, and a plain loop around a U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from helpers.twins import Twin
from torch import Tensor

from rwopt.schedule import Schedule

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++ sde": ("DPMSolverSDEScheduler", {"noise_sampler_seed": 0}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
"""Every one that issue and README promise; the variants below are further settings of them."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    "v, zero snr": (
        "DDIMScheduler",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "edm": ("EDMEulerScheduler", {}),
    "edm dpm++": ("EDMDPMSolverMultistepScheduler", {}),
    "svd euler": (
        "EulerDiscreteScheduler",
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ),
}

LEARNED: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm, learned variance": ("DDPMScheduler", {"variance_type": "learned_range"}),
}
"""For U-Nets with twice the channels: DeepFloyd IF, Kandinsky."""


def sampler(name: str, **changes: Any) -> Any:
    kind, options = (SAMPLERS | VARIANTS | LEARNED)[name]
    noise = {} if kind.startswith("EDM") else SD
    return getattr(diffusers, kind)(**noise | options | changes)


def level(scheduler: Any, t: Any) -> float:
    """VE sigma of the call that the sampler is about to make, asked of the sampler itself."""
    edm = type(scheduler).__name__.startswith("EDM") or scheduler.config.get("timestep_type") == "continuous"
    scale = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t).item()
    if not edm and scale < 1 - 1e-9:  # the sampler divides by sqrt(sigma^2 + 1)
        return (1 / scale**2 - 1) ** 0.5
    if hasattr(scheduler, "sigmas"):
        index = scheduler.step_index
        if index is None:  # before its first step
            index = scheduler.begin_index
        if index is None:
            index = scheduler.index_for_timestep(t)
        return float(scheduler.sigmas[index])
    return told(scheduler, t)


def told(scheduler: Any, t: Any) -> float:
    """VE sigma of an integer timestep, from the sampler's own noise table."""
    abar = max(scheduler.alphas_cumprod[int(t)].double().item(), 2**-24)
    return ((1 - abar) / abar) ** 0.5


def meant(scheduler: Any, t: Any) -> float:
    """VE sigma of what the U-Net is told: `level`, but for samplers that round their timestep to an integer."""
    rounds = type(scheduler).__name__ in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    return told(scheduler, t) if rounds else level(scheduler, t)


def sampled(pipe: Any, twin: Twin, steps: int = 3, split: bool = False) -> tuple[Tensor, list[float]]:
    """A plain loop, in one batch or `split` by row; also the sampler's noise level at each call."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps)
    draw = torch.Generator().manual_seed(0)
    x, levels = twin.x * scheduler.init_noise_sigma, []
    takes = "generator" in scheduler.step.__code__.co_varnames
    for t in scheduler.timesteps:
        levels.append(level(scheduler, t))
        scaled = scheduler.scale_model_input(x, t)
        parts = [slice(i, i + 1) for i in range(len(x))] if split else [slice(None)]
        out = torch.cat([pipe.unet(scaled[part], t, **twin.args(part)).sample for part in parts])
        x = scheduler.step(out, t, x, **({"generator": draw} if takes else {})).prev_sample
    return x, levels


def close(actual: Tensor, expected: Tensor) -> None:
    """Samplers compute in single precision, so it is their rounding that shows."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


class Spy(Schedule):
    """Keeps the sigmas at which it is looked up."""

    @property
    def seen(self) -> list[float]:
        return self.provenance["seen"]

    def at(self, sigma: Any) -> Any:
        self.seen.append(float(sigma))
        return super().at(sigma)


def ramp(ids: Sequence[str], seed: int = 0, **fields: Any) -> Any:
    """Weights that differ by site and noise level, on a spy."""
    weights = np.random.default_rng(seed).uniform(0.6, 1.4, (4, len(ids)))
    return Spy(tuple(ids), np.array([12.0, 3.0, 0.5, 0.05]), weights, provenance={"seen": []}, **fields)
