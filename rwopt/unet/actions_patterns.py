"""What each action means for the modules of one U-Net: a static pattern of moves, made once.

A *move* stands in place of a module's forward in one call. A module without a move runs as it is, so blocks, samplers,
FreeU, ControlNet and what else works on a U-Net go on working. What is not needed is *hollow*: it gives one number a
row, which passes through the concatenations and additions of the others and is never part of a result. Skip tensors
are counted from the top (0 is what `conv_in` gives, then one a layer and one a downsampler); up layers take them from
the last to the first. With n of them a cut k runs the up layers n - k to n - 1, and what it needs besides is the stream
in front of up layer n - k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from rwopt.errors import UserError
from rwopt.schedule.actions import Action
from rwopt.unet.sites import BRANCHES, Site, branch_modules, list_sites, resnets_at, skip_channels

_STEPWISE = ("UNet2DConditionModel", "UNet2DModel")
_RESNETS = ("ResnetBlock2D", "ResnetBlockCondNorm2D", "TemporalResnetBlock")


class Place(NamedTuple):
    """One tensor of a stored value: the name of the value, and which tensor of it."""

    name: str
    part: int = 0


@dataclass(frozen=True)
class Move:
    """What stands in place of a module's forward, if the call has the stored value of `place` (or there is no place).

    does: hollow, or inside (of a resnet); give: the stored value of `place`; add: that and the module's input (a
    transformer's branch); zero: a branch of zeros; base: the input alone; resume: run, from the stored stream (or a
    hollow one), without the first `count` layers. Of a down block, which gives skip tensors too, count is their number.
    """

    does: str
    place: Place | None = None
    count: int = 0


@dataclass(frozen=True)
class Pattern:
    """moves: module path -> move; idle: columns of weights whose sites are not computed; side: of guidance, whose rows
    alone run, or both."""

    action: Action
    moves: Mapping[str, Move] = field(default_factory=dict)
    idle: frozenset[int] = frozenset()
    side: str = "both"


@dataclass(frozen=True)
class Take:
    """Where a tensor of a stored value is read off in a call that computes it.

    how: output: what the module gives, raw; branch: without its input; weighed: with its own weights; stream: what the
    up block is given.
    """

    path: str
    place: Place
    how: str = "output"


class Layer(NamedTuple):
    """A layer of a block: its modules' paths in the order in which they run."""

    block: str
    number: int
    paths: tuple[str, ...]


