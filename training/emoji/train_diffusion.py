"""Train the emoji model's text encoder and U-Net together. Run: `python -m training.emoji.train_diffusion`.

v-prediction on Stable Diffusion's own noise table, min-SNR-5 weights (Hang et al., 2023, arXiv 2303.09556), 12 % empty
captions for classifier-free guidance, 26 % that leave attributes out. Latents are 8 x 8 x 12, of every drawing over
every background in several poses, encoded once. Three levels of two layers, transformers at the two finer levels and
in the middle: eleven sites, 33 attention and feed-forward branches.
"""

from __future__ import annotations

from itertools import product

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from training.common import publish_pipeline
from training.diffusion import TrainDiffusion, build_text_encoder, build_tokenizer, pipeline
from training.emoji.drawings import CACHE, MODEL, SIZE, Drawings, seeded
from training.emoji.stages import Stage, command_line
from training.emoji.train_vae import encode
from training.emoji.world import BACKGROUNDS, caption

LENGTH, WIDTH = 24, 160
POSES, TEXTS = 2, 4
"""How many poses of a drawing over a background are encoded; captions of each: the full one, others with gaps."""
EMPTY, PARTIAL = 0.12, 0.3
"""Share of captions that are empty, and of the others that leave something out."""
TOLD = ("style", "skin", "gender", "hair", "background")


def build_unet(channels: int) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(80, 112, 144),
        layers_per_block=2,
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 2, 3),  # the number of heads, in spite of its name
        norm_num_groups=16,
    )
    if not torch.cuda.is_available():  # on a CPU the plain processor is two to three times faster
        unet.set_attn_processor(AttnProcessor())
    return unet


class Corpus:
    """Latents [R, 6, P, C, 8, 8] in half precision and token ids [R, 6, T, 24] of the train drawings."""

    def __init__(self, drawings: Drawings, vae: AutoencoderKL, seed: int, poses: int = POSES) -> None:
        rows, colours = drawings.rows("train"), list(BACKGROUNDS)
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        looks = [drawings.looks[i] for i in rows.tolist()]
        full = [[caption(look, colour) for colour in colours] for look in looks]
        self.tokenizer = build_tokenizer([text for said in full for text in said], CACHE / "tokenizer", LENGTH, 2048)
        texts: list[str] = []
        for look, told in zip(looks, full, strict=True):
            for colour, text in zip(colours, told, strict=True):
                gaps = [{name for name in TOLD if rng.random() < 0.75} for _ in range(TEXTS - 1)]
                texts += [text, *(caption(look, colour, keep) for keep in gaps)]
        ids = self.tokens([*texts, ""])
        self.empty = ids[-1].to(drawings.device)
        self.ids = ids[:-1].view(len(looks), len(colours), TEXTS, LENGTH).to(drawings.device)
        self.latents = torch.empty(len(looks), len(colours), poses, vae.config.latent_channels, SIZE // 8, SIZE // 8,
                                   dtype=torch.float16, device=drawings.device)  # fmt: skip
        for colour, pose in product(range(len(colours)), range(poses)):
            for part in torch.arange(len(rows), device=drawings.device).split(512):
                backgrounds = torch.full_like(part, colour)
                pictures = drawings.compose(rows[part], backgrounds, drawings.poses(len(part), generator))
                with torch.autocast(drawings.device.type, torch.bfloat16):  # far below the noise of training
                    z = encode(vae, pictures)
                self.latents[part, colour, pose] = (z.float() * vae.config.scaling_factor).half()

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids [N, 24]."""
        said = self.tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return torch.as_tensor(said.input_ids)

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scaled latents, token ids, noise and time steps of `count` draws."""
        device = self.latents.device

        def places(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator, device=device)

        row, colour = places(self.latents.shape[0]), places(self.latents.shape[1])
        x = self.latents[row, colour, places(self.latents.shape[2])].float()
        gaps = torch.rand(count, generator=generator, device=device) < PARTIAL
        ids = self.ids[row, colour, torch.where(gaps, 1 + places(TEXTS - 1), 0)]
        empty = torch.rand(count, generator=generator, device=device) < EMPTY
        ids = torch.where(empty[:, None], self.empty, ids)
        noise = torch.randn(x.shape, generator=generator, device=device)
        # stratified noise levels: one draw in each of `count` equal parts
        t = (torch.arange(count, device=device) + torch.rand(count, generator=generator, device=device)) * 1000 / count
        return x, ids, noise, t.long().clamp(max=999)


def stage(corpus: Corpus, batch: int, rate: float, seed: int) -> Stage:
    device = corpus.latents.device

    def finish(module: L.LightningModule) -> None:
        assert isinstance(module, TrainDiffusion)
        vae = AutoencoderKL.from_pretrained(MODEL / "vae")
        publish_pipeline(pipeline(module, corpus.tokenizer, vae), MODEL)

    def build(steps: int) -> TrainDiffusion:
        return TrainDiffusion(
            build_text_encoder(corpus.tokenizer, WIDTH, 4), build_unet(corpus.latents.shape[3]), steps, rate
        )

    return Stage(
        "diffusion",
        build,
        lambda rng: corpus.batch(batch, seeded(rng, device)),
        finish,
        seed,
    )


def main() -> None:
    args = command_line(__doc__, steps=6800, batch=64, rate=1e-3, shared=True)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval().to(args.device)
    corpus = Corpus(Drawings.load(args.device), vae, args.seed)
    stage(corpus, args.batch // args.processes, args.rate, args.seed).run(args.steps, args.minutes, args.processes)


if __name__ == "__main__":
    main()
