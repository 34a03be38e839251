"""Where the operations and the time of one U-Net call go: shares by place and kind, which sum to 1.

Hooks read a meter whenever a part of the U-Net begins or ends, and what was counted since the last reading belongs to
the innermost part that was running. So nothing is counted twice or left out, and all shares are of the same calls. Time
is read as `rwopt.unet.cost.Watch` does, of several calls: the median of each share.

places: in (`conv_in`, and the embeddings of the time step and of what else the U-Net is told), `down_blocks.i`,
`mid_block`, `up_blocks.i`, out (the last norm and convolution).
kinds: resnet; self, cross, ff: these branches of transformers; transformer: the rest of them, norms and projections;
sampling: down- and upsamplers; other: what a block does besides, such as joining skip tensors, and all of in and out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn

from rwopt.unet.cost import SITE_KINDS, Watch, operation_counter
from rwopt.unet.sites import BRANCHES, branch_modules, list_sites

KINDS = ("resnet", "self", "cross", "ff", "transformer", "sampling", "other")
_OUT = ("conv_norm_out", "conv_act", "conv_out")


class Part(NamedTuple):
    place: str
    kind: str


@dataclass(frozen=True)
class Share:
    """Of one part in a full call, each from 0 to 1. operations: of multiply-adds; time: of measured time."""

    place: str
    kind: str
    operations: float
    time: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def parts_of(unet: Any) -> dict[nn.Module, Part]:
    """The modules at which a part begins and ends. UserError for a network that has no sites.

    What the U-Net itself does between its blocks counts as `in`.
    """
    sites = list_sites(unet, SITE_KINDS)
    sides = ("down_blocks", "up_blocks")
    blocks = {f"{side}.{i}": block for side in sides for i, block in enumerate(getattr(unet, side))}
    if getattr(unet, "mid_block", None) is not None:
        blocks["mid_block"] = unet.mid_block
    found: dict[nn.Module, Part] = {unet: Part("in", "other")}
    for name, child in unet.named_children():
        if not name.endswith(("_blocks", "_block")):
            found[child] = Part("out" if name in _OUT else "in", "other")
    for place, block in blocks.items():
        found[block] = Part(place, "other")
        for name in ("downsamplers", "upsamplers"):
            found |= dict.fromkeys(getattr(block, name, None) or (), Part(place, "sampling"))
    for site in sites:
        place = site.path.rsplit(".", 2)[0]
        module = unet.get_submodule(site.path)
        inside = branch_modules(module, site.kind) if site.kind in BRANCHES else [module]
        found |= dict.fromkeys(inside, Part(place, site.kind))
    return found


def shares(
    unet: Any, shape: Sequence[int], rest: Mapping[str, Any], rounds: int = 7, timestep: float = 500
) -> tuple[Share, ...]:
    """Shares of a call, in the order of execution; every part that the U-Net has is named.

    shape: of the sample, rows first; rest: the other arguments of a U-Net call, with as many rows; rounds: calls that
    are timed, at least 1. UserError for a network without sites.
    """
    parts = parts_of(unet)
    parameter = next(unet.parameters())
    x = torch.randn(*shape, device=parameter.device, dtype=parameter.dtype)
    watch = Watch(parameter.device)

    def call() -> None:
        unet(x, timestep, **rest, return_dict=False)

    with torch.no_grad():
        with operation_counter() as counter:
            operations = spent(parts, call, counter.get_total_flops, lambda a, b: float(b - a))
        call()  # first calls choose kernels
        timed = [spent(parts, call, watch.now, watch.seconds) for _ in range(rounds)]
    whole = [sum(sums.values()) for sums in timed]
    middle = {
        part: statistics.median(sums.get(part, 0.0) / total for sums, total in zip(timed, whole, strict=True))
        for part in parts.values()
    }
    counted, seconds = sum(operations.values()), sum(middle.values())
    return tuple(
        Share(part.place, part.kind, operations.get(part, 0.0) / counted, middle[part] / seconds)
        for part in _in_order(middle)
    )


def spent(
    parts: Mapping[nn.Module, Part], call: Callable[[], Any], read: Callable[[], Any],
    between: Callable[[Any, Any], float],
) -> dict[Part, float]:  # fmt: skip
    """What each part of a call takes by a meter: `read` it, and how much lies `between` two readings.

    parts: modules at which one begins and ends, the outermost around all others.
    """
    running: list[Part | None] = [None]
    readings: list[tuple[Any, Any]] = []  # with the part that was running until then; None: not yet in there

    def enter(module: nn.Module, _: Any) -> None:
        readings.append((running[-1], read()))
        running.append(parts[module])

    def leave(*_: Any) -> None:
        readings.append((running.pop(), read()))

    hooks = [hook for module in parts for hook in (
        module.register_forward_pre_hook(enter), module.register_forward_hook(leave))]  # fmt: skip
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    sums = dict[Part, float]()
    for (_, start), (part, end) in pairwise(readings):
        sums[part] = sums.get(part, 0.0) + between(start, end)
    return sums


def _in_order(parts: Mapping[Part, float]) -> Iterator[Part]:
    stages = ("in", "down_blocks", "mid_block", "up_blocks", "out")

    def order(part: Part) -> tuple[int, int, int]:
        stage, _, number = part.place.partition(".")
        return stages.index(stage), int(number or 0), KINDS.index(part.kind)

    yield from sorted(parts, key=order)
