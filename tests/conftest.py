"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from diffusers import UNet2DConditionModel

from rwopt.models import Model, load_model


def make_tiny_unet(seed: int = 0, **changes: object) -> UNet2DConditionModel:
    """A seeded fp32 U-Net in eval mode with 7 transformer sites (2 down, 1 mid, 4 up) and small channels."""
    config: dict[str, object] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 2, 1),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        **changes,
    }
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**config).eval()
    return unet.requires_grad_(False)


@pytest.fixture
def tiny_unet() -> UNet2DConditionModel:
    """A fresh one for each test (10 ms): tests hang hooks on it."""
    return make_tiny_unet()


@pytest.fixture(scope="session")
def loaded_avatars() -> Model:
    return load_model("avatars", device="cpu", dtype="float32")


@pytest.fixture
def avatars(loaded_avatars: Model) -> Iterator[Model]:
    """The embedded model in float32, loaded once. A test that leaves hooks on it fails, not one that comes later."""
    yield loaded_avatars
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded_avatars.unet.modules())
