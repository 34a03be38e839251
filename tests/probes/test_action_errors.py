"""The predicted effect of one cheap call is what the sampler makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from helpers.small import hooks_of, make_tiny_unet
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes.actions import ActionErrors, action_errors, price
from rwopt.probes.teacher import Teacher
from rwopt.sampling.course import course_by_rule
from rwopt.sampling.denoise import Condition, guide, predict
from rwopt.sampling.sample import sample
from rwopt.schedule.actions import FULL, Action, Actions, Level, by_letters
from rwopt.unet.actions import Frame, Known, Past
from rwopt.unet.attachment import Attachment
from rwopt.unet.call import PLAIN

CALLS = 6
ACTIONS = by_letters("ho1agxX")
HELD, LINE, CUT, CUT_LINE, GUIDANCE, CROSS, CROSS_LINE = ACTIONS


class Given:
    """A model and a run, measured once."""

    def __init__(self) -> None:
        scheduler = DDIMScheduler(prediction_type="v_prediction")  # type: ignore[no-untyped-call]
        self.unet = make_tiny_unet()
        self.model = Model("tiny", self.unet, None, None, None, scheduler, torch.device("cpu"))
        random, size = torch.Generator().manual_seed(0), self.unet.config.sample_size
        x = torch.randn(2, self.unet.config.in_channels, size, size, generator=random)
        text, other = torch.randn(2, 2, 5, self.unet.config.cross_attention_dim, generator=random)
        self.inputs = x, Condition(text, other, 3.0)
        self.course = course_by_rule(self.model, CALLS, "dpmpp_2m")
        self.before = self.end()
        self.errors = self.measured(ACTIONS)

    def measured(self, actions: tuple[Action, ...], max_gap: int = 2) -> ActionErrors:
        with Attachment(self.unet, ()) as attachment:
            return action_errors(self.model, attachment, *self.inputs, self.course, actions, max_gap)

    def end(self, plan: list[Action] | None = None) -> Tensor:
        actions = None if plan is None else Actions.along(self.course.sigmas, plan)
        with Attachment(self.unet, ()) as attachment:
            return sample(self.model, attachment, *self.inputs, self.course, actions=actions)

    def moved(self, plan: list[Action]) -> float:
        return float((self.end(plan) - self.before).double().square().mean())


@pytest.fixture(scope="module")
def given() -> Given:
    return Given()


def test_the_price_is_known_before(given: Given) -> None:
    assert given.errors.calls == price(CALLS, ACTIONS)
    assert given.measured(ACTIONS[:1], max_gap=1).calls == price(CALLS, ACTIONS[:1], max_gap=1)


def test_a_held_output_moves_the_end_as_measured(given: Given) -> None:
    for i in range(1, CALLS):
        plan = [HELD if j == i else FULL for j in range(CALLS)]
        assert given.errors(i, HELD, i - 1, -1) == pytest.approx(given.moved(plan), rel=1e-3)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda a: a.letter)
def test_every_action_moves_the_last_call_as_measured(given: Given, action: Action) -> None:
    """There the end is linear in the output, so that an effect is exact for every action."""
    i = CALLS - 1
    plan = [FULL] * i + [action]
    assert given.errors(i, action, i - 1, i - 2) == pytest.approx(given.moved(plan), rel=2e-3)


def test_older_values_of_the_plain_run_are_taken_for_a_longer_gap(given: Given) -> None:
    """The same by a run in which the call between is full, so that it follows the plain one, and stores nothing."""
    i = CALLS - 1
    course, model = given.course, given.model
    with Attachment(given.unet, ()) as attachment:
        acts = attachment.acts(Actions.along(course.sigmas, [FULL] * i + [CUT]))
        x, cond = given.inputs
        states = list[Tensor]()
        sample(model, attachment, x, cond, course, callback=lambda i, x: states.append(x))
        past, frame = acts.frame(Past(), course.sigmas[i - 2], True)
        frame = replace(frame, keep=frozenset({CUT.place}))
        predict(model, attachment.with_frame(frame), states[i - 2], course.told[i - 2], cond)
        past = Past(1, course.sigmas[i - 2], {CUT.place: (Known(course.sigmas[i - 2], 0, frame.values()[CUT.place]),)})
        line = past.line(CUT.place, 0, course.sigmas[i], Level(1.0, CUT, 1e9), 9)
        assert line is not None
        frame = Frame(acts.patterns[CUT], PLAIN, {CUT.place: line})
        cheap = guide(predict(model, attachment.with_frame(frame), states[i], course.told[i], cond), cond)
        full = guide(predict(model, attachment, states[i], course.told[i], cond), cond)
    expected = float((cheap - full).double().square().mean())
    assert given.errors.errors[i, CUT, i - 2, -1] == pytest.approx(expected, rel=1e-3)


def test_lines_of_the_output_are_measured_for_every_pair(given: Given) -> None:
    with Attachment(given.unet, ()) as attachment:
        outs = list(Teacher(given.model, attachment, *given.inputs, given.course).run())
    roots = [sigma**0.5 for sigma in given.course.sigmas]
    for i, last, before in ((3, 2, 1), (5, 3, 1), (5, 4, 2), (4, 2, 0)):
        share = (roots[i] - roots[last]) / (roots[last] - roots[before])
        off = outs[last] + share * (outs[last] - outs[before]) - outs[i]
        negative, positive = off.chunk(2)
        expected = (negative + 3.0 * (positive - negative)).double().square().mean()
        assert given.errors.errors[i, LINE, last, before] == pytest.approx(float(expected), rel=1e-3)


def test_a_line_over_a_wider_pair_goes_by_the_distances(given: Given) -> None:
    roots = [sigma**0.5 for sigma in given.course.sigmas]
    share = ((roots[5] - roots[2]) / (roots[5] - roots[3])) ** 2
    assert given.errors(5, CUT_LINE, 4, 2) == pytest.approx(given.errors(5, CUT_LINE, 4, 3) * share)


def test_calls_are_counted_and_outputs_are_free(given: Given) -> None:
    free = given.measured((HELD, LINE, FULL))
    assert free.calls == CALLS + CALLS * (CALLS - 1) // 2
    assert len(free.sigmas) == len(free.effects) == CALLS
    assert free.pictures == 2
    dear = given.measured((HELD, CUT, CUT_LINE), max_gap=1)
    assert dear.calls - free.calls == (CALLS - 1) + (CALLS - 2)


def test_nothing_stays_on_the_unet(given: Given) -> None:
    assert not hooks_of(given.unet)
    assert torch.equal(given.before, given.end())


def test_it_is_kept_as_json(given: Given, tmp_path: Path) -> None:
    given.errors.save(tmp_path / "errors.json")
    assert ActionErrors.load(tmp_path / "errors.json") == given.errors
    ruled = {(1, Action("sites", sites=(("mid_block.attentions.0.cross", "reuse"),)), 0, -1): 1.0}
    with pytest.raises(UserError, match="stands for no action"):
        ActionErrors((1.0,), (1.0,), ruled, 1, 1).save(tmp_path / "more.json")


def test_guidance_needs_guidance(given: Given) -> None:
    x, cond = given.inputs
    with Attachment(given.unet, ()) as attachment, pytest.raises(UserError, match="have no two sides"):
        action_errors(given.model, attachment, x, cond.unguided(), given.course, (GUIDANCE,))
