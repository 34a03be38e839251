"""Shapley values: a site's mean contribution to the error over all orders in which sites could be skipped.

The fair share where sites interact, and the oracle that cheaper probes are judged by: `exact_shapley` needs all 2^S
subsets, permutation sampling (Castro et al., 2009, 10.1016/j.cor.2008.04.004) some orders. Each sampled order is
followed by its reverse, which cancels the even part of the sampling error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import factorial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from rwopt.apply import Attachment
from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import Importance, choice
from rwopt.probes.teacher import TRAJECTORIES, Predict, Teacher, branch_only, relative_error
from rwopt.sampling import Condition

Loss = Callable[[np.ndarray], np.ndarray]  # skipped [S] bool -> error of each picture [N]; nobody skipped: 0


@dataclass(frozen=True)
class Shapley:
    """Score: estimated Shapley value of skipping a site, in units of `|out(subset skipped) - out|^2 / |out|^2`.

    permutations: orders at each step, an even number. At most N (2 + M (S - 1)) calls for M of them: that all are
    skipped is asked once, repeated subsets are remembered; the student pays N - i for each at step i, and N.
    The interval adds the variances of pictures and orders; details: "standard_error" [K, S] of the orders alone
    (None for one pair).
    """

    permutations: int = 4
    seed: int = 0
    trajectory: str = "teacher"
    mode: ClassVar[str] = "residual"

    def __post_init__(self) -> None:
        choice("trajectory", self.trajectory, TRAJECTORIES)
        if self.permutations < 2 or self.permutations % 2:
            raise UserError(f"probe.permutations={self.permutations} must be even: each order brings its reverse")

    @torch.no_grad()
    def __call__(
        self, model: Model, attachment: Attachment, x: Tensor, cond: Condition, ts: list[int]
    ) -> Importance:
        branch_only(attachment, 0.0)
        teacher = Teacher(model, attachment, x, cond, ts)
        predict, outputs = teacher.view(self.trajectory)
        rng, sites = np.random.default_rng(self.seed), len(attachment.sites)
        found = []
        for i, plain in enumerate(outputs):
            loss = skip_loss(predict, i, plain, len(x))
            found.append(summarise(permutation_shapley(loss, draw_orders(self.permutations, sites, rng))))
        scores, errors, halves = (None if row[0] is None else np.array(row) for row in zip(*found, strict=True))
        assert scores is not None
        low, high = (None, None) if halves is None else (scores - halves, scores + halves)
        about = {**asdict(self), "mode": attachment.mode, "pictures": len(x)}
        about["standard_error"] = None if errors is None else errors.tolist()
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


def draw_orders(count: int, sites: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`count` orders of the sites, every second one the reverse of the one before."""
    pairs = [rng.permutation(sites) for _ in range(count // 2)]
    return [order for pair in pairs for order in (pair, pair[::-1])]


def permutation_shapley(loss: Loss, orders: Sequence[np.ndarray]) -> np.ndarray:
    """Contributions [M, S, N] of each site when sites are skipped one after the other in each of M orders."""
    out = []
    for order in orders:
        skipped = np.zeros(len(order), dtype=bool)
        before, row = loss(skipped), [np.empty(0)] * len(order)
        for s in order:
            skipped[s] = True
            after = loss(skipped)
            row[s], before = after - before, after
        out.append(row)
    return np.array(out)


def summarise(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """(mean [S], its standard error over orders or None, half-width of its 95 % interval or None) of [M, S, N].

    Orders and pictures are crossed samples: their variances add (the interaction counted twice: a little wide).
    """
    pairs = shares.reshape(len(shares) // 2, 2, *shares.shape[1:]).mean((1, 3))  # [M / 2, S]
    pictures = shares.mean(0)  # [S, N]
    by_order = pairs.var(0, ddof=1) / len(pairs) if len(pairs) > 1 else None
    by_picture = pictures.var(1, ddof=1) / pictures.shape[1] if pictures.shape[1] > 1 else None
    known = [v for v in (by_order, by_picture) if v is not None]
    half = 1.96 * np.sqrt(np.sum(known, axis=0)) if known else None
    return pictures.mean(1), None if by_order is None else np.sqrt(by_order), half


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
