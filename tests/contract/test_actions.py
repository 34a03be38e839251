"""Every action at every kind of site does what a plainly written second implementation does."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from helpers import pipelines, twins
from helpers.naive import CALLS, Naive, one_side, ours, picture, sites
from torch import Tensor

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.actions import FULL, Action, Actions, by_letters
from rwopt.unet.actions import Known, Past
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.peers import tgate
from rwopt.unet.sites import list_sites

SIGMAS, TIMES = zip(*CALLS, strict=True)
KINDS = ("transformer", "self", "cross", "ff", "resnet", "skip")


STEPS = ("FFoFoFF", "FhFhFhF", "FF1F1FF", "FFaFaaF", "FF2FbFF", "FF3FcFF", "FF44FFF", "FF5FeFF", "FF6FfFF", "FFGFgFF",
         "FFgFNFF", "FFnFnFF", "FFoaFGF", "FFoFaFF")  # fmt: skip
PLANS = {letters: list(by_letters(letters)) for letters in STEPS}
for _kind in (*KINDS[:5], ("self", "cross", "ff"), ("self", "cross", "ff", "resnet")):
    _names = (_kind,) if isinstance(_kind, str) else _kind
    PLANS["+".join(_names)] = [*by_letters("FF"), *(sites(rule, *_names) for rule in ("reuse", "extrapolate", "skip")),
                               *by_letters("F"), sites("reuse", *_names)]  # fmt: skip
for _names in (("cross", "self"), ("transformer",)):
    PLANS["one side, " + "+".join(_names)] = one_side(*_names)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def twin(request: pytest.FixtureRequest) -> twins.Twin:
    return twins.make(request.param, layers_per_block=2).double()


@pytest.mark.parametrize("name", PLANS)
def test_each_action_is_what_a_second_implementation_makes_of_it(twin: twins.Twin, name: str) -> None:
    """With weights at every kind of site, the same for all rows and for each row."""
    plan, ids = PLANS[name], [site.id for site in list_sites(twin.unet, KINDS)]
    w = 1 + 0.3 * torch.randn(len(ids), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    naive = Naive(twin.unet, twin.rest, plan, dict(zip(ids, w.tolist(), strict=True)))
    x = twin.x[:1]
    with Attachment(twin.unet, ids) as attachment, torch.no_grad():
        acts = attachment.acts(Actions.along(SIGMAS, plan))
        expected = picture(naive, x)
        for weights in (w, w.expand(2, -1)):
            got = picture(ours(attachment, acts, twin.rest, weights), x)
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
        changed = picture(ours(attachment, attachment.acts(None), twin.rest, w), x)
        assert (changed - expected).abs().max() > 1e-6  # the plan does something
    assert not [m for m in twin.unet.modules() if "forward" in m.__dict__]


def test_full_everywhere_is_the_plain_model_to_the_bit(twin: twins.Twin) -> None:
    x = twin.x[:1]
    with torch.no_grad():
        plain = picture(lambda i, rows: twin.unet(rows, TIMES[i], **twin.rest).sample, x)
        with Attachment(twin.unet, ()) as attachment:
            acts = attachment.acts(Actions.along(SIGMAS, "FFFFFFF"), texts=True)
            assert torch.equal(picture(ours(attachment, acts, twin.rest, None), x), plain)


@pytest.mark.parametrize("name", ["FFoFaFF", "FFgFNFF", "self+cross+ff+resnet", "one side, cross+self"])
def test_gradients_with_and_without_checkpointing(name: str) -> None:
    """Against finite differences of the second implementation; the U-Net's own checkpointing changes nothing."""
    twin = twins.make("sd").double()
    plan, ids = PLANS[name], [site.id for site in list_sites(twin.unet, KINDS)]
    x = twin.x[:1]
    start = torch.linspace(0.8, 1.2, len(ids), dtype=torch.float64)
    along = torch.linspace(-1, 1, len(ids), dtype=torch.float64)

    def scored(w: Tensor) -> float:
        with torch.no_grad():
            return float(picture(Naive(twin.unet, twin.rest, plan, dict(zip(ids, w.tolist(), strict=True))), x).sum())

    expected = (scored(start + 1e-5 * along) - scored(start - 1e-5 * along)) / 2e-5
    with Attachment(twin.unet, ids) as attachment:
        acts = attachment.acts(Actions.along(SIGMAS, plan))
        gradients = []
        for on in (False, True):
            twin.unet.enable_gradient_checkpointing() if on else twin.unet.disable_gradient_checkpointing()
            w = start.clone().requires_grad_()
            gradients.append(torch.autograd.grad(picture(ours(attachment, acts, twin.rest, w), x).sum(), w)[0])
        twin.unet.disable_gradient_checkpointing()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-11)
    assert float(gradients[0] @ along) == pytest.approx(expected, rel=1e-5)


