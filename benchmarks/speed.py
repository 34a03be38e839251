"""Quality against time: a searched plan of actions, weights learned with it on, and what others do with the same time.

`python benchmarks/speed.py [--quick] [--seeds 5]`. Base: 12 calls of DPM++ 2M; budgets .75, .5 and .35 of its time, in
full calls by costs measured on this machine; beside them the measured ratio of whole runs. The truth is the teacher,
the plain model's picture from the same noise in 50 calls of DPM++ 2M; second column: the base's own 12-call picture,
which papers compare with. 256 test cases that no search has seen. Finished arms are kept in the run folder, so that a
killed benchmark goes on; two processes may share the budgets (`--work`, then once more without it for the tables).
Results: `benchmarks/results/speed.json`; tables between the markers of `docs/speed.md`; `docs/speed.png`,
`docs/speed-curve.png`. `--model`: another embedded model, whose name is added to all these and to the markers, which
stand in its own page; there half the time is the only budget, without a curve, and no evolution is run beside the plan.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import into
from sharing import ROOT, choice, command_line, flag, page, result_of, suffix, unless_taken
from speed_peers import Evolved, Prices, candidates, evolve, nearest, prices, schedule
from speed_tables import DIALS, FEW, LEARNED, PLAN, SOLVER, curve, markdown, stage_table
from turns import Clock, Turn, in_turns, unlike

from rwopt import config
from rwopt.embedded import DEFAULT
from rwopt.files import write_text
from rwopt.objectives.pixel import psnr
from rwopt.progress import Silent
from rwopt.sampling.sample import sample
from rwopt.schedule import Schedule
from rwopt.schedule.actions import FULL as FULL_CALL
from rwopt.search.arms import ARMS, Arm
from rwopt.search.evaluation import OBJECTIVE, Scores, compare, interval
from rwopt.search.identity import versions
from rwopt.search.search import Search
from rwopt.search.speed import arguments
from rwopt.tasks.pictures import to_pictures
from rwopt.unet.attachment import Attachment
from rwopt.unet.cost import CostTable, Watch, cost_table
from rwopt.unet.peers import phast

CALLS = 12
BUDGETS = (0.5, 0.75, 0.35)
OWN = "own.psnr"  # to the base's own picture
EVOLUTION = 10  # times what the plan took to find
FULL = ["task.train=96", "task.validation=24", "task.test=256", f"task.steps={CALLS}"]
SMALL = ["task.train=8", "task.validation=6", "task.test=8", "task.steps=6", "tuner.trials=2", "gradient.updates=2",
         "gradient.batch=4", "task.teacher.steps=10", "steps.grids=[trailing,karras]", "steps.samplers=[ddim,dpmpp_2m]",
         "speed.cases=4", "speed.proposals=3"]  # fmt: skip


class Bench:
    """All runs in one folder."""

    def __init__(self, folder: Path, quick: bool, seeds: int, model: str = DEFAULT) -> None:
        self.folder, self.quick, self.seeds, self.model = folder, quick, seeds, model
        self.budgets = BUDGETS if model == DEFAULT and not quick else BUDGETS[:1]
        self.evolution = model == DEFAULT
        self._searches: dict[str, Search] = {}
        self._plain: Search | None = None

    def search(self, budget: float) -> Search:
        return self._search("speed", f"speed-{budget:g}", [f"task.budget={budget}"])

    def few(self, calls: int) -> Search:
        """The recipe of few learned calls, without a plan."""
        return self._search("few-steps", f"few-{calls}", [f"task.steps={calls}", "task.sampler=dpmpp_2m"])

    def _search(self, recipe: str, name: str, words: list[str]) -> Search:
        if name not in self._searches:
            own = [w for w in SMALL if recipe == "speed" or not w.startswith("speed.")] if self.quick else FULL
            settings = config.load(recipe, [*choice(self.model), *own, *words, "track.wandb=off"])
            self._searches[name] = Search(settings, self.folder / name, Silent(), self.folder / "teacher")
        return self._searches[name]

    def work(self) -> None:
        """What is not done yet, and not in another process's hands."""
        for budget in self.budgets:
            unless_taken(self.folder, f"{budget:g}", partial(self._tell, budget))

    def _tell(self, budget: float) -> None:
        for name, arm in self.arms(budget):
            print(f"{time.strftime('%H:%M')} {budget:g} {name}: {arm.validation}", flush=True)

    # arms

    def cost(self) -> CostTable:
        """What every standard action costs here, for all budgets."""
        path = self.folder / "cost.json"
        if path.exists():
            return CostTable.from_json(json.loads(path.read_text()))
        search = self.search(self.budgets[0])
        model, task = search.experiment.model, search.experiment.splits.task("validation")
        with Attachment(model.unet, ()) as hooks:
            x, cond, course = task.inputs(hooks, search.experiment.base, slice(0, task.batch))
        shape, rest = arguments(model, x, cond, course)
        table = cost_table(model.unet, shape, rest)
        write_text(path, json.dumps(table.to_json()) + "\n")
        return table

    def arms(self, budget: float) -> Iterator[tuple[str, Arm]]:
        """Every arm of one budget, tested; the most telling first."""
        search = self.search(budget)
        cost = prices(search, self.cost())
        own = search.folder / "cost.json"
        if not own.exists():  # one table for all: prices must not differ by when they were measured
            write_text(own, json.dumps(cost.table.to_json()) + "\n")
        dials = search.dials()

        def tested(name: str, arm: Arm, search: Search = search) -> tuple[str, Arm]:
            self.test(search, arm)
            return name, arm

        yield tested("plain", search.make(ARMS["plain"], dials))
        yield tested(SOLVER, search.make(ARMS[SOLVER], dials))
        yield tested(PLAN, search.make(ARMS[PLAN], dials))
        yield tested(LEARNED, search.learn(dials, 0, name=f"{LEARNED} 0"))
        for name, arm in self.peers(search, cost):
            yield tested(name, arm)
        few = self.few(search.speed.affordable)
        yield tested(FEW, few.learn(few.dials(), 0, name="learned 0"), few)
        yield tested(DIALS, search.learn(dials, 0, ARMS["sampler dials"], f"{DIALS} 0"))
        for seed in range(1, self.seeds):
            yield tested(LEARNED, search.learn(dials, seed, name=f"{LEARNED} {seed}"))
        if self.evolution:
            yield tested("AutoDiffusion", self.evolved(search, cost)[0])

    def peers(self, search: Search, cost: Prices) -> Iterator[tuple[str, Arm]]:
        """Every published method at its best under the budget, by validation cases."""
        most = search.speed.most
        found = candidates(search, cost, 3 if self.quick else max(4, search.speed.affordable - 2))
        for name, group in found.items():
            chosen = nearest(group, cost, most, 2 if self.quick else 12)
            if not chosen:
                print(f"{name}: nothing costs at most {most:.3g} calls", flush=True)
                continue
            plans = {f"{len(peer)} calls, {i}: {peer.text}": peer for i, peer in enumerate(chosen)}
            kept = search.tuner.kept(name)
            if kept is None or "price" not in kept.choice:
                kept = search.tuner.best_of(name, {text: schedule(search, peer) for text, peer in plans.items()})
                kept.choice["price"] = cost.peer(plans[kept.choice["best"]])
                search.tuner.keep(kept)
            yield name, kept
        yield "PHAST", self.phast(search, cost)

    def phast(self, search: Search, cost: Prices) -> Arm:
        """From the best of HURRY: its length and number of reused calls."""
        kept = search.tuner.kept("PHAST")
        if kept is not None and "price" in kept.choice:
            return kept
        hurry, evaluator, base = search.tuner.kept("HURRY"), search.experiment.evaluator, search.experiment.base
        assert hurry is not None
        assert hurry.schedule is not None
        actions = hurry.schedule.actions
        calls = len(hurry.schedule.sigmas)
        reuse = 0 if actions is None else sum(level.action.kind == "sites" for level in actions.levels)
        before, tried = search.experiment.model.calls, 0

        def value(peer: Any) -> float:
            nonlocal tried
            tried += 1
            return float((evaluator.of("train", (base, schedule(search, peer)))[0].scores or (np.nan,))[0])

        peer = phast(calls, reuse, value)
        spent = search.experiment.model.calls - before
        arm = search.tuner.fixed("PHAST", schedule(search, peer), peer.text)
        arm.choice, arm.evaluations, arm.calls = {"best": peer.text, "price": cost.peer(peer)}, tried, spent
        return search.tuner.keep(arm)

    def evolved(self, search: Search, cost: Prices) -> tuple[Arm, list[tuple[int, float]]]:
        path = search.folder / "evolution.json"
        kept = search.tuner.kept("AutoDiffusion")
        if kept is not None and path.exists():
            return kept, [(int(n), float(v)) for n, v in json.loads(path.read_text())]
        plan = search.tuner.kept(PLAN)
        assert plan is not None
        size = (120, 4, 4) if self.quick else (EVOLUTION * plan_price(search, plan),)
        found: Evolved = evolve(search, cost, search.speed.most, *size)
        write_text(path, json.dumps(found.course))
        arm = search.tuner.fixed("AutoDiffusion", found.schedule, found.text)
        arm.choice, arm.evaluations = {"best": found.text, "price": found.price}, len(found.course)
        return search.tuner.keep(arm), found.course

    def test(self, search: Search, arm: Arm) -> Scores:
        """Metrics on test cases, with the distance to the base's own pictures."""
        path = search.folder / "arms" / f"{arm.name}.test.json"
        if not path.exists():
            from rwopt.search.evaluation import score

            task, experiment = search.experiment.splits.task("test"), search.experiment
            batch = task.made(arm.dials, arm.schedule)
            metrics = list(search.settings.objective.report)
            found = score(task, batch, experiment.composites, metrics, experiment.objectives)
            base = self.search(self.budgets[0]).experiment.splits.task("test").references
            assert base is not None  # of generation: the plain model's pictures in `task.steps` calls
            found.values[OWN] = psnr(batch.images, base).double().cpu().numpy()
            write_text(path, json.dumps(found.to_json()))
        return Scores.from_json(json.loads(path.read_text()))

    def seconds(self, search: Search, arm: Arm, rounds: int = 5, pictures: int = 4) -> float:
        """The measured time of a whole run over that of the plain one, call by call in turns; kept."""
        path = search.folder / "arms" / f"{arm.name}.time.json"
        if path.exists():
            return float(json.loads(path.read_text()))
        if self._plain is None:  # a model of its own: an attachment with actions does not stack
            base = self.search(self.budgets[0])
            self._plain = Search(base.settings, base.folder, Silent(), self.folder / "teacher")
        own, plain = (partial(self._run, s, schedule, pictures) for s, schedule in
                      ((search, arm.schedule), (self._plain, None)))  # fmt: skip
        ratio = unlike(in_turns(own, plain, 1 if self.quick else rounds))
        write_text(path, json.dumps(ratio))
        return ratio

    @torch.no_grad()
    def _run(self, search: Search, schedule: Schedule | None, pictures: int, turn: Turn) -> list[float]:
        """Processor seconds of each call. Calls without guidance run both rows here, at scale 1, so that the time of
        T-GATE, guidance interval and adaptive guidance is measured too high; their price is right."""
        from rwopt.tasks.task import attach, weights_of

        experiment, task = search.experiment, search.experiment.splits.task("test")
        course = task.course(experiment.base, None if schedule is None else schedule.steps)
        clock = Clock(Watch(experiment.model.device), turn)
        with attach(experiment.model, schedule) as hooks:
            x, cond, course = task.inputs(hooks, experiment.base, slice(0, pictures), course)
            actions, weights = None if schedule is None else schedule.actions, weights_of(schedule)
            sample(experiment.model, hooks, x, cond, course, weights, False, clock, actions)
        return clock.of_calls()


