"""A small model to probe, and losses whose sensitivities are known."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from rwopt.models import Model
from rwopt.sampling.course import Course, course_at
from rwopt.sampling.denoise import Condition
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

N, K, S = 2, 2, 7  # pictures, steps, sites (of the tiny U-Net, in 5 blocks)
TS = [700, 300]


def inputs(model: Model, guided: bool = True, steps: int = K) -> tuple[torch.Tensor, Condition, Course]:
    g = torch.Generator().manual_seed(0)
    text = torch.randn(2, N, 5, 12, generator=g)
    cond = Condition(text[0], text[1] if guided else None, 3.0 if guided else 1.0)
    return torch.randn(N, 4, 8, 8, generator=g), cond, course_at(model, TS[:steps])


def attach(model: Model, mode: str) -> Attachment:
    return Attachment(model.unet, [s.id for s in list_sites(model.unet)], mode)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


class Quadratic:
    """A linear network whose mean squared error at step k is (1 - w)' H[k] (1 - w); counts its calls."""

    def __init__(self, hessians: np.ndarray, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        steps, s, _ = hessians.shape
        basis = np.linalg.qr(rng.standard_normal((64, s)))[0] * 8  # 64 = 4 x 4 x 4 elements a row
        self.maps = [torch.tensor(basis @ np.linalg.cholesky(h).T) for h in hessians]
        self.plain = torch.tensor(rng.standard_normal((steps, 1, 4, 4, 4)))
        self.calls = 0

    def run(self) -> Any:
        for plain in self.plain:
            self.calls += 1
            yield plain

    def predict(self, i: int, weights: np.ndarray, skipped: np.ndarray | None = None) -> torch.Tensor:
        self.calls += 1
        weights = weights if skipped is None else np.where(skipped, 0, weights)
        return self.plain[i] + (self.maps[i] @ torch.tensor(1 - weights)).reshape(1, 4, 4, 4)


def coupled(rng: np.random.Generator, s: int, scale: float, coupling: float) -> np.ndarray:
    """A random SPD matrix whose diagonal spans two decades; `coupling` bounds the correlations."""
    d = scale * 10 ** rng.uniform(-2, 0, s)
    a = rng.standard_normal((s, 4 * s))
    c = (1 - coupling) * np.eye(s) + coupling * np.corrcoef(a)
    return c * np.sqrt(np.outer(d, d))
