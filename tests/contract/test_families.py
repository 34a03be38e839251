"""What a search scores is what the user gets, for every family of models: its pictures against the stock pipeline's.

Small twins of each family (`helpers.families`), from the same latents, in one float32.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as img2img_xl
from helpers.families import FAMILIES, NOISE, save_family, save_lora, save_single_file
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model, load_model
from rwopt.models.text import give_text_model
from rwopt.sampling.backprop import GradientPath, unroll
from rwopt.sampling.batched import sample_batched
from rwopt.sampling.course import course_by_rule
from rwopt.sampling.denoise import condition, guidance_embedding
from rwopt.sampling.sample import sample
from rwopt.schedule import Schedule
from rwopt.schedule.samplers import SAMPLERS
from rwopt.tasks.cases import Case
from rwopt.tasks.editing import Editing
from rwopt.tasks.generation import Generation
from rwopt.tasks.task import Dials, Task
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

PROMPTS = ("portrait, tan skin, short black hair", "portrait, beard")
STEPS = 4  # stock DDIM steps to T // N below, which on a trailing grid is the next level where N divides T
SIZE = (72, 88)  # latents of 9 x 11, which the levels of the U-Net do not divide


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_family(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@dataclass
class Stage:
    """One model as rwopt loads it, and the stock pipeline of the same folder."""

    family: str
    model: Model
    pipe: Any
    call: dict[str, Any] = field(default_factory=dict)  # further arguments of the stock pipeline

    @property
    def sampler(self) -> str:
        return "lcm" if self.family == "lcm" else "ddim"

    def task(self, kind: Any = Generation) -> Any:
        draw, size = np.random.default_rng(0), (*self.model.picture_size, 3)
        cases = [Case(f"c{i}", p, source=draw.integers(0, 256, size, np.uint8)) for i, p in enumerate(PROMPTS)]
        own = {"plain": Dials(1.0)} if kind is Generation else {}
        return kind(self.model, cases, STEPS, sampler=self.sampler, **own)

    def stock(self, task: Task, strength: float = 1.0) -> Tensor:
        call = {"prompt": list(PROMPTS), "guidance_scale": 3.0, "output_type": "latent", **self.call}
        if self.sampler == "lcm":
            call["timesteps"] = [int(t) for t in task.course(Dials(3.0, strength)).told]
            call["generator"] = task.generators("/fresh")
            options = dict(SAMPLERS["lcm"].options)
            self.pipe.scheduler = diffusers.LCMScheduler(**NOISE, **options)
        else:
            call["num_inference_steps"] = round(STEPS / strength)
        height, width = self.model.picture_size
        self.pipe.set_progress_bar_config(disable=True)
        if isinstance(task, Generation):
            return torch.as_tensor(self.pipe(latents=task.noise.clone(), height=height, width=width, **call).images)
        assert isinstance(task, Editing)
        xl = hasattr(self.pipe, "text_encoder_2")
        kind = diffusers.StableDiffusionXLImg2ImgPipeline if xl else diffusers.StableDiffusionImg2ImgPipeline
        parts = dict(self.pipe.components)
        edit: Any = kind(**parts) if xl else kind(**parts, requires_safety_checker=False)
        edit.set_progress_bar_config(disable=True)
        with pytest.MonkeyPatch.context() as patch:  # the noise of the start; a scheduler's own comes from elsewhere
            patch.setattr(img2img_xl if xl else img2img, "randn_tensor", lambda *args, **kwargs: task.noise.clone())
            given = strength if self.sampler == "ddim" else 1.0  # a list of timesteps starts at the level of the edit
            return torch.as_tensor(edit(image=task.latents, strength=given, **call).images)

    def weights(self) -> Schedule:
        sites = [site.id for site in list_sites(self.model.unet, ("self", "cross", "ff", "resnet"))]
        table = np.random.default_rng(0).uniform(0.5, 1.5, (4, len(sites)))
        return Schedule(tuple(sites), np.array([12.0, 3.0, 0.5, 0.05]), table)

    def agrees(self, kind: Any = Generation, weighted: bool = False, strength: float = 1.0) -> Tensor:
        """Holds the contract; returns rwopt's latents."""
        task, weights = self.task(kind), self.weights() if weighted else None
        got = task.made(Dials(3.0, strength), weights).latents
        with apply(self.pipe, weights) if weights is not None else nullcontext():
            expected = self.stock(task, strength)
        assert got.isfinite().all()
        assert got.shape == expected.shape == (2, *self.model.latent_shape)
        assert distance(got, expected) < 3e-5
        assert distance(got[:1], got[1:]) > 1e-3  # another prompt, another noise
        result: Tensor = got
        return result


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def make_stage(family: str, folder: Path, call: dict[str, Any] | None = None, **options: Any) -> Stage:
    model = load_model(str(folder), "cpu", "float32", **options)
    return Stage(family, model, DiffusionPipeline.from_pretrained(folder), call or {})


@pytest.fixture(scope="module")
def stages(folders: dict[str, Path]) -> dict[str, Stage]:
    return {name: make_stage(name, folder) for name, folder in folders.items()}


