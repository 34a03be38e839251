"""Others on the same U-Net: caches, copies, and pipelines that share it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from DeepCache import DeepCacheSDHelper
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from helpers.fits import bare
from helpers.pipelines import TASKS, run
from helpers.samplers import ramp, sampler
from helpers.small import hooks_of
from helpers.twins import ids_of, make
from torch import Tensor

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import KINDS


@pytest.fixture
def pipe() -> Any:
    return TASKS["text to image"]()


# ------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("task", ["text to image", "sdxl base"])
def test_deepcache(task: str) -> None:
    """DeepCache's cheap steps run a part of the U-Net: no weighed site may be in it, and that is no error."""
    pipe, call = TASKS[task]()
    pipe.scheduler = sampler("euler")
    ids = ids_of(pipe.unet, ("cross",))
    first = Schedule.constant(ids, [14.6, 0.03], 1.3)
    call = {**call, "num_inference_steps": 6}
    weighed_alone, plain = None, run(pipe, call)
    with apply(pipe, first):
        weighed_alone = run(pipe, call)
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=0)
    helper.enable()
    try:
        cached = run(pipe, call)
        with apply(pipe, first):
            weighed = run(pipe, call)
        assert torch.equal(run(pipe, call), cached)
        with apply(pipe, Schedule.constant(ids, [14.6, 0.03])):
            assert torch.equal(run(pipe, call), cached)
    finally:
        helper.disable()
    assert not torch.allclose(weighed, cached)
    assert not torch.allclose(weighed, weighed_alone)
    assert torch.equal(run(pipe, call), plain)


def test_a_part_of_the_unet_called_by_itself_is_plain(pipe: Any) -> None:
    unet = pipe[0].unet
    x = torch.randn(1, 16, 4, 4, dtype=unet.dtype)
    temb = torch.randn(1, 32, dtype=unet.dtype)
    plain = unet.mid_block.resnets[0](x, temb)
    with apply(pipe[0], bare(unet)):
        assert torch.equal(unet.mid_block.resnets[0](x, temb), plain)


# ------------------------------------------------------------------------------------------------- copies


def test_a_copy_of_a_pipeline_has_a_schedule_of_its_own(pipe: Any) -> None:
    pipe, call = pipe
    plain = run(pipe, call)
    handle = apply(pipe, bare(pipe.unet))
    weighed = run(pipe, call)
    other = copy.deepcopy(pipe)
    other.set_progress_bar_config(disable=True)
    assert torch.equal(run(other, call), weighed)
    other.scheduler = sampler("euler")  # its own, as its noise levels
    euler = run(other, call)
    assert not torch.allclose(euler, weighed)
    apply(other, None)
    assert not hooks_of(other.unet)
    assert torch.equal(run(pipe, call), weighed)
    apply(other, bare(other.unet))
    assert torch.equal(run(other, call), euler)
    handle.remove()
    assert torch.equal(run(pipe, call), plain)
    assert torch.equal(run(other, call), euler)


@pytest.mark.parametrize("whose", ["a U-Net's own", "its pipeline's"])
def test_a_copy_of_a_unet_has_a_schedule_of_its_own(pipe: Any, whose: str) -> None:
    """Such as an average of weights over time; it keeps the noise levels of the pipeline that it was copied out of."""
    pipe, call = pipe
    plain, schedule = run(pipe, call), bare(pipe.unet)
    with apply(pipe if whose == "its pipeline's" else pipe.unet, schedule):
        weighed = run(pipe, call)
        net = copy.deepcopy(pipe.unet)
        assert torch.equal(run(pipe, call), weighed)
    original, pipe.unet = pipe.unet, net
    assert torch.equal(run(pipe, call), weighed)
    apply(pipe, None)
    assert not hooks_of(net)
    assert torch.equal(run(pipe, call), plain)
    assert not hooks_of(original)


def test_a_copy_of_a_unet_with_an_attachment() -> None:
    twin = make("sd")
    explicit = Attachment(twin.unet, ids_of(twin.unet, KINDS))
    weights = torch.full((len(explicit.sites),), 1.4)
    weighed = explicit(twin.x, 500, **twin.args(), weights=weights)
    other = copy.deepcopy(explicit)
    assert other.unet is not twin.unet
    assert torch.equal(other(twin.x, 500, **twin.args(), weights=weights), weighed)
    other.remove()
    assert not hooks_of(other.unet)
    assert torch.equal(explicit(twin.x, 500, **twin.args(), weights=weights), weighed)


# ------------------------------------------------------------------------- one side of guidance, told by the call


def from_pipe(kind: Any, pipe: Any) -> Any:
    other = kind.from_pipe(pipe, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize(("before", "guidance"), [(None, 4.0), (4.0, 1.0), (1.0, 4.0)])
def test_pipelines_of_one_unet_by_from_pipe(pipe: Any, branch: str, before: float | None, guidance: float) -> None:
    """The rows that are conditional are those of the pipeline that makes the call, whatever another one did last."""
    pipe, call = pipe
    schedule = ramp(ids_of(pipe.unet, KINDS), cfg_branch=branch)
    other = from_pipe(StableDiffusionImg2ImgPipeline, pipe)
    late = {**TASKS["image to image"]()[1], "guidance_scale": guidance}
    with apply(other, schedule):
        expected = run(other, late)
    if before is not None:
        run(pipe, {**call, "guidance_scale": before})
    with apply(pipe, schedule):
        assert torch.equal(run(other, late), expected)


def test_a_call_whose_order_is_not_known_is_refused(pipe: Any) -> None:
    pipe, call = pipe
    schedule = ramp(ids_of(pipe.unet, KINDS), cfg_branch="cond")
    twin = make("sd").double()
    with apply(pipe, schedule), pytest.raises(UserError, match="no pipeline makes this call"):
        twin(unet=pipe.unet)

    class Foreign(StableDiffusionPipeline):
        """May order its batch as it likes."""

    with apply(pipe, schedule):
        pipe.__class__ = Foreign
        with pytest.raises(UserError, match="a Foreign makes this call, and the order of guidance"):
            run(pipe, call)


def test_a_guided_batch_of_odd_size_is_refused(pipe: Any) -> None:
    pipe, _ = pipe
    schedule = ramp(ids_of(pipe.unet, KINDS), cfg_branch="cond")
    twin = make("sd").double()

    class Odd(type(pipe)):  # type: ignore[misc]
        do_classifier_free_guidance = True

        def call(self) -> Tensor:
            out: Tensor = self.unet(twin.x[:1], 500, **twin.args(slice(0, 1))).sample
            return out

    Odd.__name__ = type(pipe).__name__
    pipe.__class__ = Odd
    with apply(pipe, schedule), pytest.raises(UserError, match="1 rows"):
        pipe.call()
