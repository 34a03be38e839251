"""What is weighed where a skip tensor joins the stream, in front of an up block's resnet.

skip: `w s` (Skip-Tuning). backbone: the first half of the stream's channels times w, and low: the low frequencies of
the skip times w (FreeU as in diffusers, to the last bit). structure: FreeU's original gain, `1 + (w - 1) m`, with m the
channel mean of the stream, scaled to [0, 1] in each row. Sources: FreeU (Si et al. 2023, arXiv 2309.11497) and
Skip-Tuning (Ma et al. 2024, arXiv 2402.15170). All are exact at w = 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.utils.torch_utils import fourier_filter
from torch import Tensor

from rwopt.unet.call import PLAIN, Columns, Numbers, Plain


def weigh_join(x: Tensor, stream: int, call: Plain, columns: Sequence[tuple[str, int]]) -> Tensor | None:
    """`x`: the resnet's input [rows, stream + skip, h, w]; `columns`: (kind, column) of each site at this join.

    None: nothing changes. Where nothing needs a gradient `x`, which the block has just made of stream and skip, is
    changed in place: it is not put together twice.
    """
    if call is PLAIN or (isinstance(call, Numbers) and all(call.weights[column] == 1 for _, column in columns)):
        return None
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for kind, column in columns:
            part = x[:, stream:] if kind in ("skip", "low") else x[:, : stream // 2]
            if kind in ("skip", "backbone"):
                part.mul_(_weight(call, column, x))
            else:
                part.copy_(_weighed(kind, part, x[:, :stream], _weight(call, column, x)))
        return x
    h, s = torch.split(x, [stream, x.shape[1] - stream], 1)
    for kind, column in columns:
        w = _weight(call, column, x)
        if kind in ("skip", "low"):
            s = _weighed(kind, s, h, w)
        else:
            half = stream // 2
            h = torch.cat([_weighed(kind, h[:, :half], h, w), h[:, half:]], 1)
    return torch.cat([h, s], 1)


def _weight(call: Plain, column: int, x: Tensor) -> Tensor | float:
    """In single precision at least: half-precision weights would not be the constants that a person wrote."""
    if isinstance(call, Numbers):
        return call.weights[column]
    assert isinstance(call, Columns)
    return call.column(x, column, dtype=torch.promote_types(torch.float32, call.weights.dtype))


def _weighed(kind: str, part: Tensor, stream: Tensor, w: Tensor | float) -> Tensor:
    """One site's part of the join, of the same format."""
    if kind in ("skip", "backbone"):
        return (part * w).to(part.dtype)
    if kind == "structure":
        gain = 1 + (w - 1) * _structure(stream)
        return (part * gain).to(part.dtype)
    filtered = fourier_filter(part, threshold=1, scale=w)
    # A filter that does nothing rounds, so at w = 1 the skip itself goes on, with the filter's gradient.
    same = part + (filtered - filtered.detach()) if filtered.requires_grad else part
    if isinstance(w, Tensor):
        return torch.where(w == 1, same, filtered)
    return same if w == 1 else filtered


def _structure(h: Tensor) -> Tensor:
    """Channel mean, scaled to [0, 1] over each row: [rows, 1, h, w]; 0 where it is constant."""
    mean = h.float().mean(1, keepdim=True)
    low, high = mean.amin((1, 2, 3), keepdim=True), mean.amax((1, 2, 3), keepdim=True)
    return (mean - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