def schedule_of(unet: Any, letters: str | Sequence[Action], sigmas: np.ndarray, **fields: Any) -> Schedule:
    ids = [site.id for site in list_sites(unet, ("transformer", "resnet"))]
    table = np.random.default_rng(0).uniform(0.8, 1.2, (2, len(ids)))
    return Schedule(tuple(ids), np.array([8.0, 0.2]), table, actions=Actions.along(sigmas, letters), **fields)


def levels_of(pipe: Any, steps: int) -> np.ndarray:
    pipe.scheduler.set_timesteps(steps)
    abar = pipe.scheduler.alphas_cumprod.double().numpy()[pipe.scheduler.timesteps.long().numpy()]
    return np.sqrt((1 - abar) / abar)


def convolutions(unet: Any) -> Any:
    """Counts the calls of `conv1` of all resnets."""
    counts: list[str] = []
    for path, module in unet.named_modules():
        if path.endswith("conv1"):
            module.register_forward_hook(lambda *_, path=path: counts.append(path))
    return counts


@pytest.mark.parametrize("letters", ["FFoFoF", "FF1FaF", "FFGFgF", tgate(6, 4, sides="mean").actions],
                         ids=lambda of: of if isinstance(of, str) else "T-GATE")  # fmt: skip
def test_pictures_of_a_pipeline_do_not_know_of_each_other(letters: str | Sequence[Action]) -> None:
    """The second one, another batch size, an edit that starts midway, one after a run that broke off, two threads."""
    pipe, call = pipelines.text_to_image()
    call |= {"num_inference_steps": 6}
    schedule = schedule_of(pipe.unet, letters, levels_of(pipe, 6))
    plain = pipelines.run(pipe, call)
    with apply(pipe, schedule):
        alone = pipelines.run(pipe, call)
    with apply(pipe, schedule):
        assert torch.equal(pipelines.run(pipe, call), alone)
        other = call | {"prompt_embeds": call["prompt_embeds"].repeat(2, 1, 1),
                        "negative_prompt_embeds": call["negative_prompt_embeds"].repeat(2, 1, 1)}  # fmt: skip
        pipelines.run(pipe, other)
        with pytest.raises(KeyboardInterrupt):
            pipelines.run(pipe, call | {"callback_on_step_end": broken_off})
        assert torch.equal(pipelines.run(pipe, call), alone)
        counts = convolutions(pipe.unet)
        assert torch.equal(pipelines.run(pipe, call), alone)
        full = len({*counts})
        if letters in ("FFoFoF", "FF1FaF"):  # of others rows are saved, or attention
            assert len(counts) < 5 * full
        copied = copy.deepcopy(pipe)
        assert torch.equal(pipelines.run(copied, call), alone)
    assert torch.equal(pipelines.run(pipe, call), plain)
    assert not torch.equal(alone, plain)


