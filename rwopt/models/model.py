"""A text-to-image model as search needs it: text to embeddings, pictures to latents and back, noise levels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwopt.models.formats import in_range
from rwopt.models.memory import LARGE, call_bytes, checkpointed_blocks, configured, feature_map
from rwopt.models.text import Text, Texts, pipe_of_parts
from rwopt.schedule.noise import Array, sigma_of


@dataclass
class Model:
    """Frozen parts of a diffusion pipeline. Latents are scaled (unit variance, about), pictures lie in [0, 1].

    pipe: the pipeline that the parts are of, for its text side (SDXL has a second encoder); None: Stable Diffusion's of
    these parts. clip_skip: layers at the end of the text encoders that are left out, as diffusers counts them.
    negative: the negative prompt of all guidance that names none; "": none is given. size: height and width of pictures
    in pixels; None: those that the U-Net was made for.
    """

    name: str
    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    device: torch.device
    calls: int = 0  # U-Net calls (batched network function evaluations) so far
    checkpointing: str = "auto"  # the U-Net's own, in the backward pass of a sampler: `rwopt.sampling.backprop`
    pipe: Any = field(default=None, repr=False)
    clip_skip: int = 0
    negative: str = ""
    size: tuple[int, int] | None = None
    _texts: Texts | None = field(default=None, repr=False)
    _table: tuple[Any, Array] | None = field(default=None, repr=False)

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
        return float(self.table[t])

    @property
    def table(self) -> Array:
        """VE noise levels [T] of all training timesteps, ascending."""
        abar = self.scheduler.alphas_cumprod
        if self._table is None or self._table[0] is not abar:
            self._table = abar, sigma_of(np.asarray(abar, dtype=np.float64))
        return self._table[1]

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last training timestep holds no signal at all (zero terminal SNR)."""
        return float(self.scheduler.alphas_cumprod[-1]) <= 2**-24  # what diffusers' samplers put in the place of 0

    @property
    def factor(self) -> int:
        """By how much a picture is larger than its latents."""
        return vae_factor(self.vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels = self.unet.config.out_channels
        if self.size is None:
            return (channels, *latent_size(self.unet, self.vae))
        height, width = self.size
        return channels, height // self.factor, width // self.factor

    @property
    def extra_channels(self) -> int:
        """Of the U-Net's input, beside the latents: `rwopt.models.channels`."""
        return int(self.unet.config.in_channels - self.unet.config.out_channels)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of what it makes, in pixels."""
        _, height, width = self.latent_shape
        return height * self.factor, width * self.factor

    @property
    def family(self) -> str:
        """ "sdxl" for U-Nets that take sizes and pooled text beside the embeddings, else "sd"."""
        config = getattr(self.unet, "config", None) or {}
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd"

    @property
    def guidance_width(self) -> int | None:
        """Of the embedding by which a U-Net is told the guidance scale (LCM's: `time_cond_proj_dim`); None: it is not.

        Such a U-Net was distilled from guided calls: it takes no negative rows.
        """
        config = getattr(self.unet, "config", None) or {}
        width: int | None = config.get("time_cond_proj_dim")
        return width

    @property
    def texts(self) -> Texts:
        """Its text side, with what it has encoded so far."""
        if self._texts is None:
            pipe = self.pipe
            if pipe is None:
                pipe = pipe_of_parts(self.vae, self.text_encoder, self.tokenizer, self.unet, self.scheduler)
            self._texts = Texts(pipe, self.device, self.clip_skip)
        return self._texts

    def lost_words(self, prompt: str) -> str:
        """The end of a prompt that lies beyond the text encoders' windows and does nothing; "" if all of it counts."""
        return self.texts.lost_words(prompt)

    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings [N, L, D] as the stock pipeline makes them; repeated prompts are computed once."""
        return self.texts.positive(prompts).tokens

    def added(self, text: Text) -> dict[str, Tensor]:
        """What SDXL's U-Net takes beside the embeddings of N prompts, as the stock pipeline gives it; {} for others.

        text_embeds: [N, P]; time_ids: [N, 6], of original size, corner of the crop and target size (height, width each;
        Podell et al., 2023, arXiv 2307.01952, section 2.2): both sizes are `picture_size`, and nothing is cropped.
        """
        if text.pooled is None:
            return {}
        ids = torch.tensor([*self.picture_size, 0.0, 0.0, *self.picture_size], device=text.pooled.device)
        return {"text_embeds": text.pooled, "time_ids": ids.repeat(len(text.pooled), 1)}

    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents [N, C, h, w] of `images` [N, 3, H, W] in [0, 1] (the posterior's mean, no sampling)."""
        mean = self.encoded(images)
        centre, scale = self._scaling(mean)
        latents: Tensor = (mean - centre) * scale
        return latents

    @torch.no_grad()
    def encoded(self, images: Tensor) -> Tensor:
        """What the VAE itself gives, unscaled [N, C, h, w]: the mean of its posterior."""
        found = self.vae.encode((images * 2 - 1).to(self.device, self.vae.dtype))
        # the small autoencoder (TAESD) has latents in the place of a distribution
        mean: Tensor = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return mean.float()

    def _scaling(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Centre and scale between what the VAE gives, z, and scaled latents: (z - centre) scale."""
        config = self.vae.config
        mean, std = (config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return float(config.get("shift_factor") or 0.0), float(config.scaling_factor)
        centre, spread = latents.new_tensor([mean, std]).view(2, 1, -1, 1, 1)
        return centre, float(config.scaling_factor) / spread

    def decode(self, latents: Tensor, batch: int = 64) -> Tensor:
        """Pictures [N, 3, H, W] in [0, 1], float32; differentiable where gradients are enabled (up to the clamp).

        `batch` at a time. A gradient through a large decoder (a picture's `feature_map` has 4 MiB or more, in half
        precision as from 128 x 128 in Stable Diffusion's) keeps nothing but the pictures: each is decoded alone, again
        in the backward pass, and its blocks once more, so that memory does not grow with N. The embedded model's
        decoder is not large.
        """
        if torch.is_grad_enabled() and latents.requires_grad and self._decoder_is_large(latents):
            parts = [checkpoint(self._picture, z, use_reentrant=False) for z in torch.split(latents, 1)]
        else:
            parts = [self._pictures(z) for z in torch.split(latents, batch)]
        return torch.cat(parts)

    def _decoder_is_large(self, latents: Tensor) -> bool:
        height, width = latents.shape[2:]
        return feature_map(self.vae.config, height, width, self.vae.dtype.itemsize) >= LARGE

    def _picture(self, latents: Tensor) -> Tensor:
        with checkpointed_blocks(self.vae):
            return self._pictures(latents)

    def _pictures(self, latents: Tensor) -> Tensor:
        def network(latents: Tensor) -> Tensor:
            centre, scale = self._scaling(latents)
            z = latents / scale + centre
            pictures: Tensor = self.vae.decode(z.to(self.vae.dtype)).sample.float()
            return pictures

        return (in_range(network, self.vae.dtype, latents) / 2 + 0.5).clamp(0, 1)

    def row_bytes(self, sites: tuple[str, ...], mode: str, x: torch.Size, text: torch.Size) -> float:
        """Bytes that each row of a U-Net call with weights at `sites`, and of its backward pass, takes.

        x: shape [C, h, w] of a row's latents; text: [L, D].
        """
        given = (2, x[0] + self.extra_channels, *x[1:])
        return call_bytes(self.unet, sites, mode, given, (2, *text)) / 2

    def card(self) -> dict[str, Any]:
        """What a schedule file says about the model: name, class and a digest of the U-Net's configuration."""
        return {
            "base_model": self.name,
            "unet_class": type(self.unet).__name__,
            "config_sha256": hashlib.sha256(configured(self.unet).encode()).hexdigest(),
        }


def vae_factor(vae: Any) -> int:
    """By how much a VAE's pictures are larger than their latents."""
    channels: Sequence[int] = vae.config.get("block_out_channels") or vae.config["decoder_block_out_channels"]
    return int(2 ** (len(channels) - 1))


def latent_size(unet: Any, vae: Any) -> tuple[int, int]:
    """Height and width of the latents that a U-Net was made for; one that names none has that of its VAE's pictures."""
    size = unet.config.sample_size
    if size is None:
        size = vae.config.sample_size // vae_factor(vae)
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
