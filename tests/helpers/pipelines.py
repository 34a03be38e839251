"""Stock pipelines with tiny random parts, one a task that people do, and how to call each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    DDPMPipeline,
    IFImg2ImgPipeline,
    IFPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22Pipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionLatentUpscalePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    TextToVideoSDPipeline,
    VideoToVideoSDPipeline,
    VQModel,
)
from helpers.samplers import LEARNED, SD
from helpers.twins import TEXT, make
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

DRAW = torch.Generator().manual_seed(3)
WORDS = torch.randn(2, 5, TEXT, generator=DRAW)
POOLED = torch.randn(2, 10, generator=DRAW)
IMAGE = torch.rand(1, 3, 16, 16, generator=DRAW)
MASK = (torch.rand(1, 1, 16, 16, generator=DRAW) > 0.5).float()
START = torch.randn(1, 4, 8, 8, generator=DRAW)

EXTRA = {  # samplers that only some tasks use
    "text to image": ("v, zero snr", "euler karras"),
    "deepfloyd if": tuple(LEARNED),
    "deepfloyd if image to image": tuple(LEARNED),
    "kandinsky": tuple(LEARNED),
    "kandinsky image to image": tuple(LEARNED),
    "stable video diffusion": ("svd euler", "edm"),
}
Call = dict[str, Any]
TASKS: dict[str, Callable[[], tuple[Any, Call]]] = {}
"""Name -> a pipeline in double precision and the arguments of a call of about three steps."""


def task(build: Callable[[], tuple[Any, Call]]) -> Callable[[], tuple[Any, Call]]:
    TASKS[build.__name__.replace("_", " ")] = build
    return build


def vae(kind: Any = AutoencoderKL, **changes: Any) -> Any:
    torch.manual_seed(0)
    config: Call = {
        "block_out_channels": (4, 4),
        "norm_num_groups": 2,
        "latent_channels": 4,
        "sample_size": 16,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return kind(**config | changes)


def build(kind: Any, unet: Any, **parts: Any) -> Any:
    """A pipeline that is given embeddings, so it needs no text encoder."""
    given: Call = {"unet": unet, "scheduler": DDIMScheduler(**SD), "vae": None, "text_encoder": None, "tokenizer": None}
    name = kind.__name__
    if "vae" in kind.__init__.__code__.co_varnames:
        given["vae"] = vae()
    if "XL" in name:
        given |= {"text_encoder_2": None, "tokenizer_2": None}
    if "safety_checker" in kind.__init__.__code__.co_varnames:
        given |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    given |= parts
    pipe = kind(**{key: value for key, value in given.items() if key in kind.__init__.__code__.co_varnames})
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double().requires_grad_(False)
    return pipe


def run(pipe: Any, call: Call) -> Tensor:
    """Pictures or latents of one seeded call."""
    torch.manual_seed(0)  # some pipelines keep the generator from their sampler
    outcome = pipe(**call | {"generator": torch.Generator().manual_seed(0)})
    return torch.as_tensor(outcome.frames if hasattr(outcome, "frames") else outcome.images)


def words(guidance: float = 4.0, steps: int = 3) -> Call:
    return {
        "prompt_embeds": WORDS[:1].double(),
        "negative_prompt_embeds": WORDS[1:].double(),
        "guidance_scale": guidance,
        "num_inference_steps": steps,
        "output_type": "latent",
    }


def pooled(**more: Any) -> Call:
    return {"pooled_prompt_embeds": POOLED[:1].double(), "negative_pooled_prompt_embeds": POOLED[1:].double(), **more}


@task
def text_to_image() -> tuple[Any, Call]:
    return build(StableDiffusionPipeline, make("sd").unet), words()


@task
def unguided() -> tuple[Any, Call]:
    return build(StableDiffusionPipeline, make("sd").unet), words(guidance=1.0)


@task
def several_per_prompt() -> tuple[Any, Call]:
    return build(StableDiffusionPipeline, make("sd").unet), words() | {"num_images_per_prompt": 3}


@task
def image_to_image() -> tuple[Any, Call]:
    return build(StableDiffusionImg2ImgPipeline, make("sd").unet), words(steps=4) | {"image": IMAGE, "strength": 0.8}


def hole() -> Call:
    return {"image": IMAGE, "mask_image": MASK, "height": 16, "width": 16, "strength": 0.8}


@task
def inpainting() -> tuple[Any, Call]:
    return build(StableDiffusionInpaintPipeline, make("sd").unet), words(steps=4) | hole()


@task
def inpainting_by_an_own_model() -> tuple[Any, Call]:
    return build(StableDiffusionInpaintPipeline, make("sd", in_channels=9).unet), words(steps=4) | hole()


@task
def instruct_pix2pix() -> tuple[Any, Call]:
    pipe = build(StableDiffusionInstructPix2PixPipeline, make("sd", in_channels=8).unet)
    return pipe, words() | {"image": IMAGE.double(), "image_guidance_scale": 1.5}


def control(unet: Any) -> ControlNetModel:
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    for block in (net.controlnet_mid_block, *net.controlnet_down_blocks):  # fresh ones are zero
        torch.nn.init.normal_(block.weight, std=0.3)
    return net


@task
def controlnet() -> tuple[Any, Call]:
    unet = make("sd").unet
    return build(StableDiffusionControlNetPipeline, unet, controlnet=control(unet)), words() | {"image": IMAGE}


@task
def latent_consistency() -> tuple[Any, Call]:
    """Guidance is an input of the U-Net, no second row."""
    return build(LatentConsistencyModelPipeline, make("sd", time_cond_proj_dim=8).unet), {
        "prompt_embeds": WORDS[:1].double(),
        "num_inference_steps": 3,
        "output_type": "latent",
    }


@task
def sdxl_base() -> tuple[Any, Call]:
    return build(StableDiffusionXLPipeline, make("sdxl").unet), words(steps=5) | pooled(denoising_end=0.6)


@task
def sdxl_refiner() -> tuple[Any, Call]:
    pipe = build(StableDiffusionXLImg2ImgPipeline, make("sdxl").unet)
    return pipe, words(steps=6) | pooled(image=START.double(), denoising_start=0.5)


@task
def sdxl_inpainting() -> tuple[Any, Call]:
    pipe = build(StableDiffusionXLInpaintPipeline, make("sdxl").unet)
    return pipe, words(steps=4) | pooled(**hole())


@task
def sdxl_controlnet() -> tuple[Any, Call]:
    unet = make("sdxl").unet
    pipe = build(StableDiffusionXLControlNetPipeline, unet, controlnet=control(unet))
    return pipe, words() | pooled(image=IMAGE)


@task
def sdxl_instruct_pix2pix() -> tuple[Any, Call]:
    pipe = build(StableDiffusionXLInstructPix2PixPipeline, make("sdxl", in_channels=8).unet)
    return pipe, words() | pooled(image=IMAGE.double(), height=16, width=16)


@task
def deepfloyd_if_image_to_image() -> tuple[Any, Call]:
    pipe = build(IFImg2ImgPipeline, make("if", in_channels=3, out_channels=6).unet, watermarker=None)
    return pipe, words(steps=4) | {"image": IMAGE.double(), "strength": 0.8, "output_type": "pt"}


@task
def deepfloyd_if() -> tuple[Any, Call]:
    pipe = build(IFPipeline, make("if", in_channels=3, out_channels=6).unet, watermarker=None)
    return pipe, words() | {"output_type": "pt"}


def kandinsky_with(kind: Any, **more: Any) -> tuple[Any, Call]:
    torch.manual_seed(0)
    movq = VQModel(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, num_vq_embeddings=8)
    pipe = build(kind, make("kandinsky", out_channels=8).unet, movq=movq)
    embeds = {"image_embeds": POOLED[:1].double(), "negative_image_embeds": POOLED[1:].double()}
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    return pipe, embeds | size | more


@task
def kandinsky() -> tuple[Any, Call]:
    return kandinsky_with(KandinskyV22Pipeline)


@task
def kandinsky_image_to_image() -> tuple[Any, Call]:
    return kandinsky_with(KandinskyV22Img2ImgPipeline, image=IMAGE.double(), num_inference_steps=4, strength=0.8)


@task
def unconditional() -> tuple[Any, Call]:
    pipe = build(DDPMPipeline, make("ddpm", in_channels=3, out_channels=3).unet)
    return pipe, {"num_inference_steps": 3, "output_type": "np"}


@task
def latent_upscaling() -> tuple[Any, Call]:
    """Its U-Net is told 0.25 ln sigma, whatever the sampler counts in."""
    unet = make("k", in_channels=8, out_channels=5, time_cond_proj_dim=138).unet
    call = words() | pooled(image=START.double())
    return build(StableDiffusionLatentUpscalePipeline, unet), call


@task
def animatediff() -> tuple[Any, Call]:
    pipe = build(AnimateDiffPipeline, make("motion").unet, motion_adapter=None)
    return pipe, words() | {"num_frames": 2, "height": 16, "width": 16}


VIDEO = [IMAGE[0].permute(1, 2, 0).numpy(), 1 - IMAGE[0].permute(1, 2, 0).numpy()]


@task
def animatediff_video_to_video() -> tuple[Any, Call]:
    pipe = build(AnimateDiffVideoToVideoPipeline, make("motion").unet, motion_adapter=None)
    return pipe, words(steps=4) | {"video": VIDEO, "height": 16, "width": 16, "strength": 0.8}


@task
def video_to_video() -> tuple[Any, Call]:
    pipe = build(VideoToVideoSDPipeline, make("3d").unet)
    return pipe, words(steps=4) | {"video": VIDEO, "strength": 0.8}


@task
def text_to_video() -> tuple[Any, Call]:
    return build(TextToVideoSDPipeline, make("3d").unet), words() | {"num_frames": 2, "height": 16, "width": 16}


@task
def stable_video_diffusion() -> tuple[Any, Call]:
    torch.manual_seed(0)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    look = CLIPVisionConfig(**small, image_size=16, patch_size=8, projection_dim=TEXT)
    decoder = {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2, "sample_size": 16}
    pipe = build(
        StableVideoDiffusionPipeline,
        make("svd", in_channels=8, out_channels=4).unet,
        vae=AutoencoderKLTemporalDecoder(**decoder),
        image_encoder=CLIPVisionModelWithProjection(look),
        feature_extractor=CLIPImageProcessor(),
    )
    size = {"height": 16, "width": 16, "num_frames": 2}
    return pipe, size | {"image": IMAGE.double(), "num_inference_steps": 3, "output_type": "latent"}


def absent(pipe: Any, scheduler: Any) -> str:
    """Why this pipeline cannot run under this sampler, schedule or not; "" if it can."""
    name = type(pipe).__name__
    if name.startswith("IF") and "variance_type" not in scheduler.config:
        return "it asks the sampler how the variance is learned"
    if name.startswith(("Kandinsky", "DDPM")) and "generator" not in scheduler.step.__code__.co_varnames:
        return "it hands the sampler's step a generator"
    if name == "StableDiffusionLatentUpscalePipeline" and not hasattr(scheduler, "sigmas"):
        return "it reads the sampler's sigmas"
    if name == "LatentConsistencyModelPipeline" and type(scheduler).__name__ != "LCMScheduler":
        return "it sets the sampler's original steps"
    return ""
