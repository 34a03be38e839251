"""What the U-Net is told under a schedule with steps: by the solver's level, whatever the form of the timestep."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from helpers import samplers
from helpers.samplers import SD
from helpers.small import hooks_of, inputs
from helpers.twins import ids_of, make_small
from torch._dynamo.testing import CompileCounter

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.noise import noise_table, sigma_at
from rwopt.schedule.steps import Steps
from rwopt.unet.apply import apply

TABLE = noise_table(SD)
GRID, TOLD = [900, 600, 300], [850.0, 640.5, 240.0]
STEPS = Steps("dpmpp_2m", tuple(sigma_at(GRID, TABLE)), tuple(sigma_at(TOLD, TABLE)))
OTHER = replace(STEPS, told=tuple(sigma_at([800, 500, 200], TABLE)))


class Watch:
    """Timesteps that a U-Net is told, one list a call."""

    def __init__(self, unet: Any) -> None:
        self.calls: list[list[float]] = []
        unet.time_proj.register_forward_pre_hook(self)

    def __call__(self, module: Any, args: Any) -> None:
        self.calls.append(args[0].tolist())

    def __deepcopy__(self, memo: Any) -> Watch:
        return self

    def last(self) -> list[float]:
        return [round(t, 2) for t in self.calls[-1]]


def plain(unet: Any, steps: Steps | None = STEPS, **fields: Any) -> Schedule:
    return Schedule.constant(ids_of(unet), [9.0], noise=SD, steps=steps, **fields)


def pipeline(unet: Any, **options: Any) -> Any:
    return SimpleNamespace(unet=unet, scheduler=DPMSolverMultistepScheduler(**SD, **options))


def run(pipe: Any, grid: Any = GRID, unet: Any = None) -> list[torch.Tensor]:
    """A picture's calls, as a pipeline makes them."""
    x, _, text = inputs()
    pipe.scheduler.set_timesteps(timesteps=list(grid))
    with torch.no_grad():
        return [(unet or pipe.unet)(x, t, text).sample for t in pipe.scheduler.timesteps]


@pytest.fixture
def watch(tiny_unet: UNet2DConditionModel) -> Iterator[Watch]:
    yield Watch(tiny_unet)
    assert len(hooks_of(tiny_unet)) == 1


