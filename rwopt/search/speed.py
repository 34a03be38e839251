"""A plan of actions under a budget of compute: proposed by a dynamic program, chosen on validation cases.

The budget is a share of the time of the plain run (`task.steps` full calls, `task.budget`). Time is counted in full
calls by measured costs of each action (`rwopt.unet.cost`): on this machine at the batch size of the search, or those of
the file `speed.cost`, measured on another.

1. For grids of several lengths, from `task.steps` calls down to as many as the budget pays in full, one plain run on a
   few train cases tells the error of each action at each call and what it does to the end (`rwopt.probes.actions`).
2. A dynamic program proposes plans (`rwopt.tuners.plan`); every call full, on the grid that the budget pays, is one.
3. Validation cases choose among them, by the recipe's own objective.

Weights and the sampler's dials are learned afterwards, with the plan on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from rwopt.errors import UserError
from rwopt.files import write_bytes, write_text
from rwopt.models import Model
from rwopt.probes.actions import ActionErrors, action_errors, price
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition, predict
from rwopt.schedule import Schedule
from rwopt.schedule.actions import FULL, Action, Actions, by_letters
from rwopt.search.arms import Arm
from rwopt.search.experiment import Experiment
from rwopt.search.tuning import ArmTuner
from rwopt.tuners.plan import Proposal, proposals
from rwopt.unet.attachment import Attachment
from rwopt.unet.cost import CostTable, cost_table

COSTS = "cost.json"
"""In a run folder: the table of costs."""

GRIDS = 4
"""Lengths of grid that plans are looked for on."""


class Speed:
    """The stage of one run. Costs and errors are kept in its folder: `cost.json`, `actions-<calls>.json`."""

    def __init__(self, experiment: Experiment, tuner: ArmTuner, folder: Path) -> None:
        self.experiment, self.tuner, self.folder = experiment, tuner, folder
        self.settings = experiment.settings

    @property
    def most(self) -> float:
        """The price that a plan may have, in full calls."""
        return self.settings.task.budget * self.settings.task.steps + 1e-9

    @property
    def affordable(self) -> int:
        """Full calls that the budget pays, 1 at least: those of a plain solver at the same price."""
        return self.settings.task.affordable

    @property
    def guided(self) -> bool:
        """Whether calls have rows [unconditional, conditional]."""
        base, model = self.experiment.base, self.experiment.model
        return base.guidance != 1 and base.image_guidance is None and model.guidance_width is None

    @property
    def actions(self) -> tuple[Action, ...]:
        """The recipe's actions; none on guidance where there is none."""
        found = by_letters(self.settings.speed.actions)
        return tuple(a for a in dict.fromkeys(found) if a != FULL and (self.guided or a.kind != "guidance"))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the grids on which plans with cheap calls are looked for, longest first."""
        least, most = self.affordable + 1, self.settings.task.steps
        return tuple(sorted({round(n) for n in np.linspace(least, most, GRIDS)} | {most}, reverse=True))

    @property
    def calls(self) -> int:
        """About how much finding the plan takes at most, in full U-Net calls of `task.batch` pictures."""
        task, wanted = self.settings.task, self.settings.speed
        share = min(wanted.cases, task.train * task.draws, task.batch) / task.batch
        measured = sum(price(calls, self.actions, wanted.max_gap) for calls in self.lengths)
        tried = len(self.lengths) * wanted.proposals + 1
        return round(share * measured + tried * self.affordable * -(-task.validation * task.draws // task.batch))

    def course(self, calls: int) -> Course:
        """The task's sampler on its grid of another length, at the recipe's dials."""
        return self.experiment.course(self.experiment.base, calls)

    def check(self) -> None:
        """Bring the recipe's own costs into the run folder, once. UserError for a file that does not fit this run."""
        place, path = self.settings.speed.cost, self.folder / COSTS
        if not place or path.exists():
            return
        key = f"speed.cost={place}"
        if self.settings.task.budget >= 1:
            raise UserError(f"{key}: at task.budget=1 no plan is searched for, set it below 1, or leave this out")
        table = CostTable.load(place)
        if table.guided != self.guided:
            have, need = ("with" if guided else "without" for guided in (table.guided, self.guided))
            flag = "without" if self.guided else "with"
            raise UserError(f"{key}: is of calls {have} guidance, this run's are {need}: measure {flag} --no-guidance")
        model = self.experiment.model
        own = (model.unet.config.in_channels, *model.latent_shape[1:])
        if table.shape[1:] != own:
            have, need = (" x ".join(map(str, shape)) for shape in (table.shape[1:], own))
            raise UserError(f"{key}: is of latents {have}, this run's are {need}: measure at its size (--size)")
        for action in self.actions:
            try:
                table.of(action)
            except UserError:
                remedy = "leave it out of speed.actions, or measure again"
                raise UserError(f"{key}: has no cost of action {action.letter}: {remedy}") from None
        write_bytes(path, Path(place).read_bytes())

    def cost(self) -> CostTable:
        """What actions cost, measured once."""
        path = self.folder / COSTS
        if path.exists():
            return CostTable.load(path)
        model, task = self.experiment.model, self.experiment.splits.task("validation")
        with Attachment(model.unet, ()) as hooks:
            x, cond, course = task.inputs(hooks, self.experiment.base, slice(0, task.batch))
        shape, rest = arguments(model, x, cond, course)
        table = cost_table(model.unet, shape, rest, cond.paired, self.actions)
        write_text(path, json.dumps(table.to_json()) + "\n")
        return table

    def errors(self, calls: int) -> ActionErrors:
        """Of each action on the grid of `calls` calls, on the first train cases."""
        path = self.folder / f"actions-{calls}.json"
        if path.exists():
            return ActionErrors.load(path)
        experiment, wanted = self.experiment, self.settings.speed
        task = experiment.splits.task("train")
        with Attachment(experiment.model.unet, ()) as hooks:
            rows = slice(0, min(wanted.cases, len(task), task.batch))
            x, cond, course = task.inputs(hooks, experiment.base, rows, self.course(calls))
            found = action_errors(experiment.model, hooks, x, cond, course, self.actions, wanted.max_gap)
        found.save(path)
        return found

    def proposed(self, calls: int) -> list[Proposal]:
        """Plans of `calls` calls within the budget, best predictions first."""
        cost, wanted = self.cost(), self.settings.speed
        prices = {action: cost.of(action) for action in self.actions}
        return proposals(calls, prices, self.errors(calls), self.most, wanted.max_gap, wanted.proposals)

    def schedule(self, plan: tuple[Action, ...]) -> Schedule:
        """The plain model with a plan, on the task's grid of its length."""
        course = self.course(len(plan))
        cheap = any(action != FULL for action in plan)
        actions = Actions.along(course.sigmas, plan, self.settings.speed.max_gap) if cheap else None
        return self.experiment.plain(course, actions)

    def plan(self, name: str = "plan", note: str = "") -> Arm:
        """The arm of the plan that does best on validation cases.

        Its `choice`: price in full calls; measured: U-Net calls that errors took; first: the plan of the best
        prediction, which the choice on validation cases is to be held against.
        """
        done = self.tuner.kept(name)
        if done is not None and "price" in done.choice:
            return done
        found = {calls: self.proposed(calls) for calls in self.lengths}
        plans = [p for group in found.values() for p in group]
        plans.append(Proposal((FULL,) * self.affordable, float(self.affordable), np.nan))
        named = {p.text: p for p in plans}
        arm = self.tuner.best_of(name, {text: self.schedule(p.actions) for text, p in named.items()}, note)
        measured = sum(self.errors(calls).calls for calls in self.lengths)
        arm.calls += measured
        longest = next((group for group in found.values() if group), plans)
        arm.choice |= {"price": named[arm.choice["best"]].price, "measured": measured, "first": longest[0].text}
        return self.tuner.keep(arm)


def arguments(model: Model, x: Tensor, cond: Condition, course: Course) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Shape of the sample, and the other arguments, of the U-Net call that `predict` makes; none is made."""
    seen: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def note(x: Tensor, t: Any, text: Tensor, weights: Any, **more: Any) -> Tensor:
        seen.append((tuple(x.shape), {"encoder_hidden_states": text, **more}))
        return x

    predict(model, cast(Attachment, note), x, course.told[0], cond)
    model.calls -= 1
    return seen[0]
