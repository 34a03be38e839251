"""Edit a source picture by an instruction: InstructPix2Pix (Brooks et al., 2023, arXiv 2211.09800).

The U-Net is shown the source beside the noise, and starts from noise alone. Captions are orders ("make it winter"), and
there are two scales of guidance, one for the words and one for the source (`Dials.image_guidance`).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rwopt.errors import check
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition
from rwopt.tasks.editing import Editing
from rwopt.tasks.task import Dials
from rwopt.unet.attachment import Attachment

IMAGE_GUIDANCE = 1.5
"""The usual scale, also the stock pipelines'."""


class Instructed(Editing):
    """`method` "instruct". `latents` are those of the sources as the VAE gives them, unscaled, which such U-Nets take.

    A guidance scale of 1 is no guidance at all, as in the stock pipelines: one row, whatever the source's scale.
    """

    def encode(self, pictures: Tensor) -> Tensor:
        return self.model.encoded(pictures)

    def reach(self, dials: Dials) -> float:
        return 1.0

    def start(self, attachment: Attachment, dials: Dials, course: Course, rows: slice) -> Tensor:
        return self.noise[rows] * course.scale

    def beside(self, cond: Condition, dials: Dials, rows: slice) -> Condition:
        scale = IMAGE_GUIDANCE if dials.image_guidance is None else dials.image_guidance
        check(scale >= 1, "dials.image_guidance", scale, "give 1 or more: below it, stock pipelines do not guide")
        return replace(cond, extra=self.latents[rows], image_guidance=scale)
