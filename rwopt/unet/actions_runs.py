"""A schedule with actions looked up for stock pipelines: whose earlier calls a call may take from.

A U-Net is not told which picture it works on. What is stored belongs to one thread and to one *run*: the sample's
shape, number format and device, the text tensor itself (split guidance has two a step), and the tensor of time steps,
which a pipeline makes anew for each picture. A run is over as soon as its thread makes a call at a higher noise level.
So nothing of one picture is in another, whatever changes in between: a LoRA's scale, other weights, a device. A change
in the middle of a picture acts where something is computed: what is stored comes from before it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.unet.actions import Acts, Frame, Past, Texts, same_tensor
from rwopt.unet.lookup import _PAIRED, Levels, Lookup, is_guided, same_storage


@dataclass
class Run:
    """Of one picture. `text`, `times` and `key` say which; held, so that their memory is no other tensor's."""

    key: tuple[Any, ...]
    text: Tensor | None
    times: Tensor | None
    past: Past = field(default_factory=Past)
    texts: Texts = field(default_factory=Texts)

    def fits(self, key: tuple[Any, ...], text: Tensor | None, times: Tensor | None) -> bool:
        """Whether a call with these is one of this run."""
        if key != self.key or (text is None) != (self.text is None) or (times is None) != (self.times is None):
            return False
        if times is not None and not same_storage(times, self.times):
            return False
        return text is None or self.text is None or same_tensor(text, self.text)


_MOST = 4
"""Runs of a thread: parts of guidance that are called one by one, and no more of old pictures."""


class Runs(threading.local):
    """Those under way in this thread."""

    def __init__(self) -> None:
        self.known: list[Run] = []


class ActingLookup(Lookup):
    """`Lookup` for a schedule with actions, or with keys and values of the text made once a picture."""

    acts: Acts
    texts: bool = False

    def _start(self, target: Any, levels: Levels | None) -> None:
        super()._start(target, levels)
        self._runs = Runs()

    def copied(self, target: Any, whole: bool) -> ActingLookup:
        """Without its plan's `acts`, which belong to the copied U-Net."""
        other = super().copied(target, whole)
        assert isinstance(other, ActingLookup)
        other.texts = self.texts
        return other

    @staticmethod
    def check(target: Any, schedule: Schedule) -> None:
        """UserError if the plan needs an order of guidance that is not known."""
        actions = schedule.actions
        if actions is not None and actions.paired and type(target).__name__ not in _PAIRED:
            raise UserError(
                "actions of kind guidance or with a cfg_branch, and the order of guidance in the batch of a "
                f"{type(target).__name__} is not known: use other actions, or one of {', '.join(sorted(_PAIRED)[:3])} "
                "and kin"
            )

    def frame(self, x: Tensor, t: Any, text: Tensor | None) -> Frame:
        """Of a U-Net call with sample `x` at timestep `t` and `text`."""
        sigma = self._sigma(t)
        paired = self.acts.actions is not None and self.acts.actions.paired
        run = self._run(x, t, text, sigma)
        texts = run.texts if self.texts else None
        # A call whose rows are at several levels computes everything, and none of it is stored.
        acts = self.acts if sigma is not None else Acts(self.acts.patterns, None)
        run.past, frame = acts.frame(run.past, sigma or 0.0, paired and is_guided(), texts)
        if sigma is not None:
            level = sigma

            def finish(frame: Frame) -> None:
                run.past = acts.after(run.past, frame, level)

            frame.finish = finish
        return frame.weighed(self(x, t))

    def _sigma(self, t: Any) -> float | None:
        """The noise level of a call; None if its rows are at several. Without waiting for the device, if it may."""
        levels = self.levels()
        place = self._place(t, levels)
        if place is not None and self._picture is not None:
            return float(levels(self._picture.times[place]))
        times = torch.as_tensor(t).detach().cpu().double().numpy()
        return float(levels(np.asarray(times.flat[0]))) if (times == times.flat[0]).all() else None

    def _run(self, x: Tensor, t: Any, text: Tensor | None, sigma: float | None) -> Run:
        times = t if isinstance(t, Tensor) and t.untyped_storage().nbytes() > t.element_size() else None
        key = tuple(x.shape), x.dtype, x.device, torch.is_grad_enabled()
        runs = self._runs.known
        runs[:] = [run for run in runs if sigma is None or sigma <= run.past.sigma or not run.past.calls]
        for run in runs:
            if run.fits(key, text, times):
                return run
        runs.append(Run(key, text, times))
        del runs[:-_MOST]
        return runs[-1]
