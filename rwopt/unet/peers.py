"""Published ways to save U-Net calls, each as a plan: what each of N calls computes, and whether it is guided.

Pure functions of the number of calls and, where a rule is about noise levels or measured features, of those. A method
that reuses attention maps is given with attention outputs: with fused attention a stored map costs more than it saves.
What a plan cannot say is said at its function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rwopt.errors import UserError, one_of
from rwopt.schedule.actions import FULL, Action, Actions

UNGUIDED = 1.000001
"""A guidance scale that gives the conditional output; `rwopt.schedule.steps.Steps` takes scales above 1 alone."""

_FASTER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
"""Of 50 calls: the list that the authors of Faster Diffusion give."""


@dataclass(frozen=True)
class Peer:
    """A plan of a published method. guided: of each call, () for all: a call without guidance has half the rows (and so
    has by itself a call whose action is of one side).

    max_gap: calls that a stored value may serve in it.
    """

    name: str
    actions: tuple[Action, ...]
    max_gap: int = 1
    guided: tuple[bool, ...] = ()

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def text(self) -> str:
        """One letter a call; lower dots below it mark calls without guidance."""
        marks = self.guided or (True,) * len(self)
        return "".join(a.letter + ("" if g else ".") for a, g in zip(self.actions, marks, strict=True))

    def along(self, sigmas: Sequence[float]) -> Actions | None:
        """For calls at `sigmas` [N]; None if every call is full."""
        if all(action == FULL for action in self.actions):
            return None
        return Actions.along(sigmas, self.actions, self.max_gap)

    def scales(self, guidance: float) -> tuple[float, ...]:
        """Guidance of each call for a plain scale; () if all have it."""
        return tuple(guidance if on else UNGUIDED for on in self.guided)

    def price(self, cost: Callable[[Action], float], half: float) -> float:
        """In full guided calls: `cost` of an action, `half` of a call with half the rows."""
        marks = self.guided or (True,) * len(self)
        return sum(cost(a) * (1.0 if on else half) for a, on in zip(self.actions, marks, strict=True))


def _reusing(*kinds: str) -> Action:
    return Action("sites", sites=tuple((kind, "reuse") for kind in kinds))


def fewer_steps(calls: int) -> Peer:
    """Every call full: a solver, or Align Your Steps and learned steps, with another number of calls."""
    return Peer("fewer steps", (FULL,) * calls)


def deep_cache(calls: int, interval: int, branch: int = 0) -> Peer:
    """DeepCache (Ma et al. 2024, arXiv 2312.00858), uniform: full every `interval` calls, else cut branch + 1."""
    cut = Action("cut", branch + 1)
    return Peer("DeepCache", tuple(cut if i % interval else FULL for i in range(calls)), max(1, interval - 1))


def tgate(
    calls: int, gate: int, self_interval: int = 1, warm_up: int = 2, sides: str = "own", late_interval: int = 1
) -> Peer:
    """T-GATE (Liu et al. 2024, arXiv 2404.02747): from call `gate` on cross-attention is that of call gate - 1, and
    there is no guidance. Before it self-attention is new each `self_interval` calls from `warm_up` on, after it in the
    calls that `late_interval` divides.

    sides: what is used of call gate - 1, each side's "own" value or the "mean" over the two sides of guidance. The
    latter is the rule of the package tgate 1.0.0 (gate_step, sp_interval, warm_up and fi_interval there), to the bit:
    the rows that it runs from the gate on are the unconditional ones, with SDXL's pooled text and sizes of that side.
    """
    one_of(("own", "mean"), "sides", sides)
    if not 1 <= gate <= calls:
        raise UserError(f"gate={gate} is outside 1 .. {calls}: give the first call after the gate")
    before = [
        _reusing("self") if i > warm_up and i % self_interval and i != gate - 1 else FULL for i in range(gate)
    ]  # fmt: skip
    rule, side = ("mean", "uncond") if sides == "mean" else ("reuse", "both")

    def after(i: int) -> Action:
        kinds = ("cross", "self") if i % late_interval else ("cross",)
        return Action("sites", sites=tuple((kind, rule) for kind in kinds), cfg_branch=side)

    actions = (*before, *map(after, range(gate, calls)))
    guided = () if sides == "mean" else tuple(i < gate for i in range(calls))
    return Peer("T-GATE", actions, max(1, self_interval, late_interval, calls - gate), guided)


def pyramid_attention(timesteps: Sequence[float], every: Mapping[str, int], low: float, high: float) -> Peer:
    """Pyramid Attention Broadcast (Zhao et al. 2024, arXiv 2408.12588) as diffusers' hook has it: with
    low < t < high the output of a site kind is computed each `every`[kind] calls, counted from the first call."""
    def action(i: int, t: float) -> Action:
        reused = [kind for kind, n in every.items() if i % n and low < t < high]
        return _reusing(*reused) if reused else FULL

    actions = tuple(action(i, t) for i, t in enumerate(timesteps))
    return Peer("PAB", actions, max(1, *every.values()))


def faster_diffusion(calls: int, keys: Sequence[int] = ()) -> Peer:
    """Faster Diffusion (Li et al. 2024, arXiv 2312.09608): at `keys` all is computed, else the encoder's skips are
    stored ones. Default: the published 50-call list by share of the way. Batched decoders change no result."""
    chosen = {0, *(keys or (round(k * calls / 50) for k in _FASTER_KEYS))}
    actions = tuple(FULL if i in chosen else Action("encoder") for i in range(calls))
    return Peer("Faster Diffusion", actions, calls)


def hurry(calls: int, reuse: int) -> Peer:
    """HURRY (arXiv 2401.01008): all attentions of the last `reuse` calls are those of the call before them."""
    return by_vector([i >= calls - reuse for i in range(calls)], "HURRY")


def by_vector(reused: Sequence[bool], name: str = "PHAST") -> Peer:
    """All attentions reused where a vector says so (arXiv 2401.01008); the first call is full."""
    actions = tuple(_reusing("self", "cross") if on and i else FULL for i, on in enumerate(reused))
    return Peer(name, actions, len(actions))


def phast(calls: int, reuse: int, score: Callable[[Peer], float], rounds: int = 1) -> Peer:
    """PHAST (arXiv 2401.01008): from HURRY's vector by swaps of a reused and a computed call, neighbours first, each
    kept if the score (the paper: PSNR to the full run) rises. Steps of its search are not published: this is one way.
    """
    vector = [i >= calls - reuse for i in range(calls)]
    best = score(by_vector(vector))
    for _ in range(rounds):
        for i in range(1, calls):
            other = next((j for j in range(i - 1, 0, -1) if vector[j] != vector[i]), None)
            if other is None:
                continue
            tried = list(vector)
            tried[i], tried[other] = tried[other], tried[i]
            found = score(by_vector(tried))
            if found > best:
                vector, best = tried, found
    return by_vector(vector)


def eliminated(calls: int, components: Sequence[str], first: int, last: int) -> Peer:
    """Component elimination (Prasad et al. 2023, arXiv 2312.14965): some components are left out in calls `first` to
    `last` - 1, their branches 0. components: site kinds or ids."""
    skip = Action("sites", sites=tuple((name, "skip") for name in components))
    return Peer("elimination", tuple(skip if first <= i < last else FULL for i in range(calls)))


def extrapolated(calls: int, start: int = 2, end: int = 1, every: int = 2, order: int = 1) -> Peer:
    """Extrapolated outputs (FSampler, arXiv 2511.09180): `start` first and `end` last calls are full; between them
    one of `every` asks the U-Net, the others predict its output from the last full ones (order 1), or hold it."""
    if start < order + 1:
        raise UserError(f"start={start} full calls cannot give order {order}: give {order + 1} or more")
    inner = range(start, calls - end)
    actions = tuple(Action("output", order=order) if i in inner and (i - start + 1) % every else FULL
                    for i in range(calls))  # fmt: skip
    return Peer("extrapolated output", actions, max(1, every - 1))


def guidance_interval(sigmas: Sequence[float], low: float, high: float) -> Peer:
    """Guidance in an interval of noise levels alone, low < sigma <= high (Kynkaanniemi et al. 2024, arXiv 2404.07724,
    equation 3)."""
    return Peer("guidance interval", (FULL,) * len(sigmas), guided=tuple(low < s <= high for s in sigmas))


def adaptive_guidance(calls: int, guided: int) -> Peer:
    """Adaptive Guidance (Castillo et al. 2023, arXiv 2312.12487): none after the first `guided` calls, at which the two
    sides have come near each other for all cases alike."""
    return Peer("adaptive guidance", (FULL,) * calls, guided=tuple(i < guided for i in range(calls)))


def guidance_reuse(calls: int, interval: int) -> Peer:
    """The difference of the two sides computed each `interval` calls (FasterCache, Lv et al. 2024, arXiv 2410.19355,
    without its weighting of frequencies)."""
    actions = tuple(Action("guidance") if i % interval else FULL for i in range(calls))
    return Peer("guidance reuse", actions, max(1, interval - 1))


def smooth_cache(changes: Mapping[str, Sequence[Sequence[float]]], threshold: float) -> Peer:
    """SmoothCache (Liu et al. 2024, arXiv 2411.10510): a site kind's outputs are reused while their recorded relative
    change is at most `threshold`.

    changes: {kind: [call][gap - 1]: mean |out_i - out_(i - gap)| / mean |out_(i - gap)|} of one plain run, for gaps 1
    to as many as there are (the paper: 3); entries before the first call are not looked at.
    """
    kinds = list(changes)
    calls, most = len(changes[kinds[0]]), len(changes[kinds[0]][0])
    since, reused = dict.fromkeys(kinds, 0), list[list[str]]()
    for i in range(calls):
        now = []
        for kind in kinds:
            since[kind] += 1
            if i and since[kind] <= most and changes[kind][i][since[kind] - 1] <= threshold:
                now.append(kind)
            else:
                since[kind] = 0
        reused.append(now)
    return Peer("SmoothCache", tuple(_reusing(*now) if now else FULL for now in reused), most)


def block_wise(refreshed: Mapping[str, Sequence[int]], calls: int) -> Peer:
    """Block-wise caching (BAC, arXiv 2506.13456): each site is computed in its own calls alone (of its dynamic program,
    `rwopt.tuners.plan.refreshes`), and where a feed-forward is, so are the sites before it in its block.

    refreshed: {site id in execution order: its calls}.
    """
    plan = {site: set(at) for site, at in refreshed.items()}
    for site in plan:
        block, _, kind = site.rpartition(".")
        if kind == "ff":
            for other in plan:
                if other.rpartition(".")[0] == block:
                    plan[other] |= plan[site]
    actions = []
    for i in range(calls):
        reused = tuple((site, "reuse") for site, at in plan.items() if i and i not in at)
        actions.append(Action("sites", sites=reused) if reused else FULL)
    return Peer("block-wise", tuple(actions), calls)
