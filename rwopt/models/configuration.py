"""What a model is, read from its configuration alone: no weights are loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rwopt.errors import UserError
from rwopt.models import EMBEDDED

_UNETS = {
    "UNet2DConditionModel",
    "UNet2DModel",
    "UNetMotionModel",
    "UNet3DConditionModel",
    "UNetSpatioTemporalConditionModel",
}


def empty_unet(name: str | Path) -> Any:
    """The U-Net of a folder or hub id, without weights (on the meta device)."""
    import diffusers
    import torch

    config = unet_config(name)
    kind = config.get("_class_name")
    if kind not in _UNETS:
        what = f"a {kind}" if kind else "a configuration without _class_name"
        raise UserError(f"{name} holds {what}, which has no sites: give one of {', '.join(sorted(_UNETS))}")
    try:
        with torch.device("meta"):
            return getattr(diffusers, kind).from_config(config)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name} describes a {kind} that cannot be built ({reason}): mend its config.json") from None


def unet_config(name: str | Path) -> dict[str, Any]:
    """`config.json` of a U-Net: in that folder, in its `unet` sub-folder, or on the hub."""
    if str(name) == "avatars":
        name = EMBEDDED
    for path in (Path(name) / "unet" / "config.json", Path(name) / "config.json"):
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{path} is not JSON ({error}): give a folder that diffusers wrote") from None
            if not isinstance(config, dict):
                raise UserError(f"{path} is not a configuration: give a folder that diffusers wrote")
            return config
    if Path(name).exists():
        raise UserError(f"{name} holds no U-Net: give a folder with config.json or unet/config.json")
    from diffusers import UNet2DConditionModel

    try:
        loaded: dict[str, Any] = UNet2DConditionModel.load_config(str(name), subfolder="unet")
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{name} is neither a folder nor a model on the hub ({reason}): check the name") from None
    return loaded