def broken_off(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 3:
        raise KeyboardInterrupt
    return tensors


def test_an_edit_that_starts_at_a_cheap_level_computes_it() -> None:
    pipe, call = pipelines.image_to_image()
    call |= {"num_inference_steps": 6, "strength": 0.67}
    plain = pipelines.run(pipe, call)
    schedule = Schedule.constant([s.id for s in list_sites(pipe.unet)], [1.0])
    one = Actions.along(levels_of(pipe, 6), "FFoFFF")  # the edit's first call: nothing is stored, so it runs
    with apply(pipe, copy_with(schedule, one)):
        assert torch.equal(pipelines.run(pipe, call), plain)


def copy_with(schedule: Schedule, actions: Actions) -> Schedule:
    return Schedule(schedule.sites, schedule.sigmas, schedule.weights, actions=actions)


def test_two_threads_on_one_unet_have_stores_of_their_own(twin: twins.Twin) -> None:
    plan = Actions.along(SIGMAS, "FFaFoFa")
    starts = [twin.x[:1], twin.x[1:]]
    with Attachment(twin.unet, ()) as attachment:
        acts = attachment.acts(plan, texts=True)
        expected = [picture(ours(attachment, acts, twin.rest, None), x).detach() for x in starts]
        got: list[list[Tensor]] = [[], []]
        barrier = threading.Barrier(2)

        def work(k: int) -> None:
            inner = ours(attachment, acts, twin.rest, None)

            def call(i: int, x: Tensor) -> Tensor:
                barrier.wait(20)
                return inner(i, x)

            with torch.no_grad():
                got[k] = [picture(call, starts[k])]

        threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    for k in range(2):
        assert torch.equal(got[k][0], expected[k])


def test_a_schedule_with_actions_neither_stacks_nor_compiles(twin: twins.Twin) -> None:
    with Attachment(twin.unet, ()) as first:
        first.acts(Actions.along(SIGMAS, "FFaFoFF"))
        with pytest.raises(UserError, match="does not stack"):
            Attachment(twin.unet, ())
    with Attachment(twin.unet, ()), Attachment(twin.unet, ()) as second, pytest.raises(UserError, match="stack"):
        second.acts(Actions.along(SIGMAS, "FFaFoFF"))
    with Attachment(twin.unet, ()) as attachment, pytest.raises(UserError, match=r"cut has k=9.* 6"):
        attachment.acts(Actions.along(SIGMAS, [*by_letters("FF"), Action("cut", 9), *by_letters("FFFF")]))


@pytest.mark.parametrize("branch", [0, 4, 7])
def test_cuts_are_deepcaches_to_the_bit(branch: int) -> None:
    """Its branch b is cut b + 1, on a stock pipeline of Stable Diffusion XL's layout."""
    why = "DeepCache is not installed: pip install --no-deps DeepCache==0.1.1"
    deepcache = pytest.importorskip("DeepCache", reason=why)
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
              "transformer_layers_per_block": (1, 2, 3), "block_out_channels": (8, 16, 16)}  # fmt: skip
    pipe = pipelines.build(StableDiffusionXLPipeline, twins.make("sdxl", layers_per_block=2, **blocks).unet)
    call = pipelines.words(steps=7) | pipelines.pooled() | {"height": 32, "width": 32}
    helper = deepcache.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=3, cache_branch_id=branch)
    helper.enable()
    theirs = pipelines.run(pipe, call)
    helper.disable()
    for module in pipe.unet.modules():  # it leaves these behind
        module.__dict__.pop("forward", None)
    cheap = [FULL if i % 3 == 0 else Action("cut", branch + 1) for i in range(7)]
    plain = Schedule.constant([s.id for s in list_sites(pipe.unet)], [1.0])
    with apply(pipe, copy_with(plain, Actions.along(levels_of(pipe, 7), cheap))):
        assert torch.equal(pipelines.run(pipe, call), theirs)


def test_an_adapter_into_what_is_left_out_is_refused_and_a_controlnet_is_right(twin: twins.Twin) -> None:
    """A ControlNet's residuals of the skips that are computed are those of the present call."""
    residuals = [torch.full_like(s, 0.1) for s in skips_of(twin)]
    middle = torch.full_like(residuals[-1], 0.1)
    rest = twin.rest | {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
    with Attachment(twin.unet, ()) as attachment, torch.no_grad():
        acts = attachment.acts(Actions.along(SIGMAS, "FF2FFFF"))
        call = ours(attachment, acts, rest, None)
        outs = [call(i, twin.x) for i in range(2)]
        same = call(2, twin.x)  # all as before but for the timestep
        call = ours(attachment, acts, rest, None)
        for i in range(2):
            call(i, twin.x)
        residuals[0] += 1.0
        assert not torch.equal(call(2, twin.x), same)
        residuals[0] -= 1.0
        assert same.shape == outs[0].shape
        adapter = {"down_intrablock_additional_residuals": [torch.zeros(1)]}
        past = Past(2, SIGMAS[1], {"cut 2": (Known(SIGMAS[1], 1, (torch.zeros(1),)),)})
        _, frame = acts.frame(past, SIGMAS[2], guided=True)
        with pytest.raises(UserError, match="T2I adapter"):
            attachment.with_frame(frame)(twin.x, 500, **twin.rest, **adapter)


def skips_of(twin: twins.Twin) -> list[Tensor]:
    found = []
    blocks = twin.unet.down_blocks
    hooks = [twin.unet.conv_in.register_forward_hook(lambda m, a, y: found.append(y))]
    hooks += [block.register_forward_hook(lambda m, a, y: found.extend(y[1])) for block in blocks]
    with torch.no_grad():
        twin()
    for hook in hooks:
        hook.remove()
    return found
