"""Single .safetensors files in the layout of the first Stable Diffusion (LDM), which A1111, Forge and ComfyUI read.

What a file holds is told by the names and shapes of its tensors, which stand at its head: no weights are read for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rwopt.errors import UserError
from rwopt.models.quiet import quiet

SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
"""The classes of pipelines that models are run by."""

Shapes = Mapping[str, tuple[int, ...]]

_UNET = "model.diffusion_model."
_VAES = ("first_stage_model.", "vae.")
_OTHERS = (
    # one of these in a name, and what the file is; the first one counts
    (("lora_unet_", "lora_te", ".lora_A.", ".lora_B.", ".lora.up.", "lora_down."), "a LoRA: give it as model.loras"),
    (("control_model.", "controlnet_"), "a ControlNet, which is not searched: give its base model"),
    (("joint_blocks.",), "a Stable Diffusion 3"),
    (("double_blocks.", "single_blocks.", "single_transformer_blocks."), "a Flux"),
    (("caption_projection.", "adaln_single."), "a PixArt"),
    (("down_blocks.", "mid_block."), "one part of a diffusers folder: give the folder"),
    (("input_blocks.",), "a U-Net alone: give a file that has text encoder and VAE too"),
    (("decoder.conv_in.", "encoder.conv_in.", "encoder.down."), "a VAE: give it as model.vae"),
    (("text_model.", "transformer.resblocks."), "a text encoder"),
)
_WORDS = {"emb_params", "clip_l", "clip_g"}  # whole names of tensors: SD3 and Flux have text encoders of such names
_ONLY = "single files are taken of Stable Diffusion 1.x, 2.x and XL"


def is_file_name(name: str) -> bool:
    """Whether `name` is meant as a file, be there one or not."""
    suffixes = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".sft")
    return Path(name).is_file() or name.lower().endswith(suffixes)


def shapes_of(name: str, path: str, key: str = "model.name") -> Shapes:
    """Shape of every tensor in a .safetensors file. Raises `UserError` for others."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise UserError(f"{key}={name} is not there: check the path")
    if Path(path).suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"{key}={name} is a pickle, which may run anything: give the .safetensors file")
    try:
        with safe_open(path, "pt") as file:
            return {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}={name} is no .safetensors file ({first}): give a model") from None


def kind_of_file(name: str, path: str) -> tuple[str, dict[str, int]]:
    """Class of the pipeline that runs a file; channels of its U-Net's input (`in_channels`) and of its latents.

    Raises `UserError` for what is no Stable Diffusion.
    """
    shapes = shapes_of(name, path)
    entry = shapes.get(_UNET + "input_blocks.0.0.weight")
    if entry is None:
        if _WORDS.intersection(shapes):
            raise UserError(f"model.name={name} is a textual inversion: give it as model.embeddings")
        for parts, what in _OTHERS:
            if any(part in key for key in shapes for part in parts):
                raise UserError(f"model.name={name} is {what}" + ("" if ":" in what else f": {_ONLY}"))
        first = next(iter(shapes), "nothing")
        raise UserError(f"model.name={name} holds tensors of another kind ({first}, ...): {_ONLY}")
    if any(key.startswith("control_model.") for key in shapes):
        raise UserError(f"model.name={name} is a ControlNet, which is not searched: give its base model")
    if any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        raise UserError(f"model.name={name} is an SDXL refiner: give its base model")
    sdxl = _UNET + "label_emb.0.0.weight" in shapes
    return (XL if sdxl else SD), {
        "in_channels": entry[1],
        "latent_channels": shapes.get(_UNET + "out.2.weight", entry[1:])[0],
    }


def without_extras(kind: str) -> dict[str, Any]:
    """Arguments that leave out what a pipeline adds behind the model: a checker of pictures, a watermark."""
    return {"safety_checker": None, "requires_safety_checker": False} if kind == SD else {"add_watermarker": False}


def open_file(path: str, kind: str, config: str, vae: Any) -> Any:
    """The pipeline of a file, all in float32. config, vae: see `load_model`.

    A file may say by an empty tensor that it predicts v ("v_pred"), and that its last timestep holds no signal
    ("ztsnr"), as those of ComfyUI do.
    """
    import diffusers

    shapes = shapes_of(path, path)
    given: dict[str, Any] = {"torch_dtype": torch.float32, **without_extras(kind)}
    given |= {key: value for key, value in (("config", config), ("vae", vae)) if value}
    if vae is None and not any(key.startswith(_VAES) for key in shapes):
        raise UserError(f"model.name={path} holds no VAE: give model.vae")
    with quiet():
        pipe = getattr(diffusers, kind).from_single_file(path, **given)
    if "v_pred" in shapes:
        options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": "ztsnr" in shapes}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **options)
    return pipe