def price_of(bench: Bench, budget: float, name: str, arm: Arm) -> float:
    """In full calls."""
    search = bench.search(budget)
    if name == "plain":
        return float(search.settings.task.steps)
    if name in (SOLVER, FEW):
        return float(search.speed.affordable)
    if name in (PLAN, DIALS, LEARNED):
        return float(search.speed.plan().choice["price"])
    return float(arm.choice["price"])


def plan_text(arm: Arm) -> str:
    """The plan in letters, with the number of its calls."""
    schedule = arm.schedule
    if schedule is None or schedule.steps is None:
        return ""
    return f"{len(schedule.steps)}: {schedule.actions.text}" if schedule.actions else f"{len(schedule.steps)} full"


def run(bench: Bench) -> dict[str, Any]:
    """The content of the result file."""
    rows, paired, searches = [], [], []
    for budget in bench.budgets:
        search = bench.search(budget)
        groups: dict[str, list[Arm]] = {}
        for name, arm in bench.arms(budget):
            groups.setdefault(name, []).append(arm)
        few = bench.few(search.speed.affordable)
        scores = {
            name: [bench.test(few if name == FEW else search, arm) for arm in group] for name, group in groups.items()
        }
        for name, group in groups.items():
            table = np.stack([s.values[OBJECTIVE] for s in scores[name]], 1)
            low, high = interval(table)
            price = price_of(bench, budget, name, group[0])
            means = {key: float(np.mean([s.mean(key) for s in scores[name]])) for key in scores[name][0].values}
            rows.append({
                "method": name, "budget": budget, "price": price, "calls": price,
                "time_ratio": bench.seconds(few if name == FEW else search, group[0]),
                "priced_ratio": price / search.settings.task.steps,
                "psnr_converged": float(table.mean()), "psnr_20": means[OWN], "low": low, "high": high,
                "seeds": len(group), "plan": plan_text(group[0]), "means": means, "validation": group[0].validation,
                "search_calls": group[0].calls, "evaluations": group[0].evaluations,
            })  # fmt: skip
        for first in (LEARNED, PLAN):
            for name in scores:
                if name != first:
                    row = compare(scores[first], scores[name], OBJECTIVE, (first, name), True, "test")
                    paired.append({"budget": budget, **asdict(row)})
        searches.append(stages(bench, budget, groups))
    return {
        "name": "speed",
        "command": "python benchmarks/speed.py" + (" --quick" if bench.quick else f" --seeds {bench.seeds}")
        + flag(bench.model),
        "quick": bench.quick,
        "settings": asdict(bench.search(bench.budgets[0]).settings),
        "versions": versions(),
        "cost": bench.cost().to_json(),
        "rows": rows,
        "paired": paired,
        "searches": searches,
    }


