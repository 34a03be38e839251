"""The architectures that people use, at their true sizes and without weights (on the meta device)."""

from __future__ import annotations

from typing import Any

import torch
from architectures import SD15, VAE, XL
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from rwopt.models import Model

UNETS: dict[str, dict[str, Any]] = {
    "SD1.5": {**SD15, "sample_size": 64},
    "SDXL": {
        **XL,
        "sample_size": 128,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


def true_model(name: str, vae: torch.dtype = torch.float16, checkpointing: str = "on") -> Model:
    """Parameters alone, with a float16 U-Net."""
    with torch.device("meta"):
        unet = torch.nn.Module.to(UNet2DConditionModel(**UNETS[name]), torch.float16)
        decoder = torch.nn.Module.to(AutoencoderKL(**VAE), vae)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")  # type: ignore[no-untyped-call]
    return Model(
        name, unet, decoder, None, None, scheduler, torch.device("meta"), checkpointing=checkpointing
    )
