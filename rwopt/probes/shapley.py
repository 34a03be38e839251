"""Shapley values: a site's mean contribution to the error over all orders in which sites could be skipped.

The fair share where sites interact, and the oracle that cheaper probes are judged by: `exact_shapley` needs all 2^S
subsets, permutation sampling (Castro et al., 2009, 10.1016/j.cor.2008.04.004) some orders. A batch of pictures takes
as many orders at the price of one, since each row of a U-Net call can skip other sites. Orders come in pairs, one the
reverse of the other, which cancels the even part of the sampling error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import factorial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import Importance, choice
from rwopt.probes.teacher import TRAJECTORIES, Predict, Teacher, branch_only, relative_error
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition
from rwopt.unet.attachment import Attachment

Loss = Callable[[np.ndarray], np.ndarray]  # skipped [S] or [N, S] bool -> error of each picture [N]; none skipped: 0


@dataclass(frozen=True)
class Shapley:
    """Score: estimated Shapley value of skipping a site, in units of `|out(subset skipped) - out|^2 / |out|^2`.

    permutations: orders at each step for each picture, M. A picture has its own; an odd number of them is paired with
    the next picture's. At most N (2 + M (S - 1)) calls: that all are skipped is asked once; the student pays N - i for
    each at step i, and N. The interval is over pictures (over pairs of pictures for odd M, over pairs of orders for one
    picture: then it says nothing of other pictures).
    """

    permutations: int = 1
    seed: int = 0
    trajectory: str = "teacher"
    mode: ClassVar[str] = "residual"

    def __post_init__(self) -> None:
        choice("trajectory", self.trajectory, TRAJECTORIES)
        if self.permutations < 1:
            raise UserError(f"probe.permutations={self.permutations} must be at least 1")

    @torch.no_grad()
    def __call__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course
    ) -> Importance:
        branch_only(attachment, 0.0)
        teacher = Teacher(model, attachment, x, cond, course)
        predict, outputs = teacher.view(self.trajectory)
        rng, sites, m = np.random.default_rng(self.seed), len(attachment.sites), self.permutations
        found = []
        for i, plain in enumerate(outputs):
            orders = draw_orders(len(x) * m, sites, rng).reshape(len(x), m, sites).transpose(1, 0, 2)
            found.append(summarise(permutation_shapley(skip_loss(predict, i, plain, len(x)), orders)))
        scores = np.array([mean for mean, _ in found])
        half = None if found[0][1] is None else np.array([h for _, h in found])
        low, high = (None, None) if half is None else (scores - half, scores + half)
        about = {**asdict(self), "mode": attachment.mode, "pictures": len(x)}
        return Importance(attachment.sites, teacher.sigmas, scores, low, high, teacher.calls, "shapley", about)


def skip_loss(predict: Predict, i: int, plain: Tensor, pictures: int) -> Loss:
    """The error at step `i` as a function of which sites are skipped; asks for each subset once."""
    known: dict[bytes, np.ndarray] = {}

    def loss(skipped: np.ndarray) -> np.ndarray:
        if not skipped.any():
            return np.zeros(pictures)
        key = skipped.tobytes()
        if key not in known:
            known[key] = relative_error(predict(i, 1.0 - skipped), plain, pictures)
        return known[key]

    return loss


def draw_orders(count: int, sites: int, rng: np.random.Generator) -> np.ndarray:
    """Orders [count, S] of the sites, every second one the reverse of the one before."""
    orders = np.array([rng.permutation(sites) for _ in range(-(-count // 2))])
    return np.stack([orders, orders[:, ::-1]], 1).reshape(-1, sites)[:count]


def permutation_shapley(loss: Loss, orders: np.ndarray) -> np.ndarray:
    """Contributions [M, S, N] of each site when sites are skipped one after the other.

    orders: M for all pictures, [M, S], or M for each, [M, N, S].
    """
    out = []
    for order in orders:
        skipped = np.zeros(order.shape, dtype=bool)
        before = loss(skipped)
        row, pictures = np.empty((order.shape[-1], len(before))), np.arange(len(before))
        for s in order.T:  # one site for all pictures, or one for each, [N]
            skipped[s if order.ndim == 1 else (pictures, s)] = True
            after = loss(skipped)
            row[s, pictures], before = after - before, after
        out.append(row)
    return np.array(out)


def summarise(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """(mean [S], half-width of its 95 % interval or None) of contributions [M, S, N] in orders that come in pairs.

    What is resampled keeps pairs and pictures whole: pictures, pairs of pictures, or, of one picture, pairs of orders.
    """
    m, sites, _ = shares.shape
    flat = shares.transpose(1, 2, 0).reshape(sites, -1)  # [S, N M], orders of a picture side by side
    size = m if m % 2 == 0 else 2 * m
    if flat.shape[1] // size < 2:
        size = 2
    units = flat[:, : flat.shape[1] // size * size].reshape(sites, -1, size).mean(2)
    if units.shape[1] < 2:
        return flat.mean(1), None
    return flat.mean(1), 1.96 * units.std(1, ddof=1) / np.sqrt(units.shape[1])


def every_subset(loss: Loss, sites: int) -> np.ndarray:
    """Errors [2^S, N] of all subsets; bit s of the index says that site s is skipped."""
    return np.array([loss((index >> np.arange(sites) & 1).astype(bool)) for index in range(2**sites)])


def exact_shapley(losses: np.ndarray) -> np.ndarray:
    """Shapley values [S, ...] of the errors [2^S, ...] of all subsets, ordered as `every_subset` does.

    >>> exact_shapley(np.array([0.0, 1.0, 2.0, 7.0]))  # alone 1 and 2, together 4 more
    array([3., 4.])
    """
    sites = len(losses).bit_length() - 1
    if len(losses) != 2**sites:
        raise UserError(f"{len(losses)} errors are not those of all subsets: give 2^S of them")
    index = np.arange(2**sites)
    size = np.array([int(i).bit_count() for i in index])
    shares = np.array([factorial(k) * factorial(sites - k - 1) / factorial(sites) for k in range(sites)])
    out = []
    for s in range(sites):
        without = index[index >> s & 1 == 0]
        out.append(np.tensordot(shares[size[without]], losses[without | 1 << s] - losses[without], 1))
    return np.array(out)