def first_full(plan: Arm) -> int:
    """How many calls are computed in full before the first that is not."""
    schedule = plan.schedule
    levels = () if schedule is None or schedule.actions is None else schedule.actions.levels
    return sum(1 for _ in takewhile(lambda level: level.action == FULL_CALL, levels))


def plan_price(search: Search, plan: Arm) -> int:
    """What finding a plan took, in U-Net calls times pictures."""
    cases, measured = search.settings, plan.choice["measured"]
    price = measured * min(cases.speed.cases, cases.task.train)
    return int(price + (plan.calls - measured) * min(cases.task.validation, cases.task.batch))


def stages(bench: Bench, budget: float, groups: dict[str, list[Arm]]) -> dict[str, Any]:
    """What each stage of the search gains on validation cases, and what it takes beside evolution.

    Prices in U-Net calls times pictures; evolution: when its best on its own train cases first is as good as the plan
    is on the same cases, and when it ends.
    """
    search = bench.search(budget)
    plan = groups[PLAN][0]
    history = dict(plan.history)
    course = bench.evolved(search, prices(search, bench.cost()))[1] if bench.evolution else []
    few = search.experiment.splits.cases("train")[: 4 if bench.quick else 16]
    task = search.experiment.splits.prepare(few)
    from rwopt.search.evaluation import score

    made = task.made(plan.dials, plan.schedule)
    goal = score(task, made, {OBJECTIVE: search.experiment.objective}).mean(OBJECTIVE)
    reached = next((spent for spent, best in course if best >= goal), None)
    return {
        "budget": budget,
        "proposals": len(history),
        "best prediction": history.get(plan.choice["first"]),
        "chosen on validation cases": plan.validation,
        "dials": groups[DIALS][0].validation if DIALS in groups else None,
        "weights and dials": groups[LEARNED][0].validation,
        "plan_price": plan_price(search, plan),
        "evolution_price": course[-1][0] if course else None,
        "evolution_reached": reached,
        "evolution_best": course[-1][1] if course else None,
        "plan_there": goal,
        "first steps full": first_full(plan),
        "chosen": bench.search(budget).chosen([g[0] for n, g in groups.items() if n in (PLAN, SOLVER)]).name,
    }


