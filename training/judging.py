"""What the trainings of both embedded models' judges share: augmentation, the loop, temperatures, accuracy."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from rwopt.models.judge import Judge


def augment(images: Tensor, generator: torch.Generator, reach: int, gain: float = 0.08) -> Tensor:
    """Shifts of up to `reach` pixels, brightness (`gain`: its standard deviation) and noise: a judge must not live on
    single pixels."""
    n, device, (height, width) = len(images), images.device, images.shape[-2:]
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=generator, device=device).tolist()
    images = F.pad(images, (reach,) * 4, mode="replicate")[:, :, down : down + height, right : right + width]
    brightness = 1 + gain * torch.randn(n, 1, 1, 1, generator=generator, device=device)
    level = 0.04 * torch.rand(n, 1, 1, 1, generator=generator, device=device)
    noise = torch.randn(images.shape, generator=generator, device=device)
    return (images * brightness + level * noise).clamp(0, 1)


def mean_loss(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy over the pictures to which an attribute applies; 0 where there is none in the batch."""
    total = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


class TrainJudge(L.LightningModule):
    """Attributes by cross-entropy, identity by InfoNCE, realism by logistic loss, of which pictures count half."""

    def __init__(self, judge: Judge, steps: int, rate: float, decay: float, smoothing: float = 0.0) -> None:
        super().__init__()
        self.judge, self.steps, self.rate, self.decay, self.smoothing = judge, steps, rate, decay, smoothing

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels, fakes = batch  # [2M, 3, H, W] (M pictures, then their partners), [2M, attributes], fakes
        with torch.autocast(images.device.type, torch.bfloat16):
            said = self.judge(torch.cat([images, fakes]).to(memory_format=torch.channels_last))
        n = len(images)
        attributes = torch.stack([
            mean_loss(logits[:n].float(), labels[:, i], self.smoothing)
            for i, logits in enumerate(said.logits.values())
        ]).mean()  # fmt: skip
        first, second = said.embedding[:n].float().chunk(2)
        similarity = first @ second.T / 0.1
        target = torch.arange(len(first), device=images.device)
        identity = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
        real = torch.cat([torch.ones(n), torch.zeros(len(fakes))]).to(images.device)
        realism = F.binary_cross_entropy_with_logits(
            said.realism.float(), real, weight=torch.where(real == 1, 0.5, 1.0)
        )
        self.log_dict({"attributes": attributes, "identity": identity, "realism": realism}, prog_bar=True)
        return attributes + 0.3 * identity + 0.3 * realism

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=self.decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=self.steps, pct_start=0.1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@torch.no_grad()
def fit_temperatures(judge: Judge, images: Tensor, labels: Tensor) -> None:
    """Guo et al. (2017): one temperature a head, the best of a grid by likelihood. labels: [N, attributes]."""
    said = judge(images)
    for i, logits in enumerate(said.logits.values()):
        grid = torch.logspace(-0.5, 0.7, 49, device=images.device)
        losses = torch.stack([F.cross_entropy(logits / t, labels[:, i], ignore_index=-1) for t in grid])
        judge.temperature[i] = grid[losses.argmin()]


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: Tensor, first: int = 1) -> dict[str, float]:
    """Share of pictures whose right value is among the `first` likeliest, by attribute, where it applies.

    labels: [N, attributes], -1 where one does not.
    """
    out, verdict = {}, judge(images)
    for i, name in enumerate(verdict.logits):
        found = verdict.among(name, labels[:, i].clamp(min=0), first)
        out[name] = float(found[labels[:, i] >= 0].double().mean())
    return out
