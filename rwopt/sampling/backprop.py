"""From weights to a reward and back: which way a gradient takes through the sampler, and what it starts from.

With `x_{i+1} = A_i x_i + B_i u(x_i, w_i)` (DDIM, u the U-Net; a multistep sampler adds earlier u), the reward's
gradient with respect to row w_i can take
- `full`: every path, as DRaFT (Clark et al., 2023, arXiv 2309.17400) with one checkpoint a step;
- `truncated`: the last K steps only (DRaFT-K); earlier rows get exactly zero;
- `detached`: no path through the input of a U-Net call (DRTune, Wu et al., 2024, arXiv 2405.00760): every row trains
  by its own direct effect and the linear part of the sampler, without a long chain of Jacobians.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.models.formats import in_range
from rwopt.models.memory import checkpointed_blocks
from rwopt.sampling import GRADIENTS
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition, Row, Sided, told_scale
from rwopt.sampling.sample import Plan, Weights, advance, plan_of
from rwopt.sampling.solvers import Memory
from rwopt.schedule.actions import Actions
from rwopt.unet.actions import Past
from rwopt.unet.attachment import Attachment

ROOM = 2 * 2**30  # bytes of activations that a computer without a GPU may be asked for
CROWD = 4  # pictures that share a U-Net call where memory is short: eight rows with guidance, which keep a GPU busy
Reward = Callable[[Tensor], Tensor]  # final latents [N, C, h, w] -> scores [N], differentiable


@dataclass(frozen=True)
class GradientPath:
    """The way of a gradient. last: K of `truncated`. stride: `detached` trains every stride-th step.

    Which ones moves on with `offset`, so that in `stride` rounds every row has had its turn.
    """

    mode: str = "detached"
    last: int = 2
    stride: int = 1

    def __post_init__(self) -> None:
        if self.mode not in GRADIENTS:
            raise UserError(f"gradient.mode={self.mode} is unknown: one of {', '.join(GRADIENTS)}")
        for name in ("last", "stride"):
            if getattr(self, name) < 1:
                raise UserError(f"gradient.{name}={getattr(self, name)} must be at least 1")

    def trains(self, i: int, steps: int, offset: int = 0) -> bool:
        """Whether row `i` of `steps` gets a gradient in round `offset`."""
        if self.mode == "truncated":
            return i >= steps - self.last
        return self.mode == "full" or (i + offset) % self.stride == 0

    def price(self, steps: int, offset: int = 0, kept: bool = False) -> int:
        """U-Net calls of a run and its backward pass: 1 a step, 3 more where it trains (re-run; backward as two), or 2
        where activations are `kept`."""
        return steps + (2 if kept else 3) * sum(self.trains(i, steps, offset) for i in range(steps))


def unroll(
    model: Model,
    attachment: Attachment,
    x: Tensor,
    cond: Condition,
    course: Course,
    weights: Weights,
    path: GradientPath,
    offset: int = 0,
    actions: Actions | None = None,
) -> Tensor:
    """`sample` with gradient along `path`: clean latents [N, C, h, w], bit-equal to what it gives.

    Where there is room the activations of all steps are kept (`keeps_activations`). Else memory is that of one U-Net
    call: each step that trains is re-run in the backward pass, its weights and the solver's memory arguments of the
    re-run part (a hook that looked weights up would read the last step's). Where that is too much (`is_crowded`), the
    U-Net's own checkpointing is on in these steps, and `CROWD` pictures at most share a call, so that memory does not
    grow with N; the latents are then `sample`'s within float error, as other batch sizes round differently. Levels,
    told timesteps and guidance of the course may need a gradient like the weights.

    actions: what each call computes; None: everything. A stored output enters behind the U-Net, as a multistep solver's
    memory does, and always keeps its gradient; all else that is stored is an input of a call, so `detached` has no
    path through it. float16 with another path than `detached` is refused there: each call has its own gradient's scale.
    """
    inside = [a for a in actions.patterns if a.kind not in ("full", "output")] if actions is not None else []
    if inside and model.dtype == torch.float16 and path.mode != "detached":
        raise UserError(
            f"model.dtype=float16 has no gradient through what action {inside[0].kind} stores: use bfloat16, float32, "
            "or gradient.mode=detached"
        )
    crowded, kept = is_crowded(model, attachment, x, cond), keeps_activations(model, attachment, x, cond, len(course))
    parts = [slice(i, i + CROWD) for i in range(0, len(x), CROWD)] if crowded else [slice(None)]
    guided = cond.negative is not None
    plans, pasts = [plan_of(attachment, actions) for _ in parts], [Past() for _ in parts]
    memory: Memory = ()
    for i, sigma in enumerate(course.sigmas):
        row = weights(sigma)
        call = told_scale(model, cond, course.scale_at(i))
        free = plans[0].stored(pasts[0], sigma, cond.paired) is not None

        def step(
            x: Tensor, row: Row | None, cond: Condition, memory: Memory, past: Past, plan: Plan, part: slice,
            i: int = i, sigma: float = sigma,
        ) -> tuple[Tensor, Memory, Past]:  # fmt: skip
            seen = x.detach() if path.mode == "detached" else x
            if isinstance(row, Sided):
                row = row.rows(len(x), guided)
            after: list[Past] = []

            def network(x: Tensor, row: Tensor | None, t: Tensor | None, scale: Tensor | None) -> Tensor:
                told = course.told[i] if t is None else t
                heard = told_scale(model, cond, scale)
                out, new = plan.call(model, attachment, x, told, heard, row, past, sigma)
                after.append(new.detached() if path.mode == "detached" else new)
                return out

            dials = (v if isinstance(v, Tensor) else None for v in (course.told[i], cond.guidance))
            with checkpointed_blocks(model.unet) if crowded else nullcontext():
                out = in_range(network, model.dtype, seen, row, *dials)
            return *advance(model, course, i, out, cond, x, memory, part), after[0]

        if free or path.trains(i, len(course), offset):
            ends = []
            for p, plan, past in zip(parts, plans, pasts, strict=True):
                given = x[p], _part(row, p), call.rows(p), tuple(m[p] for m in memory), past, plan, p
                ends.append(step(*given) if kept or free else checkpoint(step, *given, use_reentrant=False))
            x = torch.cat([end for end, _, _ in ends])
            memory = tuple(torch.cat(m) for m in zip(*(memory for _, memory, _ in ends), strict=True))
            pasts = [past for _, _, past in ends]
        else:
            with torch.no_grad():
                calls = [
                    plan.call(model, attachment, x[p], course.told[i], call.rows(p), _part(row, p), past, sigma)
                    for p, plan, past in zip(parts, plans, pasts, strict=True)
                ]
                outs, pasts = [out for out, _ in calls], [past for _, past in calls]
                out = outs[0]
                if len(outs) > 1:  # both sides of guidance apart, as the sampler expects them
                    sides = [out.chunk(1 if cond.negative is None else 2) for out in outs]
                    out = torch.cat([torch.cat(side) for side in zip(*sides, strict=True)])
            x, memory = advance(model, course, i, out, cond, x, memory)  # the linear part keeps its gradient, if any
    return x


def _part(row: Row | None, pictures: slice) -> Row | None:
    """The weights of some of the pictures."""
    if isinstance(row, Sided):
        return Sided(*(side[pictures] if side.ndim == 2 else side for side in row))
    return row[pictures] if row is not None and row.ndim == 2 else row


def keeps_activations(model: Model, attachment: Attachment, x: Tensor, cond: Condition, calls: int) -> bool:
    """Whether the activations of all `calls` fit, so that nothing is computed twice: by `ROOM`, or half of what is free
    on a GPU. Only where `model.checkpointing` is auto."""
    if model.checkpointing != "auto":
        return False
    room = float(ROOM)
    if x.device.type == "cuda":
        room = 0.5 * _free(x.device)
    return calls * _call_bytes(model, attachment, x, cond) < room


def _call_bytes(model: Model, attachment: Attachment, x: Tensor, cond: Condition) -> float:
    """What a U-Net call with all pictures `x` and its backward pass take."""
    rows = x.shape[0] * cond.each
    return rows * model.row_bytes(attachment.sites, attachment.mode, x.shape[1:], cond.positive.shape[1:])


def _free(device: torch.device) -> int:
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def is_crowded(model: Model, attachment: Attachment, x: Tensor, cond: Condition) -> bool:
    """Whether the steps of a gradient need the U-Net's own checkpointing, as `model.checkpointing` says.

    auto: never on a CPU; on a GPU if a call with all pictures `x` [N, C, h, w] and its backward pass would take more
    than 80 % of the memory that is free. The rest is for what fake tensors do not show (`rwopt.models.memory`).
    """
    if model.checkpointing != "auto" or x.device.type != "cuda":
        return model.checkpointing == "on"
    return _call_bytes(model, attachment, x, cond) > 0.8 * _free(x.device)
