"""Sites: the named places of a diffusion U-Net where a residual branch joins the stream, `x + f(x)`.

Site names are the module paths of diffusers (`down_blocks.0.attentions.1`); a finer kind adds its name
(`down_blocks.0.attentions.1.cross`, `up_blocks.1.resnets.0.skip`). They are listed in the order of execution,
down, mid, up, which is *not* the order of `named_modules()` (that one puts the middle last). Everything is read
off the live model, never from a table, so pruned and unusual networks are listed right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rwopt.errors import UserError

if TYPE_CHECKING:
    from torch import nn

KINDS = ("transformer", "self", "cross", "ff")
"""transformer: all that stands at `*.attentions.j`; else: that branch of every transformer block in it."""

SITE_KINDS = (*KINDS, "resnet", "skip")
"""resnet: the branch of `*.resnets.j`; skip: the tensor that joins the stream in front of an up block's resnet."""

FREEU_KINDS = ("backbone", "structure", "low")
"""What FreeU weighs at a skip's join: the first half of the stream's channels (by a constant, or by the structure
map), and the low frequencies of the skip tensor. Listed only when asked for."""

BRANCHES = {"self": "attn1", "cross": "attn2", "ff": "ff"}
"""Branch kind -> the attribute of a transformer block whose output is the branch."""

ALL_KINDS = (*SITE_KINDS, *FREEU_KINDS)
_JOINS = (*FREEU_KINDS, "skip")
_RESNET_KINDS = (*_JOINS, "resnet")
_PLACE = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(attentions|resnets)\.(\d+)")
_STAGES = ("down", "mid", "up")


@dataclass(frozen=True)
class Site:
    """One place to weigh.

    path: the module; channels: of what is weighed; stage: "down.0", "mid"; factor: by which the latent is reduced
    there; module: its class; inert: in mode `output` a positive weight changes nothing there, as the next thing is
    the last group norm, which is scale-free.
    """

    id: str
    path: str
    kind: str
    channels: int
    stage: str
    factor: int = 1
    module: str = ""
    inert: bool = False


def _block(site: Site) -> str:
    return re.split(r"\.(?:attentions|resnets)\.", site.path)[0]


_GROUPS: dict[str, Callable[[Site], str]] = {
    "site": lambda site: site.id,
    "block": _block,
    "stage": lambda site: site.stage.split(".")[0],
    "kind": lambda site: site.kind,
    "stage_kind": lambda site: f"{site.stage.split('.')[0]}.{site.kind}",
    "block_kind": lambda site: f"{_block(site)}.{site.kind}",
    "all": lambda site: "all",
}

GROUPINGS = tuple(_GROUPS)
"""What `group_sites` can group by."""


def list_sites(unet: nn.Module, kinds: Sequence[str] = ("transformer",)) -> list[Site]:
    """All sites of `unet` of the given kinds in execution order; at one place in the order of `ALL_KINDS`.

    Raises UserError for an unknown kind and for a network without any site of these kinds.
    """
    for kind in kinds:
        if kind not in ALL_KINDS:
            raise UserError(f"site kind {kind!r} is unknown: choose from {', '.join(ALL_KINDS)}")
    if not hasattr(unet, "up_blocks"):
        raise UserError(f"{type(unet).__name__} has no up blocks, so it is no U-Net: give the U-Net itself")
    blocks: list[Any] = [*unet.down_blocks, *unet.up_blocks]  # type: ignore[misc]
    blocks += [unet.mid_block] if getattr(unet, "mid_block", None) is not None else []
    if not all(hasattr(block, "resnets") for block in blocks):
        raise UserError(f"{type(unet).__name__} is not built of U-Net blocks as they are known here: it has no sites")
    found: list[tuple[tuple[int, int, int, bool], str, Any]] = []
    for path, module in unet.named_modules():
        match = _PLACE.fullmatch(path)
        if match:
            side, block, family, index = match.groups()
            parent: Any = unet.get_submodule(path.rsplit(".", 2)[0])
            late = family == "attentions" and side == "up" and hasattr(parent, "skip_norm")  # one, behind all resnets
            place = len(parent.resnets) if late else int(index)
            order = (_STAGES.index(side or "mid"), int(block or 0), place, family == "attentions")
            found.append((order, path, module))
    skips, factors, last = skip_channels(unet), _factors(unet), _last_place(unet)
    sites = []
    for (stage, block, _, attention), path, module in sorted(found, key=lambda item: item[0]):
        stage_name = "mid" if _STAGES[stage] == "mid" else f"{_STAGES[stage]}.{block}"
        for kind in KINDS if attention else _RESNET_KINDS:
            channels = _channels(module, kind, skips.get(path))
            if kind in kinds and channels:
                whole = kind in ("transformer", "resnet")
                name = path if kind == "transformer" else f"{path}.{kind}"
                kind_name = type(module).__name__
                inert = whole and path == last
                sites.append(Site(name, path, kind, channels, stage_name, factors[stage_name], kind_name, inert))
    if not sites:
        raise UserError(f"{type(unet).__name__} has no site of kind {', '.join(kinds)}: give a U-Net that has")
    return sites