@pytest.fixture(params=FAMILIES)
def stage(request: pytest.FixtureRequest, stages: dict[str, Stage]) -> Stage:
    return stages[request.param]


@pytest.mark.parametrize("kind", [Generation, Editing])
def test_pictures_are_the_stock_pipelines(stage: Stage, kind: Any) -> None:
    strength = 0.5 if kind is Editing else 1.0
    plain = stage.agrees(kind, strength=strength)
    weighted = stage.agrees(kind, weighted=True, strength=strength)
    assert distance(weighted, plain) > 1e-2


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", [Generation, Editing])
def test_another_size_that_is_not_square(folders: dict[str, Path], family: str, kind: Any) -> None:
    stage = make_stage(family, folders[family], size=SIZE)
    assert stage.model.latent_shape == (4, 9, 11)
    assert stage.model.picture_size == SIZE
    stage.agrees(kind, weighted=True, strength=0.5 if kind is Editing else 1.0)
    pictures = stage.task(Generation).images(Dials(3.0))
    assert pictures.shape == (2, 3, *SIZE)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_words_of_ones_own(folders: dict[str, Path], stages: dict[str, Stage], family: str) -> None:
    """A negative prompt, and layers that are left out: on the positive side alone, as in stock."""
    given = {"negative_prompt": ["blurred, beard"] * 2, "clip_skip": 1}
    stage = make_stage(family, folders[family], given, negative="blurred, beard", clip_skip=1)
    give_text_model(stage.pipe.text_encoder)  # stock finds none with transformers from 5.6 on
    got, without = stage.agrees(), stages[family].agrees()
    assert distance(got, without) > 1e-3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_no_negative_prompt_and_an_empty_one(stages: dict[str, Stage], family: str) -> None:
    """SDXL has zeros for one that is not given."""
    model = stages[family].model
    cond = condition(model, list(PROMPTS), 3.0)
    assert cond.negative is not None
    assert bool((cond.negative == 0).all()) == (family == "sdxl")
    other = condition(model, list(PROMPTS), 3.0, "blurred")
    assert other.negative is not None
    assert distance(other.negative, cond.positive) > 1e-3
    assert set(cond.added) == set(cond.added_negative) == ({"text_embeds", "time_ids"} if family == "sdxl" else set())


def test_parts_of_a_condition_keep_what_comes_beside_the_text(stages: dict[str, Stage]) -> None:
    cond = condition(stages["sdxl"].model, list(PROMPTS), torch.tensor([2.0, 3.0]))
    assert cond.added["time_ids"].tolist() == [[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2
    one, twice, alone = cond.rows(slice(1, 2)), cond.times(2), cond.unguided()
    for side in ("added", "added_negative"):
        for name, whole in getattr(cond, side).items():
            assert torch.equal(getattr(one, side)[name], whole[1:])
            assert torch.equal(getattr(twice, side)[name], torch.cat([whole, whole]))
    assert torch.equal(one.guidance, torch.tensor([3.0]))
    assert (alone.negative, alone.added_negative) == (None, {})
    assert alone.added.keys() == cond.added.keys()
    assert [stages[name].model.family for name in FAMILIES] == ["sd", "sd", "sdxl", "sd", "sdxl"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_loras(
    folders: dict[str, Path], stages: dict[str, Stage], tmp_path: Path, family: str
) -> None:
    """Fused, they are what they are in stock; U-Net and text encoders keep their modules and names."""
    path = save_lora(family, tmp_path)
    stage = make_stage(family, folders[family], loras={str(path): 0.7})
    plain = stages[family].model
    assert [(n, type(m)) for n, m in stage.model.unet.named_modules()] == [
        (n, type(m)) for n, m in plain.unet.named_modules()
    ]
    assert stage.model.unet.state_dict().keys() == plain.unet.state_dict().keys()
    assert distance(stage.model.encode(["portrait"]), plain.encode(["portrait"])) > 1e-3
    stage.pipe.load_lora_weights(str(path), adapter_name="own")
    stage.pipe.set_adapters(["own"], [0.7])
    stage.pipe.fuse_lora()  # else stock adds it in each layer, with a float error of its own
    assert distance(stage.agrees(weighted=True), stages[family].agrees(weighted=True)) > 1e-2


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_single_file(folders: dict[str, Path], stages: dict[str, Stage], tmp_path: Path, family: str) -> None:
    path = save_single_file(folders[family], tmp_path / "mine.safetensors")
    model = load_model(str(path), "cpu", "float32", config=str(folders[family]))
    own, other = stages[family], Stage(family, model, stages[family].pipe)
    assert torch.equal(own.task().made(Dials(3.0)).images, other.task().made(Dials(3.0)).images)
    other.agrees(weighted=True)


def test_a_single_file_may_say_what_it_predicts(folders: dict[str, Path], tmp_path: Path) -> None:
    path = save_single_file(folders["sd1"], tmp_path / "v.safetensors", "v_pred", "ztsnr")
    marked = load_model(str(path), "cpu", "float32", config=str(folders["sd1"]))
    assert marked.scheduler.config.prediction_type == "v_prediction"
    assert marked.ends_in_noise


# --- candidates together, and gradients


@pytest.mark.parametrize("family", ["sdxl", "lcm"])
@pytest.mark.parametrize("batch", [2, 64])
def test_candidates_together_get_what_they_get_alone(stages: dict[str, Stage], family: str, batch: int) -> None:
    stage = stages[family]
    model, weights = stage.model, stage.weights()
    course = course_by_rule(model, 3, "ddim")
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))

    def late(sigma: float) -> Tensor:
        w = torch.from_numpy(weights.at(sigma)).float()
        return w if sigma < 1 else torch.ones_like(w)

    def plain(sigma: float) -> Tensor:
        return torch.ones(len(weights.sites))

    candidates = [(3.0, plain), (3.0, late), (5.0, plain), (5.0, late)]
    with Attachment(model.unet, weights.sites) as attachment:
        alone = [sample(model, attachment, x, condition(model, list(PROMPTS), g), course, w) for g, w in candidates]
        before = model.calls
        cond = condition(model, list(PROMPTS), 3.0)
        ends = sample_batched(model, attachment, x, cond, course, candidates, batch)
    for got, one in zip(ends, alone, strict=True):
        assert torch.equal(got, one) if batch < 4 else distance(got, one) < 3e-5
    assert min(distance(alone[0], other) for other in alone[1:]) > 1e-4
    # a U-Net that is told the scale cannot share a call between scales; the others part behind the first
    assert model.calls - before == (3 if batch == 64 else 2 + 2 + 4 if family == "lcm" else 1 + 2 + 4)


def test_guidance_embedding_is_the_stock_pipelines(stages: dict[str, Stage]) -> None:
    pipe: Any = stages["lcm"].pipe
    for width in (8, 9, 256):
        expected = pipe.get_guidance_scale_embedding(torch.tensor([0.0, 2.0, 6.5]), width)
        got = guidance_embedding(torch.tensor([1.0, 3.0, 7.5]), 3, width)
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)  # of angles up to 6500 in single precision
    assert stages["lcm"].model.guidance_width == 9
    assert condition(stages["lcm"].model, ["a"], 3.0).negative is None


