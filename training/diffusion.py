"""What the trainings of both embedded models share: tokenizer, text encoder, noise, and the loop of the U-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer


def build_tokenizer(texts: list[str], folder: Path, length: int, vocabulary: int) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer whose merges make each caption word one token; `length` tokens a caption."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    raw = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(
        [*texts, *(chr(c) for c in range(33, 127))],  # every printable character also as a word of its own
        trainers.BpeTrainer(vocab_size=vocabulary, end_of_word_suffix="</w>", initial_alphabet=alphabet,
                            special_tokens=["<|startoftext|>", "<|endoftext|>"], show_progress=False),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    raw.model.save(str(folder))
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        model_max_length=length,
        pad_token="<|endoftext|>",
    )
    if max(map(len, tokenizer(texts)["input_ids"])) > length - 2:
        raise SystemExit("captions do not fit the context length")
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, heads: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, set_alpha_to_one=True, steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip


class TrainDiffusion(L.LightningModule):
    """v-prediction with min-SNR-5 weights (Hang et al., 2023, arXiv 2303.09556), text encoder and U-Net together."""

    def __init__(self, text: CLIPTextModel, unet: UNet2DConditionModel, steps: int, rate: float) -> None:
        super().__init__()
        self.text, self.unet = text, unet.to(memory_format=torch.channels_last)
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


def pipeline(module: TrainDiffusion, tokenizer: CLIPTokenizer, vae: AutoencoderKL) -> StableDiffusionPipeline:
    """All of it in half precision, as it is shipped."""
    return StableDiffusionPipeline(
        vae=vae.half(), text_encoder=module.text.cpu().half(), tokenizer=tokenizer, unet=module.unet.cpu().half(),
        scheduler=scheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
