"""Published ways to save calls under a budget, for `benchmarks/speed.py`: each with its own dials, on many grids.

A method is given what it leaves open (intervals, gates, thresholds, the number of steps) by the same validation cases
that choose our plan. AutoDiffusion's evolution searches steps and skips together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from rwopt.sampling.course import course_at
from rwopt.schedule import Schedule
from rwopt.schedule.actions import FULL, Action, Actions
from rwopt.schedule.noise import timestep_of
from rwopt.schedule.steps import Steps
from rwopt.search.evaluation import OBJECTIVE, score
from rwopt.search.search import Search
from rwopt.tasks import Task
from rwopt.tuners.plan import refreshes
from rwopt.unet import peers
from rwopt.unet.actions import Frame, Texts
from rwopt.unet.attachment import Attachment
from rwopt.unet.call import PLAIN
from rwopt.unet.cost import CostTable
from rwopt.unet.peers import Peer
from rwopt.unet.sites import list_sites

MOST = 12
"""Candidates of a method that validation cases see: those whose price is nearest to the budget."""
KINDS = ("self", "cross", "ff")


@dataclass
class Prices:
    """Of calls, in full guided calls: a measured table; for rules of single sites a share of their kind's."""

    table: CostTable
    kinds: Mapping[str, str]  # site id -> kind

    @property
    def half(self) -> float:
        """A call without guidance: its rows are those of a call that takes the difference of the two sides."""
        return self.table.of(Action("guidance"))

    def of(self, action: Action) -> float:
        if action.kind != "sites":
            return self.table.of(action)
        count = {kind: list(self.kinds.values()).count(kind) for kind in set(self.kinds.values())}
        saved = 0.0
        for name, _ in action.sites:
            kind = self.kinds.get(name, name)
            saved += self.table.sites[kind] / (count[kind] if name in self.kinds else 1)
        return max(0.0, 1.0 - saved)

    def peer(self, peer: Peer) -> float:
        return peer.price(self.of, self.half)


def prices(search: Search, table: CostTable) -> Prices:
    sites = list_sites(search.experiment.model.unet, ("transformer", *KINDS, "resnet"))
    return Prices(table, {site.id: site.kind for site in sites})


def schedule(search: Search, peer: Peer) -> Schedule:
    """A peer on the task's sampler and grid of its length."""
    sigmas = search.speed.course(len(peer)).sigmas
    steps = Steps(search.settings.task.sampler, sigmas, guidance=peer.scales(search.experiment.base.guidance))
    ids = [s.id for s in list_sites(search.experiment.model.unet, search.settings.weights.kinds)]
    return Schedule.constant(ids, sigmas, steps=steps, actions=peer.along(sigmas))


@dataclass
class Record:
    """Of one plain run: each site's branch at each call, [calls, elements], by site id."""

    branches: dict[str, torch.Tensor]

    def cosine(self, site: str) -> np.ndarray:
        unit = torch.nn.functional.normalize(self.branches[site], dim=1)
        return np.asarray((unit @ unit.T).numpy())

    def changes(self, kind: str, kinds: Mapping[str, str], gaps: int = 3) -> list[list[float]]:
        """Mean relative L1 change of a kind's branches over 1 .. gaps calls; infinite where there is no such call."""
        rows = [value for site, value in self.branches.items() if kinds[site] == kind]
        calls = len(rows[0])

        def change(i: int, gap: int) -> float:
            if i < gap:
                return float("inf")
            off = [float((v[i] - v[i - gap]).abs().mean() / v[i - gap].abs().mean()) for v in rows]
            return float(np.mean(off))

        return [[change(i, gap) for gap in range(1, gaps + 1)] for i in range(calls)]


@torch.no_grad()
def recorded(search: Search, calls: int, cases: int = 4) -> Record:
    """The branches of the transformers' parts in one plain run of the first train cases."""
    from rwopt.probes.teacher import Teacher

    experiment, task = search.experiment, search.experiment.splits.task("train")
    action = Action("sites", sites=tuple((kind, "reuse") for kind in KINDS))
    found: dict[str, list[torch.Tensor]] = {}
    with Attachment(experiment.model.unet, ()) as hooks:
        x, cond, course = task.inputs(hooks, experiment.base, slice(0, cases), search.speed.course(calls))
        sigmas = course.sigmas
        acts = hooks.acts(Actions.along(sigmas, [FULL, *[action] * (calls - 1)], calls), texts=True)
        names, texts = frozenset(acts.names(action)), Texts(vouched=True)
        teacher = Teacher(experiment.model, hooks, x, cond, course)
        for i in range(calls):
            frame = Frame(acts.patterns[FULL], PLAIN, {}, names, texts)
            teacher.attachment = hooks.with_frame(frame)
            teacher.advance(i, teacher.predict(i))
            for name, values in frame.values().items():
                flat = torch.cat([value.float().flatten() for value in values])
                found.setdefault(name, []).append(flat)
    return Record({name: torch.stack(rows) for name, rows in found.items()})


