"""Every drawing on the device at once, and pictures composed of them: `Drawings.load()`.

A picture is a drawing over a background colour, a little smaller or larger and shifted (a `pose`: never in a caption,
so that two pictures of one caption still differ).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.common import ROOT
from training.emoji.world import BACKGROUNDS, GENDERS, HAIRS, SKINS, STYLES, Look, split_of

CACHE = ROOT / "cache" / "emoji"
MODEL, DATA = ROOT.parent / "rwopt" / "models" / "emoji", ROOT.parent / "data" / "emoji"
SIDE, SIZE = 80, 64
"""Pixels of a drawing as it is kept, and of a picture."""
ZOOM, SHIFT = (0.86, 0.96), 0.05
"""Share of the picture's width that a drawing fills, and by how much of it it is shifted at most."""
COLOURS = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in BACKGROUNDS.values()]) / 255


class Drawings:
    """`looks`: what is known of each of N drawings; `pixels`: uint8 [N, 4, 80, 80], red, green, blue, alpha."""

    def __init__(self, looks: list[Look], pixels: Tensor) -> None:
        self.looks, self.pixels = looks, pixels
        self.subjects = sorted({look.subject for look in looks})
        self.attributes: dict[str, list[str]] = {
            "style": list(STYLES), "subject": self.subjects, "skin": list(SKINS), "gender": list(GENDERS),
            "hair": list(HAIRS), "background": list(BACKGROUNDS),
        }  # fmt: skip
        number = {name: {v: i for i, v in enumerate(values)} for name, values in self.attributes.items()}
        table = [[number[n][v] if (v := getattr(look, n, None)) else -1 for n in self.attributes] for look in looks]
        self.labels = torch.tensor(table, device=pixels.device)  # [N, 6]; -1: does not apply, or the background
        self.split = np.array([split_of(look) for look in looks])

    @classmethod
    def load(cls, device: str | torch.device = "cpu", folder: Path = CACHE) -> Drawings:
        """The drawings that `draw.py` has kept."""
        path = folder / "drawings.npy"
        if not path.exists():
            raise SystemExit(f"{path.name} is missing: run `python -m training.emoji.draw` first")
        looks = [Look(**row) for row in json.loads((folder / "looks.json").read_text())]
        return cls(looks, torch.from_numpy(np.load(path)).permute(0, 3, 1, 2).contiguous().to(device))

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def rows(self, *splits: str) -> Tensor:
        """Places of the drawings of these splits."""
        return torch.from_numpy(np.flatnonzero(np.isin(self.split, splits))).to(self.device)

    def poses(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, 3]: zoom, shift to the right and down."""
        u = torch.rand(count, 3, generator=generator, device=generator.device).to(self.device)
        zoom = ZOOM[0] + (ZOOM[1] - ZOOM[0]) * u[:, :1]
        return torch.cat([zoom, SHIFT * (2 * u[:, 1:] - 1)], 1)

    def compose(self, rows: Tensor, backgrounds: Tensor, poses: Tensor) -> Tensor:
        """Pictures [B, 3, 64, 64] in [0, 1] of drawings [B] over backgrounds [B] (places in `BACKGROUNDS`)."""
        pixels = self.pixels[rows].float() / 255
        alpha = pixels[:, 3:]
        pixels = torch.cat([pixels[:, :3] * alpha, alpha], 1)  # premultiplied: no halo of what is transparent
        zoom, shift = poses[:, 0], poses[:, 1:]
        theta = torch.zeros(len(rows), 2, 3, device=self.device)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom
        theta[:, :, 2] = -2 * shift / zoom[:, None]
        grid = F.affine_grid(theta, [len(rows), 4, SIZE, SIZE], align_corners=False)
        out = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        colour = COLOURS.to(self.device)[backgrounds][:, :, None, None]
        return (out[:, :3] + (1 - out[:, 3:]) * colour).clamp(0, 1)

    def same(self, one: int, other: int) -> bool:
        """Whether two drawings are one: some artists make no difference between genders."""
        return bool((self.pixels[one].float() - self.pixels[other].float()).abs().mean() < 0.1)

    def told(self, rows: Tensor, backgrounds: Tensor) -> Tensor:
        """Labels [B, 6] of such pictures."""
        labels = self.labels[rows].clone()
        labels[:, list(self.attributes).index("background")] = backgrounds
        return labels

    def draw(self, rows: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """`count` random places out of `rows`, backgrounds and poses."""
        chosen = torch.randint(len(rows), (count,), generator=generator, device=generator.device).to(rows.device)
        backgrounds = torch.randint(len(BACKGROUNDS), (count,), generator=generator, device=generator.device)
        return rows[chosen], backgrounds.to(self.device), self.poses(count, generator)


def seeded(rng: np.random.Generator, device: torch.device) -> torch.Generator:
    """A generator on `device` that belongs to the next draw of `rng`."""
    return torch.Generator(device).manual_seed(int(rng.integers(2**62)))
