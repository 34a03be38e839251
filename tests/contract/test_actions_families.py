"""Actions on every family of U-Nets: what a second implementation makes of them, or one line that refuses."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import peft
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from helpers import pipelines, twins
from helpers.naive import RULED, Hooked, Naive, Standin, calls_of, effective, made, one_side, ours, picture, sites
from helpers.samplers import close, meant, sampler, told
from torch import Tensor

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.actions import FULL, SITE_RULES, Action, Actions, by_letters
from rwopt.unet.actions import Known, Past, joined, parted
from rwopt.unet.actions_patterns import Layout
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import SITE_KINDS, list_sites

FLAT = ("if", "kandinsky", "ddpm", "fourier", "sd2", "lcm", "pruned")
"""Those with one skip tensor a layer."""
OTHERS = ("k", "ncsn++", "motion", "3d", "svd")
TOLD = tuple(name for name in (*FLAT, *OTHERS) if name not in ("ddpm", "fourier", "ncsn++"))
"""Those that are told a text, or a picture, so that there is guidance."""


def weights_of(ids: Sequence[str]) -> Tensor:
    return 1 + 0.3 * torch.randn(len(ids), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def equal(twin: twins.Twin, plan: Sequence[Action], kind: type[Naive], kinds: Sequence[str], by_row: bool) -> None:
    """A picture by the plan is that of a second implementation, call by call; nothing is left on the U-Net."""
    ids, calls, guided = twins.ids_of(twin.unet, tuple(kinds)), calls_of(plan), has_text(twin)
    w, rest, before = weights_of(ids), twin.args(), twins.state(twin.unet)
    naive = kind(twin.unet, rest, plan, dict(zip(ids, w.tolist(), strict=True)), calls, guided)
    with Attachment(twin.unet, ids) as attachment, torch.no_grad():
        acts = attachment.acts(Actions.along([sigma for sigma, _ in calls], plan))
        own = ours(attachment, acts, rest, w.expand(2 if guided else 1, -1) if by_row else w, calls, guided)

        def both(i: int, x: Tensor) -> Tensor:
            expected, got = naive(i, x), own(i, x)
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10, msg=lambda m: f"call {i} {plan[i]}: {m}")
            return expected

        picture(both, twin.x[:1], calls, guided)
    assert twins.state(twin.unet) == before


def has_text(twin: twins.Twin) -> bool:
    return bool(twin.rest)


def rules_of(twin: twins.Twin) -> list[Action]:
    """Each kind by each rule, the others by other rules in the same call; of what is skipped every other site."""
    there = {site.kind for site in list_sites(twin.unet, SITE_KINDS)}
    present, plan = [kind for kind in RULED if kind in there and kind != "transformer"], [FULL, FULL]
    for shift in range(3):
        rules: list[tuple[str, str]] = []
        for i, kind in enumerate(present):
            rule = SITE_RULES[(i + shift) % 3]
            rules += [(name, rule) for name in (twins.ids_of(twin.unet, (kind,))[::2] if rule == "skip" else [kind])]
        plan += [Action("sites", sites=tuple(rules)), *[FULL] * (shift > 0)]
    few = twins.ids_of(twin.unet, ("transformer",))[::2]
    return [*plan, sites("reuse", "transformer"), sites("extrapolate", "transformer", "resnet"), sites("skip", *few)]


@pytest.mark.parametrize("name", FLAT)
def test_steps_of_every_flat_family(name: str) -> None:
    """Every cut, the encoder, the whole output, and guidance where there is text, held and by order 1."""
    twin = made(name)
    plan = list(by_letters("FF"))
    for k in range(1, Layout(twin.unet).skips + 1):
        plan += [Action("cut", k), Action("cut", k, 1), FULL]
    plan += by_letters("NnFohF" + ("Gg" if has_text(twin) else ""))
    equal(twin, plan, Naive, SITE_KINDS, by_row=False)


@pytest.mark.parametrize("name", FLAT)
def test_sites_of_every_flat_family(name: str) -> None:
    twin = made(name)
    equal(twin, rules_of(twin), Naive, SITE_KINDS, by_row=True)


@pytest.mark.parametrize("name", OTHERS)
def test_sites_of_the_other_families(name: str) -> None:
    twin = made(name)
    equal(twin, rules_of(twin), Hooked, RULED, by_row=True)


@pytest.mark.parametrize("name", OTHERS)
def test_output_and_guidance_of_the_other_families(name: str) -> None:
    twin = made(name)
    equal(twin, by_letters("FFohF" + ("Gg" if has_text(twin) else "")), Hooked, RULED, by_row=False)


@pytest.mark.parametrize("name", TOLD)
def test_one_side_of_guidance_on_every_family_that_is_told_something(name: str) -> None:
    """Mean, own value and line, of cross- and self-attention and resnets; without cross-attention, of transformers."""
    twin = made(name)
    cross = any(site.kind == "cross" for site in list_sites(twin.unet, RULED))
    kinds = ("cross", "self", "resnet") if cross else ("transformer", "resnet")
    assert cross == (name not in ("if", "kandinsky"))
    equal(twin, one_side(*kinds), Hooked if name in OTHERS else Naive, RULED, by_row=True)


@pytest.mark.parametrize("name", OTHERS)
def test_what_walks_along_skips_is_refused_there(name: str) -> None:
    twin = made(name)
    with Attachment(twin.unet, ()) as attachment:
        for action in (Action("cut", 1), Action("cut", 2, 1), Action("encoder"), Action("encoder", order=1)):
            plan = [FULL, FULL, action]
            with pytest.raises(UserError) as caught:
                attachment.acts(Actions.along([sigma for sigma, _ in calls_of(plan)], plan))
            assert "use actions of kind sites, output or guidance" in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["deepfloyd if", "kandinsky", "text to video", "unconditional"])
def test_guidance_is_refused_where_a_pipelines_rows_are_not_known(name: str) -> None:
    pipe, _ = pipelines.TASKS[name]()
    for last in (Action("guidance", order=1), sites("reuse", "resnet", side="cond")):
        plan = Actions.along([3.0, 2.0, 1.0], [FULL, FULL, last])
        schedule = Schedule(("mid_block.attentions.0",), np.array([9.0, 0.2]), np.ones((2, 1)), actions=plan)
        with pytest.raises(UserError, match=r"^actions of kind guidance or with a cfg_branch.*use other actions.*$"):
            apply(pipe, schedule)


def test_branches_of_a_spatio_temporal_transformer_under_checkpointing_are_refused() -> None:
    twin = made("svd")
    twin.unet.enable_gradient_checkpointing()
    plan = [FULL, sites("reuse", "self")]
    with Attachment(twin.unet, ()) as attachment:
        call = ours(attachment, attachment.acts(Actions.along([2.0, 1.0], plan)), twin.args(), None, calls_of(plan))
        with pytest.raises(UserError, match=r"^gradient checkpointing inside .*: checkpoint whole U-Net calls, or"):
            call(0, twin.x.requires_grad_())


@pytest.mark.parametrize("name", [*twins.NETS, "fourier", "sd2", "lcm", "pruned"])
def test_full_everywhere_is_the_plain_model_to_the_bit(name: str) -> None:
    twin = made(name)
    calls, guided, rest = calls_of([FULL] * 2), has_text(twin), twin.args()
    with torch.no_grad():
        plain = picture(lambda i, x: twin.unet(x, calls[i][1], **rest).sample, twin.x[:1], calls, guided)
        with Attachment(twin.unet, ()) as attachment:
            acts = attachment.acts(Actions.along([sigma for sigma, _ in calls], "FF"), texts=True)
            got = picture(ours(attachment, acts, rest, None, calls, guided), twin.x[:1], calls, guided)
    assert torch.equal(got, plain)


# ------------------------------------------------------------------------------------------------- what else people do


OFFLOADS: dict[str, Any] = {  # what a pipeline's offload hangs on, which itself asks for an accelerator
    "sequential": lambda unet: accelerate.cpu_offload(unet, torch.device("cpu")),
    "group": lambda unet: apply_group_offloading(unet, torch.device("cpu"), offload_type="leaf_level"),
}
def short_plan(twin: twins.Twin, name: str) -> list[Action]:
    """Of every kind of move that a family has."""
    kinds = twins.ids_of(twin.unet, ("transformer", "resnet"))
    mixed = tuple((site, SITE_RULES[i % 3]) for i, site in enumerate(kinds))
    return [*by_letters("FFo" if name in OTHERS else "FF1"), Action("sites", sites=mixed), *by_letters("Fo")]


@pytest.mark.parametrize("name", ["sdxl", "if"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("how", OFFLOADS)
def test_offload_changes_no_bit(name: str, order: str, how: str) -> None:
    twin = made(name)
    plan = short_plan(twin, name)
    calls, rest = calls_of(plan), twin.args()
    actions = Actions.along([sigma for sigma, _ in calls], plan)
    pictures = []
    for offload in (False, True):
        if offload and order == "before":
            OFFLOADS[how](twin.unet)
        with Attachment(twin.unet, ()) as attachment, torch.no_grad():
            acts = attachment.acts(actions, texts=True)
            if offload and order == "after":
                OFFLOADS[how](twin.unet)
            pictures.append(picture(ours(attachment, acts, rest, None, calls), twin.x[:1], calls))
    assert torch.equal(*pictures)


def test_blocks_that_are_loaded_together(tmp_path: Path) -> None:
    """What is left out cannot load its neighbour. With files in the place of memory that is seen on a CPU too."""
    twin, plan = made("sdxl"), by_letters("FF1F2")
    calls, rest = calls_of(plan), twin.args()
    actions = Actions.along([sigma for sigma, _ in calls], plan)

    def load(unet: Any, count: int, folder: str) -> None:
        how: Any = {"num_blocks_per_group": count, "offload_to_disk_path": str(tmp_path / folder)}
        apply_group_offloading(unet, torch.device("cpu"), offload_type="block_level", **how)

    with Attachment(twin.unet, ()) as attachment, torch.no_grad():
        acts = attachment.acts(actions)
        expected = picture(ours(attachment, acts, rest, None, calls), twin.x[:1], calls)
        load(twin.unet, 2, "after")
        assert torch.equal(picture(ours(attachment, acts, rest, None, calls), twin.x[:1], calls), expected)
    for count in (1, 2):
        twin = made("sdxl")
        load(twin.unet, count, str(count))
        with Attachment(twin.unet, ()) as attachment, torch.no_grad():
            if count == 2:
                with pytest.raises(UserError, match=r"^down_blocks.0 .* group of 2.*num_blocks_per_group=1$"):
                    attachment.acts(actions)
                continue
            acts = attachment.acts(actions)
            assert torch.equal(picture(ours(attachment, acts, rest, None, calls), twin.x[:1], calls), expected)


LAYERS = ["to_q", "to_k", "to_v", "add_k_proj", "conv1", "conv2", "time_emb_proj", "conv_in", "conv_out",
          "conv_shortcut", "downsamplers.0.conv", "ff.net.2"]  # fmt: skip


def adapt(unet: Any) -> None:
    """A LoRA for all that a plan may have a move for."""
    torch.manual_seed(5)
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=LAYERS))
    unet.double()


@pytest.mark.parametrize("name", ["sdxl", "if"])
def test_a_lora_that_comes_after_a_plan_and_goes_again(name: str) -> None:
    """It wraps layers that a plan has moves for, between two pictures."""
    twin, reference = made(name), made(name)
    plan = [*by_letters("FF1oFN"), Action("sites", sites=(("resnet", "reuse"), ("transformer", "skip")))]
    calls, rest, ids = calls_of(plan), twin.args(), twins.ids_of(twin.unet, ("transformer", "resnet", "skip"))
    w = weights_of(ids)
    named = dict(zip(ids, w.tolist(), strict=True))
    with Attachment(twin.unet, ids) as attachment, torch.no_grad():
        acts = attachment.acts(Actions.along([sigma for sigma, _ in calls], plan), texts=True)

        def check() -> Tensor:
            expected = picture(Naive(reference.unet, rest, plan, named, calls), twin.x[:1], calls)
            got = picture(ours(attachment, acts, rest, w, calls), twin.x[:1], calls)
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)
            return expected

        seen = [check()]
        adapt(twin.unet)
        adapt(reference.unet)
        seen.append(check())
        for unet in (twin.unet, reference.unet):
            unet.unload_lora()
        seen.append(check())
    torch.testing.assert_close(seen[2], seen[0])
    assert (seen[1] - seen[0]).abs().max() > 1e-3
    assert twins.state(twin.unet) == twins.state(reference.unet)


@pytest.mark.parametrize("name", [name for name in twins.NETS if name != "sd"])
def test_gradients_with_and_without_checkpointing(name: str) -> None:
    """Against finite differences of the second implementation; the U-Net's own checkpointing changes nothing."""
    twin, kind = made(name), Hooked if name in OTHERS else Naive
    # Branches of spatio-temporal transformers are refused where checkpointing is on.
    ids = twins.ids_of(twin.unet, ("transformer", "resnet") if name == "svd" else ("transformer", "resnet", "self"))
    branches = [name for name in ids if name.endswith(".self")] or ids[:1]
    cheap = Action("output", order=1) if name in OTHERS else Action("cut", 2, 1)
    resnets = [name for name in ids if name.endswith(".resnet")]
    mixed = (*((name, "extrapolate") for name in resnets[::2]), *((name, "reuse") for name in branches))
    plan = [FULL, FULL, cheap, Action("sites", sites=mixed)]
    calls, rest, x = calls_of(plan), twin.args(slice(0, 1)), twin.x[:1]
    start = torch.linspace(0.8, 1.2, len(ids), dtype=torch.float64)
    along = torch.linspace(-1, 1, len(ids), dtype=torch.float64)

    def scored(w: Tensor) -> float:
        with torch.no_grad():
            naive = kind(twin.unet, rest, plan, dict(zip(ids, w.tolist(), strict=True)), calls, False)
            return float(picture(naive, x, calls, False).sum())

    expected = (scored(start + 1e-5 * along) - scored(start - 1e-5 * along)) / 2e-5
    gradients = []
    with Attachment(twin.unet, ids) as attachment:
        acts = attachment.acts(Actions.along([sigma for sigma, _ in calls], plan))
        for on in (False, True) if twin.unet._supports_gradient_checkpointing else (False,):
            twin.unet.enable_gradient_checkpointing() if on else twin.unet.disable_gradient_checkpointing()
            w = start.clone().requires_grad_()
            out = picture(ours(attachment, acts, rest, w, calls, False), x, calls, False)
            gradients.append(torch.autograd.grad(out.sum(), w)[0])
    torch.testing.assert_close(gradients[0], gradients[-1], rtol=1e-9, atol=1e-11)
    assert float(gradients[0] @ along) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["kandinsky", "motion"])
