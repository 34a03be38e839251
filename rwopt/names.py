"""What other tools call a site, and the table that `rwopt sites` prints.

LDM checkpoints, ComfyUI, A1111, Forge and stable-diffusion.cpp count the layers of a U-Net through; with R layers in
each down block, `down_blocks.i.attentions.j` is `input_blocks[1 + (R + 1) i + j][1]` and `up_blocks.i.attentions.j` is
`output_blocks[(R + 1) i + j][1]` (the resnet in front of it is `[0]`). Layers are counted on the live model, so unequal
blocks come out right. Block-weight presets name the same numbers IN01, M00, OUT03; diffusers' block-wise LoRA scales
say `down.block_0.1`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rwopt.errors import UserError
from rwopt.sites import SITE_KINDS, Site, list_sites

_UNETS = {
    "UNet2DConditionModel",
    "UNet2DModel",
    "UNetMotionModel",
    "UNet3DConditionModel",
    "UNetSpatioTemporalConditionModel",
}
_LDM_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
"""The blocks of networks that LDM code knows; others (DeepFloyd's, DDPM's) are not laid out so."""


@dataclass(frozen=True)
class Names:
    """None: that tool has no name for the site."""

    ldm: str | None = None  # "input_blocks.1.1"
    comfy: tuple[str, int] | None = None  # transformer_options["block"]
    lbw: str | None = None  # block-weight presets: "IN01"
    lora: str | None = None  # block-wise LoRA scales of diffusers: "down.block_0.0"


def foreign_names(place: str, kind: str, down: Sequence[int], up: Sequence[int]) -> Names:
    """Names of the place `up_blocks.1.attentions.0` and the like; `down`, `up`: resnets in each block of that side."""
    block, family, index = place.replace("mid_block", "mid_blocks.0").rsplit(".", 2)
    side, _, number = block.partition("_blocks.")
    i, j, attention = int(number), int(index), family == "attentions"
    if side == "mid":
        lora = "mid" if attention else None
        return Names(f"middle_block.{2 * j + attention}", ("middle", 0), "M00", lora)
    n = 1 + sum(down[:i]) + i + j if side == "down" else sum(up[:i]) + j
    tool, short = ("input", "IN") if side == "down" else ("output", "OUT")
    inner = "" if kind in ("skip", "low", "backbone", "structure") else f".{int(attention)}"
    lora = f"{side}.block_{i}.{j}" if attention else None
    return Names(f"{tool}_blocks.{n}{inner}", (tool, n), f"{short}{n:02d}", lora)


def names_of(unet: Any, site: Site) -> Names:
    """Names of a site of a live U-Net; none but the LoRA alias for a network that is not laid out as LDM's."""
    blocks = [*unet.down_blocks, *unet.up_blocks]
    down, up = ([len(block.resnets) for block in side] for side in (unet.down_blocks, unet.up_blocks))
    names = foreign_names(site.path, site.kind, down, up)
    kinds = {type(block).__name__.replace("Motion", "2D").replace("SpatioTemporal", "2D") for block in blocks}
    return names if kinds <= _LDM_BLOCKS else Names(lora=names.lora)


def site_rows(model: Any, kinds: Sequence[str] = SITE_KINDS) -> list[dict[str, str]]:
    """One row a site: id, kind, class, channels, stage, factor, ldm, comfy, lbw, lora, note.

    `model`: a U-Net, a pipeline, a folder or a hub id of either. Only the configuration is read, no weights.
    """
    unet = getattr(model, "unet", model)
    if isinstance(model, str | Path):
        unet = empty_unet(model)
    rows = []
    for site in list_sites(unet, kinds):
        names = names_of(unet, site)
        rows.append(
            {
                "id": site.id,
                "kind": site.kind,
                "class": site.module,
                "channels": str(site.channels),
                "stage": site.stage,
                "factor": str(site.factor),
                "ldm": names.ldm or "",
                "comfy": "{} {}".format(*names.comfy) if names.comfy else "",
                "lbw": names.lbw or "",
                "lora": names.lora or "",
                "note": "no effect in mode output" if site.inert else "",
            }
        )
    return rows


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
        from rwopt.models import EMBEDDED

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