def grid(bench: Bench, path: Path, rows: int = 5) -> None:
    """Pictures of the smallest budget side by side."""
    from rwopt.report import image_grid

    search = bench.search(min(bench.budgets))
    cases = search.experiment.splits.cases("test")
    task = search.experiment.splits.prepare(cases[7 :: len(cases) // rows][:rows])
    columns: dict[str, list[np.ndarray]] = {}
    for name, title in (("DeepCache", "DeepCache"), ("T-GATE", "T-GATE"), (SOLVER, SOLVER), (PLAN, PLAN),
                        (f"{LEARNED} 0", LEARNED)):  # fmt: skip
        arm = Arm.load(search.folder / "arms" / f"{name}.json")
        columns[title] = to_pictures(task.images(arm.dials, arm.schedule))
    assert task.teacher is not None
    columns["50 calls"] = to_pictures(task.teacher)
    image_grid(columns, path, [case.caption for case in task.cases])


def main() -> None:
    quick = "minutes: one budget, few cases and updates, own file"
    args = command_line("speed", __doc__, quick, 5, "of plan and weights", models=True)
    bench = Bench(args.folder, args.quick, args.seeds, args.model)
    result = result_of(args, bench, run)
    if result is None:
        return
    print(markdown(result), stage_table(result), sep="\n\n")
    if not args.quick:
        docs, end = ROOT.parent / "docs", suffix(args.model)
        into(page(args.model, "speed.md"), f"speed{end}", markdown(result))
        into(page(args.model, "speed.md"), f"stages{end}", stage_table(result))
        if len(bench.budgets) > 1:
            curve(result, docs / f"speed-curve{end}.png")
        if not args.table:
            grid(bench, docs / f"speed{end}.png")


if __name__ == "__main__":
    main()
