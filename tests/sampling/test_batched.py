"""Several candidates at once: each gets what it gets alone, for fewer U-Net calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from helpers.small import make_tiny_unet
from torch import Tensor

from rwopt.models import Model
from rwopt.sampling.batched import sample_batched
from rwopt.sampling.course import course_by_rule
from rwopt.sampling.denoise import Condition, condition
from rwopt.sampling.sample import Weights, sample
from rwopt.schedule import Schedule
from rwopt.schedule.actions import Actions
from rwopt.tasks import Dials, make_task
from rwopt.tasks.cases import load_cases
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

STEPS = 3
Candidates = Sequence[tuple[float, Weights | None]]


def late(model: Model, factor: float, first: int, columns: int) -> Weights:
    """Weights that are one until step `first`."""
    levels = course_by_rule(model, STEPS).sigmas
    return lambda sigma: torch.full((columns,), factor if levels.index(sigma) >= first else 1.0)


def calls_and_ends(
    model: Model, attachment: Attachment, candidates: Candidates, batch: int, sampler: str = "ddim"
) -> tuple[int, list[Tensor]]:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    cond = condition(model, ["a woman", "a man with a beard"], 3.0)
    course = course_by_rule(model, STEPS, sampler)
    alone = [
        sample(model, attachment, x, condition(model, ["a woman", "a man with a beard"], scale), course, weights)
        for scale, weights in candidates
    ]
    before = model.calls
    ends = sample_batched(model, attachment, x, cond, course, candidates, batch)
    calls = model.calls - before
    for one, end in zip(alone, ends, strict=True):
        if batch < 2 * len(x):
            assert torch.equal(one, end)
        else:
            torch.testing.assert_close(one, end, rtol=0, atol=1e-3)
    return calls, ends


@pytest.mark.parametrize(("sampler", "batch"), [*(("ddim", n) for n in (1, 2, 3, 64)), ("uni_pc", 3), ("uni_pc", 64)])
def test_trajectories_part_where_the_candidates_do(avatars: Model, sampler: str, batch: int) -> None:
    sites = [s.id for s in list_sites(avatars.unet)]
    n = len(sites)
    ones = late(avatars, 1.0, 0, n)
    with Attachment(avatars.unet, sites) as attachment:
        # the same twice; from step 1; from step 2; another scale (parts behind step 0); another from the start
        candidates = [(3.0, ones), (3.0, ones), (3.0, late(avatars, 0.8, 1, n)), (3.0, late(avatars, 1.2, 2, n)),
                      (5.0, ones), (3.0, late(avatars, 0.9, 0, n))]  # fmt: skip
        calls, ends = calls_and_ends(avatars, attachment, candidates, batch, sampler)
    outputs = [2, 4, 5]  # U-Net outputs of each step; 18 if every candidate went alone
    assert calls == (sum(outputs) if batch < 4 else STEPS)
    assert ends[0] is ends[1]
    assert len({end.double().sum().item() for end in ends}) == 5


def test_the_plain_model_and_a_schedule_do_not_mix_rows(avatars: Model) -> None:
    sites = [s.id for s in list_sites(avatars.unet)]
    with Attachment(avatars.unet, sites) as attachment:
        candidates = [(3.0, None), (3.0, late(avatars, 0.7, 1, len(sites))), (4.0, None)]
        calls, _ = calls_and_ends(avatars, attachment, candidates, 64)
    assert calls == 2 * STEPS  # what has no weights cannot share a call with what has


@pytest.mark.parametrize(("batch", "exact"), [(64, False), (3, True), (2, True)])
def test_a_tasks_candidates_are_its_images(avatars: Model, batch: int, exact: bool) -> None:
    """Dials of every kind: another scale, no guidance, another strength; branches, blocks and no schedule."""
    task = make_task("editing", avatars, load_cases("avatars", "train", "editing", 3), 2, batch=batch)
    rng = np.random.default_rng(0)
    branches = [s.id for s in list_sites(avatars.unet, ("self", "cross", "ff"))]
    table = Schedule(branches, [10.0, 0.1], rng.uniform(0.5, 1.5, (2, len(branches))))
    other = Schedule(branches, [10.0, 0.1], rng.uniform(0.5, 1.5, (2, len(branches))))
    blocks = Schedule.constant([s.id for s in list_sites(avatars.unet)], [1.0], 0.9, mode="output")
    points = [(Dials(g, s), w) for g, s, w in [
        (3.0, 0.6, table), (4.0, 0.6, table), (3.0, 0.6, other), (1.0, 0.6, table), (3.0, 0.8, table),
        (3.0, 0.6, blocks), (3.0, 0.6, None),
    ]]  # fmt: skip
    before = avatars.calls
    together = task.candidates(points)
    calls = avatars.calls - before
    alone = [task.images(*point) for point in points]
    assert calls < avatars.calls - before - calls
    for a, b in zip(together, alone, strict=True):
        if exact:
            assert torch.equal(a.images, b)
        else:
            torch.testing.assert_close(a.images, b, rtol=0, atol=2e-3)


def test_schedules_for_one_side_of_guidance_share_a_call(avatars: Model) -> None:
    """Candidates for both sides, the conditional and the other one, guided and not, are what they are alone."""
    task = make_task("generation", avatars, load_cases("avatars", "train", "generation", 3), 2, batch=64)
    ids = [s.id for s in list_sites(avatars.unet, ("self", "cross", "ff"))]
    points = [
        (Dials(guidance, 1.0), Schedule.constant(ids, [10.0], 1.2, cfg_branch=branch))
        for guidance in (3.0, 1.0)
        for branch in ("both", "cond", "uncond")
    ]
    alone = [task.images(*point) for point in points]
    for a, b in zip(task.candidates(points), alone, strict=True):
        torch.testing.assert_close(a.images, b, rtol=0, atol=2e-3)
    assert not any(torch.allclose(alone[0], other, atol=1e-3) for other in alone[1:])
    plain = task.images(Dials(1.0, 1.0))
    torch.testing.assert_close(alone[5], plain)  # without guidance all rows are conditional
    torch.testing.assert_close(alone[4], alone[3])


@pytest.mark.parametrize("image_guidance", [None, 1.5])
def test_what_is_stored_stays_each_candidates_own(image_guidance: float | None) -> None:
    """Under a plan, with two and with three rows a picture (edits by instruction)."""
    unet = make_tiny_unet(in_channels=8)
    scheduler = DDIMScheduler(prediction_type="v_prediction")  # type: ignore[no-untyped-call]
    model = Model("tiny", unet, None, None, None, scheduler, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    x, extra = torch.randn(2, 2, 4, 8, 8, generator=draw)
    text, negative = torch.randn(2, 2, 5, 12, generator=draw)
    cond = Condition(text, negative, 3.0, extra=extra, image_guidance=image_guidance)
    course = course_by_rule(model, 7, "dpmpp_2m")
    sites = [s.id for s in list_sites(unet)]
    candidates: Candidates = [
        (scale, lambda _, w=w: torch.full((len(sites),), w)) for scale, w in ((3.0, 0.8), (3.0, 1.2), (5.0, 0.8))
    ]
    with Attachment(unet, sites) as attachment:
        plain = sample(model, attachment, x, cond, course, candidates[0][1])
        for letters in ("FF1aFoF", "FFgFGFF", "FFnFxFF"):
            actions = Actions.along(course.sigmas, letters)
            ends = sample_batched(model, attachment, x, cond, course, candidates, 64, actions)
            for (scale, weights), end in zip(candidates, ends, strict=True):
                own = replace(cond, guidance=scale)
                alone = sample(model, attachment, x, own, course, weights, actions=actions)
                torch.testing.assert_close(end, alone, rtol=0, atol=1e-4)
            same = torch.allclose(ends[0], plain, rtol=0, atol=1e-4)
            assert same == ("g" in letters and image_guidance is not None)  # three sides have no one difference
