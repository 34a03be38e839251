"""A frozen model from a diffusers folder, a hub id or a single file, ready for a search.

Stable Diffusion 1.x and 2.x, Stable Diffusion XL, their distilled kin (Turbo, Lightning, Hyper, LCM), pruned ones
(SSD-1B), and those made for edits (inpainting, InstructPix2Pix): all with a plain `UNet2DConditionModel`, which a
`StableDiffusionPipeline`, a `StableDiffusionXLPipeline` or their kin for edits runs. What a folder or file holds is
found out from its configuration and names before any weights are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rwopt.embedded import DEFAULT, FOLDERS, place_of
from rwopt.errors import UserError, check, one_of
from rwopt.models.addons import add_embeddings, add_loras, other_vae
from rwopt.models.channels import check_channels
from rwopt.models.formats import FORMATS, auto_vae_format, device_of, has_bf16, unet_format_of
from rwopt.models.model import Model, latent_size, vae_factor
from rwopt.models.quiet import quiet
from rwopt.models.single_file import SD, XL, is_file_name, kind_of_file, open_file, without_extras
from rwopt.models.text import encoders_of
from rwopt.models.variants import only_variant

_KINDS = {
    SD: SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionInpaintPipeline": SD,
    "StableDiffusionInstructPix2PixPipeline": SD,
    "LatentConsistencyModelPipeline": SD,
    "LatentConsistencyModelImg2ImgPipeline": SD,
    XL: XL,
    "StableDiffusionXLImg2ImgPipeline": XL,
    "StableDiffusionXLInpaintPipeline": XL,
    "StableDiffusionXLInstructPix2PixPipeline": XL,
}
_ONLY = "search, sample and edit take Stable Diffusion 1.x, 2.x, XL and what was distilled from them"


def load_model(
    name: str = DEFAULT,
    device: str = "auto",
    dtype: str = "auto",
    vae_dtype: str = "auto",
    checkpointing: str = "auto",
    *,
    revision: str = "",
    variant: str = "",
    config: str = "",
    vae: str = "",
    loras: Mapping[str, float] | None = None,
    embeddings: Sequence[str] = (),
    clip_skip: int = 0,
    negative: str = "",
    size: Sequence[int] | None = None,
    method: str = "",
) -> Model:
    """Load a frozen model.

    name: an embedded model ("avatars"), a diffusers folder, a hub id, or a single .safetensors file in the
    layout that A1111 and ComfyUI read. dtype: the U-Net's: "float32", "bfloat16", "float16", "auto" (bfloat16 where the
    processor has it).
    vae_dtype: the same for the VAE, or "auto": float32 on a CPU, beside a float32 U-Net and for a small decoder (it
    needs little memory); else the U-Net's, unless the VAE's configuration says `force_upcast` (SDXL's overflows in
    float16): bfloat16 there, or float32 on a GPU that has none.
    checkpointing: "on", "off" or "auto", see `rwopt.sampling.backprop.unroll`.
    revision, variant: of a hub id or folder, as diffusers has them; a folder of one variant alone needs no name for it.
    config: for a single file: diffusers folder or hub id with the same architecture, whose configurations, tokenizer
    and noise levels it gets; "": diffusers looks for it on the hub. vae: folder, hub id or file of another VAE.
    loras: scale of each LoRA (file, folder or hub id), fused into U-Net and text encoders. embeddings: textual
    inversions (file, folder or hub id); a file that names no word is called by its own name. clip_skip: layers at the
    end of the text encoders to leave out, 0 for none (A1111 and ComfyUI count from 1). negative: negative prompt.
    size: height and width of pictures in pixels, multiples of the VAE's factor and of 8; None: the model's own.
    method: what it is for, a key of `rwopt.models.channels.EXTRA`, so that another kind of model is refused before its
    weights are read; "": anything.
    Raises `UserError` for what cannot be opened or is no model of these kinds, for add-ons that do not fit, and for a
    device, number format, switch or size that does not exist.
    """
    device = device_of(device)
    for key, value in (("dtype", dtype), ("vae_dtype", vae_dtype)):
        if value not in ("auto", *FORMATS):
            raise UserError(f"model.{key}={value} is not a number format: use {', '.join(FORMATS)} or auto")
    one_of(("auto", "on", "off"), "model.checkpointing", checkpointing)
    _checked_size(size)  # before minutes of reading; once more when the VAE is known
    bf16, unet_format = has_bf16(device), unet_format_of(dtype, device)
    # LoRAs are added to whole numbers: half precision would lose small ones
    pipe = _opened(name, torch.float32 if loras else unet_format, revision, variant, config, vae, method)
    _check_noise(name, pipe.scheduler)
    add_embeddings(pipe, embeddings)
    add_loras(pipe, loras or {})
    _check_clip_skip(pipe, clip_skip)
    wanted = _checked_size(size, vae_factor(pipe.vae))
    side = max(latent_size(pipe.unet, pipe.vae) if wanted is None else (n // vae_factor(pipe.vae) for n in wanted))
    if vae_dtype != "auto":
        vae_format = getattr(torch, vae_dtype)
    elif device.startswith("cuda"):
        vae_format = auto_vae_format(pipe.vae.config, side, unet_format, bf16)
    else:
        vae_format = torch.float32
    encoders = encoders_of(pipe)
    for part in (pipe.unet, pipe.vae, *encoders):
        part.requires_grad_(False).eval()
    for part, number in ((pipe.unet, unet_format), (pipe.vae, vae_format)):
        nn.Module.to(part, number)  # diffusers' own `to` warns of modules to keep in float32: none here
        part.to(device, memory_format=torch.channels_last)
    for encoder in encoders:
        encoder.float()
        if not device.startswith("cuda"):  # there it waits in the computer's own memory: `rwopt.models.text`
            encoder.to(device)
    suit(pipe.unet, name, device)
    return Model(
        name, pipe.unet, pipe.vae, encoders[0], pipe.tokenizer, pipe.scheduler, torch.device(device),
        checkpointing=checkpointing, pipe=pipe, clip_skip=clip_skip, negative=negative, size=wanted,
    )  # fmt: skip


def suit(unet: Any, name: str, device: str) -> None:
    """Choose what computes attention in a model's U-Net."""
    if name in FOLDERS and device == "cpu":
        # few heads and tokens (64, 144): the plain processor beats flash attention here, up to threefold in backward
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())


