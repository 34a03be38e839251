"""The small model that every probe is tried on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from rwopt.models import Model


@pytest.fixture
def model(tiny_unet: Any) -> Model:
    scheduler = DDIMScheduler(prediction_type="v_prediction")  # type: ignore[no-untyped-call]
    return Model("tiny", tiny_unet, None, None, None, scheduler, torch.device("cpu"))
