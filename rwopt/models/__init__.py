"""A text-to-image model as search needs it: text to embeddings, pictures to latents and back, noise levels.

`load_model("avatars")` gives the embedded model (64 x 64 avatars, see `training/`); any other name is a folder or hub
id in the diffusers layout with a `UNet2DConditionModel` and one text encoder (Stable Diffusion 1.x, 2.x and kin).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwopt.errors import UserError

EMBEDDED = Path(__file__).parent / "avatars"


@dataclass
class Model:
    """Frozen parts of a diffusion pipeline. Latents are scaled (unit variance, about), pictures lie in [0, 1]."""

    name: str
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    device: torch.device
    calls: int = 0  # U-Net calls (batched network function evaluations) so far
    _embeddings: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """The U-Net's own number format; latents between calls are float32 whatever it is."""
        return next(iter(self.unet.parameters())).dtype  # type: ignore[no-any-return]

    @property
    def alphas_cumprod(self) -> Tensor:
        """abar_t for t = 0 .. T-1, float32 [T]."""
        table: Tensor = self.scheduler.alphas_cumprod
        return table.to(self.device, torch.float32)

    def sigma(self, t: int) -> float:
        """VE-equivalent noise level sqrt((1 - abar_t) / abar_t) of training timestep `t`."""
        alpha = max(float(self.scheduler.alphas_cumprod[t]), 2**-24)  # zero terminal SNR: as diffusers floors it
        return float(((1 - alpha) / alpha) ** 0.5)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, size, size)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings [N, L, D], as the stock pipeline makes them; repeated prompts are computed once."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._embeddings]
        for i in range(0, len(new), 64):
            part = new[i : i + 64]
            ids = self.tokenizer(
                part,
                padding="max_length",
                truncation=True,
                max_length=self.tokenizer.model_max_length,
                return_tensors="pt",
            ).input_ids.to(self.device)
            self._embeddings.update(zip(part, self.text_encoder(ids).last_hidden_state.float(), strict=True))
        return torch.stack([self._embeddings[p] for p in prompts])

    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents [N, C, h, w] of `images` [N, 3, H, W] in [0, 1] (the posterior's mean, no sampling)."""
        with torch.no_grad():
            posterior = self.vae.encode((images * 2 - 1).to(self.device, self.vae.dtype)).latent_dist
            mean: Tensor = posterior.mode().float()
            return mean * float(self.vae.config.scaling_factor)

    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """Pictures [N, 3, H, W] in [0, 1], float32; differentiable where gradients are enabled (up to the clamp)."""
        parts = []
        for i in range(0, len(latents), batch):
            z = latents[i : i + batch].to(self.vae.dtype) / self.vae.config.scaling_factor
            parts.append((self.vae.decode(z).sample.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(parts)

    def card(self) -> dict[str, Any]:
        """What a schedule file says about the model: name, class and a digest of the U-Net's configuration."""
        config = {k: v for k, v in self.unet.config.items() if not k.startswith("_")}
        text = json.dumps(config, sort_keys=True, default=str)
        return {
            "base_model": self.name,
            "unet_class": type(self.unet).__name__,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }


def load_model(name: str = "avatars", device: str = "auto", dtype: str = "auto") -> Model:
    """Load a frozen model. `dtype` is the U-Net's: "float32", "bfloat16", "auto" (bfloat16 where the processor has it).

    Raises `UserError` if `name` is neither "avatars" nor a folder or hub id that diffusers can open, and for a device
    or number format that does not exist.
    """
    place = str(EMBEDDED) if name == "avatars" else name
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"model.device={device} is not to be had on this machine: use cpu or auto") from None
    if dtype == "auto":
        dtype = "bfloat16" if _has_bf16(device) else "float32"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"model.dtype={dtype} is not a number format: use float32, bfloat16, float16 or auto")
    try:
        pipe = _open(place)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"model.name={name} cannot be opened ({first}): give a diffusers folder or 'avatars'") from None
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise UserError(f"model.name={name} has scheduler {type(pipe.scheduler).__name__} without alphas_cumprod")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval().float().to(device)
    if name == "avatars" and device == "cpu":
        # few heads and 64 tokens: the plain processor beats flash attention here, two- to threefold in backward
        from diffusers.models.attention_processor import AttnProcessor

        pipe.unet.set_attn_processor(AttnProcessor())
    nn.Module.to(pipe.unet, getattr(torch, dtype))  # diffusers' own `to` warns of modules to keep in float32: none here
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return Model(
        name, pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, torch.device(device)
    )


def _open(place: str) -> Any:
    """The pipeline of a folder or hub id, without progress bars and talk of optional packages."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.disable_progress_bar()
        return StableDiffusionPipeline.from_pretrained(place, safety_checker=None, requires_safety_checker=False)
    finally:
        transformers_logging.set_verbosity(level)


def _has_bf16(device: str) -> bool:
    if device.startswith("cuda"):
        return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported())
    if device != "cpu":
        return False
    present: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return present and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
