"""Train the optimised scorer and the held-out judge. Run: `python training/train_judges.py` after train_diffusion.py.

The two differ in seed, width and pictures. Each learns: attributes (cross-entropy where the picture shows them),
identity (a person and one edit of that person attract each other, InfoNCE), realism (avatars and their VAE
reconstructions against the model's own pictures of every quality, and damaged latents). Temperatures are fitted on the
last 500 people of the pool, which training does not see.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from rwopt.models import Model, load_model
from rwopt.models.judge import Judge
from rwopt.sampling.course import course_by_rule
from rwopt.sampling.denoise import condition
from rwopt.sampling.sample import sample
from rwopt.unet.attachment import Attachment

from common import CACHE, fit, load_pool, publish, to_float, visible
from judging import TrainJudge, accuracy, augment, fit_temperatures
from world import NAMES, caption

JUDGES = {"scorer": {"width": 24, "seed": 1}, "judge": {"width": 32, "seed": 2}}


@torch.no_grad()
def make_fakes(model: Model, pool: str, count: int, seed: int) -> np.ndarray:
    """uint8 [count, 64, 64, 3]: few and many steps, weak and strong guidance, edits from pictures, damaged latents."""
    path = CACHE / f"fakes_{pool}.npy"
    if path.exists():
        return np.load(path)
    pictures, values = load_pool(pool)
    rng, generator, out = np.random.default_rng(seed), torch.Generator().manual_seed(seed), []
    attachment = Attachment(model.unet, ())
    while len(out) * 64 < count:
        rows = rng.integers(len(pictures), size=64)
        people = [{n: NAMES[n][v] for n, v in zip(NAMES, values[r, 0], strict=True)} for r in rows]
        noise = torch.randn(64, *model.latent_shape, generator=generator)
        z = model.latents(to_float(pictures[rows, 1]))
        kind = len(out) % 4
        if kind == 3:  # damaged latents of real pictures
            level = torch.from_numpy(rng.uniform(0.1, 0.6, size=(64, 1, 1, 1))).float()
            z = z + level * noise * (torch.rand(64, 1, *z.shape[2:], generator=generator) < 0.5)
        else:
            strength = 1.0 if kind < 2 else float(rng.uniform(0.3, 0.9))
            course = course_by_rule(model, int(rng.choice([2, 3, 4, 6, 8, 12])), strength=strength)
            guidance = torch.from_numpy(rng.uniform(1, 9, size=64)).float()
            x = noise if kind < 2 else course.noised(0, z, noise)
            z = sample(model, attachment, x, condition(model, [caption(p) for p in people], guidance), course)
        out.append((model.decode(z) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    attachment.remove()
    fakes = np.concatenate(out)[:count]
    np.save(path, fakes)
    return fakes


@torch.no_grad()
def reconstruct(model: Model, pool: str, people: int = 2000) -> np.ndarray:
    """The VAE's reconstruction of the pool's last people, uint8 [people, 2, 64, 64, 3]."""
    path = CACHE / f"reconstructed_{pool}.npy"
    if path.exists():
        return np.load(path)
    pictures = load_pool(pool)[0][-people:]
    flat = pictures.reshape(-1, 64, 64, 3)
    parts = [model.decode(model.latents(to_float(flat[i : i + 128]))) for i in range(0, len(flat), 128)]
    out = (torch.cat(parts) * 255).round().byte().permute(0, 2, 3, 1).numpy().reshape(pictures.shape)
    np.save(path, out)
    return out


def train(name: str, steps: int, model: Model) -> None:
    settings = JUDGES[name]
    pictures, values = load_pool(name)
    recon, fakes = reconstruct(model, name), make_fakes(model, name, 2560, settings["seed"])
    labels, train_count, m = visible(values), len(pictures) - 500, 40
    offset = len(pictures) - len(recon)  # recon[i] shows the people of pictures[offset + i]

    def batch(rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        if rng.random() < 0.5:  # what the model can draw at best counts as real, too
            rows = rng.integers(offset, train_count, size=m)
            images = np.concatenate([recon[rows - offset, 0], recon[rows - offset, 1]])
        else:
            rows = rng.integers(train_count, size=m)
            images = np.concatenate([pictures[rows, 0], pictures[rows, 1]])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        target = torch.from_numpy(np.concatenate([labels[rows, 0], labels[rows, 1]]))
        fake = fakes[rng.integers(len(fakes) - 256, size=m)]
        return augment(to_float(images), generator, 2), target, augment(to_float(fake), generator, 2)

    judge = Judge({k: list(v) for k, v in NAMES.items()}, settings["width"])
    module = TrainJudge(judge, steps, rate=2e-3, decay=0.02)
    fit(module, batch, name, steps, settings["seed"], ema=0.995)
    judge = module.judge.eval()
    fit_temperatures(judge, to_float(recon[train_count - offset :, 0]), torch.from_numpy(labels[train_count:, 0]))
    publish(lambda folder: judge.save(folder), name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--only", choices=list(JUDGES))
    args = parser.parse_args()
    model = load_model("avatars", dtype="float32")
    unseen, values = load_pool("unseen")
    for name in [args.only] if args.only else JUDGES:
        train(name, args.steps, model)
        scores = accuracy(Judge.load(name), to_float(unseen[:, 0]), torch.from_numpy(visible(values)[:, 0]))
        print(name, f"mean {np.mean(list(scores.values())):.3f}", {k: round(v, 3) for k, v in scores.items()})


if __name__ == "__main__":
    main()