FORMS: dict[str, Any] = {
    "int": 600,
    "float": 600.0,
    "0-d": torch.tensor(600),
    "[1]": torch.tensor([600]),
    "[B]": torch.tensor([600, 600]),
    "float32": torch.tensor(600.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by", ["position", "name"])
def test_every_form_of_the_timestep(tiny_unet: UNet2DConditionModel, watch: Watch, form: str, by: str) -> None:
    """On a bare U-Net, which has no picture: each call by its own level."""
    x, _, text = inputs()
    expected = tiny_unet(x, torch.tensor(640.5), text).sample
    with apply(tiny_unet, plain(tiny_unet)):
        if by == "name":
            actual = tiny_unet(sample=x, timestep=FORMS[form], encoder_hidden_states=text).sample
        else:
            actual = tiny_unet(x, FORMS[form], text).sample
        torch.testing.assert_close(actual, expected)
        assert watch.last() == [640.5, 640.5]
        tiny_unet(x, 610, text)  # no level of the file's
        assert watch.last() == [610, 610]
        tiny_unet(x, torch.tensor([900, 601]), text)  # 601 is 600 to within 0.01 in ln sigma
        assert watch.last() == [850, 640.5]
        tiny_unet(x, torch.tensor([610, 300]), text)
        assert watch.last() == [610, 240]
    tiny_unet(x, 600, text)
    assert watch.last() == [600, 600]


@pytest.mark.parametrize("form", ["view", "[1]", "expanded", "cloned"])
def test_a_pictures_calls_by_their_place(tiny_unet: UNet2DConditionModel, watch: Watch, form: str) -> None:
    pipe, (x, _, text) = pipeline(tiny_unet), inputs()
    with apply(pipe, plain(tiny_unet)):
        for _ in range(2):
            pipe.scheduler.set_timesteps(timesteps=GRID)
            for t in pipe.scheduler.timesteps:
                given = {"view": t, "[1]": t[None], "expanded": t.expand(2), "cloned": t.clone()}[form]
                tiny_unet(x, given, text)
    assert [round(call[0], 2) for call in watch.calls] == TOLD * 2
    assert all(len(call) == 2 or form in ("view", "cloned") for call in watch.calls)


def test_weights_are_looked_up_at_the_solvers_level(tiny_unet: UNet2DConditionModel, watch: Watch) -> None:
    """By all schedules on the U-Net, in whatever order they came."""
    pipe = pipeline(tiny_unet)
    first, second = samplers.ramp(ids_of(tiny_unet)), samplers.ramp(ids_of(tiny_unet), 1)
    teller = samplers.ramp(ids_of(tiny_unet), 2, steps=STEPS)
    with apply(pipe, first), apply(pipe, teller), apply(pipe, second):
        run(pipe)
    for spy in (first, teller, second):
        np.testing.assert_allclose(spy.seen, STEPS.sigmas, rtol=1e-4)
    assert [round(call[0], 2) for call in watch.calls] == TOLD


@pytest.mark.parametrize(
    ("grid", "options", "count"),
    [
        ([900, 600, 200], {}, "3 of DPMSolverMultistepScheduler"),
        ([900, 600], {}, "2 of DPMSolverMultistepScheduler"),
        (GRID, {"solver_order": 3}, "3 of DPMSolverMultistepScheduler"),
    ],
)
def test_a_run_that_is_not_the_files_is_not_lied_to(
    tiny_unet: UNet2DConditionModel, watch: Watch, grid: list[int], options: Any, count: str
) -> None:
    """Not at the levels that it has in common either; and it is said, once."""
    pipe = pipeline(tiny_unet, **options)
    with apply(pipe, plain(tiny_unet)), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        run(pipe, grid)
        run(pipe, grid)
    assert [call[0] for call in watch.calls] == [float(t) for t in grid * 2]
    (warning,) = (w for w in caught if w.category is UserWarning)
    assert count in str(warning.message)
    assert str(warning.message).endswith("its steps are not: pass **handle.arguments to the pipeline's call")
    assert "\n" not in str(warning.message)


def test_no_warning_without_steps_or_on_the_files_grid(tiny_unet: UNet2DConditionModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for schedule in (plain(tiny_unet, None), plain(tiny_unet), plain(tiny_unet, Steps("dpmpp_2m", STEPS.sigmas))):
            pipe = pipeline(tiny_unet)
            with apply(pipe, schedule):
                run(pipe)
        with apply(tiny_unet, plain(tiny_unet)):  # a bare U-Net has no grid
            tiny_unet(*inputs())


def test_a_swapped_scheduler_and_schedule(tiny_unet: UNet2DConditionModel, watch: Watch) -> None:
    pipe = pipeline(tiny_unet)
    with apply(pipe, plain(tiny_unet)) as handle:
        run(pipe)
        handle.schedule = plain(tiny_unet, OTHER)
        run(pipe)
        assert watch.last() == [200, 200]
        assert handle.schedule.steps is OTHER
        handle.schedule = plain(tiny_unet, None)
        assert handle.arguments == {}
        run(pipe)
        assert watch.last() == [300, 300]
        handle.schedule = plain(tiny_unet)
        pipe.scheduler = DDIMScheduler(**SD)
        pipe.scheduler.set_timesteps(3)
        with pytest.warns(UserWarning, match="3 of DDIMScheduler"):
            tiny_unet(inputs()[0], pipe.scheduler.timesteps[0], inputs()[2])


def test_the_samplers_own_class_on_a_grid_that_is_its_own(tiny_unet: UNet2DConditionModel, watch: Watch) -> None:
    """DDIM takes no grid, but where the file's is the one that it makes, the file's levels are told."""
    scheduler = DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing")
    steps = Steps("ddim", tuple(sigma_at([999, 666, 332], TABLE)), OTHER.told)
    pipe, (x, _, text) = SimpleNamespace(unet=tiny_unet, scheduler=scheduler), inputs()
    with apply(pipe, plain(tiny_unet, steps)):
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            tiny_unet(x, t, text)
    assert [round(call[0], 2) for call in watch.calls] == [800, 500, 200]


def test_one_schedule_tells(tiny_unet: UNet2DConditionModel) -> None:
    """A second one of the same pipeline is refused, however it comes; one of another pipeline is not."""
    pipe, quiet = pipeline(tiny_unet), plain(tiny_unet, Steps("dpmpp_2m", STEPS.sigmas))
    with apply(pipe, plain(tiny_unet)) as first:
        first.schedule = plain(tiny_unet, OTHER)  # it is not a second one to itself
        for target in (pipe, tiny_unet):
            with pytest.raises(UserError, match=r"steps\.told of another schedule"):
                apply(target, plain(tiny_unet))
        with apply(pipe, quiet) as second, pytest.raises(UserError, match=r"steps\.told of another schedule"):
            second.schedule = plain(tiny_unet)
        with apply(pipeline(tiny_unet), plain(tiny_unet)):
            pass
    apply(pipe, plain(tiny_unet)).remove()
    assert not hooks_of(tiny_unet)


def test_two_pipelines_on_one_unet_are_each_told_their_own(tiny_unet: UNet2DConditionModel, watch: Watch) -> None:
    first, second = pipeline(tiny_unet), pipeline(tiny_unet)
    with apply(first, plain(tiny_unet)), apply(second, plain(tiny_unet, OTHER)):
        run(first)
        assert watch.last() == [240, 240]
        run(second)
        assert watch.last() == [200, 200]


def test_copies_have_their_own(tiny_unet: UNet2DConditionModel, watch: Watch) -> None:
    pipe = pipeline(tiny_unet)
    with apply(pipe, plain(tiny_unet)):
        whole, alone = copy.deepcopy(pipe), copy.deepcopy(tiny_unet)
        run(whole)
        assert watch.last() == [240, 240]
        alone(inputs()[0], 300, inputs()[2])  # the U-Net's copy keeps the noise of the pipeline that it came from
        assert watch.last() == [240, 240]
        apply(whole, None)
        run(whole)
        assert watch.last() == [300, 300]
        run(pipe)
        assert watch.last() == [240, 240]
    alone(inputs()[0], 300, inputs()[2])
    assert watch.last() == [240, 240]


def test_a_call_that_checkpointing_makes_again_is_told_the_same(tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.double()
    pipe, (x, _, text) = pipeline(tiny_unet), inputs(dtype=torch.float64)
    schedule = samplers.ramp(ids_of(tiny_unet), steps=STEPS)
    gradients = []
    with apply(pipe, schedule):
        pipe.scheduler.set_timesteps(timesteps=GRID)
        t = pipe.scheduler.timesteps[1]
        for again in (False, True):
            leaf = x.clone().requires_grad_()

            def call(x: torch.Tensor) -> torch.Tensor:
                return tiny_unet(x, t, text).sample

            out = torch.utils.checkpoint.checkpoint(call, leaf, use_reentrant=False) if again else call(leaf)
            out.square().sum().backward()
            gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_the_host_waits_once_a_picture_and_tensors_are_made_once(tiny_unet: UNet2DConditionModel) -> None:
    """Told levels are views of one tensor, on the device of the sample."""
    pipe, (x, _, text) = pipeline(tiny_unet), inputs()
    given: list[torch.Tensor] = []
    with apply(pipe, plain(tiny_unet)):
        tiny_unet.register_forward_pre_hook(lambda _, args: given.append(args[1]))
        with torch.inference_mode():
            pipe.scheduler.set_timesteps(timesteps=GRID)
            for t in (*pipe.scheduler.timesteps, pipe.scheduler.timesteps[1].expand(2)):
                tiny_unet(x, t, text)
    assert len({t.untyped_storage().data_ptr() for t in given}) == 1
    assert [tuple(t.shape) for t in given] == [(), (), (), (2,)]
    assert {t.dtype for t in given} == {torch.float32}
    assert not any(t.is_inference() for t in given)
    tiny_unet._forward_pre_hooks.clear()


@torch.no_grad()
def test_a_compiled_unet_is_told_by_one_more_graph_at_most() -> None:
    """A told timestep is an input of the graph: float32, where the solver's may be whole numbers."""
    twin, counter = make_small(), CompileCounter()
    pipe = pipeline(twin.unet)
    schedule = plain(twin.unet, STEPS)

    def picture(unet: Any = None) -> list[torch.Tensor]:
        pipe.scheduler.set_timesteps(timesteps=GRID)
        return [twin(t, unet) for t in pipe.scheduler.timesteps]

    plainly = picture()
    by_hand = [twin(torch.tensor(t)) for t in TOLD]
    torch._dynamo.reset()
    handle = apply(pipe, schedule)
    unet = torch.compile(twin.unet, backend=counter, fullgraph=True)
    for _ in range(2):
        for actual, expected in zip(picture(unet), by_hand, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1
    handle.schedule = plain(twin.unet, None)
    assert all(torch.equal(a, b) for a, b in zip(picture(unet), plainly, strict=True))
    assert counter.frame_count == 2
    handle.remove()
    assert handle.arguments == {}
    assert all(torch.equal(a, b) for a, b in zip(picture(unet), plainly, strict=True))
    with apply(pipe, schedule):  # takes the place of the one that rests
        torch.testing.assert_close(picture(unet)[-1], by_hand[-1])
    assert all(torch.equal(a, b) for a, b in zip(picture(unet), plainly, strict=True))
    assert counter.frame_count == 2
    torch._dynamo.reset()
