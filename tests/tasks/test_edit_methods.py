"""Instructions and inpainting: what a task makes is what stock pipelines make of the same noise, and what is refused.

The oracles are the stock pipelines themselves on the same small networks. They draw from the VAE's posterior where
rwopt takes its mean, so the VAE here has a posterior without width. Stock DDIM steps by whole timesteps, so that only a
number of calls that divides 1000 is on its own grid.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.families import UNETS, save_family
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model, load_model
from rwopt.sampling.backprop import GradientPath, unroll
from rwopt.sampling.denoise import Sided, condition, guide, predict
from rwopt.schedule import Schedule
from rwopt.schedule.samplers import SAMPLERS
from rwopt.tasks import Dials, Task, make_task
from rwopt.tasks.cases import Case
from rwopt.tasks.task import attach, weights_of
from rwopt.unet.apply import apply
from rwopt.unet.sites import list_sites

KINDS = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL"}
STEPS = 4
DIALS = Dials(5.0, 1.0, 1.7)
Make = Callable[[str, int], Model]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A family's model with a U-Net of so many channels."""
    known: dict[str, Model] = {}

    def make(family: str, channels: int) -> Model:
        if family not in known:
            known[family] = load_model(str(save_family(family, tmp_path_factory.mktemp(family))), "cpu", "float32")
            layer = known[family].vae.quant_conv
            layer.weight[4:], layer.bias[4:] = 0, -60  # the logarithm of the posterior's variance
        torch.manual_seed(5)
        unet = UNet2DConditionModel(**UNETS[family], in_channels=channels).eval().requires_grad_(False)
        return replace(known[family], unet=unet)

    return make


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    draw, rows = np.random.default_rng(0), []
    for i, words in enumerate(("make it a portrait, beard", "pale skin")):
        mask = np.zeros((64, 64), bool)
        mask[8 * i : 40, 16:50] = True
        picture = draw.integers(0, 256, (64, 64, 3), np.uint8)
        rows.append(Case(f"case {i}", words, "tan skin", source=picture, mask=mask))
    return rows


def stock(model: Model, kind: str, sampler: str = "ddim") -> Any:
    """A pipeline of the model's own parts."""
    known = inspect.signature(getattr(diffusers, kind)).parameters
    given = {**model.pipe.components, "unet": model.unet, "vae": model.vae}
    given |= {"add_watermarker": False, "requires_safety_checker": False}
    pipe = getattr(diffusers, kind)(**{name: value for name, value in given.items() if name in known})
    options = {**SAMPLERS[sampler].options, "timestep_spacing": "trailing"}
    pipe.scheduler = getattr(diffusers, SAMPLERS[sampler].scheduler).from_config(model.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bumpy(model: Model, branch: Any = "both") -> Schedule:
    """Weights that differ from site to site and from step to step."""
    sites = tuple(site.id for site in list_sites(model.unet, ("self", "cross", "ff")))
    weights = np.random.default_rng(1).uniform(0.2, 1.8, (3, len(sites)))
    return Schedule(sites, np.array([14.6, 1.5, 0.1]), weights, cfg_branch=branch)


def same(mine: Tensor | None, other: Tensor) -> None:
    assert mine is not None
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)


def instructed(task: Task, pipe: Any, dials: Dials = DIALS) -> Tensor:
    found: Tensor = pipe(
        [case.caption for case in task.cases], image=task.references, latents=task.noise.clone(), output_type="latent",
        guidance_scale=dials.guidance, image_guidance_scale=dials.image_guidance, num_inference_steps=task.steps,
    ).images  # fmt: skip
    return found


def inpainted(task: Any, pipe: Any, **more: Any) -> Tensor:
    given = {"image": task.references, "mask_image": task.masks, "latents": task.noise.clone(), "strength": 1.0,
             "num_inference_steps": task.steps}  # fmt: skip
    found: Tensor = pipe(
        [case.caption for case in task.cases], output_type="latent", guidance_scale=DIALS.guidance, height=64, width=64,
        **{**given, **more},
    ).images  # fmt: skip
    return found


def same_as_stock(task: Any, pipe: Any, schedule: Schedule, made_by: Callable[[Any, Any], Tensor]) -> None:
    """A task's latents are those that `made_by(task, pipe)` gets, plain and with a schedule, which changes them."""
    plain = task.made(DIALS).latents
    same(plain, made_by(task, pipe))
    with apply(pipe, schedule):
        weighed = made_by(task, pipe)
    same(task.made(DIALS, schedule).latents, weighed)
    assert plain is not None
    assert (weighed - plain).abs().max() > 0.05


# --- what the stock pipelines make


