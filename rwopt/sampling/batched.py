"""Several candidates through one sampler: what their trajectories share is computed once, the rest in one batch.

Candidates of one start differ in their weights and guidance scales. Trajectories part at the first step in which the
weights differ; scales part them only after that step's U-Net call, since they enter behind it. What has parted goes
through the U-Net as rows of one batch, each with its own weights, as far as the batch reaches. A U-Net that is told
the scale (LCM's) parts them before the call.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rwopt.models import Model
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition, Row, Sided, told_scale
from rwopt.sampling.sample import Plan, Weights, advance, plan_of
from rwopt.sampling.solvers import Memory, Number
from rwopt.schedule.actions import Actions
from rwopt.unet.actions import Past, joined, parted
from rwopt.unet.attachment import Attachment


@dataclass
class Branch:
    """Candidates (their numbers) that are still one: latents [N, C, h, w], their weights [S] of the next call, what the
    solver remembers, and what is stored of earlier calls."""

    latents: Tensor
    members: list[int]
    weights: Row | None = None
    memory: Memory = ()
    past: Past = field(default_factory=Past)


@torch.no_grad()
def sample_batched(
    model: Model,
    attachment: Attachment,
    x: Tensor,
    cond: Condition,
    course: Course,
    candidates: Sequence[tuple[float, Weights | None]],
    batch: int = 64,
    actions: Actions | None = None,
) -> list[Tensor]:
    """Clean latents [N, C, h, w] of each candidate (guidance scale, weights) from `x` [N, C, h, w] at the first level.

    batch: pictures that one U-Net call may hold; it takes N at least. `cond.guidance` is not looked at; all scales have
    effect, if `cond` has negative rows and the course no guidance of its own. A candidate gets what `sample` gives it
    alone: to the bit if `batch` < 2 N, else within float error, as other batch sizes round differently. actions: what
    each call computes, for all candidates; None: everything.
    """
    plan = plan_of(attachment, actions)
    branches = [Branch(x, list(range(len(candidates))))]
    scales = [scale if course.guidance is None else 0.0 for scale, _ in candidates]
    told = model.guidance_width is not None
    for i, sigma in enumerate(course.sigmas):
        rows = [None if weights is None else weights(sigma) for _, weights in candidates]
        keys = [(_bits(row), scale if told else None) for row, scale in zip(rows, scales, strict=True)]
        parted = [
            Branch(b.latents, group, rows[group[0]], b.memory, b.past)
            for b in branches for group in _alike(b.members, keys)
        ]  # fmt: skip
        branches = []
        for group in _alike(range(len(parted)), [b.weights is None for b in parted]):
            for part in _cut([parted[k] for k in group], max(1, batch // len(x))):
                heard = [scales[b.members[0]] if course.guidance is None else course.guidance[i] for b in part]
                outs = _call(model, attachment, plan, part, cond, course.told[i], heard, sigma)
                for branch, (out, past) in zip(part, outs, strict=True):
                    for members in _alike(branch.members, scales):
                        own = replace(cond, guidance=scales[members[0]])
                        end, memory = advance(model, course, i, out, own, branch.latents, branch.memory)
                        branches.append(Branch(end, members, memory=memory, past=past))
    ends = {member: branch.latents for branch in branches for member in branch.members}
    return [ends[i] for i in range(len(candidates))]


def _call(
    model: Model, attachment: Attachment, plan: Plan, part: Sequence[Branch], cond: Condition, t: Number,
    scales: Sequence[Number], sigma: float,
) -> list[tuple[Tensor, Past]]:  # fmt: skip
    """`Plan.call` for several branches at once: of each the raw output, its negative rows first, and its past.

    scales: guidance of each, for a U-Net that is told it."""
    n, size, guided = len(part), len(part[0].latents), cond.negative is not None
    if n == 1:
        own = told_scale(model, cond, scales[0])
        return [plan.call(model, attachment, part[0].latents, t, own, part[0].weights, part[0].past, sigma)]
    own = replace(cond.times(n), guidance=torch.tensor([float(s) for s in scales]).repeat_interleave(size))
    out, past = plan.call(
        model, attachment, torch.cat([b.latents for b in part]), t, own,
        _stacked([b.weights for b in part if b.weights is not None], size),
        joined([b.past for b in part], cond.each), sigma,
    )  # fmt: skip
    pieces = list(torch.split(out, size))
    if guided:
        pieces = [torch.cat(pair) for pair in zip(pieces[:n], pieces[n:], strict=True)]
    return list(zip(pieces, parted(past, n, cond.each), strict=True))


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
