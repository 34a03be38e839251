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

from rwopt.unet.scope import column_of


def weigh_join(x: Tensor, stream: int, weights: Tensor, columns: Sequence[tuple[str, int]]) -> Tensor:
    """`x`: the resnet's input [rows, stream + skip, h, w]; `columns`: (kind, column) of each site at this join."""
    h, s = x[:, :stream], x[:, stream:]
    for kind, column in columns:
        # In single precision at least: half-precision weights would not be the constants that a person wrote.
        w = column_of(weights, column, x, torch.promote_types(torch.float32, weights.dtype))
        if kind == "skip":
            s = (s * w).to(x.dtype)
        elif kind == "low":
            filtered = fourier_filter(s, threshold=1, scale=w)
            # A filter that does nothing rounds, so at w = 1 the skip itself goes on, with the filter's gradient.
            same = s + (filtered - filtered.detach()) if filtered.requires_grad else s
            s = torch.where(w == 1, same, filtered)
        else:
            half = h.shape[1] // 2
            gain = w if kind == "backbone" else 1 + (w - 1) * _structure(h).to(w.dtype)
            h = torch.cat([(h[:, :half] * gain).to(x.dtype), h[:, half:]], 1)
    return torch.cat([h, s], 1)


def _structure(h: Tensor) -> Tensor:
    """Channel mean, scaled to [0, 1] over each row: [rows, 1, h, w]; 0 where it is constant."""
    mean = h.float().mean(1, keepdim=True)
    low, high = mean.amin((1, 2, 3), keepdim=True), mean.amax((1, 2, 3), keepdim=True)
    return (mean - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