def _opened(name: str, unet: torch.dtype, revision: str, variant: str, config: str, vae: str, method: str) -> Any:
    """The pipeline of a folder, hub id or file."""
    place = str(Path(name).expanduser()) if name.startswith("~") else place_of(name)
    if is_file_name(place):
        kind, network = kind_of_file(name, place)
        check_channels(name, network["in_channels"], network["latent_channels"], method)
        with _told(name, "give model.config, a diffusers folder or hub id of the same architecture"):
            return open_file(place, kind, config, other_vae(vae, config))
    with _told(name, f"give a diffusers folder, a .safetensors file or {' or '.join(map(repr, FOLDERS))}"):
        kind = _kind_of(name, place, revision, method)
        return _open(place, kind, unet, revision, variant, other_vae(vae, place))


class _told:
    """What diffusers finds wrong with a place, in one line."""

    def __init__(self, name: str, remedy: str) -> None:
        self.name, self.remedy = name, remedy

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        from diffusers.loaders.single_file_utils import SingleFileComponentError

        found = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SingleFileComponentError)
        if isinstance(error, found):
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"model.name={self.name} cannot be opened ({first}): {self.remedy}") from None


def _kind_of(name: str, place: str, revision: str, method: str) -> str:
    """Class of the pipeline that runs a folder or hub id. Raises `UserError` for those of other kinds, and for what
    `method` is not for; reads no weights."""
    from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel

    given = {"revision": revision} if revision else {}
    index = DiffusionPipeline.load_config(place, **given)
    said = index.get("_class_name")
    if said in (None, "DiffusionPipeline"):
        said = XL if "text_encoder_2" in index else SD
    if said not in _KINDS:
        raise UserError(f"model.name={name} is a {said}: {_ONLY}; rwopt.apply takes more")
    if index.get("requires_aesthetics_score"):
        raise UserError(f"model.name={name} is an SDXL refiner: {_ONLY}, so give its base model")
    if index.get("is_cosxl_edit"):
        raise UserError(f"model.name={name} is a CosXL edit model: {_ONLY}; rwopt.apply takes more")
    parts = {part: (index.get(part) or (None, None))[1] for part in ("unet", "vae", "text_encoder")}
    if parts["unet"] not in (None, "UNet2DConditionModel"):
        raise UserError(f"model.name={name} has a {parts['unet']}: {_ONLY}")
    unet = UNet2DConditionModel.load_config(place, subfolder="unet", **given)
    latents = AutoencoderKL.load_config(place, subfolder="vae", **given).get("latent_channels", 4)
    check_channels(name, unet.get("in_channels", 4), latents, method)
    return _KINDS[said]


def _open(place: str, kind: str, unet: torch.dtype, revision: str, variant: str, vae: Any) -> Any:
    """The pipeline of a folder or hub id, without progress bars and talk of optional packages. The U-Net is read in its
    own number format, so that it is not in memory twice; the rest in float32."""
    import diffusers

    given: dict[str, Any] = {"torch_dtype": {"unet": unet, "default": torch.float32}}
    given |= without_extras(kind)
    given |= {key: value for key, value in (("revision", revision), ("vae", vae)) if value}
    folder = Path(place)
    variant = variant or (only_variant(folder) if folder.is_dir() else "")
    with quiet():
        load = getattr(diffusers, kind).from_pretrained
        try:
            return load(place, **given, variant=variant or None)
        except OSError as error:
            if variant or folder.is_dir():
                raise
            try:  # on the hub too there are models that have the half precision variant alone
                return load(place, **given, variant="fp16")
            except (OSError, ValueError):
                raise error from None


def _check_noise(name: str, scheduler: Any) -> None:
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UserError(f"model.name={name} has scheduler {type(scheduler).__name__} without alphas_cumprod")
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UserError(f"model.name={name} has prediction_type={kind}: search takes epsilon and v_prediction")


def _check_clip_skip(pipe: Any, clip_skip: int) -> None:
    encoders = encoders_of(pipe)
    layers = min(e.config.num_hidden_layers for e in encoders)
    most = layers - (len(encoders) > 1)  # SDXL leaves out one by itself
    check(0 <= clip_skip <= most, "model.clip_skip", clip_skip, f"give the number of layers to leave out, 0 to {most}")


def _checked_size(size: Sequence[int] | None, factor: int = 8) -> tuple[int, int] | None:
    """Height and width in pixels."""
    if size is None:
        return None
    unit = max(8, factor)  # stock pipelines ask for multiples of 8; a U-Net pads what its own levels do not divide
    fits = len(size) == 2 and all(isinstance(n, int) and n > 0 and n % unit == 0 for n in size)
    check(fits, "task.size", list(size), f"give height and width in pixels, multiples of {unit}")
    height, width = size
    return height, width
