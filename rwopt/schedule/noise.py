"""Noise levels: what a training timestep means, so that every tool finds the same row of a schedule.

A diffusion model is trained on `x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) e`. The axis of a schedule is the noise
level of the same picture in the variance-exploding form, `x_0 + sigma e` (Karras et al. 2022, arXiv 2206.00364):

    sigma_t = sqrt((1 - abar_t) / abar_t) ,    abar_t = prod_(s <= t) (1 - beta_s) .

A `noise` block (a mapping, part of a schedule file) names the betas; from it, or from a live diffusers scheduler,
comes the table of sigmas [T]. Fractional timesteps are interpolated in ln sigma.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rwopt.errors import UserError

Array = NDArray[np.float64]

_SAME = 1e-2  # relative: betas in single precision end up to half a per cent beside those in double
_SMALLEST_ABAR = 2.0**-24  # what diffusers' samplers use for a terminal SNR of zero (sigma 4096)


def noise_table(noise: Mapping[str, Any]) -> Array:
    """VE sigma [T] of the training timesteps 0 to T-1 of a `noise` block (num_train_timesteps is T).

    beta_schedule: linear, scaled_linear or squaredcos_cap_v2; beta_start, beta_end; zero_snr; or train_sigma, the
    table itself. The defaults are those of Stable Diffusion 1, 2 and XL. Source: diffusers' schedulers (betas, and
    `rescale_zero_terminal_snr` after Lin et al. 2023). Raises UserError for an unknown beta schedule.
    """
    if "train_sigma" in noise:
        table = np.asarray(noise["train_sigma"], dtype=np.float64)
        sound = table.ndim == 1 and len(table) > 1 and np.isfinite(table).all()
        if not sound or table[0] <= 0 or (np.diff(table) < 0).any():
            raise UserError("noise.train_sigma is no table of noise levels: give ascending numbers above 0")
        return table
    kind = noise.get("beta_schedule", "scaled_linear")
    steps = int(noise.get("num_train_timesteps", 1000))
    start, end = float(noise.get("beta_start", 0.00085)), float(noise.get("beta_end", 0.012))
    if kind == "linear":
        betas = np.linspace(start, end, steps)
    elif kind == "scaled_linear":
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    elif kind == "squaredcos_cap_v2":
        level = np.cos((np.linspace(0, 1, steps + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
    else:
        raise UserError(f"noise.beta_schedule is {kind!r}: choose linear, scaled_linear or squaredcos_cap_v2")
    root = np.sqrt(np.cumprod(1 - betas))
    if noise.get("zero_snr"):
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return sigma_of(root**2)


def edm_noise(noise: Mapping[str, Any]) -> bool:
    """Whether the U-Net is told `0.25 ln sigma` (Karras et al. 2022, arXiv 2206.00364) and not a training timestep."""
    return bool(noise.get("timestep") == "edm")


def edm_scheduler(scheduler: Any) -> bool:
    """The same of a diffusers scheduler: its EDM ones, and Euler as Stable Video Diffusion sets it."""
    config = getattr(scheduler, "config", {})
    continuous = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return continuous or type(scheduler).__name__.startswith("EDM")


def flow_scheduler(scheduler: Any) -> bool:
    """Whether a diffusers scheduler is one of flow matching: `x_s = (1 - s) x_0 + s e`, and the U-Net is told `s T`."""
    config = getattr(scheduler, "config", {})
    return bool(config.get("use_flow_sigmas")) or type(scheduler).__name__.startswith("FlowMatch")


def flow_sigma(timestep: ArrayLike, steps: int) -> Array:
    """VE sigmas `s / (1 - s)` of flow matching's timesteps `s T`, T being `steps`; pure noise (s = 1) counts as 1e4."""
    s = np.clip(np.asarray(timestep, dtype=np.float64) / steps, 0, 1 - 1e-4)
    return np.asarray(s / (1 - s))


def edm_sigma(timestep: ArrayLike) -> Array:
    """VE sigmas of EDM timesteps `0.25 ln sigma`."""
    return np.exp(4 * np.asarray(timestep, dtype=np.float64))


def sigma_of(abar: ArrayLike) -> Array:
    """VE sigma of the cumulative signal share `abar` in (0, 1]; an abar of 0 gives 4096, as in diffusers."""
    share = np.maximum(np.asarray(abar, dtype=np.float64), _SMALLEST_ABAR)
    return np.sqrt((1 - share) / share)


def timestep_of(sigma: ArrayLike, table: Array) -> Array:
    """Fractional training timesteps of VE sigmas: `table` [T] inverted in ln sigma, clamped to 0 and T-1."""
    return np.interp(np.log(np.asarray(sigma, dtype=np.float64)), np.log(table), np.arange(len(table)))


def sigma_at(timestep: ArrayLike, table: Array) -> Array:
    """VE sigmas of timesteps, which may be fractional: ln `table` [T] interpolated, clamped to 0 and T-1."""
    return np.exp(np.interp(np.asarray(timestep, dtype=np.float64), np.arange(len(table)), np.log(table)))


def noise_block(scheduler: Any) -> dict[str, Any]:
    """The `noise` entry of a schedule for a diffusers scheduler: named, where the named noise is the scheduler's own.

    Trained betas, and beta schedules that have no name here, go in as the table that they amount to (`train_sigma`).
    """
    config = scheduler.config
    about = {"prediction": config.get("prediction_type", "epsilon")}
    if edm_scheduler(scheduler):
        return {**about, "timestep": "edm"}
    if flow_scheduler(scheduler):
        return {**about, "timestep": "flow", "num_train_timesteps": config["num_train_timesteps"]}
    named = {
        "beta_schedule": config["beta_schedule"],
        "beta_start": config["beta_start"],
        "beta_end": config["beta_end"],
        "num_train_timesteps": config["num_train_timesteps"],
        "zero_snr": bool(config.get("rescale_betas_zero_snr", False)),
    }
    real = sigma_of(np.asarray(scheduler.alphas_cumprod, dtype=np.float64))
    try:
        table = noise_table(named)
    except UserError:
        table = np.zeros(0)
    if table.shape == real.shape and np.allclose(table, real, rtol=_SAME):
        return {**about, **named}
    return {**about, "train_sigma": [float(f"{sigma:.6g}") for sigma in real]}
