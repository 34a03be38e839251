"""Train the emoji model's `AutoencoderKL` (64 x 64 x 3 <-> 8 x 8 x 12). Run: `python -m training.emoji.train_vae`.

Two stages, each one command. `--stage joint` starts from the avatars' VAE: L1 + 4 MSE and a small KL, mostly MSE
towards the end (the target is PSNR); latent channels of which the decoder makes nothing are cut off; the scaling factor
gives latents unit variance. `--stage decoder`: with the encoder frozen, so that the U-Net may be trained at the same
time, the decoder alone on MSE.
`--minutes M` instead of `--steps N`: as many steps as this machine makes in that time, told at the start.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from training.common import MODEL as AVATARS
from training.common import publish
from training.emoji.drawings import MODEL, SIZE, Drawings, seeded
from training.emoji.stages import Stage, command_line
from training.measuring import psnr

MATTERS = 5e-5
"""Mean squared change of pictures in [-1, 1] from which on a latent channel is kept; reconstructions are 6e-3 off."""


class TrainVAE(L.LightningModule):
    """Encoder and decoder together."""

    def __init__(self, vae: AutoencoderKL, steps: int, rate: float) -> None:
        super().__init__()
        self.vae, self.steps, self.rate = vae.train().to(memory_format=torch.channels_last), steps, rate

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = (batch * 2 - 1).to(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            posterior = self.vae.encode(x).latent_dist
            y = self.vae.decode(posterior.sample()).sample
        y = y.float()
        mse = F.mse_loss(y, x)
        absolute = 1.0 if self.global_step < 0.6 * self.steps else 0.1
        loss = absolute * F.l1_loss(y, x) + 4 * mse + 1e-6 * posterior.kl().float().mean()
        self.log_dict({"loss": loss, "psnr": 10 * torch.log10(4 / mse.detach())}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.rate, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=self.steps, pct_start=0.05)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class TrainDecoder(TrainVAE):
    """The decoder alone, so that latents stay what they are."""

    def __init__(self, vae: AutoencoderKL, steps: int, rate: float) -> None:
        super().__init__(vae, steps, rate)
        self.vae.encoder.requires_grad_(False)
        self.vae.quant_conv.requires_grad_(False)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        x = (batch * 2 - 1).to(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            with torch.no_grad():
                z = self.vae.encode(x).latent_dist.mode()
            y = self.vae.decode(z).sample
        mse = F.mse_loss(y.float(), x)
        self.log_dict({"loss": mse, "psnr": 10 * torch.log10(4 / mse.detach())}, prog_bar=True)
        return mse


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Latents (posterior mean, not scaled) of pictures [N, 3, 64, 64] in [0, 1]."""
    return torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in pictures.split(256)])


@torch.no_grad()
def pruned(vae: AutoencoderKL, pictures: Tensor, least: float = MATTERS) -> AutoencoderKL:
    """The same VAE without the latent channels that hardly change its reconstruction of `pictures` [N, 3, H, W].

    A channel that is cut counts with its mean. Both 1 x 1 layers are folded into the 3 x 3 ones beside them, which is
    exact but at the border of the latents, where the decoder's first layer pads zeros behind a bias.
    """
    z, old = encode(vae, pictures), vae.config.latent_channels
    whole, means = vae.decode(z).sample, z.mean((0, 2, 3))
    change = []
    for channel in range(old):
        without = z.clone()
        without[:, channel] = means[channel]
        change.append(float(F.mse_loss(vae.decode(without).sample, whole)))
    kept = torch.tensor([i for i in range(old) if change[i] > least])
    few, rows = len(kept), torch.cat([kept, kept + old])  # means, then logarithms of variances
    mix, out = vae.quant_conv.weight[rows, :, 0, 0], vae.encoder.conv_out
    spread, into = vae.post_quant_conv.weight[:, :, 0, 0], vae.decoder.conv_in
    fixed = means.clone()
    fixed[kept] = 0
    offset = vae.post_quant_conv.bias + spread @ fixed
    bias = torch.linalg.lstsq(spread[:, kept], offset[:, None]).solution[:, 0]
    state = {name: value for name, value in vae.state_dict().items() if name.startswith(("encoder", "decoder"))}
    state |= {
        "encoder.conv_out.weight": torch.einsum("ab,bcij->acij", mix, out.weight),
        "encoder.conv_out.bias": mix @ out.bias + vae.quant_conv.bias[rows],
        "quant_conv.weight": torch.eye(2 * few)[:, :, None, None], "quant_conv.bias": torch.zeros(2 * few),
        "post_quant_conv.weight": torch.eye(few)[:, :, None, None], "post_quant_conv.bias": bias,
        "decoder.conv_in.weight": torch.einsum("abij,bc->acij", into.weight, spread[:, kept]),
        "decoder.conv_in.bias": into.bias + into.weight.sum((2, 3)) @ (offset - spread[:, kept] @ bias),
    }  # fmt: skip
    small = AutoencoderKL(**{**vae.config, "latent_channels": few, "sample_size": SIZE})
    small.load_state_dict(state)
    return small.eval()


def unseen(drawings: Drawings, count: int = 400) -> Tensor:
    """Pictures [count, 3, 64, 64] of test combinations."""
    generator = torch.Generator().manual_seed(3)
    return drawings.compose(*drawings.draw(drawings.rows("test"), count, generator))


def stage(drawings: Drawings, name: str, batch: int, rate: float, seed: int) -> Stage:
    rows, kind = drawings.rows("train"), {"joint": TrainVAE, "decoder": TrainDecoder}[name]

    def build(steps: int) -> TrainVAE:
        folder = (AVATARS if name == "joint" else MODEL) / "vae"
        return kind(AutoencoderKL.from_pretrained(folder).float(), steps, rate)

    def make(rng: np.random.Generator) -> Tensor:
        return drawings.compose(*drawings.draw(rows, batch, seeded(rng, drawings.device)))

    def finish(module: L.LightningModule) -> None:
        assert isinstance(module, TrainVAE)
        vae = module.vae.cpu().eval()
        if name == "joint":
            many = drawings.compose(*drawings.draw(rows, 512, seeded(np.random.default_rng(seed), drawings.device)))
            vae = pruned(vae, many[:128].cpu())
            z = encode(vae, many.cpu())
            vae.register_to_config(scaling_factor=float(1 / z.std()))
            deviations = z.std((0, 2, 3))
            print(f"latents: {len(deviations)} channels, std {deviations.min():.2f} .. {deviations.max():.2f}")
        print(f"PSNR on unseen combinations {psnr(vae, unseen(drawings).cpu()):.2f} dB", flush=True)
        publish(lambda path: vae.half().save_pretrained(path), "vae", MODEL)

    return Stage(name, build, make, finish, seed, ema=0.99)


def main() -> None:
    args = command_line(__doc__, steps=3500, batch=16, rate=1.5e-3, stages=("joint", "decoder"))
    drawings = Drawings.load(args.device)
    stage(drawings, args.stage, args.batch, args.rate, args.seed).run(args.steps, args.minutes)


if __name__ == "__main__":
    main()
