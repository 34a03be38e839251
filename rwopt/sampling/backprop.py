"""From weights to a reward and back: which way a gradient takes through the sampler, and what it starts from.

With `x_{i+1} = A_i x_i + B_i u(x_i, w_i)` (DDIM, u the U-Net), the reward's gradient with respect to row w_i can take
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
from rwopt.sampling.denoise import Condition, Row, Sided, guide, predict
from rwopt.sampling.sample import Weights, ddim_step
from rwopt.unet.attachment import Attachment

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

    def price(self, steps: int, offset: int = 0) -> int:
        """U-Net calls of a run and its backward pass: 1 a step, 3 more where it trains (re-run; backward as two)."""
        return steps + 3 * sum(self.trains(i, steps, offset) for i in range(steps))


def unroll(
    model: Model,
    attachment: Attachment,
    x: Tensor,
    cond: Condition,
    ts: list[int],
    weights: Weights,
    path: GradientPath,
    offset: int = 0,
) -> Tensor:
    """`sample` with gradient along `path`: clean latents [N, C, h, w], bit-equal to what it gives.

    Memory is that of one U-Net call: each step that trains is re-run in the backward pass, its weights an argument of
    the re-run part (a hook that looked them up would read the last step's). Where that is too much (`is_crowded`), the
    U-Net's own checkpointing is on in these steps, and `CROWD` pictures at most share a call, so that memory does not
    grow with N; the latents are then `sample`'s within float error, as other batch sizes round differently.
    """
    crowded = is_crowded(model, attachment, x, cond)
    parts = [slice(i, i + CROWD) for i in range(0, len(x), CROWD)] if crowded else [slice(None)]
    for i, t in enumerate(ts):
        t_next = ts[i + 1] if i + 1 < len(ts) else None
        row = weights(model.sigma(t))

        def step(
            x: Tensor, row: Row | None, cond: Condition, t: int = t, t_next: int | None = t_next
        ) -> Tensor:
            seen = x.detach() if path.mode == "detached" else x
            if isinstance(row, Sided):
                row = row.rows(len(x), cond.negative is not None)
            with checkpointed_blocks(model.unet) if crowded else nullcontext():
                out = in_range(lambda x, row: predict(model, attachment, x, t, cond, row), model.dtype, seen, row)
            return ddim_step(model, guide(out, cond), x, t, t_next)

        if path.trains(i, len(ts), offset):
            ends = [checkpoint(step, x[p], _part(row, p), cond.rows(p), use_reentrant=False) for p in parts]
            x = torch.cat(ends)
        else:
            with torch.no_grad():
                outs = [predict(model, attachment, x[p], t, cond.rows(p), _part(row, p)) for p in parts]
                out = torch.cat([guide(out, cond.rows(p)) for out, p in zip(outs, parts, strict=True)])
            x = ddim_step(model, out, x, t, t_next)  # the linear part keeps its gradient, there is none if truncated
    return x


def _part(row: Row | None, pictures: slice) -> Row | None:
    """The weights of some of the pictures."""
    if isinstance(row, Sided):
        return Sided(*(side[pictures] if side.ndim == 2 else side for side in row))
    return row[pictures] if row is not None and row.ndim == 2 else row


def is_crowded(model: Model, attachment: Attachment, x: Tensor, cond: Condition) -> bool:
    """Whether the steps of a gradient need the U-Net's own checkpointing, as `model.checkpointing` says.

    auto: never on a CPU; on a GPU if a call with all pictures `x` [N, C, h, w] and its backward pass would take more
    than 80 % of the memory that is free. The rest is for what fake tensors do not show (`rwopt.models.memory`).
    """
    if model.checkpointing != "auto" or x.device.type != "cuda":
        return model.checkpointing == "on"
    unused = torch.cuda.memory_reserved(x.device) - torch.cuda.memory_allocated(x.device)
    free = torch.cuda.mem_get_info(x.device)[0] + unused
    rows = x.shape[0] * (1 if cond.negative is None else 2)
    return rows * model.row_bytes(attachment.sites, attachment.mode, x.shape[1:], cond.positive.shape[1:]) > 0.8 * free
