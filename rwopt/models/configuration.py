"""What a model is, read from its configuration alone: no weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwopt.embedded import place_of
from rwopt.errors import UserError

if TYPE_CHECKING:
    import torch

_UNETS = {
    "UNet2DConditionModel",
    "UNet2DModel",
    "UNetMotionModel",
    "UNet3DConditionModel",
    "UNetSpatioTemporalConditionModel",
}
_VAES = {"AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL", "ConsistencyDecoderVAE"}
_TOKENS = 77  # of CLIP, which has none other in the models that do not say


def empty_unet(name: str | Path) -> Any:
    """The U-Net of a folder or hub id, without weights (on the meta device)."""
    config = unet_config(name)
    kind = config.get("_class_name")
    if kind not in _UNETS:
        what = f"a {kind}" if kind else "a configuration without _class_name"
        raise UserError(f"{name} holds {what}, which has no sites: give one of {', '.join(sorted(_UNETS))}")
    return _empty(name, config)


def empty_vae(name: str | Path) -> Any | None:
    """The VAE beside it, likewise; None where there is a U-Net alone."""
    config = _part(name, "vae")
    if config is None:
        return None
    kind = config.get("_class_name")
    if kind not in _VAES:
        raise UserError(f"{name} has a VAE of class {kind}: give a model with one of {', '.join(sorted(_VAES))}")
    return _empty(name, config)


def prompt_tokens(name: str | Path) -> int:
    """How many tokens its text encoder makes of a prompt; CLIP's 77 where there is a U-Net alone."""
    found = (_part(name, "text_encoder") or {}).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else _TOKENS


def random_unet(empty: Any, device: str, dtype: torch.dtype) -> Any:
    """An `empty_unet` with weights that layers are born with, frozen, laid out in memory as `load_model` does."""
    import torch
    from torch import nn

    unet = nn.Module.to(empty, dtype).to_empty(device=device)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()  # those that no layer's own rule fills
        for module in unet.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return unet.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def unet_config(name: str | Path) -> dict[str, Any]:
    """`config.json` of a U-Net: in that folder, in its `unet` sub-folder, or on the hub."""
    config = _part(name, "unet")
    if config is None:
        raise UserError(f"{name} holds no U-Net: give a folder with config.json or unet/config.json")
    return config


def _part(name: str | Path, part: str) -> dict[str, Any] | None:
    """`config.json` of a part of a diffusers folder or hub id; None if it has no such part. Of a U-Net's own folder the
    U-Net is the one part."""
    place = Path(place_of(str(name)))
    for path in (place / part / "config.json", *([place / "config.json"] if part == "unet" else [])):
        if path.is_file():
            return _read(path)
    if place.exists():
        return None
    from diffusers import UNet2DConditionModel

    try:
        loaded: dict[str, Any] = UNet2DConditionModel.load_config(str(name), subfolder=part)
    except (OSError, ValueError) as error:
        if part != "unet":
            return None
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is neither a folder nor a model on the hub ({reason}): check the name") from None
    return loaded


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): give a folder that diffusers wrote") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a configuration: give a folder that diffusers wrote")
    return config


def _empty(name: str | Path, config: dict[str, Any]) -> Any:
    import diffusers
    import torch

    kind = config["_class_name"]
    try:
        with torch.device("meta"):
            return getattr(diffusers, kind).from_config(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} describes a {kind} that cannot be built ({reason}): mend its config.json") from None
