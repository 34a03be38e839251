"""Stock pipelines with tiny parts: every task sees the schedule at the noise levels of its own steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny_unet
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from helpers.twins import make
from torch import Tensor

from rwopt.apply import apply
from rwopt.errors import UserError
from rwopt.schedule import Schedule, sigma_of
from rwopt.sites import list_sites

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DRAW = torch.Generator().manual_seed(3)
TEXT = torch.randn(2, 5, 12, generator=DRAW)
POOLED = torch.randn(2, 10, generator=DRAW)
IMAGE = torch.rand(1, 3, 16, 16, generator=DRAW)
START = torch.randn(1, 4, 8, 8, generator=DRAW)


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def build(kind: Any, unet: Any, scheduler: Any = None, **parts: Any) -> Any:
    if "XL" in kind.__name__:
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler = scheduler or DDIMScheduler(**SD)
    pipe = kind(vae=vae(), text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, **extra: Any) -> Tensor:
    call = {"guidance_scale": 4.0, "num_inference_steps": 4, "output_type": "latent"}
    if "XL" in type(pipe).__name__:
        call |= {"pooled_prompt_embeds": POOLED[:1], "negative_pooled_prompt_embeds": POOLED[1:]}
    call |= {"prompt_embeds": TEXT[:1], "negative_prompt_embeds": TEXT[1:]}
    images: Tensor = pipe(**call | {"generator": torch.Generator().manual_seed(0)} | extra).images
    return images


def text_to_image() -> Any:
    return build(StableDiffusionPipeline, make_tiny_unet()), {}


def several_per_prompt() -> Any:
    return build(StableDiffusionPipeline, make_tiny_unet()), {"num_images_per_prompt": 3}


def image_to_image() -> Any:
    return build(StableDiffusionImg2ImgPipeline, make_tiny_unet()), {"image": IMAGE, "strength": 0.6}


def inpainting() -> Any:
    mask = (IMAGE[:, :1] > 0.5).float()
    return build(StableDiffusionInpaintPipeline, make_tiny_unet()), {
        "image": IMAGE,
        "mask_image": mask,
        "height": 16,
        "width": 16,
        "strength": 0.8,
    }


def instruct_pix2pix() -> Any:
    pipe = build(StableDiffusionInstructPix2PixPipeline, make_tiny_unet(in_channels=8))
    return pipe, {"image": IMAGE, "image_guidance_scale": 1.5}


def controlnet() -> Any:
    torch.manual_seed(0)
    net = ControlNetModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
    )
    pipe = build(StableDiffusionControlNetPipeline, make_tiny_unet(), controlnet=net)
    return pipe, {"image": IMAGE}


def xl_base() -> Any:
    return build(StableDiffusionXLPipeline, make("sdxl").unet), {"denoising_end": 0.6}


def xl_refiner() -> Any:
    pipe = build(StableDiffusionXLImg2ImgPipeline, make("sdxl").unet)
    return pipe, {"image": START, "denoising_start": 0.6, "num_inference_steps": 8}


TASKS: list[Callable[[], Any]] = [
    text_to_image,
    several_per_prompt,
    image_to_image,
    inpainting,
    instruct_pix2pix,
    controlnet,
    xl_base,
    xl_refiner,
]


class Spy(Schedule):
    def at(self, sigma: Any) -> Any:
        self.provenance["seen"].append(float(sigma))
        return super().at(sigma)


def ramp(unet: Any, kind: Any = Schedule, seed: int = 0, **fields: Any) -> Any:
    ids = [site.id for site in list_sites(unet, ("transformer", "cross", "resnet", "skip"))]
    weights = np.random.default_rng(seed).uniform(0.6, 1.4, (3, len(ids)))
    return kind(tuple(ids), np.array([12.0, 1.0, 0.05]), weights, **fields)


@pytest.mark.parametrize("task", TASKS)
def test_every_task(task: Callable[[], Any]) -> None:
    pipe, extra = task()
    plain = run(pipe, **extra)
    spy = ramp(pipe.unet, Spy, provenance={"seen": []})
    with apply(pipe, Schedule.constant(spy.sites, [1.0])):
        assert torch.equal(run(pipe, **extra), plain)
    with apply(pipe, spy):
        changed = run(pipe, **extra)
    assert torch.equal(run(pipe, **extra), plain)
    assert not torch.equal(changed, plain)
    seen = spy.provenance["seen"]
    sigmas = sigma_of(pipe.scheduler.alphas_cumprod.numpy())[pipe.scheduler.timesteps.numpy()]
    expected = sigmas[: len(seen)] if task is xl_base else sigmas[-len(seen) :]
    assert len(seen) < len(sigmas) or task not in (image_to_image, inpainting, xl_base, xl_refiner)
    np.testing.assert_allclose(seen, expected, rtol=1e-5)


def test_pipelines_that_share_a_unet_do_not_mix() -> None:
    unet = make_tiny_unet()
    first = build(StableDiffusionPipeline, unet)
    second = build(StableDiffusionImg2ImgPipeline, unet, EulerDiscreteScheduler(**SD))
    late = {"image": IMAGE, "strength": 0.6}
    alone = []
    for pipe, seed, extra in ((first, 0, {}), (second, 1, late)):
        with apply(pipe, ramp(unet, seed=seed)):
            alone.append(run(pipe, **extra))
    with apply(first, ramp(unet, seed=0)), apply(second, ramp(unet, seed=1)):
        assert torch.equal(run(first), alone[0])
        assert torch.equal(run(second, **late), alone[1])
        assert torch.equal(run(first), alone[0])


def test_weights_of_one_side_of_guidance() -> None:
    pipe, _ = text_to_image()
    plain = run(pipe)
    results = {}
    for branch in ("both", "cond", "uncond"):
        with apply(pipe, ramp(pipe.unet, cfg_branch=branch)):
            results[branch] = run(pipe)
            results[branch, "unguided"] = run(pipe, guidance_scale=1.0)
    with apply(pipe, ramp(pipe.unet, cfg_branch="cond")), apply(pipe, ramp(pipe.unet, cfg_branch="uncond")):
        torch.testing.assert_close(run(pipe), results["both"])
    assert not torch.equal(results["cond"], results["both"])
    assert not torch.equal(results["cond"], plain)
    assert not torch.equal(results["cond"], results["uncond"])
    assert torch.equal(results["uncond", "unguided"], run(pipe, guidance_scale=1.0))
    torch.testing.assert_close(results["cond", "unguided"], results["both", "unguided"])
    other, _ = instruct_pix2pix()
    for target in (other, other.unet):
        noise = {"beta_schedule": "scaled_linear"}
        with pytest.raises(UserError, match="order of guidance in the batch"):
            apply(target, ramp(other.unet, cfg_branch="cond", noise=noise))
