"""Train the embedded text encoder and U-Net together on cached latents. Run: `python training/train_diffusion.py`.

v-prediction on Stable Diffusion's own noise table (scaled-linear 0.00085 .. 0.012, 1000 steps), min-SNR-5 weights
(Hang et al., 2023, arXiv 2303.09556), 12 % empty captions for classifier-free guidance, and captions that leave some
attributes out. Latents are 8 x 8 x 16. Seven transformer sites, named as in Stable Diffusion.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel

from common import CACHE, MODEL, fit, load_pool, publish_pipeline, to_float
from diffusion import TrainDiffusion, build_text_encoder, build_tokenizer, pipeline
from world import NAMES, caption, draw_person

LENGTH, WIDTH = 32, 192


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 192),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 3),  # the number of heads, in spite of its name
        norm_num_groups=16,
    )
    unet.set_attn_processor(AttnProcessor())
    return unet


@torch.no_grad()
def cache_latents(vae: AutoencoderKL) -> Tensor:
    """Scaled latents of the generator pool, float32 [2N, 16, 8, 8]."""
    path = CACHE / "latents.pt"
    if path.exists():  # the decoder may have changed since; the encoder must not
        return torch.load(path)
    pictures = load_pool("generator")[0].reshape(-1, 64, 64, 3)
    latents = torch.cat(
        [vae.encode(to_float(pictures[i : i + 128]) * 2 - 1).latent_dist.mode() for i in range(0, len(pictures), 128)]
    )
    latents = latents * vae.config.scaling_factor
    torch.save(latents, path)
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shipped", action="store_true", help="start from the shipped weights, fresh optimiser")
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval()
    latents = cache_latents(vae)
    values = load_pool("generator")[1].reshape(-1, len(NAMES))
    words = np.random.default_rng(0)
    said = [caption(draw_person(words)) for _ in range(4000)]
    tokenizer = build_tokenizer(said, CACHE / "tokenizer", LENGTH, 1024)
    names = list(NAMES)

    def batch(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, texts = rng.integers(len(latents), size=args.batch), []
        for row in rows:
            person = {n: NAMES[n][v] for n, v in zip(names, values[row], strict=True)}
            if rng.random() < 0.12:
                texts.append("")
            elif rng.random() < 0.3:
                texts.append(caption(person, {n for n in names if rng.random() < 0.75}))
            else:
                texts.append(caption(person))
        ids = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(args.batch, *latents.shape[1:], generator=generator)
        # stratified noise levels: one draw in each of `batch` equal parts
        t = (torch.arange(args.batch) + torch.rand(args.batch, generator=generator)) * 1000 / args.batch
        return latents[rows], ids, noise, t.long().clamp(max=999)

    module = TrainDiffusion(build_text_encoder(tokenizer, WIDTH, 3), build_unet(), args.steps, args.rate)
    if args.shipped:
        module.text.load_state_dict(CLIPTextModel.from_pretrained(MODEL / "text_encoder").float().state_dict())
        module.unet.load_state_dict(UNet2DConditionModel.from_pretrained(MODEL / "unet").float().state_dict())
    fit(module, batch, "diffusion-on" if args.shipped else "diffusion", args.steps, args.seed)
    publish_pipeline(pipeline(module, tokenizer, AutoencoderKL.from_pretrained(MODEL / "vae")))


if __name__ == "__main__":
    main()
