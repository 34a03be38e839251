"""Several candidates through one sampler: what their trajectories share is computed once, the rest in one batch.

Candidates of one start differ in their weights and guidance scales. Trajectories part at the first step in which the
weights differ; scales part them only after that step's U-Net call, since they enter behind it. What has parted goes
through the U-Net as rows of one batch, each with its own weights, as far as the batch reaches.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rwopt.models import Model
from rwopt.sampling.denoise import Condition, Row, Sided, guide, predict
from rwopt.sampling.sample import Weights, ddim_step
from rwopt.unet.attachment import Attachment


@dataclass
class Branch:
    """Candidates (their numbers) that are still one: latents [N, C, h, w], and their weights [S] of the next call."""

    latents: Tensor
    members: list[int]
    weights: Row | None = None


@torch.no_grad()
def sample_batched(
    model: Model,
    attachment: Attachment,
    x: Tensor,
    cond: Condition,
    ts: list[int],
    candidates: Sequence[tuple[float, Weights | None]],
    batch: int = 64,
) -> list[Tensor]:
    """Clean latents [N, C, h, w] of each candidate (guidance scale, weights) from `x` [N, C, h, w] at level `ts[0]`.

    batch: pictures that one U-Net call may hold; it takes N at least. `cond.guidance` is not looked at; all scales have
    effect, if `cond` has negative rows. A candidate gets what `sample` gives it alone: to the bit if `batch` < 2 N,
    else within float error, as other batch sizes round differently.
    """
    branches = [Branch(x, list(range(len(candidates))))]
    scales = [scale for scale, _ in candidates]
    for i, t in enumerate(ts):
        t_next = ts[i + 1] if i + 1 < len(ts) else None
        rows = [None if weights is None else weights(model.sigma(t)) for _, weights in candidates]
        parted = [
            Branch(b.latents, group, rows[group[0]]) for b in branches for group in _alike(b.members, map(_bits, rows))
        ]
        branches = []
        for group in _alike(range(len(parted)), [b.weights is None for b in parted]):
            for part in _cut([parted[k] for k in group], max(1, batch // len(x))):
                for branch, out in zip(part, _call(model, attachment, part, cond, t), strict=True):
                    for members in _alike(branch.members, scales):
                        guided = guide(out, replace(cond, guidance=scales[members[0]]))
                        branches.append(Branch(ddim_step(model, guided, branch.latents, t, t_next), members))
    ends = {member: branch.latents for branch in branches for member in branch.members}
    return [ends[i] for i in range(len(candidates))]


def _call(model: Model, attachment: Attachment, part: Sequence[Branch], cond: Condition, t: int) -> list[Tensor]:
    """`predict` for several branches at once: the raw output of each, its negative rows first."""
    n, size = len(part), len(part[0].latents)
    if n == 1:
        return [predict(model, attachment, part[0].latents, t, cond, part[0].weights)]
    negative = None if cond.negative is None else torch.cat([cond.negative] * n)
    out = predict(
        model, attachment, torch.cat([b.latents for b in part]), t, Condition(torch.cat([cond.positive] * n), negative),
        _stacked([b.weights for b in part if b.weights is not None], size),
    )  # fmt: skip
    pieces = torch.split(out, size)
    return list(pieces) if negative is None else [torch.cat(pair) for pair in zip(pieces[:n], pieces[n:], strict=True)]


def _stacked(weights: Sequence[Row], size: int) -> Row | None:
    """The weights of branches of `size` pictures each as those of one call."""
    if not weights:
        return None
    if not any(isinstance(w, Sided) for w in weights):
        return torch.cat([w.expand(size, -1) for w in weights if isinstance(w, Tensor)])
    sides = [w if isinstance(w, Sided) else Sided(w, w) for w in weights]
    return Sided(*(torch.cat([side.expand(size, -1) for side in pair]) for pair in zip(*sides, strict=True)))


def _alike(members: Sequence[int], keys: Iterable[Hashable]) -> list[list[int]]:
    """Members in groups of equal keys, `keys[member]` being a member's."""
    known, groups = list(keys), dict[Hashable, list[int]]()
    for member in members:
        groups.setdefault(known[member], []).append(member)
    return list(groups.values())


def _bits(row: Row | None) -> tuple[bytes, ...] | None:
    if row is None:
        return None
    return tuple(w.detach().cpu().numpy().tobytes() for w in (row if isinstance(row, Sided) else (row,)))


def _cut(branches: Sequence[Branch], size: int) -> list[Sequence[Branch]]:
    return [branches[i : i + size] for i in range(0, len(branches), size)]
