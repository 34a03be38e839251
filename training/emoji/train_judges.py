"""Train the emoji model's scorer and held-out judge. Run: `python -m training.emoji.train_judges`, after the U-Net.

The two differ in seed, size, width and drawings (each sees 85 % of the train combinations). Each learns: attributes and
subject (cross-entropy, where they apply), identity (a drawing and one that differs in a single attribute, or in the
background, attract each other, InfoNCE), realism (drawings and their VAE reconstructions against the model's own
pictures of every quality, and damaged latents). Temperatures are fitted on drawings that training does not see.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rwopt.models import Model, load_model
from rwopt.models.judge import Judge
from rwopt.sampling.course import course_by_rule
from rwopt.sampling.denoise import condition
from rwopt.sampling.sample import sample
from rwopt.unet.attachment import Attachment
from training.common import fit, publish
from training.emoji.drawings import MODEL, SIZE, Drawings, seeded
from training.emoji.stages import Stage, command_line
from training.emoji.world import BACKGROUNDS, caption, share

JUDGES = {"scorer": {"width": 24, "seed": 1, "size": 64}, "judge": {"width": 32, "seed": 2, "size": 80}}
SEEN = 0.85
FAKES, PARTNERS = 3072, 6


@torch.no_grad()
def make_fakes(model: Model, drawings: Drawings, rows: Tensor, count: int, seed: int) -> Tensor:
    """uint8 [count, 3, 96, 96]: few and many steps, weak and strong guidance, edits from pictures, damaged latents."""
    rng, generator, out = np.random.default_rng(seed), torch.Generator().manual_seed(seed), list[Tensor]()
    attachment, each, colours = Attachment(model.unet, ()), min(256, count), list(BACKGROUNDS)
    while len(out) * each < count:
        chosen, backgrounds, poses = drawings.draw(rows, each, generator)
        noise = torch.randn(each, *model.latent_shape, generator=generator).to(drawings.device)
        z = model.latents(drawings.compose(chosen, backgrounds, poses))
        kind = len(out) % 4
        if kind == 3:  # damaged latents of real pictures
            level = torch.from_numpy(rng.uniform(0.1, 0.6, size=(each, 1, 1, 1))).float().to(drawings.device)
            z = z + level * noise * (torch.rand(each, 1, *z.shape[2:], generator=generator).to(drawings.device) < 0.5)
        else:
            strength = 1.0 if kind < 2 else float(rng.uniform(0.3, 0.9))
            course = course_by_rule(model, int(rng.choice([2, 3, 4, 6, 8, 12])), strength=strength)
            guidance = torch.from_numpy(rng.uniform(1, 9, size=each)).float().to(drawings.device)
            wanted, others, _ = drawings.draw(rows, each, generator)
            pairs = zip(wanted.tolist(), others.tolist(), strict=True)
            texts = [caption(drawings.looks[i], colours[b]) for i, b in pairs]
            x = noise if kind < 2 else course.noised(0, z, noise)
            z = sample(model, attachment, x, condition(model, texts, guidance), course)
        out.append((model.decode(z) * 255).round().byte())
    attachment.remove()
    return torch.cat(out)[:count]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small shifts, brightness and noise: a judge must not live on single pixels."""
    n, device = len(images), images.device
    right, down = torch.randint(0, 7, (2,), generator=generator, device=device).tolist()
    images = F.pad(images, (3, 3, 3, 3), mode="replicate")[:, :, right : right + SIZE, down : down + SIZE]
    gain = 1 + 0.08 * torch.randn(n, 1, 1, 1, generator=generator, device=device)
    level = 0.04 * torch.rand(n, 1, 1, 1, generator=generator, device=device)
    noise = torch.randn(images.shape, generator=generator, device=device)
    return (images * gain + level * noise).clamp(0, 1)


def partners(drawings: Drawings, rows: Tensor) -> Tensor:
    """[N, 6]: for each drawing others among `rows` that differ in one attribute and not in the subject, or itself."""
    groups: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    names = ("style", "skin", "gender", "hair")

    def keys(i: int) -> list[tuple[Any, ...]]:
        look = drawings.looks[i]
        return [(n, look.subject, *(getattr(look, m) for m in names if m != n)) for n in names]

    for i in rows.tolist():
        for key in keys(i):
            groups[key].append(i)
    rng, out = np.random.default_rng(0), np.arange(len(drawings.looks))[:, None].repeat(PARTNERS, 1)
    for i in rows.tolist():
        others = [j for key in keys(i) for j in groups[key] if j != i]
        if others:
            out[i] = rng.choice(others, size=PARTNERS)
    return torch.from_numpy(out).to(drawings.device)


