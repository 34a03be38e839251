"""Edit a source picture towards a target caption: SDEdit, or DDIM inversion with the target prompt.

SDEdit (Meng et al., 2022, arXiv 2108.01073) noises the source to `strength` and denoises with the target caption;
inversion (Song et al., 2021) runs DDIM upwards with the source caption instead, which keeps more. Both take `steps`
calls from whatever strength (inversion as many again, once for each strength, without weights), so that prices compare.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.objectives import Batch
from rwopt.sampling.denoise import Condition, condition
from rwopt.sampling.noise import add_noise, timesteps
from rwopt.sampling.sample import invert
from rwopt.tasks.cases import Case
from rwopt.tasks.task import Dials, Task
from rwopt.unet.attachment import Attachment


def to_tensor(pictures: Sequence[np.ndarray | None]) -> Tensor | None:
    """uint8 [H, W, 3] each to float [N, 3, H, W] in [0, 1]; None if one is missing."""
    if any(p is None for p in pictures):
        return None
    stacked = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
    return stacked.permute(0, 3, 1, 2).float() / 255


def _check_size(model: Model, case: str, kind: str, picture: np.ndarray | None) -> None:
    """Raise `UserError` unless the picture has the size that the model makes."""
    if picture is not None and picture.shape[:2] != model.picture_size:
        (height, width), (high, wide) = picture.shape[:2], model.picture_size
        raise UserError(f"case {case}: {kind} is {width} x {height}, {model.name} makes {wide} x {high}: resize it")


class Editing(Task):
    """`method` "sdedit" or "inversion"; every case needs a source picture."""

    name = "editing"

    def __init__(
        self,
        model: Model,
        cases: Sequence[Case],
        steps: int,
        draws: int = 1,
        batch: int = 64,
        seed: int = 0,
        method: str = "sdedit",
    ) -> None:
        super().__init__(model, cases, steps, draws, batch, seed)
        if method not in ("sdedit", "inversion"):
            raise UserError(f"task.method={method} is unknown: sdedit or inversion")
        self.method = method
        for case in self.cases:
            for kind, picture in (("source", case.source), ("truth", case.truth)):
                _check_size(model, case.id, kind, picture)
        sources = to_tensor([c.source for c in self.cases])
        if sources is None:
            missing = next(c.id for c in self.cases if c.source is None)
            raise UserError(f"case {missing} has no source picture: an edit needs source_image")
        self.references = sources.to(model.device)
        truths = to_tensor([c.truth for c in self.cases])
        self.truths = None if truths is None else truths.to(model.device)
        self.latents = torch.cat(
            [model.latents(self.references[i : i + batch]) for i in range(0, len(self), batch)]
        )
        self._inverted: dict[float, Tensor] = {}

    @property
    def calls(self) -> int:
        return self.steps * (2 if self.method == "inversion" else 1)

    def _start(self, attachment: Attachment, strength: float, ts: list[int], rows: slice) -> Tensor:
        if self.method == "sdedit":
            return add_noise(self.model, self.latents[rows], self.noise[rows], ts[0])
        if strength not in self._inverted:  # once for each strength: it depends on no weights
            parts = []
            for i in range(0, len(self), self.batch):
                part = slice(i, i + self.batch)
                cond = condition(self.model, [c.source_caption for c in self.cases[part]], 1.0)
                parts.append(invert(self.model, attachment, self.latents[part], cond, ts))
            self._inverted[strength] = torch.cat(parts)
        return self._inverted[strength][rows]

    def inputs(self, attachment: Attachment, dials: Dials, rows: slice) -> tuple[Tensor, Condition, list[int]]:
        ts = timesteps(self.model, self.steps, dials.strength)
        cond = condition(self.model, [c.caption for c in self.cases[rows]], dials.guidance)
        return self._start(attachment, dials.strength, ts, rows), cond, ts

    def describe(self, images: Tensor) -> Batch:
        batch = super().describe(images)
        batch.truth = self.truths
        return batch