@pytest.mark.parametrize(("family", "sampler"), [("sd1", "ddim"), ("sd1", "euler"), ("sdxl", "dpmpp_2m")])
def test_instructions_give_what_the_stock_pipeline_gives(
    twin: Make, cases: list[Case], family: str, sampler: str
) -> None:
    model = twin(family, 8)
    task = make_task("editing", model, cases, STEPS, method="instruct", sampler=sampler)
    pipe, schedule = stock(model, f"{KINDS[family]}InstructPix2PixPipeline", sampler), bumpy(model)
    same_as_stock(task, pipe, schedule, instructed)


def test_without_guidance_a_call_has_one_row(twin: Make, cases: list[Case]) -> None:
    model, dials = twin("sd1", 8), replace(DIALS, guidance=1.0)
    task = make_task("editing", model, cases, 2, method="instruct")
    same(task.made(dials).latents, instructed(task, stock(model, "StableDiffusionInstructPix2PixPipeline"), dials))


@pytest.mark.parametrize(
    ("family", "channels", "sampler"),
    [("sd1", 9, "ddim"), ("sd1", 4, "ddim"), ("sd1", 4, "euler"), ("sd1", 4, "dpmpp_2m"), ("sdxl", 9, "dpmpp_2m"),
     ("sdxl", 4, "dpmpp_2m")],
)  # fmt: skip
def test_inpainting_gives_what_the_stock_pipeline_gives(
    twin: Make, cases: list[Case], family: str, channels: int, sampler: str
) -> None:
    model = twin(family, channels)
    task = make_task("editing", model, cases, STEPS, method="inpaint", sampler=sampler)
    pipe, schedule = stock(model, f"{KINDS[family]}InpaintPipeline", sampler), bumpy(model)
    same_as_stock(task, pipe, schedule, inpainted)


@pytest.mark.parametrize("channels", [9, 4])
def test_inpainting_from_a_lower_level_starts_from_the_source(twin: Make, cases: list[Case], channels: int) -> None:
    model = twin("sd1", channels)
    task: Any = make_task("editing", model, cases, STEPS, method="inpaint")
    mine = task.made(replace(DIALS, strength=0.5)).latents
    pipe = stock(model, "StableDiffusionInpaintPipeline")
    rest = task.rest if channels == 9 else torch.zeros_like(task.latents)  # which a plain U-Net does not see
    given = {"image": task.latents, "masked_image_latents": rest, "latents": None, "strength": 0.5}
    same(mine, inpainted(task, pipe, num_inference_steps=2 * STEPS, generator=task.generators(), **given))


def test_a_plain_model_leaves_what_is_not_masked(twin: Make, cases: list[Case]) -> None:
    task: Any = make_task("editing", twin("sd1", 4), cases, STEPS, method="inpaint", sampler="dpmpp_2m")
    latents = task.made(DIALS).latents
    kept = task.mask.expand_as(latents) == 0
    assert torch.equal(latents[kept], task.latents[kept])
    assert (latents - task.latents)[~kept].abs().mean() > 0.1
    assert torch.equal(task.made(DIALS).mask, task.masks)


# --- several candidates, sides of guidance, gradients


@pytest.mark.parametrize(("method", "channels"), [("instruct", 8), ("inpaint", 9), ("inpaint", 4)])
def test_candidates_share_calls_and_get_what_each_gets_alone(
    twin: Make, cases: list[Case], method: str, channels: int
) -> None:
    model = twin("sd1", channels)
    task = make_task("editing", model, cases, STEPS, method=method, sampler="dpmpp_2m")
    given = [(DIALS, None), (replace(DIALS, guidance=3.0), bumpy(model)), (replace(DIALS, image_guidance=1.2), None),
             (DIALS, bumpy(model))]  # fmt: skip
    before = model.calls
    found = task.candidates(given)
    together = model.calls - before
    for batch, (dials, schedule) in zip(found, given, strict=True):
        alone = task.made(dials, schedule).latents
        assert alone is not None
        same(batch.latents, alone)
    assert together < model.calls - before - together
    if method == "instruct":
        assert found[0].latents is not None
        assert found[2].latents is not None
        assert (found[0].latents - found[2].latents).abs().max() > 1e-3


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_weights_of_one_side_are_on_the_rows_with_or_without_words(
    twin: Make, cases: list[Case], branch: str
) -> None:
    model = twin("sd1", 8)
    task: Any = make_task("editing", model, cases, STEPS, method="instruct")
    schedule = bumpy(model, branch)
    weights = weights_of(schedule)
    assert weights is not None
    with attach(model, schedule) as hooks:
        x, cond, course = task.inputs(hooks, DIALS, slice(None))
        out = guide(predict(model, hooks, x, course.told[0], cond, weights(course.sigmas[0])), cond)
        row, ones = torch.from_numpy(schedule.at(course.sigmas[0])).float(), torch.ones(len(schedule.sites))
        sides = (ones, row) if branch == "cond" else (row, ones)

        def alone(text: Tensor, extra: Tensor, w: Tensor) -> Tensor:
            return hooks(torch.cat([x, extra], 1), course.told[0], text, w)

        assert cond.negative is not None
        blank = alone(cond.negative, torch.zeros_like(x), sides[0])
        shown, asked = alone(cond.negative, task.latents, sides[0]), alone(cond.positive, task.latents, sides[1])
    expected = blank + 1.7 * (shown - blank) + 5.0 * (asked - shown)  # DIALS
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    pipe = stock(model, "StableDiffusionInstructPix2PixPipeline")
    with pytest.raises(UserError, match=r"^op.cfg_branch[^\n]*$"):
        apply(pipe, schedule)