class Layout:
    """The flat walk through a U-Net, for cuts and the encoder. UserError where its blocks pass skip tensors in another
    way."""

    def __init__(self, unet: Any) -> None:
        kind = type(unet).__name__
        self.down: list[tuple[str, list[Layer | str]]] = []
        """of each down block its layers and samplers (paths), one skip tensor each"""
        for i, block in enumerate(unet.down_blocks):
            count = len(getattr(block, "downsamplers", None) or ())
            samplers = [f"down_blocks.{i}.downsamplers.{j}" for j in range(count)]
            self.down.append((f"down_blocks.{i}", [*_layers(f"down_blocks.{i}", block), *samplers]))
        self.up = [_layers(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
        self.skips = 1 + sum(len(parts) for _, parts in self.down)
        joined = len(skip_channels(unet))
        blocks = (*unet.down_blocks, *unet.up_blocks)
        odd = any(hasattr(block, "skip_norm") or hasattr(block, "resnet_down") for block in blocks)
        if kind not in _STEPWISE or odd or not self.skips == joined == sum(map(len, self.up)):
            raise UserError(
                f"actions of kind cut and encoder are not known for this {kind}, whose blocks pass skip tensors in "
                "another way: use actions of kind sites, output or guidance"
            )
        self.middle = "mid_block" if getattr(unet, "mid_block", None) is not None else ""

    def boundary(self, k: int) -> Layer:
        """The up layer that takes skip k - 1."""
        if not 0 < k <= self.skips:
            raise UserError(f"action cut has k={k}: this U-Net has {self.skips} skip tensors, give 1 to {self.skips}")
        return [layer for block in self.up for layer in block][self.skips - k]


def _layers(path: str, block: Any) -> list[Layer]:
    kinds = [kind for kind in ("resnets", "attentions") if getattr(block, kind, None) is not None]
    return [Layer(path, j, tuple(f"{path}.{kind}.{j}" for kind in kinds)) for j in range(len(block.resnets))]


class Patterns:
    """The patterns of one U-Net whose weights have `columns` (site id each)."""

    def __init__(self, unet: nn.Module, columns: Sequence[str]) -> None:
        self.unet = unet
        self.columns = list(columns)
        self._layout: Layout | None = None
        self._made: dict[Action, tuple[Pattern, tuple[Take, ...]]] = {}
        self._ruled: dict[Action, dict[Site, str]] = {}

    @property
    def layout(self) -> Layout:
        if self._layout is None:
            self._layout = Layout(self.unet)
        return self._layout

    def __getitem__(self, action: Action) -> Pattern:
        """UserError if this U-Net has no such cut or site."""
        return self._of(action)[0]

    def takes(self, action: Action) -> tuple[Take, ...]:
        """Where a call that computes what `action` stores reads it off."""
        return self._of(action)[1]

    def _of(self, action: Action) -> tuple[Pattern, tuple[Take, ...]]:
        if action not in self._made:
            make: Callable[[Action], tuple[dict[str, Move], list[Take]]] = getattr(self, f"_{action.kind}")
            moves, takes = make(action)
            idle = frozenset(i for i, site in enumerate(self.columns) if _silent(site, moves))
            side = "cond" if action.kind == "guidance" else action.cfg_branch
            self._made[action] = Pattern(action, moves, idle, side), tuple(takes)
        return self._made[action]

    def _full(self, action: Action) -> tuple[dict[str, Move], list[Take]]:
        return {}, []

    def _guidance(self, action: Action) -> tuple[dict[str, Move], list[Take]]:
        return {}, []  # the difference is taken from the U-Net's output

    def _output(self, action: Action) -> tuple[dict[str, Move], list[Take]]:
        """All parts are hollow, in any U-Net; its output is stored and given outside of it."""
        unet: Any = self.unet
        ends = ("conv_in", "transformer_in", "mid_block", "conv_norm_out", "conv_out")
        moves = {name: Move("hollow") for name in ends if getattr(unet, name, None) is not None}
        moves |= {f"up_blocks.{i}": Move("hollow") for i in range(len(unet.up_blocks))}
        for i, block in enumerate(unet.down_blocks):
            count = len(block.resnets) + len(getattr(block, "downsamplers", None) or ())  # as many skips, or more
            moves[f"down_blocks.{i}"] = Move("hollow", count=count)
        return moves, []

    def _cut(self, action: Action) -> tuple[dict[str, Move], list[Take]]:
        layout, place = self.layout, Place(action.place)
        first = layout.boundary(action.k)
        moves = self._hollow_down(action.k)
        for block in layout.up:
            if block[0].block == first.block:
                break
            moves[block[0].block] = Move("hollow")
        if first.number == 0:
            moves[first.block] = Move("resume", place)
            return moves, [Take(first.block, place, "stream")]
        moves[first.block] = Move("resume", None, first.number)
        before = next(block for block in layout.up if block[0].block == first.block)[: first.number]
        moves |= {path: Move("hollow") for layer in before for path in layer.paths}
        last = before[-1].paths[-1]
        moves[last] = Move("give", place)
        return moves, [Take(last, place, "weighed")]

    def _hollow_down(self, k: int) -> dict[str, Move]:
        """What of the down path and the middle gives none of the skips 0 to k - 1."""
        moves, count = {}, 1
        for block, parts in self.layout.down:
            if count >= k:
                moves[block] = Move("hollow", count=len(parts))
            else:
                for part in parts[max(0, k - count) :]:
                    moves |= {path: Move("hollow") for path in (part.paths if isinstance(part, Layer) else (part,))}
            count += len(parts)
        return moves | ({self.layout.middle: Move("hollow")} if self.layout.middle else {})

    def _encoder(self, action: Action) -> tuple[dict[str, Move], list[Take]]:
        place = Place("encoder")
        moves, takes, count = {"conv_in": Move("give", place)}, [Take("conv_in", place)], 1
        for block, parts in self.layout.down:
            first = Place("encoder", count)
            moves[block] = Move("give", first, len(parts))
            takes.append(Take(block, first, "skips"))
            count += len(parts)
        return moves, takes

    def _sites(self, action: Action) -> tuple[dict[str, Move], list[Take]]:
        moves: dict[str, Move] = {}
        takes: list[Take] = []
        for site, rule in self.ruled(action).items():
            module = self.unet.get_submodule(site.path)
            if site.kind == "transformer":
                place = Place(site.id)
                moves[site.path] = Move("base") if rule == "skip" else Move("add", place)
                takes.append(Take(site.path, place, "branch"))
            elif site.kind == "resnet":
                for path, place in self._residuals(site, module):
                    moves |= _resnet(self.unet.get_submodule(path), path, None if rule == "skip" else place)
                    takes.append(Take(f"{path}.conv2", place))
            else:
                names = {id(part): name for name, part in module.named_modules()}
                for i, part in enumerate(branch_modules(module, site.kind)):
                    path = f"{site.path}.{names[id(part)]}"
                    moves[path] = Move("zero") if rule == "skip" else Move("give", Place(site.id, i))
                    takes.append(Take(path, Place(site.id, i)))
        return moves, takes

    def _residuals(self, site: Site, module: nn.Module) -> list[tuple[str, Place]]:
        """Path and place of each residual block at a site: one, or with frames two."""
        names = {id(part): f"{site.path}.{name}".removesuffix(".") for name, part in module.named_modules()}
        parts = resnets_at(module)
        odd = [type(part).__name__ for part in parts if type(part).__name__ not in _RESNETS]
        if odd:
            raise UserError(f"actions at {site.id}: a {odd[0]} can only run, leave this site out")
        return [(names[id(part)], Place(site.id, i)) for i, part in enumerate(parts)]

    def ruled(self, action: Action) -> dict[Site, str]:
        """Site -> rule of an action of kind `sites`. UserError for a site that the U-Net has not, and for a transformer
        ruled beside what is in it."""
        if action not in self._ruled:
            self._ruled[action] = self._find(dict(action.sites))
        return self._ruled[action]

    def _find(self, rules: Mapping[str, str]) -> dict[Site, str]:
        kinds = ("transformer", *BRANCHES, "resnet")
        known = list_sites(self.unet, kinds)
        absent = [name for name in rules if name not in {s.id for s in known} | {s.kind for s in known}]
        if absent:
            raise UserError(f"actions name the site {absent[0]}, which this U-Net has not: see rwopt.list_sites")
        found = {site: rules.get(site.id, rules.get(site.kind, "")) for site in known}
        found = {site: rule for site, rule in found.items() if rule}
        whole = {site.path for site in found if site.kind == "transformer"}
        inside = [site.id for site in found if site.kind in BRANCHES and site.path in whole]
        if inside:
            raise UserError(f"actions name {inside[0]} and the transformer that it is in: give one of the two")
        return found


def _resnet(module: nn.Module, path: str, place: Place | None) -> dict[str, Move]:
    """Shortcut and sum run on; all that leads to `conv2`'s output, the branch, does not. place: None if it is 0."""
    inside = ("norm1", "conv1", "time_emb_proj", "norm2")
    moves = {f"{path}.{name}": Move("inside", place) for name in inside if getattr(module, name, None) is not None}
    return moves | {f"{path}.conv2": Move("give" if place else "hollow", place)}


def _silent(site: str, moves: Mapping[str, Move]) -> bool:
    """Whether a site's weight has nothing to act on: it is inside of, or is, what is hollow or given as it was."""
    path = site.split(".")
    for n in range(1, len(path) + 1):
        move = moves.get(".".join(path[:n]))
        if move is not None and move.does in ("hollow", "give"):
            return True
    return False
