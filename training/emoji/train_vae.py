"""Train the emoji model's `AutoencoderKL` (96 x 96 x 3 <-> 12 x 12 x 16). Run: `python -m training.emoji.train_vae`.

L1 + 4 MSE and a small KL, mostly MSE towards the end (the target is PSNR); the scaling factor gives latents unit
variance. `--minutes M` instead of `--steps N`: as many steps as this machine makes in that time, told at the start.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from training.common import publish
from training.emoji.drawings import MODEL, SIZE, Drawings, seeded
from training.emoji.stages import Stage, command_line


def build() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(24, 48, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


class TrainVAE(L.LightningModule):
    def __init__(self, steps: int, rate: float) -> None:
        super().__init__()
        self.vae, self.steps, self.rate = build().to(memory_format=torch.channels_last), steps, rate

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = (batch * 2 - 1).to(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            posterior = self.vae.encode(x).latent_dist
            y = self.vae.decode(posterior.sample()).sample
        y = y.float()
        mse = F.mse_loss(y, x)
        absolute = 1.0 if self.global_step < 0.6 * self.steps else 0.1
        loss = absolute * F.l1_loss(y, x) + 4 * mse + 1e-6 * posterior.kl().float().mean()
        self.log_dict({"loss": loss, "mse": mse}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=self.steps, pct_start=0.05)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents (posterior mean, not scaled) of pictures [N, 3, 96, 96] in [0, 1]."""
    return torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in pictures.split(256)])


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean over pictures [N, 3, 96, 96] in [0, 1] of the PSNR, in dB, of decode(encode(x)) with the posterior mean."""
    values = []
    for x in pictures.split(64):
        y = (vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)
        values.append(-10 * torch.log10(((x - y) ** 2).mean((1, 2, 3))))
    return float(torch.cat(values).mean())


def unseen(drawings: Drawings, count: int = 400) -> Tensor:
    """Pictures [count, 3, 96, 96] of test combinations."""
    generator = torch.Generator().manual_seed(3)
    return drawings.compose(*drawings.draw(drawings.rows("test"), count, generator))


def stage(drawings: Drawings, batch: int, rate: float, seed: int) -> Stage:
    rows = drawings.rows("train")

    def make(rng: np.random.Generator) -> Tensor:
        return drawings.compose(*drawings.draw(rows, batch, seeded(rng, drawings.device)))

    def finish(module: L.LightningModule) -> None:
        assert isinstance(module, TrainVAE)
        vae = module.vae.to(drawings.device).eval()
        z = encode(vae, make(np.random.default_rng(seed))[:512])
        vae.register_to_config(scaling_factor=float(1 / z.std()))
        print(f"latents: std by channel {z.std((0, 2, 3)).min():.2f} .. {z.std((0, 2, 3)).max():.2f}; "
              f"PSNR on unseen combinations {psnr(vae, unseen(drawings)):.2f} dB", flush=True)  # fmt: skip
        publish(lambda path: vae.half().save_pretrained(path), "vae", MODEL)

    return Stage("vae", lambda steps: TrainVAE(steps, rate), make, finish, seed, ema=0.99)


def main() -> None:
    args = command_line(__doc__, steps=5000, batch=64, rate=1.5e-3)
    drawings = Drawings.load(args.device)
    stage(drawings, args.batch, args.rate, args.seed).run(args.steps, args.minutes)


if __name__ == "__main__":
    main()