def test_sides_of_several_pictures_keep_their_rows(twin: Make, cases: list[Case]) -> None:
    model = twin("sd1", 8)
    cond = replace(condition(model, ["a", "b"], 3.0), extra=torch.randn(2, 4, 8, 8), image_guidance=1.5)
    sites = [site.id for site in list_sites(model.unet)]
    x, w = torch.randn(2, 4, 8, 8), torch.rand(2, 2, len(sites)) + 0.5
    with attach(model, Schedule(tuple(sites), np.ones(1), np.full((1, len(sites)), 2.0))) as hooks:
        both = predict(model, hooks, x, 400, cond, Sided(w[0], w[1]))
        assert both.shape == (4, 4, 8, 8)
        for i in range(2):
            own = slice(i, i + 1)
            one = predict(model, hooks, x[own], 400, cond.rows(own), Sided(w[0, own], w[1, own]))
            torch.testing.assert_close(both[i::2], one, rtol=1e-4, atol=1e-4)
    assert [cond.each, cond.unguided().each, replace(cond, image_guidance=None).each] == [3, 1, 2]


@pytest.mark.parametrize(("method", "channels"), [("instruct", 8), ("inpaint", 4)])
def test_the_gradient_of_weights_equals_finite_differences(
    twin: Make, cases: list[Case], method: str, channels: int
) -> None:
    base = twin("sd1", channels)
    model = replace(base, unet=base.unet.double(), checkpointing="off")
    task = make_task("editing", model, cases[:1], 2, method=method, sampler="dpmpp_2m")
    schedule = bumpy(model)
    with attach(model, schedule) as hooks:
        x, cond, course = task.inputs(hooks, DIALS, slice(None))
        x = x.double()
        table = torch.rand(2, len(schedule.sites), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        rows = {sigma: i for i, sigma in enumerate(course.sigmas)}

        def reward(table: Tensor) -> Tensor:
            end = unroll(model, hooks, x, cond, course, lambda s: table[rows[s]], GradientPath("full"))
            return end.double().square().mean()

        leaf = (table + 0.5).requires_grad_()
        (gradient,) = torch.autograd.grad(reward(leaf), leaf)
        way = torch.randn(table.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            change = (reward(leaf + 1e-3 * way) - reward(leaf - 1e-3 * way)) / 2e-3
    assert float((gradient * way).sum()) == pytest.approx(float(change), rel=2e-3, abs=1e-7)


# --- what is refused


@pytest.mark.parametrize(
    ("channels", "name", "method", "said"),
    [
        (8, "editing", "sdedit", r"8 channels for latents of 4 \(InstructPix2Pix\), and task.method=sdedit .*=ins"),
        (8, "generation", "sdedit", "task.name=generation takes one of 4: use task.name=editing with task.method=ins"),
        (8, "editing", "inpaint", "task.method=inpaint takes one of 9 or 4"),
        (9, "editing", "inversion", r"9 channels .*\(inpainting\), and task.method=inversion"),
        (4, "editing", "instruct", r"4 channels .*\(text to picture\), and task.method=instruct takes one of 8"),
        (9, "editing", "instruct", "use task.name=editing with task.method=inpaint"),
        (5, "editing", "sdedit", r"\(depth-to-picture\): such models are not searched"),
    ],
)  # fmt: skip
def test_models_of_other_inputs_are_refused_before_any_work(
    twin: Make, cases: list[Case], channels: int, name: str, method: str, said: str
) -> None:
    model = twin("sd1", channels)
    with pytest.raises(UserError, match=rf"^model.name=[^\n]*{said}[^\n]*$"):
        make_task(name, replace(model, vae=None), cases, 2, method=method)
    assert model.calls == 0


def test_inpainting_needs_masks(twin: Make, cases: list[Case]) -> None:
    bare = [cases[0], replace(cases[1], mask=None)]
    with pytest.raises(UserError, match=r"^case case 1 has no mask, which task.method=inpaint needs: [^\n]*$"):
        make_task("editing", twin("sd1", 4), bare, 2, method="inpaint")
