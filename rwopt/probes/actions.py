"""What each cheap action costs in quality at each call: its error there, and what an error there does to the end.

One plain run is followed (`rwopt.probes.teacher`). At its states each action is tried with the values of the plain
run's own full calls, at each distance that a plan may have; actions on the whole output need no call for that. The
error is the mean square of what the guided output moves by. What it does to the final latents is measured by a run that
is plain but for one call, whose output is that of the call before: mean square of the end's movement per mean square of
the output's. It differs by a hundred times between first and last calls, so errors alone would misjudge early calls.

Price: N calls for the run, N (N - 1) / 2 for the effects, and for each action that asks the U-Net a cheap call for each
distance up to `max_gap` (order 1 with the two full calls side by side: error is that of a line, so that for others it
goes by the product of distances on the line's axis).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.files import write_text
from rwopt.models import Model
from rwopt.probes.teacher import Teacher
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition, guide
from rwopt.schedule.actions import FULL, MAX_GAP, Action, Actions, Level, by_letters
from rwopt.unet.actions import Acts, Frame, Known, Line, Past, Texts, axis
from rwopt.unet.attachment import Attachment
from rwopt.unet.call import PLAIN

_FAR = 1e9  # a ratio of noise levels that nothing exceeds

Key = tuple[int, Action, int, int]


@dataclass(frozen=True)
class ActionErrors:
    """What was measured on `pictures` pictures in `calls` U-Net calls (a cheap one counts as one).

    sigmas: VE levels of the calls [N]; effects: mean square of the final latents' movement per that of the guided
    output of each call [N]; errors: {(call, action, last full call, the one before or -1): mean square error of the
    guided output}, order 1 of actions that ask the U-Net for neighbouring full calls alone.
    """

    sigmas: tuple[float, ...]
    effects: tuple[float, ...]
    errors: Mapping[Key, float]
    calls: int
    pictures: int

    def __call__(self, i: int, action: Action, last: int, before: int) -> float:
        """Mean square that the final latents move by if call `i` alone is cheap: `rwopt.tuners.plan.Errors`."""
        if action.takes < 2:
            return self.errors[i, action, last, -1] * self.effects[i]
        error = self.errors.get((i, action, last, before))
        if error is None:
            here, near, far = (axis(self.sigmas[k]) for k in (i, last - 1, before))
            error = self.errors[i, action, last, last - 1] * ((here - far) / (here - near)) ** 2
        return error * self.effects[i]

    def save(self, path: Path) -> None:
        """As JSON. Actions are kept by their letters: UserError for those that have none."""
        rows = [[i, action.letter, last, before, error] for (i, action, last, before), error in self.errors.items()]
        for letter in {str(row[1]) for row in rows}:
            by_letters(letter)
        body = {"sigmas": self.sigmas, "effects": self.effects, "calls": self.calls, "pictures": self.pictures}
        write_text(path, json.dumps({**body, "errors": rows}) + "\n")

    @classmethod
    def load(cls, path: Path) -> ActionErrors:
        body = json.loads(path.read_text())
        errors = {(i, by_letters(letter)[0], last, before): e for i, letter, last, before, e in body.pop("errors")}
        return cls(tuple(body["sigmas"]), tuple(body["effects"]), errors, body["calls"], body["pictures"])


@torch.no_grad()
def action_errors(
    model: Model, attachment: Attachment, x: Tensor, cond: Condition, course: Course, actions: Sequence[Action],
    max_gap: int = MAX_GAP,
) -> ActionErrors:  # fmt: skip
    """Measure `actions` along the plain run from `x` [N, C, h, w]. Raises `UserError` for an action on guidance where
    there is none, and for what the U-Net has not."""
    actions = [action for action in dict.fromkeys(actions) if action != FULL]
    if not cond.paired and any(action.kind == "guidance" for action in actions):
        raise UserError(
            "actions name guidance, and this run's calls have no two sides: leave it out, or set dials.guidance above 1"
        )
    teacher = Teacher(model, attachment, x, cond, course)
    acts = attachment.acts(Actions(tuple(Level(float(n + 1), a, _FAR) for n, a in enumerate(actions))[::-1]))
    names = frozenset(name for action in actions for name in acts.names(action)) - {"output"}
    texts, fresh = Texts(vouched=True), list[dict[str, Known]]()
    errors: dict[Key, float] = {}
    outs: list[Tensor] = []
    for i, sigma in enumerate(course.sigmas):
        frame = Frame(acts.patterns[FULL], PLAIN, {}, names, texts)
        teacher.attachment = attachment.with_frame(frame)
        out = teacher.predict(i)
        plain = guide(out, cond, course.scale_at(i))
        for action in actions:
            for last, before in _sources(action, i, max_gap):
                lines = _lines(acts, action, fresh, last, before, i, sigma)
                if action.kind == "output":
                    cheap = lines["output"].value(0)
                else:
                    teacher.attachment = attachment.with_frame(
                        Frame(acts.patterns[action], PLAIN, lines, frozenset(), texts)
                    )
                    cheap = teacher.predict(i)
                moved = guide(cheap, cond, course.scale_at(i)) - plain
                errors[i, action, last, before] = float(moved.double().square().mean())
        values = {"output": (out,), **frame.values()}
        fresh.append({name: Known(sigma, i, value) for name, value in values.items()})
        if i > max_gap:  # no later call takes anything else of this one
            fresh[i - max_gap - 1] = {"output": fresh[i - max_gap - 1]["output"]}
        outs.append(out)
        teacher.advance(i, out)
    teacher.attachment = attachment
    effects = tuple(_effects(teacher, outs))
    return ActionErrors(tuple(course.sigmas), effects, errors, teacher.calls, len(x))


def price(calls: int, actions: Sequence[Action], max_gap: int = MAX_GAP) -> int:
    """U-Net calls that `action_errors` makes on a course of `calls` calls."""
    asking = [action for action in dict.fromkeys(actions) if action.kind not in ("full", "output")]
    cheap = sum(1 for action in asking for i in range(calls) for _ in _sources(action, i, max_gap))
    return calls + calls * (calls - 1) // 2 + cheap


def _sources(action: Action, i: int, max_gap: int) -> Iterator[tuple[int, int]]:
    """The full calls (last, before) whose values an action at call `i` may take."""
    for last in range(max(0, i - max_gap), i):
        if action.takes < 2:
            yield last, -1
        elif action.kind == "output":
            yield from ((last, before) for before in range(max(0, last - max_gap - 1), last))
        elif last:
            yield last, last - 1


def _lines(
    acts: Acts, action: Action, fresh: Sequence[Mapping[str, Known]], last: int, before: int, i: int, sigma: float
) -> dict[str, Line]:
    """What a call takes of the values of two full calls, as a run would have them."""
    rules = {site.id: rule for site, rule in acts.patterns.ruled(action).items()} if action.kind == "sites" else {}
    level, lines = Level(sigma, action, _FAR), dict[str, Line]()
    for name in acts.names(action):
        known = tuple(fresh[k][name] for k in (before, last) if k >= 0)
        by = int(rules.get(name) == "extrapolate") if rules else action.order
        line = Past(i, sigma, {name: known}).line(name, by, sigma, level, i)
        assert line is not None
        lines[name] = line
    return lines


def _effects(teacher: Teacher, outs: Sequence[Tensor]) -> Iterator[float]:
    """Of each call: the end moves so much, per movement of its guided output, both as mean squares."""
    cond, course, n = teacher.cond, teacher.course, len(outs)
    end = teacher.follow(n - 1, outs[-1])
    for i, out in enumerate(outs):
        moved = outs[i - 1] if i else outs[min(1, n - 1)]
        size = (guide(moved, cond, course.scale_at(i)) - guide(out, cond, course.scale_at(i))).double().square().mean()
        yield float((teacher.follow(i, moved) - end).double().square().mean() / size.clamp(min=1e-30))
