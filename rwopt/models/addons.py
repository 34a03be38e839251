"""What people add to a model: another VAE, LoRAs, textual inversions. All by the pipeline's own loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwopt.errors import UserError, check
from rwopt.models.quiet import quiet
from rwopt.models.single_file import is_file_name, shapes_of

_WRONG = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ImportError)


def _first_line(error: BaseException) -> str:
    if "size mismatch" in str(error):
        return "its layers have other sizes"
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def other_vae(name: str, place: str) -> Any:
    """The VAE of a folder (a VAE's own, or a pipeline's), hub id or .safetensors file, in float32; None for "".

    place: the diffusers folder or hub id whose VAE's configuration a file gets. Raises `UserError` if there is none.
    """
    if not name:
        return None
    import diffusers

    given: dict[str, Any] = {"torch_dtype": torch.float32}
    try:
        with quiet():
            if is_file_name(name):
                shapes_of(name, name, "model.vae")
                given |= {"config": place, "subfolder": "vae"} if place else {}
                return diffusers.AutoencoderKL.from_single_file(name, **given)
            try:
                config = diffusers.AutoencoderKL.load_config(name)
            except OSError:  # of a whole pipeline
                given["subfolder"] = "vae"
                config = diffusers.AutoencoderKL.load_config(name, subfolder="vae")
            kind = config.get("_class_name")
            if kind not in ("AutoencoderKL", "AutoencoderTiny"):
                raise UserError(f"model.vae={name} is a {kind}: give an AutoencoderKL or AutoencoderTiny")
            return getattr(diffusers, kind).from_pretrained(name, **given)
    except _WRONG as error:
        raise UserError(f"model.vae={name} cannot be opened ({_first_line(error)}): check the place") from None


def add_loras(pipe: Any, loras: Mapping[str, float]) -> None:
    """Fuse LoRAs, each with its scale, into U-Net and text encoders, whose modules are what they were afterwards.

    Raises `UserError` for one that cannot be read, that fits nothing here, or whose shapes are another model's.
    """
    names: list[str] = []
    for i, (place, scale) in enumerate(loras.items()):
        key = f"model.loras.{place}"
        check(isinstance(scale, int | float) and abs(scale) < 1e3, key, scale, "give its scale, a number")
        names.append(f"lora{i}")
        try:
            with quiet():
                pipe.load_lora_weights(place, adapter_name=names[-1])
                fits = any(names[-1] in own for own in pipe.get_list_adapters().values())
        except _WRONG as error:
            remedy = "pip install peft" if "peft" in str(error).lower() else "give a LoRA for this kind of model"
            raise UserError(f"{key} cannot be added ({_first_line(error)}): {remedy}") from None
        if not fits:
            raise UserError(f"{key} fits no layer of this model: give a LoRA for this kind of model")
    if names:
        with quiet():
            pipe.set_adapters(names, [float(scale) for scale in loras.values()])
            try:
                pipe.fuse_lora(adapter_names=names, safe_fusing=True)
            except ValueError as error:
                raise UserError(f"model.loras cannot be fused ({_first_line(error)}): use smaller scales") from None
            pipe.unload_lora_weights()


def add_embeddings(pipe: Any, embeddings: Sequence[str]) -> None:
    """Add textual inversions: a diffusers folder or hub id says the word itself, a file is called by its own name.

    Raises `UserError` for one that cannot be read or is another model's.
    """
    for place in embeddings:
        try:
            with quiet():
                _add_embedding(pipe, place)
        except _WRONG as error:
            remedy = "give a textual inversion for this kind of model"
            raise UserError(f"model.embeddings={place} cannot be added ({_first_line(error)}): {remedy}") from None


def _add_embedding(pipe: Any, place: str) -> None:
    sides = [(pipe.text_encoder, pipe.tokenizer, "clip_l")]
    if getattr(pipe, "text_encoder_2", None) is not None:
        sides.append((pipe.text_encoder_2, pipe.tokenizer_2, "clip_g"))
    tensors: dict[str, Tensor] = {}
    if is_file_name(place):
        from safetensors.torch import load_file

        shapes_of(place, place, "model.embeddings")
        tensors = load_file(place)
        if set(tensors) == {"emb_params"}:
            tensors = {Path(place).stem: tensors["emb_params"]}
    if "clip_l" in tensors or "clip_g" in tensors or len(sides) > 1:
        for encoder, tokenizer, key in sides:  # SDXL: one for each encoder, under one word
            if key not in tensors:
                raise ValueError(f"it has no {key}")
            pipe.load_textual_inversion(
                tensors[key], token=Path(place).stem, text_encoder=encoder, tokenizer=tokenizer
            )
    else:
        pipe.load_textual_inversion(tensors or place)
