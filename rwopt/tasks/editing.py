"""Edit a source picture: what all methods share, and those that any model can do by a caption of what is wanted.

SDEdit (Meng et al., 2022, arXiv 2108.01073) noises the source to `strength` and denoises with the target caption;
inversion (Song et al., 2021) runs DDIM upwards with the source caption instead, which keeps more. Both take `steps`
calls from whatever strength (inversion as many again, once for each course, without weights), so that prices compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.objectives import Batch
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import condition
from rwopt.sampling.sample import invert
from rwopt.tasks.cases import Case, fit_cases
from rwopt.tasks.pictures import to_masks, to_tensor
from rwopt.tasks.task import Dials, Task
from rwopt.unet.attachment import Attachment


class Editing(Task):
    """`method` "sdedit" or "inversion"; others are subclasses. Every case needs a source picture.

    Pictures of another size than the model's are cut to their centre and scaled (`fit_cases`). masks: [N, 1, H, W] of 0
    and 1, or None where a case has none; latents: of the sources, [N, C, h, w].
    """

    name = "editing"

    def __init__(
        self,
        model: Model,
        cases: Sequence[Case],
        steps: int,
        *args: Any,
        method: str = "sdedit",
        **options: Any,
    ) -> None:
        super().__init__(model, fit_cases(cases, model.picture_size), steps, *args, **options)
        self.method = method
        sources = to_tensor([c.source for c in self.cases])
        if sources is None:
            missing = next(c.id for c in self.cases if c.source is None)
            raise UserError(f"case {missing} has no source picture: an edit needs source_image")
        self.references = sources.to(model.device)
        truths = to_tensor([c.truth for c in self.cases])
        self.truths = None if truths is None else truths.to(model.device)
        masks = to_masks([c.mask for c in self.cases])
        self.masks = None if masks is None else masks.to(model.device)
        self.latents = self.in_parts(self.encode, self.references)
        self._inverted: dict[object, Tensor] = {}

    def encode(self, pictures: Tensor) -> Tensor:
        """Latents [n, C, h, w] of pictures [n, 3, H, W] in [0, 1], as the method uses them."""
        return self.model.latents(pictures)

    def in_parts(self, make: Callable[[Tensor], Tensor], pictures: Tensor) -> Tensor:
        """`make` of all pictures [N, ...], no more at once than share a U-Net call."""
        return torch.cat([make(part) for part in torch.split(pictures, self.batch)])

    @property
    def calls(self) -> int:
        return self.steps * (2 if self.method == "inversion" else 1)

    def reach(self, dials: Dials) -> float:
        return dials.strength

    def start(self, attachment: Attachment, dials: Dials, course: Course, rows: slice) -> Tensor:
        if self.method == "sdedit":
            return course.noised(0, self.latents[rows], self.noise[rows])
        key = course.sigmas, course.told
        if key not in self._inverted:  # once for each course: it depends on no weights
            parts = []
            for i in range(0, len(self), self.batch):
                part = slice(i, i + self.batch)
                cond = condition(self.model, [c.source_caption for c in self.cases[part]], 1.0)
                parts.append(invert(self.model, attachment, self.latents[part], cond, course))
            self._inverted[key] = torch.cat(parts)
        return self._inverted[key][rows]

    def describe(self, images: Tensor, latents: Tensor | None = None) -> Batch:
        batch = super().describe(images, latents)
        batch.truth, batch.mask = self.truths, self.masks
        return batch
