"""The weights of one U-Net call, in the form that costs each site the fewest tensor operations.

Where all rows share their weights and none needs a gradient they are plain numbers: one operation a site, none where
the weight is 1, and nothing to be copied to the device. Else they are tensors, split into a column a site once a
call. Both kinds answer the same two questions, at site `column` with activations `y` [rows, ...]:

    scaled   w y                      what a branch, a resnet's branch or a skip tensor becomes
    blended  b + w (y - b)            what a site with input b becomes, its output being y = b + f(b)

None means unchanged. Both are exact at w = 1, and `blended` gives b itself at w = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def like(output: Any, y: Tensor) -> Any:
    """`y` in the form of a module's output: a tensor, a tuple, or an output class."""
    if isinstance(output, Tensor):
        return y
    return (y, *output[1:]) if type(output) is tuple else type(output)(sample=y)


class Plain:
    """No weights: the plain model."""

    def scaled(self, y: Tensor, column: int) -> Tensor | None:
        return None

    def blended(self, y: Tensor, base: Tensor, column: int) -> Tensor | None:
        return None

    def table(self) -> Tensor | None:
        """The weights as one tensor, [S] or [rows, S]; None for the plain model."""
        return None


class Numbers(Plain):
    """Weights [S] for all rows.

    factors: the same as S tensors of no dimension on the CPU, whatever device the U-Net is on. It is what torch makes
    of a number each time that it multiplies by it; who makes many calls makes them all at once.
    """

    def __init__(self, weights: Sequence[float], factors: Sequence[Tensor] | None = None) -> None:
        self.weights = list(weights)
        self.rests = [1 - w for w in self.weights]
        self.factors: Sequence[Tensor | float] = self.weights if factors is None else factors

    def scaled(self, y: Tensor, column: int) -> Tensor | None:
        return None if self.weights[column] == 1 else y * self.factors[column]

    def blended(self, y: Tensor, base: Tensor, column: int) -> Tensor | None:
        # lerp switches its formula half-way, so it returns b at w = 0 and y at w = 1 themselves; b + w (y - b) would
        # not. From y to b, as the result takes the memory format of the first: another one would make later layers
        # round differently.
        rest = self.rests[column]
        return None if rest == 0 else torch.lerp(y, base.to(y.dtype), rest)

    def table(self) -> Tensor:
        return torch.tensor(self.weights)


class Columns(Plain):
    """Weights [S], or [B, S] with a row for each row of the call; they may need a gradient."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._split: dict[tuple[torch.dtype, torch.device, bool, bool], tuple[Tensor, ...]] = {}

    def column(self, y: Tensor, column: int, rest: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """Of a site w, or 1 - w (`rest`), in a shape that multiplies `y`: 0-d, or [rows, 1, ...]."""
        key = (dtype or y.dtype, y.device, rest, torch.is_grad_enabled())
        if key not in self._split:  # once a call, not once a site
            weights = 1 - self.weights if rest else self.weights
            self._split[key] = weights.to(device=y.device, dtype=key[0]).unbind(-1)
        return spread(self._split[key][column], y)

    def scaled(self, y: Tensor, column: int) -> Tensor:
        return y * self.column(y, column)

    def blended(self, y: Tensor, base: Tensor, column: int) -> Tensor:
        return torch.lerp(y, base.to(y.dtype), self.column(y, column, rest=True))

    def table(self) -> Tensor:
        return self.weights


class Traced(Columns):
    """Weights that a compiled graph reads. It fuses what belongs to a site, so precision costs nothing there."""

    def scaled(self, y: Tensor, column: int) -> Tensor:
        return (y * self.column(y, column, dtype=self.weights.dtype)).to(y.dtype)

    def blended(self, y: Tensor, base: Tensor, column: int) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32)
        return torch.lerp(y.to(wide), base.to(wide), self.column(y, column, rest=True, dtype=wide)).to(y.dtype)

    def column(self, y: Tensor, column: int, rest: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        weights = 1 - self.weights if rest else self.weights
        return spread(weights[..., column], y).to(y.device, dtype or y.dtype)


PLAIN = Plain()


def call_of(weights: Tensor) -> Plain:
    """The weights [S] or [rows, S] of a call. No synchronisation: a tensor on a device stays one."""
    if weights.ndim == 1 and not weights.requires_grad and weights.device.type == "cpu":
        return Numbers(weights.tolist())
    return Columns(weights)


def spread(w: Tensor, y: Tensor) -> Tensor:
    """One site's weights, 0-d or [B], in a shape that multiplies `y`; a video's frames take the row of their video."""
    if not w.ndim:
        return w
    if w.shape[0] != y.shape[0]:
        w = w.repeat_interleave(y.shape[0] // w.shape[0], 0)
    return w.reshape(-1, *[1] * (y.ndim - 1))
