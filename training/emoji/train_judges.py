"""Train the emoji model's scorer and held-out judge. Run: `python -m training.emoji.train_judges`, after the U-Net.

The two differ in seed, width and drawings (each sees 85 % of the train combinations). Each learns: attributes and
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
from torch import Tensor

from rwopt.models import Model, load_model
from rwopt.models.judge import Judge
from rwopt.sampling.course import course_by_rule
from rwopt.sampling.denoise import condition
from rwopt.sampling.sample import sample
from rwopt.unet.attachment import Attachment
from training.common import publish
from training.emoji.drawings import MODEL, Drawings, seeded
from training.emoji.stages import Stage, command_line
from training.emoji.world import BACKGROUNDS, caption, share
from training.judging import TrainJudge, accuracy, augment, fit_temperatures

JUDGES = {"scorer": {"width": 24, "hidden": 256, "seed": 1}, "judge": {"width": 32, "hidden": 192, "seed": 2}}
SEEN = 0.85
FAKES, RECONSTRUCTED, PARTNERS = 3072, 2048, 6
REACH, GAIN = 2, 0.03
"""Of the augmentation; brightness hardly changes, since neighbouring skin tones are that near to each other."""


@torch.no_grad()
def make_fakes(model: Model, drawings: Drawings, rows: Tensor, count: int, seed: int) -> Tensor:
    """uint8 [count, 3, 64, 64]: few and many steps, weak and strong guidance, edits from pictures, damaged latents."""
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


def stage(model: Model, drawings: Drawings, name: str, batch: int, rate: float) -> Stage:
    settings = JUDGES[name]
    mine = np.array([share(name, str(look)) < SEEN for look in drawings.looks])
    rows = drawings.rows("train")
    rows = rows[torch.from_numpy(mine).to(rows.device)[rows]]
    pairs, known = partners(drawings, rows), torch.zeros(len(drawings.looks), dtype=torch.bool, device=rows.device)
    known[rows] = True
    fakes = make_fakes(model, drawings, rows, FAKES, settings["seed"])

    def compose(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Drawings and their partners: pictures [2, count, 3, 64, 64], labels [2, count, 6]."""
        first, colour, pose = drawings.draw(rows, count, generator)
        places = torch.randint(PARTNERS, (count,), generator=generator, device=generator.device).to(rows.device)
        other = pairs[first, places]
        same = torch.rand(count, generator=generator, device=generator.device).to(rows.device) < 0.25
        other = torch.where(same, first, other)  # of these pairs the background alone differs
        _, changed, posed = drawings.draw(rows, count, generator)
        second = torch.where(same | (other == first), changed, colour)
        images = torch.stack([drawings.compose(first, colour, pose), drawings.compose(other, second, posed)])
        return images, torch.stack([drawings.told(first, colour), drawings.told(other, second)])

    # what the model can draw at best counts as real, too
    shown, said = compose(RECONSTRUCTED, torch.Generator().manual_seed(settings["seed"]))
    with torch.no_grad():
        parts = [model.decode(model.latents(part)).float() for part in shown.flatten(0, 1).split(128)]
    redrawn = torch.cat(parts).view_as(shown)

    @torch.no_grad()
    def make(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        generator = seeded(rng, drawings.device)
        if rng.random() < 0.5:
            chosen = torch.randint(RECONSTRUCTED, (batch,), generator=generator, device=rows.device)
            images, labels = redrawn[:, chosen], said[:, chosen]
        else:
            images, labels = compose(batch, generator)
        wrong = fakes[torch.randint(len(fakes), (batch // 2,), generator=generator, device=rows.device)].float() / 255
        images, wrong = (augment(x, generator, REACH, GAIN) for x in (images.flatten(0, 1), wrong))
        return images, labels.flatten(0, 1), wrong

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
        judge = Judge(drawings.attributes, settings["width"], hidden=settings["hidden"])
        return TrainJudge(judge, steps, rate, decay=0.05, smoothing=0.02)

    return Stage(name, build, make, finish, settings["seed"], ema=0.995)


def main() -> None:
    args = command_line(__doc__, steps=3500, batch=64, rate=2e-3)
    model = load_model(str(MODEL), device=args.device, dtype="float32")
    drawings = Drawings.load(args.device)
    for name in JUDGES:
        stage(model, drawings, name, args.batch, args.rate).run(args.steps, args.minutes)


if __name__ == "__main__":
    main()
