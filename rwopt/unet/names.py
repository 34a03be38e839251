"""What other tools call a site, and the table that `rwopt sites` prints.

LDM checkpoints, ComfyUI, A1111, Forge and stable-diffusion.cpp count the layers of a U-Net through; with R layers in
each down block, `down_blocks.i.attentions.j` is `input_blocks[1 + (R + 1) i + j][1]` and `up_blocks.i.attentions.j` is
`output_blocks[(R + 1) i + j][1]` (the resnet in front of it is `[0]`). Layers are counted on the live model, so unequal
blocks come out right. Block-weight presets name the same numbers IN01, M00, OUT03; diffusers' block-wise LoRA scales
say `down.block_0.1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rwopt.unet.sites import SITE_KINDS, Site, list_sites

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
    """One row a site of a U-Net or pipeline: id, kind, class, channels, stage, factor, ldm, comfy, lbw, lora, note."""
    unet = getattr(model, "unet", model)
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
