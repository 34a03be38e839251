"""Train the embedded model's `AutoencoderKL` (64 x 64 x 3 <-> 8 x 8 x 16). Run: `python training/train_vae.py`.

Three stages, each one command. `joint`: L1 + 4 MSE (the target is PSNR) + a small KL. `polish`: goes on
from there, mostly MSE; the scaling factor is set so that latents have unit variance. `decoder`: with the
encoder frozen (so that the diffusion training may already go on), the decoder alone on MSE.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from common import MODEL, fit, load_pool, publish, to_float
from measuring import psnr


def build() -> AutoencoderKL:
    channels = (16, 32, 96, 128)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


class TrainVAE(L.LightningModule):
    def __init__(self, steps: int, vae: AutoencoderKL, rate: float = 2e-3, absolute: float = 1.0) -> None:
        super().__init__()
        self.vae, self.steps = vae.to(memory_format=torch.channels_last), steps
        self.rate, self.absolute = rate, absolute

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = batch * 2 - 1
        x = x.to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = self.vae.encode(x).latent_dist
            y = self.vae.decode(posterior.sample()).sample
        y = y.float()
        mse = F.mse_loss(y, x)
        loss = self.absolute * F.l1_loss(y, x) + 4 * mse + 1e-6 * posterior.kl().float().mean()
        self.log_dict({"loss": loss, "psnr": 10 * torch.log10(4 / mse.detach())}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, betas=(0.9, 0.95), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=self.steps, pct_start=0.05)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class TrainDecoder(TrainVAE):
    """Stage two: cached latents in, pictures out."""

    def __init__(self, vae: AutoencoderKL, steps: int) -> None:
        super().__init__(steps, vae, rate=1e-3)
        self.vae.encoder.requires_grad_(False)
        self.vae.quant_conv.requires_grad_(False)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:  # type: ignore[override]
        z, x = batch
        with torch.autocast("cpu", torch.bfloat16):
            y = self.vae.decode(z).sample
        mse = F.mse_loss(y.float(), x * 2 - 1)
        self.log_dict({"loss": mse, "psnr": 10 * torch.log10(4 / mse.detach())}, prog_bar=True)
        return mse


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray) -> Tensor:
    """Latents (posterior mean, not scaled) of uint8 [N, 64, 64, 3]."""
    return torch.cat(
        [vae.encode(to_float(pictures[i : i + 128]) * 2 - 1).latent_dist.mode() for i in range(0, len(pictures), 128)]
    )


def train_joint(stage: str, steps: int, seed: int) -> AutoencoderKL:
    pictures = load_pool("generator")[0].reshape(-1, 64, 64, 3)
    if stage == "joint":
        module, size = TrainVAE(steps, build()), 16
    else:
        start = AutoencoderKL.from_pretrained(MODEL / "vae").float().train()
        module, size = TrainVAE(steps, start, rate=1.2e-3, absolute=0.1), 16
    fit(module, lambda rng: to_float(pictures[rng.integers(len(pictures), size=size)]), stage, steps, seed, ema=0.99)
    vae = module.vae.eval()
    z = encode(vae, pictures[:2048])
    vae.register_to_config(scaling_factor=float(1 / z.std()))
    print(f"latents: mean {z.mean():.3f}, std {z.std():.3f}, std by channel {z.std((0, 2, 3)).min():.2f} .. "
          f"{z.std((0, 2, 3)).max():.2f}")  # fmt: skip
    return vae


def train_decoder(vae: AutoencoderKL, steps: int, seed: int) -> AutoencoderKL:
    pictures = load_pool("generator")[0].reshape(-1, 64, 64, 3)
    latents = encode(vae, pictures)

    def batch(rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        rows = rng.integers(len(pictures), size=16)
        return latents[rows], to_float(pictures[rows])

    module = TrainDecoder(vae, steps)
    fit(module, batch, "decoder", steps, seed, ema=0.99)
    return module.vae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=["joint", "polish", "decoder"], required=True)
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.stage != "decoder":
        vae = train_joint(args.stage, args.steps, args.seed)
    else:
        vae = train_decoder(AutoencoderKL.from_pretrained(MODEL / "vae").float(), args.steps, args.seed)
    publish(lambda path: vae.half().save_pretrained(path), "vae")
    print(f"PSNR on unseen avatars: {psnr(vae.float(), to_float(load_pool('unseen')[0][:, 0])):.2f} dB")


if __name__ == "__main__":
    main()
