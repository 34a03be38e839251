"""The teacher: the plain model's own picture from the same start in many calls, the truth for cheap pictures.

It is made once for each case and draw, by a solver that converges (50 calls of DDIM are not there yet, 50 of DPM++ 2M
are: `benchmarks/few_steps.py`), at the plain dials, and is kept in a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rwopt.files import write_bytes
from rwopt.sampling.course import Course
from rwopt.sampling.sample import sample
from rwopt.unet.attachment import Attachment

if TYPE_CHECKING:
    from rwopt.tasks.task import Dials, Task


@torch.no_grad()
def teacher_latents(task: Task, dials: Dials, course: Course) -> Tensor:
    """Clean latents [N, C, h, w] of the plain model's pictures of a task on a course of many calls."""
    parts = []
    with Attachment(task.model.unet, ()) as hooks:
        for start in range(0, len(task), task.batch):
            x, cond, own = task.inputs(hooks, dials, slice(start, start + task.batch), course)
            parts.append(sample(task.model, hooks, x, cond, own))
    return torch.cat(parts)


def teach(task: Task, dials: Dials, course: Course, file: Path | None = None) -> int:
    """Give a task its teacher, from `file` if it is there; the U-Net calls that making it took, then or now."""
    from safetensors import safe_open
    from safetensors.torch import save

    if file is not None and file.exists():
        with safe_open(file, "pt") as kept:
            latents, calls = kept.get_tensor("latents"), int(kept.metadata()["calls"])
    else:
        before = task.model.calls
        latents = teacher_latents(task, dials, course).cpu().contiguous()
        calls = task.model.calls - before
        if file is not None:
            write_bytes(file, save({"latents": latents}, {"calls": str(calls)}))
    task.teacher_latents = latents.to(task.model.device)
    task.teacher = task.decoded(task.teacher_latents)
    return calls