def find_sites(unet: nn.Module, ids: Sequence[str]) -> list[Site]:
    """The sites named `ids`, in that order. UserError lists both sides in short if one is absent."""
    known = {site.id: site for site in list_sites(unet, ALL_KINDS)}
    absent = [name for name in ids if name not in known]
    if absent:
        raise UserError(
            f"{len(absent)} of {len(ids)} sites are absent from this U-Net ({short(absent)}): "
            f"use a schedule made for it, or map it; it has {brief(known.values())}"
        )
    return [known[name] for name in ids]


def brief(sites: Iterable[Site]) -> str:
    """The transformer sites in short, or all if there are none."""
    sites = list(sites)
    return short([site.id for site in sites if site.kind == "transformer"] or [site.id for site in sites])


def group_sites(sites: Sequence[Site], by: str) -> dict[str, list[int]]:
    """Group name -> indices into `sites`, in order of first appearance.

    `by`: site, block ("down_blocks.0"), stage ("down"), kind, stage_kind ("down.cross"), block_kind, all.
    """
    if by not in _GROUPS:
        raise UserError(f"site grouping {by!r} is unknown: choose from {', '.join(_GROUPS)}")
    groups: dict[str, list[int]] = {}
    for index, site in enumerate(sites):
        groups.setdefault(_GROUPS[by](site), []).append(index)
    return groups


def blocks_of(transformer: Any) -> list[Any]:
    """The transformer blocks at a place; a `KAttentionBlock` is its own, a dual transformer has those of both."""
    parts = getattr(transformer, "transformers", [transformer])
    return [block for part in parts for block in getattr(part, "transformer_blocks", [part])]


def branch_modules(transformer: nn.Module, kind: str) -> list[nn.Module]:
    """The modules of a branch kind, one a transformer block; a block without that branch has none."""
    modules = (getattr(block, BRANCHES[kind], None) for block in blocks_of(transformer))
    return [module for module in modules if module is not None]


def resnets_at(resnet: Any) -> list[Any]:
    """The residual blocks at a place: two, one after the other, if it has frames."""
    return [resnet.spatial_res_block, resnet.temporal_res_block] if hasattr(resnet, "spatial_res_block") else [resnet]


def skip_channels(unet: Any) -> dict[str, tuple[int, int]]:
    """Path of each up-block resnet that a skip tensor joins -> channels of (stream, skip) in its input."""
    middle = getattr(unet, "mid_block", None)
    stream = _resnet_channels((middle if middle is not None else unet.down_blocks[-1]).resnets[-1])[1]
    joins = {}
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            total, out = _resnet_channels(resnet)
            if total > stream:
                joins[f"up_blocks.{i}.resnets.{j}"] = (stream, total - stream)
            stream = out
    return joins


def _resnet_channels(resnet: Any) -> tuple[int, int]:
    inner = resnets_at(resnet)[0]
    return inner.in_channels, inner.out_channels


def _channels(module: Any, kind: str, join: tuple[int, int] | None) -> int:
    """Channels of what `kind` weighs at this module; 0 if it has no such site."""
    if kind == "resnet":
        return _resnet_channels(module)[1]
    if kind in _JOINS:
        return 0 if join is None else join[kind in ("low", "skip")]
    if kind in BRANCHES and not branch_modules(module, kind):
        return 0
    inner = getattr(module, "transformers", [module])[0]
    attention = getattr(inner, "attn2", None) or inner
    channels: int = getattr(inner, "in_channels", None) or attention.query_dim
    return channels


def _factors(unet: Any) -> dict[str, int]:
    """Stage -> how many times smaller than the latent (one side) its sites are."""
    factors, factor = {}, 1
    for i, block in enumerate(unet.down_blocks):
        factors[f"down.{i}"] = factor
        factor *= 2 if getattr(block, "downsamplers", None) else 1
    factors["mid"] = factor
    for i, block in enumerate(unet.up_blocks):
        factors[f"up.{i}"] = factor
        factor //= 2 if getattr(block, "upsamplers", None) or getattr(block, "resnet_up", None) else 1
    return factors


def _last_place(unet: Any) -> str | None:
    """The place whose output goes into the U-Net's last group norm and nowhere else."""
    block = unet.up_blocks[-1]
    followed = ("upsamplers", "resnet_up", "motion_modules", "temp_convs", "temp_attentions")
    if getattr(unet, "conv_norm_out", None) is None or any(getattr(block, name, None) is not None for name in followed):
        return None
    family = "attentions" if getattr(block, "attentions", None) else "resnets"
    if hasattr(block, "skip_norm"):  # Skip blocks also give their output to a picture
        return None
    return f"up_blocks.{len(unet.up_blocks) - 1}.{family}.{len(getattr(block, family)) - 1}"


def short(names: Sequence[str], limit: int = 4) -> str:
    """A list that fits into a one-line message."""
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[: limit - 1])}, ... {names[-1]}; {len(names)} in all"