def candidates(search: Search, cost: Prices, least: int) -> dict[str, list[Peer]]:
    """Every method's plans for `least` to `task.steps` calls, by name."""
    out: dict[str, list[Peer]] = {}
    table = search.experiment.model.table

    def add(name: str, found: Iterator[Peer]) -> None:
        out.setdefault(name, []).extend(found)

    for n in range(search.settings.task.steps, least - 1, -1):
        sigmas = search.speed.course(n).sigmas
        times = timestep_of(np.array(sigmas), table).round().tolist()
        record = recorded(search, n)
        kinds = {site: cost.kinds[site] for site in record.branches}
        add("DeepCache", (peers.deep_cache(n, k, b) for k in (2, 3, 5) for b in (0, 1) if k <= n))
        add("T-GATE", (peers.tgate(n, gate, k) for gate in range(2, n) for k in (1, 5)))
        add("PAB", (peers.pyramid_attention(times, {"cross": a, "self": b}, low, high)
                    for a, b in ((3, 2), (4, 2), (6, 3)) for low, high in ((100, 800), (0, 950))))  # fmt: skip
        add("Faster Diffusion", iter([peers.faster_diffusion(n), peers.faster_diffusion(n, range(0, n, 2)),
                                      peers.faster_diffusion(n, range(0, n, 3))]))  # fmt: skip
        add("HURRY", (peers.hurry(n, k) for k in range(1, n)))
        add("elimination", (peers.eliminated(n, [kind], first, last) for kind in (*KINDS, "transformer", "resnet")
                            for first, last in ((0, n // 3), (n - n // 3, n))))  # fmt: skip
        add("block-wise DP", (block_wise(record, n, count) for count in {n // 2, n // 3, 2 * n // 3} if count))
        add("SmoothCache", (
            peers.smooth_cache({kind: record.changes(kind, kinds) for kind in KINDS}, threshold)
            for threshold in (0.05, 0.1, 0.2, 0.35, 0.6)
        ))  # fmt: skip
        add("extrapolated output", (
            peers.extrapolated(n, start, end, every) for start in (2, 3, 4) for end in (1, 2) for every in (2, 3)
        ))  # fmt: skip
        spans = [(sigmas[j - 1], sigmas[i]) for i in range(n) for j in range(i + 2, n + 1) if i + n - j <= n // 2]
        add("guidance interval", (peers.guidance_interval(sigmas, low * 0.999, high) for low, high in spans))
        add("adaptive guidance", (peers.adaptive_guidance(n, k) for k in range(2, n)))
        add("guidance reuse", (peers.guidance_reuse(n, k) for k in (2, 3)))
    return out


def block_wise(record: Record, calls: int, count: int) -> Peer:
    found = {}
    for site in record.branches:
        table = record.cosine(site)
        found[site] = refreshes(lambda i, j, table=table: float(table[i, j]), calls, count)  # type: ignore[misc]
    return peers.block_wise(found, calls)


def nearest(found: list[Peer], cost: Prices, most: float, count: int = MOST) -> list[Peer]:
    """Those that cost at most `most`, the dearest first: a method is best served by the whole budget."""
    unique = {peer.text + str(peer.actions): peer for peer in found if cost.peer(peer) <= most}
    return sorted(unique.values(), key=lambda peer: -cost.peer(peer))[:count]


@dataclass
class Evolved:
    """What evolution found: the schedule, its price, and (calls x pictures so far, best score so far)."""

    schedule: Schedule
    price: float
    text: str
    course: list[tuple[int, float]]


def evolve(
    search: Search, cost: Prices, most: float, spend: int, population: int = 20, cases: int = 16, seed: int = 0,
    score_of: Callable[[Task, Schedule], float] | None = None,
) -> Evolved:  # fmt: skip
    """AutoDiffusion (arXiv 2309.10438): sorted time steps and the transformers and resnets that each call leaves out.

    Half of the first generation are mutations of the even grid that the budget pays; the best half are parents, half of
    the children by crossover; time steps alone move in the first half, as its authors do. Fitness: the recipe's
    objective on train cases. spend: U-Net calls times pictures, after which no generation begins.
    """
    rng, model = np.random.default_rng(seed), search.experiment.model
    sites = [site for site, kind in cost.kinds.items() if kind in ("transformer", "resnet")]
    task = search.experiment.splits.prepare(search.experiment.splits.cases("train")[:cases])
    total, base = len(model.table), search.experiment.base
    ids = [s.id for s in list_sites(model.unet, search.settings.weights.kinds)]
    first = total - 1
    spent, best, known = 0, (-np.inf, None), dict[object, float]()
    course: list[tuple[int, float]] = []
    Genome = tuple[tuple[int, ...], tuple[frozenset[str], ...]]

    def actions(skips: tuple[frozenset[str], ...]) -> list[Action]:
        return [Action("sites", sites=tuple((s, "skip") for s in sorted(k))) if k else FULL for k in skips]

    def price(genome: Genome) -> float:
        return sum(cost.of(action) for action in actions(genome[1]))

    def made(genome: Genome) -> Schedule:
        sigmas = course_at(model, genome[0], search.settings.task.sampler).sigmas
        plan = actions(genome[1])
        along = None if all(a == FULL for a in plan) else Actions.along(sigmas, plan)
        return Schedule.constant(ids, sigmas, steps=Steps(search.settings.task.sampler, sigmas), actions=along)

    def fitness(genome: Genome) -> float:
        nonlocal spent, best
        if genome not in known:
            schedule = made(genome)
            if score_of is not None:
                known[genome] = score_of(task, schedule)
            else:
                batch = task.made(base, schedule)
                known[genome] = score(task, batch, {OBJECTIVE: search.experiment.objective}).mean(OBJECTIVE)
            spent += len(genome[0]) * len(task)
            if known[genome] > best[0]:
                best = known[genome], genome
            course.append((spent, float(best[0])))
        return known[genome]

    def legal(genome: Genome) -> Genome:
        times, skips = genome
        pairs = dict(sorted(zip(times, skips, strict=True), reverse=True))
        pairs = {min(first, max(0, t)): k for t, k in pairs.items()}
        times = (first, *[t for t in pairs if t != first])
        skips = (pairs.get(first, frozenset()), *[k for t, k in pairs.items() if t != first])
        while price((times, skips)) > most and len(times) > 1:
            drop = int(rng.integers(1, len(times)))
            times, skips = times[:drop] + times[drop + 1 :], skips[:drop] + skips[drop + 1 :]
        return times, skips

    def mutated(genome: Genome, joint: bool) -> Genome:
        times, skips = list(genome[0]), [set(k) for k in genome[1]]
        for i in range(1, len(times)):
            if rng.random() < 0.25:
                times[i] = int(np.clip(times[i] + rng.normal(0, 60), 0, first - 1))
        if joint:
            for k in skips:
                for site in sites:
                    if rng.random() < 0.02:
                        k ^= {site}
            if price((tuple(times), tuple(map(frozenset, skips)))) <= most - 0.9:  # what was saved pays another call
                times.append(int(rng.integers(0, first)))
                skips.append(set())
        return legal((tuple(times), tuple(frozenset(k) for k in skips)))

    def crossed(a: Genome, b: Genome) -> Genome:
        pool = {**dict(zip(*a, strict=True)), **dict(zip(*b, strict=True))}
        chosen = rng.choice(sorted(pool), size=min(len(pool), len(a[0])), replace=False).tolist()
        return legal((tuple(chosen), tuple(pool[t] for t in chosen)))

    count = max(1, int(most))
    even = tuple(round(total - i * total / count) - 1 for i in range(count))
    start: Genome = (even, (frozenset(),) * count)
    group = [start, *[mutated(start, False) for _ in range(population // 2)]]
    while len(group) < population:
        times = (first, *sorted(rng.choice(first, count - 1, replace=False).tolist(), reverse=True))
        group.append(legal((times, (frozenset(),) * len(times))))
    while True:
        group = sorted(dict.fromkeys(group), key=fitness, reverse=True)[: population // 2]
        if spent >= spend:
            break
        joint, parents = spent >= spend // 2, list(group)
        while len(group) < population:
            a, b = (parents[int(k)] for k in rng.integers(0, len(parents), 2))
            group.append(crossed(a, b) if rng.random() < 0.5 else mutated(a, joint))
    genome = best[1]
    assert genome is not None
    text = " ".join(f"{t}{'-' * len(k)}" for t, k in zip(*genome, strict=True))
    return Evolved(made(genome), price(genome), text, course)
