"""Weights baked into the network, which any tool loads, at no cost a call: a U-Net folder, or one file of LDM's layout.

A branch that ends in a linear layer is weighed by that layer: `x + w (A h + b) = x + ((w A) h + w b)`. So mode residual
with one weight a site (all levels alike, or the one level of a one-step model) is exact: `proj_out` of transformers,
`to_out.0` and `ff.net.2` of their branches, `conv2` of resnets. Mode output and skips have no such layer.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from rwopt.errors import UserError
from rwopt.export.checkpoint import SUFFIX, fold_file
from rwopt.export.plain import one_row, write_folder
from rwopt.schedule import Schedule
from rwopt.unet.sites import BRANCHES, Site, blocks_of, find_sites

ABOUT = "a U-Net folder of diffusers, or a .safetensors checkpoint, with the weights multiplied into its layers"
NEEDS = "unet=FOLDER or FILE.safetensors; one weight a site for all noise levels (or at=SIGMA), in mode residual"
FOLDER = None


def export(
    schedule: Schedule, place: Path, *, unet: Any, at: float | None = None, steps: bool = True
) -> list[Path]:
    """Write the changed U-Net as `save_pretrained` does, and the schedule beside it; the files written.

    unet: a live U-Net (or pipeline), which stays as it is, or a folder; or a .safetensors checkpoint of LDM's layout,
    and then `place` is one, too. at: the VE sigma whose weights are taken; steps=False leaves the schedule's steps
    behind. UserError for weights that change with the level, mode output, sites without a last linear layer, and layers
    that are wrapped (LoRA) or quantized.
    """
    row = one_row(schedule, "a folded U-Net", at, steps)
    if schedule.mode != "residual":
        raise UserError(f"op.mode is {schedule.mode!r} at site {schedule.sites[0]}: only residual can be folded")
    if isinstance(unet, str | os.PathLike) and (Path(unet).is_file() or Path(unet).suffix == SUFFIX):
        return fold_file(schedule, row.tolist(), Path(unet), place)
    if place.suffix == SUFFIX:
        raise UserError(f"out={place}: is a single file, which is made of one: give unet=FILE{SUFFIX}, or a folder")
    whole = network(unet)
    sites = find_sites(whole, schedule.sites)
    for site in sites:
        _layers(whole, site)
    folded = copy.deepcopy(whole)
    for site, weight in zip(sites, row.tolist(), strict=True):
        for layer in _layers(folded, site):
            _scale(layer, weight)

    def fill(folder: Path) -> None:
        folded.save_pretrained(folder)
        schedule.save(folder / "rwopt-schedule.json")

    return write_folder(place, fill)


def network(source: Any) -> Any:
    """A U-Net: itself, that of a pipeline, or loaded from a folder (of either). UserError if there is none."""
    if not isinstance(source, str | os.PathLike):
        unet = getattr(source, "unet", source)
        return getattr(unet, "_orig_mod", unet)
    return _kind(_folder(source)).from_pretrained(_folder(source), local_files_only=True).eval()


def skeleton(source: Any) -> Any:
    """The same without its parameters, where it comes from a folder: enough to list sites."""
    if not isinstance(source, str | os.PathLike):
        return network(source)
    import torch

    folder = _folder(source)
    with torch.device("meta"):
        return _kind(folder).from_config(_kind(folder).load_config(folder, local_files_only=True))


def _folder(source: str | os.PathLike[str]) -> Path:
    for folder in (Path(source) / "unet", Path(source)):
        if (folder / "config.json").is_file():
            return folder
    raise UserError(f"unet={source}: has no config.json: give the folder of a U-Net or of a pipeline")


def _kind(folder: Path) -> Any:
    import json

    import diffusers

    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError):
        name = None
    if not isinstance(name, str) or not name.startswith("UNet") or not hasattr(diffusers, name):
        raise UserError(f"unet={folder}: is no U-Net of diffusers ({str(name)[:60]!r}): give the folder of one")
    return getattr(diffusers, name)


def _layers(unet: Any, site: Site) -> list[Any]:
    """The last layers of a site's branch. UserError with its name if there is none to fold into."""
    from torch import nn

    module: Any = unet.get_submodule(site.path)
    layers: list[Any]
    if site.kind == "transformer" and type(module).__name__ == "Transformer2DModel":
        layers = [getattr(module, "proj_out", None)]
    elif site.kind == "resnet" and type(module).__name__ == "ResnetBlock2D":
        layers = [module.conv2]
    elif site.kind in BRANCHES:
        branches = [getattr(block, BRANCHES[site.kind], None) for block in blocks_of(module)]
        layers = [_last(branch, site) for branch in branches if branch is not None]
    else:
        raise UserError(f"site {site.id} ({type(module).__name__}) cannot be folded: export the schedule without it")
    for layer in layers:
        if type(layer) not in (nn.Linear, nn.Conv2d) or not layer.weight.is_floating_point():
            kind = f"{type(layer).__module__}.{type(layer).__name__}"  # LoRA's are called Linear, too
            raise UserError(f"site {site.id} ends in a {kind}: fuse or unload LoRA, and use weights of plain precision")
    return layers


def _last(branch: Any, site: Site) -> Any:
    if hasattr(branch, "to_out"):
        if branch.residual_connection or branch.rescale_output_factor != 1:
            raise UserError(f"site {site.id} adds its own input: it cannot be folded")
        return branch.to_out[0]
    return branch.net[2]


def _scale(layer: Any, weight: float) -> None:
    import torch

    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:  # product in double precision, rounded once
                parameter.copy_((parameter.double() * weight).to(parameter.dtype))
