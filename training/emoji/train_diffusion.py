"""Train the emoji model's text encoder and U-Net together. Run: `python -m training.emoji.train_diffusion`.

v-prediction on Stable Diffusion's own noise table, min-SNR-5 weights (Hang et al., 2023, arXiv 2303.09556), 12 % empty
captions for classifier-free guidance, 26 % that leave attributes out. Latents are 12 x 12 x 16, of every drawing over
every background in several poses, encoded once. Three levels of two layers, transformers at the two finer levels and
in the middle: eleven sites, 33 attention and feed-forward branches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.common import fit, publish
from training.emoji.drawings import CACHE, MODEL, SIZE, Drawings, seeded
from training.emoji.stages import Stage, command_line
from training.emoji.train_vae import encode
from training.emoji.world import BACKGROUNDS, caption

LENGTH, WIDTH = 32, 160
POSES, TEXTS = 4, 4
"""How many poses of a drawing over a background are encoded; captions of each: the full one, others with gaps."""
EMPTY, PARTIAL = 0.12, 0.3
"""Share of captions that are empty, and of the others that leave something out."""
TOLD = ("style", "skin", "gender", "hair", "background")


def build_tokenizer(texts: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges make each caption word one token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        [*texts, *(chr(c) for c in range(33, 127))],  # every printable character also as a word of its own
        trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", initial_alphabet=alphabet,
                            special_tokens=["<|startoftext|>", "<|endoftext|>"], show_progress=False),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    raw.model.save(str(folder))
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH, pad_token="<|endoftext|>",
    )  # fmt: skip
    if max(map(len, tokenizer(texts)["input_ids"])) > LENGTH:
        raise SystemExit("captions do not fit the context length")
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=16,
        out_channels=16,
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


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


class Corpus:
    """Latents [R, 6, P, 16, 12, 12] in half precision and token ids [R, 6, T, 32] of the train drawings."""

    def __init__(self, drawings: Drawings, vae: AutoencoderKL, seed: int, poses: int = POSES) -> None:
        rows, colours = drawings.rows("train"), list(BACKGROUNDS)
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        looks = [drawings.looks[i] for i in rows.tolist()]
        full = [[caption(look, colour) for colour in colours] for look in looks]
        self.tokenizer = build_tokenizer([text for texts in full for text in texts], CACHE / "tokenizer")
        texts: list[str] = []
        for look, told in zip(looks, full, strict=True):
            for colour, text in zip(colours, told, strict=True):
                gaps = [{name for name in TOLD if rng.random() < 0.75} for _ in range(TEXTS - 1)]
                texts += [text, *(caption(look, colour, keep) for keep in gaps)]
        ids = self.tokens([*texts, ""])
        self.empty = ids[-1].to(drawings.device)
        self.ids = ids[:-1].view(len(looks), len(colours), TEXTS, LENGTH).to(drawings.device)
        self.latents = torch.empty(len(looks), len(colours), poses, 16, SIZE // 8, SIZE // 8, dtype=torch.float16,
                                   device=drawings.device)  # fmt: skip
        for colour in range(len(colours)):
            for pose in range(poses):
                for part in torch.arange(len(rows), device=drawings.device).split(512):
                    backgrounds = torch.full_like(part, colour)
                    pictures = drawings.compose(rows[part], backgrounds, drawings.poses(len(part), generator))
                    self.latents[part, colour, pose] = (encode(vae, pictures) * vae.config.scaling_factor).half()

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids [N, 32]."""
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
        with torch.autocast(x.device.type, torch.bfloat16):
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


def stage(corpus: Corpus, batch: int, rate: float, seed: int) -> Stage:
    device = corpus.latents.device

    def finish(module: L.LightningModule) -> None:
        assert isinstance(module, TrainDiffusion)
        export(module, corpus.tokenizer)

    return Stage(
        "diffusion",
        lambda steps: TrainDiffusion(corpus.tokenizer, steps, rate),
        lambda rng: corpus.batch(batch, seeded(rng, device)),
        finish,
        seed,
    )


def export(module: TrainDiffusion, tokenizer: CLIPTokenizer) -> None:
    """Put U-Net, text encoder, tokenizer and scheduler beside the VAE, fp16, in the standard layout."""
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").half()
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=module.text.cpu().half(), tokenizer=tokenizer, unet=module.unet.cpu().half(),
        scheduler=scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_config(MODEL)
    for name in ("unet", "text_encoder", "tokenizer", "scheduler"):
        part = getattr(pipe, name)
        publish(lambda path, part=part: part.save_pretrained(path), name, MODEL)
    # transformers 5 loads by what the configuration says; diffusers loads the other parts in float32
    CLIPTextConfig.from_pretrained(MODEL / "text_encoder", dtype="float32").save_pretrained(MODEL / "text_encoder")


def main() -> None:
    args = command_line(__doc__, steps=7000, batch=512, rate=1e-3)
    vae = AutoencoderKL.from_pretrained(MODEL / "vae").float().eval().to(args.device)
    corpus = Corpus(Drawings.load(args.device), vae, args.seed)
    stage(corpus, args.batch, args.rate, args.seed).run(fit, args.steps, args.minutes)


if __name__ == "__main__":
    main()
