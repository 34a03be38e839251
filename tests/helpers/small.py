"""The tiny U-Net of most tests, and calls of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from rwopt.schedule.weights import WeightFunction
from rwopt.unet.sites import Site, group_sites


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


def inputs(rows: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 8, 8, generator=generator, dtype=torch.float64)
    text = torch.randn(rows, 5, 12, generator=generator, dtype=torch.float64)
    return x.to(dtype), 500, text.to(dtype)


def hooks_of(unet: nn.Module) -> list[Any]:
    return [
        hook
        for module in unet.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
        for hook in table.values()
    ]


def weight_function(
    sites: Sequence[Site], knots: Sequence[float], by: str = "stage_kind", **options: Any
) -> WeightFunction:
    return WeightFunction([s.id for s in sites], knots, group_sites(sites, by), **options)  # type: ignore[arg-type]