class TrainJudge(L.LightningModule):
    def __init__(self, attributes: dict[str, list[str]], width: int, size: int, steps: int, rate: float) -> None:
        super().__init__()
        self.judge, self.steps, self.rate = Judge(attributes, width, size=size), steps, rate

    def training_step(self, batch: Any, _: int) -> Tensor:
        images, labels, fakes = batch  # [2M, 3, 96, 96] (M drawings, then their partners), [2M, 6], [M, 3, 96, 96]
        with torch.autocast(images.device.type, torch.bfloat16):
            said = self.judge(torch.cat([images, fakes]).to(memory_format=torch.channels_last))
        n = len(images)
        losses = {
            name: _mean_loss(logits[:n].float(), labels[:, i]) for i, (name, logits) in enumerate(said.logits.items())
        }
        attributes = torch.stack(list(losses.values())).mean()
        first, second = said.embedding[:n].float().chunk(2)
        similarity = first @ second.T / 0.1
        target = torch.arange(len(first), device=images.device)
        identity = (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2
        real = torch.cat([torch.ones(n), torch.zeros(len(fakes))]).to(images.device)
        realism = F.binary_cross_entropy_with_logits(
            said.realism.float(), real, weight=torch.where(real == 1, 0.5, 1.0)
        )
        self.log_dict({"subject": losses["subject"], "attributes": attributes, "identity": identity,
                       "realism": realism}, prog_bar=True)  # fmt: skip
        return attributes + 0.3 * identity + 0.3 * realism

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.rate, total_steps=self.steps, pct_start=0.1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the pictures to which the attribute applies; 0 where there is none in the batch."""
    total = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=0.02, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


@torch.no_grad()
def fit_temperatures(judge: Judge, images: Tensor, labels: Tensor) -> None:
    """Guo et al. (2017): one temperature a head, the best of a grid by likelihood."""
    said = judge(images)
    for i, (_, logits) in enumerate(said.logits.items()):
        grid = torch.logspace(-0.5, 0.7, 49, device=images.device)
        losses = torch.stack([F.cross_entropy(logits / t, labels[:, i], ignore_index=-1) for t in grid])
        judge.temperature[i] = grid[losses.argmin()]


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: Tensor, first: int = 1) -> dict[str, float]:
    """Share of pictures whose right value is among the `first` likeliest, by attribute, where it applies."""
    out, verdict = {}, judge(images)
    for i, (name, logits) in enumerate(verdict.logits.items()):
        seen = labels[:, i] >= 0
        best = logits[seen].topk(min(first, logits.shape[1]), -1).indices
        out[name] = float((best == labels[seen, i, None]).any(-1).float().mean())
    return out


def stage(model: Model, drawings: Drawings, name: str, batch: int, rate: float) -> Stage:
    settings = JUDGES[name]
    mine = np.array([share(name, str(look)) < SEEN for look in drawings.looks])
    rows = drawings.rows("train")
    rows = rows[torch.from_numpy(mine).to(rows.device)[rows]]
    pairs, known = partners(drawings, rows), torch.zeros(len(drawings.looks), dtype=torch.bool, device=rows.device)
    known[rows] = True
    fakes = make_fakes(model, drawings, rows, FAKES, settings["seed"])

    @torch.no_grad()
    def make(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        generator = seeded(rng, drawings.device)
        first, colour, pose = drawings.draw(rows, batch, generator)
        other = pairs[first, int(rng.integers(PARTNERS))]
        same = torch.rand(batch, generator=generator, device=rows.device) < 0.25  # differs in the background alone
        other = torch.where(same, first, other)
        _, changed, posed = drawings.draw(rows, batch, generator)
        second = torch.where(same | (other == first), changed, colour)
        images = torch.cat([drawings.compose(first, colour, pose), drawings.compose(other, second, posed)])
        if rng.random() < 0.5:  # what the model can draw at best counts as real, too
            images = model.decode(model.latents(images)).float()
        labels = torch.cat([drawings.told(first, colour), drawings.told(other, second)])
        wrong = fakes[torch.randint(len(fakes), (batch // 2,), generator=generator, device=rows.device)].float() / 255
        return augment(images, generator), labels, augment(wrong, generator)

    def finish(module: L.LightningModule) -> None:
        assert isinstance(module, TrainJudge)
        judge = module.judge.to(drawings.device).eval()
        left = torch.tensor([i for i in drawings.rows("train").tolist() if not known[i]], device=rows.device)
        chosen = drawings.draw(left, 1024, torch.Generator().manual_seed(0))
        fit_temperatures(judge, drawings.compose(*chosen), drawings.told(*chosen[:2]))
        chosen = drawings.draw(drawings.rows("test"), 1024, torch.Generator().manual_seed(1))
        images, labels = drawings.compose(*chosen), drawings.told(*chosen[:2])
        print(name, {k: round(v, 3) for k, v in accuracy(judge, images, labels).items()},
              f"subject among five: {accuracy(judge, images, labels, 5)['subject']:.3f}", flush=True)  # fmt: skip
        publish(lambda folder: judge.cpu().save(Path(folder)), name, MODEL)

    def build(steps: int) -> TrainJudge:
        return TrainJudge(drawings.attributes, settings["width"], settings["size"], steps, rate)

    return Stage(name, build, make, finish, settings["seed"], ema=0.995)


def main() -> None:
    args = command_line(__doc__, steps=4000, batch=128, rate=2e-3)
    model = load_model(str(MODEL), device=args.device, dtype="float32")
    drawings = Drawings.load(args.device)
    for name in JUDGES:
        stage(model, drawings, name, args.batch, args.rate).run(fit, args.steps, args.minutes)


if __name__ == "__main__":
    main()
