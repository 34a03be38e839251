"""Sites: the named places of a diffusion U-Net where a residual branch joins the stream, `x + f(x)`.

Site names are the module paths of diffusers (`down_blocks.0.attentions.1`); a finer kind adds its name
(`down_blocks.0.attentions.1.cross`). They are listed in the order of execution, down, mid, up, which is *not*
the order of `named_modules()` (that one puts the middle last).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rwopt.errors import UserError

if TYPE_CHECKING:
    from torch import nn

KINDS = ("transformer", "self", "cross", "ff")
"""transformer: all of a `Transformer2DModel`; else: that branch of every `BasicTransformerBlock` in it."""

BRANCHES = {"self": "attn1", "cross": "attn2", "ff": "ff"}
"""Branch kind -> the attribute of `BasicTransformerBlock` whose output is the branch."""

_TRANSFORMER = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.attentions\.(\d+)")
_STAGES = ("down", "mid", "up")


@dataclass(frozen=True)
class Site:
    """One place to weigh. path: the transformer module; channels: of the stream; stage: "down.0", "mid"."""

    id: str
    path: str
    kind: str
    channels: int
    stage: str


_GROUPS: dict[str, Callable[[Site], str]] = {
    "site": lambda site: site.id,
    "block": lambda site: site.path.split(".attentions.")[0],
    "stage": lambda site: site.stage.split(".")[0],
    "kind": lambda site: site.kind,
    "stage_kind": lambda site: f"{site.stage.split('.')[0]}.{site.kind}",
    "block_kind": lambda site: f"{site.path.split('.attentions.')[0]}.{site.kind}",
    "all": lambda site: "all",
}

GROUPINGS = tuple(_GROUPS)
"""What `group_sites` can group by."""


def list_sites(unet: nn.Module, kinds: Sequence[str] = ("transformer",)) -> list[Site]:
    """All sites of `unet` of the given kinds in execution order; at one transformer in the order of `KINDS`.

    Raises UserError for an unknown kind and for a network without any transformer site.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"site kind {kind!r} is unknown: choose from {', '.join(KINDS)}")
    found: list[tuple[tuple[int, int, int], str, nn.Module]] = []
    for path, module in unet.named_modules():
        match = _TRANSFORMER.fullmatch(path)
        if match and hasattr(module, "transformer_blocks"):
            side, block, index = match.groups()
            found.append(((_STAGES.index(side or "mid"), int(block or 0), int(index)), path, module))
    if not found:
        raise UserError(f"{type(unet).__name__} has no '*.attentions.j' transformer: give a U-Net that has")
    sites = []
    for (stage, block, _), path, module in sorted(found, key=lambda item: item[0]):
        stage_name = "mid" if _STAGES[stage] == "mid" else f"{_STAGES[stage]}.{block}"
        for kind in KINDS:
            if kind in kinds and (kind == "transformer" or branch_modules(module, kind)):
                name = path if kind == "transformer" else f"{path}.{kind}"
                channels: int = module.in_channels  # type: ignore[assignment]
                sites.append(Site(name, path, kind, channels, stage_name))
    return sites


def find_sites(unet: nn.Module, ids: Sequence[str]) -> list[Site]:
    """The sites named `ids`, in that order. UserError lists both sides in short if one is absent."""
    known = {site.id: site for site in list_sites(unet, KINDS)}
    absent = [name for name in ids if name not in known]
    if absent:
        present = [site.id for site in known.values() if site.kind == "transformer"]
        raise UserError(
            f"{len(absent)} of {len(ids)} sites are absent from this U-Net ({_short(absent)}): "
            f"use a schedule made for it; it has {_short(present)}"
        )
    return [known[name] for name in ids]


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


def branch_modules(transformer: nn.Module, kind: str) -> list[nn.Module]:
    """The modules of a branch kind, one a `BasicTransformerBlock`; a block without that branch has none."""
    blocks: Sequence[nn.Module] = transformer.transformer_blocks  # type: ignore[assignment]
    modules = (getattr(block, BRANCHES[kind], None) for block in blocks)
    return [module for module in modules if module is not None]


def _short(names: Sequence[str], limit: int = 4) -> str:
    """A list that fits into a one-line message."""
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[: limit - 1])}, ... {names[-1]}; {len(names)} in all"