@pytest.mark.parametrize("family", ["sdxl", "lcm"])
@pytest.mark.parametrize("checkpointing", ["auto", "on"])
def test_gradients_through_the_sampler_are_finite_differences(
    folders: dict[str, Path], family: str, checkpointing: str
) -> None:
    """Of weights; with `on`, in parts of some pictures, whose added inputs are cut with them."""
    model = load_model(str(folders[family]), "cpu", "float32", checkpointing=checkpointing)
    model.unet.double()
    sites = [site.id for site in list_sites(model.unet)]
    course = course_by_rule(model, 3)
    n = 5  # two parts
    x = torch.randn(n, *model.latent_shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = condition(model, [f"portrait, {i} beard" for i in range(n)], 3.0)

    def end(table: Tensor) -> Tensor:
        rows = {sigma: i for i, sigma in enumerate(course.sigmas)}
        with Attachment(model.unet, sites) as attachment:
            z = unroll(model, attachment, x, cond, course, lambda sigma: table[rows[sigma]], GradientPath("full"))
            return torch.autograd.grad(score(z), table)[0] if table.requires_grad else score(z)

    def score(z: Tensor) -> Tensor:
        return (z * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z)).sum() + z.square().sum()

    table = torch.full((3, len(sites)), 0.9, dtype=torch.float64)
    gradient = end(table.clone().requires_grad_())
    assert gradient.isfinite().all()
    direction = torch.randn(table.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = 1e-4
    with torch.no_grad():
        slope = float((end(table + h * direction) - end(table - h * direction)) / (2 * h))
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5)


def test_gradients_of_what_a_unet_is_told(stages: dict[str, Stage]) -> None:
    """Timesteps and the scale, too, leave a float16 U-Net as large as they are."""
    found = []
    for number in (torch.float32, torch.float16):
        model = replace(stages["lcm"].model, unet=copy.deepcopy(stages["lcm"].model.unet).to(number))
        sites = [site.id for site in list_sites(model.unet)]
        x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        made = course_by_rule(model, 2)
        dials = [torch.tensor(float(v), requires_grad=True) for v in (*made.told, 3.0, 4.0)]
        course = replace(made, told=tuple(dials[:2]), guidance=tuple(dials[2:]))
        cond = condition(model, list(PROMPTS), 1.0)
        with Attachment(model.unet, sites) as attachment:
            z = unroll(model, attachment, x, cond, course, lambda sigma: None, GradientPath("full"))
            found.append(torch.stack(torch.autograd.grad(z.square().mean() / 1e4, dials)))
    whole, half = found
    assert whole.abs().min() > 0
    assert float((half - whole).norm() / whole.norm()) < 0.1


def test_an_unknown_size_is_refused(folders: dict[str, Path]) -> None:
    for size in ((60, 64), (64,), (0, 64), (64.0, 64)):
        with pytest.raises(UserError, match=r"^task.size=[^\n]*give height and width in pixels, multiples of 8$"):
            load_model(str(folders["sd1"]), "cpu", "float32", size=size)  # type: ignore[arg-type]
