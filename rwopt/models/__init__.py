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
from torch.utils.checkpoint import checkpoint

from rwopt.errors import UserError, one_of
from rwopt.models.formats import FORMATS, auto_vae_format, has_bf16, in_range
from rwopt.models.memory import LARGE, call_bytes, checkpointed_blocks, feature_map

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
    checkpointing: str = "auto"  # the U-Net's own, in the backward pass of a sampler: `rwopt.sampling.backprop`
    _embeddings: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _row_bytes: dict[tuple[Any, ...], float] = field(default_factory=dict, repr=False)

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
    def factor(self) -> int:
        """By how much a picture is larger than its latents."""
        return _factor(self.vae)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (self.unet.config.in_channels, *latent_size(self.unet, self.vae))

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of what it makes, in pixels."""
        _, height, width = self.latent_shape
        return height * self.factor, width * self.factor

    def lost_words(self, prompt: str) -> str:
        """The end of a prompt that lies beyond the text encoder's window and does nothing; "" if all of it counts."""
        window = self.tokenizer.model_max_length
        ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
        lost: str = self.tokenizer.decode(ids[window - 1 : -1]).strip() if len(ids) > window else ""
        return lost

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Text embeddings [N, L, D], as the stock pipeline makes them; repeated prompts are computed once.

        On a GPU the text encoder is there for new prompts only, and lies in the computer's own memory otherwise.
        """
        new = [p for p in dict.fromkeys(prompts) if p not in self._embeddings]
        away = self.device.type == "cuda"
        if new and away:
            self.text_encoder.to(self.device)
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
        if new and away:
            self.text_encoder.to("cpu")
        return torch.stack([self._embeddings[p] for p in prompts])

    def latents(self, images: Tensor) -> Tensor:
        """Scaled latents [N, C, h, w] of `images` [N, 3, H, W] in [0, 1] (the posterior's mean, no sampling)."""
        with torch.no_grad():
            posterior = self.vae.encode((images * 2 - 1).to(self.device, self.vae.dtype)).latent_dist
            mean: Tensor = posterior.mode().float()
            return mean * float(self.vae.config.scaling_factor)

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
            z = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
            pictures: Tensor = self.vae.decode(z).sample.float()
            return pictures

        return (in_range(network, self.vae.dtype, latents) / 2 + 0.5).clamp(0, 1)

    def row_bytes(self, sites: tuple[str, ...], mode: str, x: torch.Size, text: torch.Size) -> float:
        """Bytes that each row of a U-Net call with weights at `sites`, and of its backward pass, takes; found once.

        x: shape [C, h, w] of a row's input; text: [L, D].
        """
        key = (sites, mode, x, text)
        if key not in self._row_bytes:
            self._row_bytes[key] = call_bytes(self.unet, sites, mode, (2, *x), (2, *text)) / 2
        return self._row_bytes[key]

    def card(self) -> dict[str, Any]:
        """What a schedule file says about the model: name, class and a digest of the U-Net's configuration."""
        config = {k: v for k, v in self.unet.config.items() if not k.startswith("_")}
        text = json.dumps(config, sort_keys=True, default=str)
        return {
            "base_model": self.name,
            "unet_class": type(self.unet).__name__,
            "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }


def load_model(
    name: str = "avatars",
    device: str = "auto",
    dtype: str = "auto",
    vae_dtype: str = "auto",
    checkpointing: str = "auto",
) -> Model:
    """Load a frozen model. `dtype` is the U-Net's: "float32", "bfloat16", "auto" (bfloat16 where the processor has it).

    vae_dtype: the same for the VAE, or "auto": float32 on a CPU, beside a float32 U-Net and for a small decoder (it
    needs little memory); else the U-Net's, unless the VAE's configuration says `force_upcast` (SDXL's overflows in
    float16): bfloat16 there, or float32 on a GPU that has none.
    checkpointing: "on", "off" or "auto", see `rwopt.sampling.backprop.unroll`.
    Raises `UserError` if `name` is neither "avatars" nor a folder or hub id that diffusers can open, and for a device,
    number format or switch that does not exist.
    """
    place = str(EMBEDDED) if name == "avatars" else name
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"model.device={device} is not to be had on this machine: use cpu or auto") from None
    for key, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
        if value not in ("auto", *FORMATS):
            raise UserError(f"model.{key}={value} is not a number format: use {', '.join(FORMATS)} or auto")
    one_of(("auto", "on", "off"), "model.checkpointing", checkpointing)
    try:
        _check_kind(name, place)
        pipe = _open(place)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"model.name={name} cannot be opened ({first}): give a diffusers folder or 'avatars'") from None
    if not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise UserError(f"model.name={name} has scheduler {type(pipe.scheduler).__name__} without alphas_cumprod")
    channels, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != latents:
        raise UserError(
            f"model.name={name} has a U-Net of {channels} channels for latents of {latents}: inpainting and other "
            "models with further inputs are not searched, rwopt.apply takes them"
        )
    bf16 = has_bf16(device)
    unet_format = getattr(torch, dtype if dtype != "auto" else "bfloat16" if bf16 else "float32")
    side = max(latent_size(pipe.unet, pipe.vae))
    if vae_dtype != "auto":
        vae_format = getattr(torch, vae_dtype)
    elif device.startswith("cuda"):
        vae_format = auto_vae_format(pipe.vae.config, side, unet_format, bf16)
    else:
        vae_format = torch.float32
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval().float()
    for part, number in ((pipe.unet, unet_format), (pipe.vae, vae_format)):
        nn.Module.to(part, number)  # diffusers' own `to` warns of modules to keep in float32: none here
        part.to(device, memory_format=torch.channels_last)
    if not device.startswith("cuda"):  # there it waits in the computer's own memory: `Model.encode`
        pipe.text_encoder.to(device)
    if name == "avatars" and device == "cpu":
        # few heads and 64 tokens: the plain processor beats flash attention here, two- to threefold in backward
        from diffusers.models.attention_processor import AttnProcessor

        pipe.unet.set_attn_processor(AttnProcessor())
    return Model(
        name, pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, torch.device(device),
        checkpointing=checkpointing,
    )  # fmt: skip


def _factor(vae: Any) -> int:
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def latent_size(unet: Any, vae: Any) -> tuple[int, int]:
    """Height and width of the latents that a U-Net was made for; one that names none has that of its VAE's pictures."""
    size = unet.config.sample_size
    if size is None:
        size = vae.config.sample_size // _factor(vae)
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


_KINDS = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "DiffusionPipeline", None)


def _check_kind(name: str, place: str) -> None:
    """Raise `UserError` unless a folder or hub id holds a pipeline with one text encoder; reads no weights."""
    from diffusers import DiffusionPipeline

    kind = DiffusionPipeline.load_config(place).get("_class_name")
    if kind not in _KINDS:
        raise UserError(
            f"model.name={name} is a {kind}: search, sample and edit take a StableDiffusionPipeline (1.x, 2.x); "
            "rwopt.apply takes more"
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
