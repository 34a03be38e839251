"""The architectures that people use, at their true sizes and without weights (on the meta device)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from rwopt.models import Model

UNETS: dict[str, dict[str, Any]] = {
    "SD1.5": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "SDXL": {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
}
"""Of both; XL's says `force_upcast`, too."""


def true_model(name: str, vae: torch.dtype = torch.float16, checkpointing: str = "on") -> Model:
    """Parameters alone, with a float16 U-Net."""
    with torch.device("meta"):
        unet = torch.nn.Module.to(UNet2DConditionModel(**UNETS[name]), torch.float16)
        decoder = torch.nn.Module.to(AutoencoderKL(**VAE), vae)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")  # type: ignore[no-untyped-call]
    return Model(
        name, unet, decoder, None, None, scheduler, torch.device("meta"), checkpointing=checkpointing
    )
