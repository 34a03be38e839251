"""Noise of every scheduler that a schedule may be made for: named, or the table itself; and files of before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import flow_sigma, noise_block, noise_table, sigma_of, timestep_of

FILES = Path(__file__).parent / "files"
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
KINDS: dict[str, Any] = {
    "sd": diffusers.DDIMScheduler(**SD),
    "zero snr": diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True),
    "euler": diffusers.EulerDiscreteScheduler(**SD),
    "sigmoid": diffusers.DDPMScheduler(beta_schedule="sigmoid"),
    "trained": diffusers.DDIMScheduler(trained_betas=(BETAS * 0.8).tolist()),
    "trained, zero snr": diffusers.DDIMScheduler(
        trained_betas=rescale_zero_terminal_snr(BETAS).clamp(max=0.999).tolist()
    ),
    "trained, as named": diffusers.DDIMScheduler(**SD, trained_betas=BETAS.tolist()),
    "short": diffusers.DDIMScheduler(**SD, num_train_timesteps=250),
}
TABLES = ("sigmoid", "trained", "trained, zero snr")


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_names_the_schedulers_own_noise(kind: str, tmp_path: Path) -> None:
    scheduler = KINDS[kind]
    block = noise_block(scheduler)
    assert ("train_sigma" in block) == (kind in TABLES)
    schedule = Schedule.constant(["mid_block.attentions.0"], [4.0, 0.1], 1.1, noise=block)
    schedule.save(tmp_path / "a.json")
    again = Schedule.load(tmp_path / "a.json")
    assert again == schedule
    real = sigma_of(scheduler.alphas_cumprod.numpy())
    np.testing.assert_allclose(noise_table(again.noise), real, rtol=1e-2)
    steps = json.loads((tmp_path / "a.json").read_text())["grid"]["train_timestep"]
    np.testing.assert_allclose(steps, timestep_of([4.0, 0.1], real), atol=1)


@pytest.mark.parametrize(
    "table", [[1.0], [1.0, 0.5], [0.0, 1.0], [-1.0, 1.0], [1.0, float("inf")], [float("nan"), 1.0], [[1.0, 2.0]]]
)
def test_what_is_no_table_is_refused(table: Any) -> None:
    with pytest.raises(UserError, match=r"noise\.train_sigma is no table"):
        noise_table({"train_sigma": table})


def test_flow_matching_counts_in_its_own_way() -> None:
    np.testing.assert_allclose(flow_sigma([500, 750, 0], 1000), [1, 3, 0])
    assert flow_sigma(1000, 1000) == pytest.approx(1e4, rel=1e-3)
    kind = diffusers.UniPCMultistepScheduler
    block = noise_block(kind(use_flow_sigmas=True, prediction_type="flow_prediction"))
    assert block == {"prediction": "flow_prediction", "timestep": "flow", "num_train_timesteps": 1000}
    Schedule.from_dict(Schedule.constant(["mid_block.attentions.0"], [4.0], noise=block).to_dict())


def test_a_file_of_version_1_0_is_read_as_it_was_meant() -> None:
    """Written by rwopt of before; its digest is what that rwopt said."""
    schedule = Schedule.load(FILES / "schedule-1.0.json")
    assert schedule.digest() == "bc6e30f7818fd7fb16eabd2d3ed84492b6e17b3310275b7db2e344ef5e38460b"
    assert schedule.sites == ("down_blocks.0.attentions.0.cross", "mid_block.attentions.0.cross")
    np.testing.assert_array_equal(schedule.at(1.6), [1.05, 1.03])
    assert schedule.extra == {"x-note": "kept"}
