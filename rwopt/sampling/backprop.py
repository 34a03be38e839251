"""From weights to a reward and back: which way a gradient takes through the sampler, and what it starts from.

With `x_{i+1} = A_i x_i + B_i u(x_i, w_i)` (DDIM, u the U-Net), the reward's gradient with respect to row w_i can take
- `full`: every path, as DRaFT (Clark et al., 2023, arXiv 2309.17400) with one checkpoint a step;
- `truncated`: the last K steps only (DRaFT-K); earlier rows get exactly zero;
- `detached`: no path through the input of a U-Net call (DRTune, Wu et al., 2024, arXiv 2405.00760): every row trains
  by its own direct effect and the linear part of the sampler, without a long chain of Jacobians.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.sampling import GRADIENTS
from rwopt.sampling.denoise import Condition, guide, predict
from rwopt.sampling.sample import Weights, ddim_step
from rwopt.unet.attachment import Attachment

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
    the re-run part (a hook that looked them up would read the last step's).
    """
    for i, t in enumerate(ts):
        t_next = ts[i + 1] if i + 1 < len(ts) else None
        row = weights(model.sigma(t))

        def step(x: Tensor, row: Tensor | None, t: int = t, t_next: int | None = t_next) -> Tensor:
            seen = x.detach() if path.mode == "detached" else x
            out = guide(predict(model, attachment, seen, t, cond, row), cond)
            return ddim_step(model, out, x, t, t_next)

        if path.trains(i, len(ts), offset):
            x = checkpoint(step, x, row, use_reentrant=False)
        else:
            with torch.no_grad():
                out = guide(predict(model, attachment, x, t, cond, row), cond)
            x = ddim_step(model, out, x, t, t_next)  # the linear part keeps its gradient, there is none if truncated
    return x
