"""Train the embedded text encoder and U-Net together on cached latents. Run: `python training/train_diffusion.py`.

v-prediction on Stable Diffusion's own noise table (scaled-linear 0.00085 .. 0.012, 1000 steps), min-SNR-5 weights
(Hang et al., 2023, arXiv 2303.09556), 12 % empty captions for classifier-free guidance, and captions that leave some
attributes out. Latents are 8 x 8 x 16. Seven transformer sites, named as in Stable Diffusion.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from common import CACHE, MODEL, fit, load_pool, publish, to_float
from world import NAMES, caption, draw_person

LENGTH, WIDTH = 32, 192


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges make each caption word one token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    rng = np.random.default_rng(0)
    texts = [caption(draw_person(rng)) for _ in range(4000)]
    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        texts + [chr(c) for c in range(33, 127)],  # every printable character also as a word of its own
        trainers.BpeTrainer(vocab_size=1024, end_of_word_suffix="</w>", initial_alphabet=alphabet,
                            special_tokens=["<|startoftext|>", "<|endoftext|>"], show_progress=False),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    raw.model.save(str(folder))
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=LENGTH,
        pad_token="<|endoftext|>",
    )
    if max(len(tokenizer(t)["input_ids"]) for t in texts) > LENGTH - 2:
        raise SystemExit("captions do not fit the context length")
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


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


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


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


class TrainDiffusion(L.LightningModule):
    def __init__(self, tokenizer: CLIPTokenizer, steps: int, rate: float) -> None:
        super().__init__()
        self.text, self.unet = build_text_encoder(tokenizer), build_unet().to(memory_format=torch.channels_last)
        self.steps, self.rate = steps, rate
        self.register_buffer("alphas", scheduler().alphas_cumprod)

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, ids, noise, t = batch
        alpha = self.alphas[t][:, None, None, None]
        noisy = (alpha.sqrt() * x + (1 - alpha).sqrt() * noise).to(memory_format=torch.channels_last)
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
        with torch.autocast("cpu", torch.bfloat16):
            out = self.unet(noisy, t, self.text(ids).last_hidden_state).sample
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=5) / (snr + 1)
        loss = (weight * (out.float() - target) ** 2).mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, betas=(0.9, 0.98), weight_decay=1e-2, fused=True)

        def scale(step: int) -> float:  # warm up, hold, then down to 0 over the last 40 %
            return min(1.0, (step + 1) / 300, max(0.0, (self.steps - step) / (0.4 * self.steps)))

        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, scale), "interval": "step"}]


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
    tokenizer = build_tokenizer(CACHE / "tokenizer")
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

    module = TrainDiffusion(tokenizer, args.steps, args.rate)
    if args.shipped:
        module.text.load_state_dict(CLIPTextModel.from_pretrained(MODEL / "text_encoder").float().state_dict())
        module.unet.load_state_dict(UNet2DConditionModel.from_pretrained(MODEL / "unet").float().state_dict())
    fit(module, batch, "diffusion-on" if args.shipped else "diffusion", args.steps, args.seed)
    export(module, tokenizer)


def export(module: TrainDiffusion, tokenizer: CLIPTokenizer) -> None:
    """Put U-Net, text encoder, tokenizer and scheduler beside the VAE, fp16, in the standard layout."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").half()
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=module.text.half(), tokenizer=tokenizer, unet=module.unet.half(),
        scheduler=scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_config(MODEL)
    for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
        part = getattr(pipe, name)
        publish(lambda path, part=part: part.save_pretrained(path), name)
    # transformers 5 loads by what the configuration says; diffusers loads the other parts in float32
    CLIPTextConfig.from_pretrained(MODEL / "text_encoder", dtype="float32").save_pretrained(MODEL / "text_encoder")


if __name__ == "__main__":
    main()