def test_two_threads_on_one_unet(name: str) -> None:
    twin = made(name)
    plan = short_plan(twin, name)
    calls, rest = calls_of(plan), twin.args()
    starts, barrier = [twin.x[:1], twin.x[1:]], threading.Barrier(2)
    with Attachment(twin.unet, ()) as attachment, torch.no_grad():
        acts = attachment.acts(Actions.along([sigma for sigma, _ in calls], plan), texts=True)

        def draw(start: Tensor, together: bool) -> Tensor:
            inner = ours(attachment, acts, rest, None, calls)

            def call(i: int, x: Tensor) -> Tensor:
                if together:
                    barrier.wait(20)
                return inner(i, x)

            with torch.no_grad():
                return picture(call, start, calls)

        alone = [draw(start, False) for start in starts]
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(draw, starts, (True, True)))
    for ours_, theirs in zip(got, alone, strict=True):
        assert torch.equal(ours_, theirs)


def test_sides_of_guidance_in_two_calls_are_told_apart_by_their_pictures() -> None:
    """Kandinsky's text is none: what it is conditioned on is a picture's embedding."""
    twin = made("kandinsky")
    pipe = SimpleNamespace(unet=twin.unet, scheduler=sampler("ddim"))
    pipe.scheduler.set_timesteps(7)
    levels = [meant(pipe.scheduler, t) for t in pipe.scheduler.timesteps]
    plain = Schedule.constant([s.id for s in list_sites(twin.unet)], [1.0], 0.9)
    plan = replace(plain, actions=Actions.along(levels, "FF2FoFa"))
    x, rest = twin.x[:1], [twin.args(slice(k, k + 1)) for k in range(2)]

    def outputs(sides: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
        with torch.no_grad(), apply(pipe, plan):
            return [[twin.unet(x, t, **side).sample for side in sides] for t in pipe.scheduler.timesteps.clone()]

    together, alone = outputs(rest), [outputs(rest[k : k + 1]) for k in range(2)]
    for i, pair in enumerate(together):
        for k in range(2):
            assert torch.equal(pair[k], alone[k][i][0])
    assert not torch.equal(together[2][0], together[2][1])


# ------------------------------------------------------------------------------------------------- stock pipelines


IN_PIPELINES = {
    "deepfloyd if image to image": "1FFcoF", "kandinsky image to image": "oFFNFa",
    "unconditional": "FF2FnF", "sdxl refiner": "GFFgFo", "latent upscaling": "hFFoFx",
    "animatediff video to video": "GFFgFX", "video to video": "xFFoFX", "stable video diffusion": "FFoFxX",
}  # fmt: skip
"""A plan for each; an edit's first call finds nothing stored, so it computes."""
SAMPLER = {"latent upscaling": "euler", "sdxl refiner": "dpm++ 2m"} | dict.fromkeys(
    ("deepfloyd if", "deepfloyd if image to image", "kandinsky", "kandinsky image to image"), "ddpm, learned variance"
)


def task(name: str) -> tuple[Any, dict[str, Any]]:
    pipe, call = pipelines.TASKS[name]()
    pipe.scheduler = sampler(SAMPLER.get(name, "ddim"))
    return pipe, call


@pytest.mark.parametrize("name", IN_PIPELINES)
def test_pictures_of_stock_pipelines(name: str) -> None:
    """Twice the same: a picture knows nothing of the one before."""
    (pipe, call), letters = task(name), IN_PIPELINES[name]
    edit = letters[0] != "F"
    unet, call = pipe.unet, call | {"num_inference_steps": 7 if edit else 6}

    def drawn_by(standin: Standin) -> Tensor:
        pipe.unet = standin.unet
        try:
            return pipelines.run(pipe, call)
        finally:
            pipe.unet = unet

    notes = Standin(unet, pipe.scheduler)
    drawn_by(notes)
    sigmas = [math.exp(4 * t) if name == "latent upscaling" else meant(pipe.scheduler, t) for t in notes.told]
    letters = (letters + "F" * len(sigmas))[: len(sigmas)]
    plan = by_letters(letters)
    ids = twins.ids_of(unet, ("transformer", "resnet"))
    above = [3 * sigmas[0], 2 * sigmas[0]]
    actions = Actions.along([*above, *sigmas], "FF" + letters, slack=3.0)
    schedule = Schedule(tuple(ids), np.array([9.0, 0.2]), np.full((2, len(ids)), 1.2), actions=actions)
    kind = Hooked if name == "latent upscaling" or "video" in name or "animate" in name else Naive
    naive = kind(unet, {}, effective(plan, 0), dict.fromkeys(ids, 1.2), list(zip(sigmas, notes.told, strict=True)))
    with apply(pipe, schedule):
        got = pipelines.run(pipe, call)
        assert torch.equal(pipelines.run(pipe, call), got)
    close(got, drawn_by(Standin(unet, pipe.scheduler, naive)))


@pytest.mark.parametrize("name", ["sdxl base", "deepfloyd if"])
def test_another_scale_of_a_lora_between_two_pictures(name: str) -> None:
    """What one picture has stored is in no other, also where the text's keys and values are made once."""
    pipe, call = task(name)
    adapt(pipe.unet)
    pipe.scheduler.set_timesteps(call["num_inference_steps"])
    sigmas = [told(pipe.scheduler, t) for t in pipe.scheduler.timesteps]
    ids = twins.ids_of(pipe.unet, ("transformer", "resnet"))
    actions = Actions.along(sigmas, ("FFoF1F" + "F" * len(sigmas))[: len(sigmas)])
    schedule = Schedule(tuple(ids), np.array([9.0, 0.2]), np.full((2, len(ids)), 1.2), actions=actions)
    with apply(pipe, schedule, text_once=True):
        pictures = []
        for scale in (1.0, 0.3, 1.0):
            pipe.unet.set_adapters("default", scale)
            pictures.append(pipelines.run(pipe, call))
    pipe.unet.set_adapters("default", 0.3)
    with apply(pipe, schedule, text_once=True):
        alone = pipelines.run(pipe, call)
    assert torch.equal(pictures[0], pictures[2])
    assert torch.equal(pictures[1], alone)
    assert not torch.allclose(pictures[0], pictures[1])


# ------------------------------------------------------------------------------------------------- several branches


@pytest.mark.parametrize("each", [1, 2, 3])
def test_what_branches_store_together_is_what_they_store_alone(each: int) -> None:
    """Two branches of two pictures each; with 3 sides of guidance as InstructPix2Pix has them. Rows are [side, branch,
    row]; a whole output has two sides, as `predict` gives it, and what a call of one side computes has one."""
    past = {name: torch.randn(2 * 2 * sides, 3) for name, sides in
            (("cut 1", each), ("output", min(each, 2)), ("guidance", 1), ("a site", 1))}  # fmt: skip
    both = Past(2, 1.0, {name: (Known(1.0, 1, (value,), "uncond" if name == "a site" else "both"),)
                         for name, value in past.items()})  # fmt: skip
    apart = parted(both, 2, each)
    for name, value in past.items():
        sided = value.unflatten(0, (-1, 2, 2))
        for i, branch in enumerate(apart):
            assert torch.equal(branch.known[name][0].values[0], sided[:, i].flatten(0, 1)), name
        again = joined(apart, each)
        assert torch.equal(again.known[name][0].values[0], value)
