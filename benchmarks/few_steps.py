"""Few learned calls against many plain ones: quality by number of calls, and what a gain is worth in plain calls.

`python benchmarks/few_steps.py [--quick] [--seeds 5]`. Two processes may share the work: each takes a number of calls
that nobody has (`--work`, then once more without it for the tables). Finished parts are kept in the run folder, so a
killed benchmark goes on. Everything is held against the teacher, the plain model's picture from the same noise in 50
calls of DPM++ 2M, on test cases that no search has seen. Results: `benchmarks/results/few_steps.json`; tables between
the markers of `docs/few-steps.md` and README.md; `docs/few-steps.png`, `docs/few-steps-curve.png`. `--model`: another
embedded model, whose name is added to all these and to the markers, which stand in its own page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import into
from few_steps_tables import FEATURES, carry_markdown, curve, markdown, short
from sharing import ROOT, choice, command_line, flag, page, result_of, suffix, unless_taken

from rwopt import config
from rwopt.embedded import DEFAULT
from rwopt.files import write_text
from rwopt.progress import Silent
from rwopt.sampling.course import course_by_rule
from rwopt.schedule import Schedule
from rwopt.search.arms import ARMS, Arm
from rwopt.search.evaluation import OBJECTIVE, Scores, compare, interval
from rwopt.search.identity import versions
from rwopt.search.search import Search
from rwopt.search.verdict import report_metrics
from rwopt.search.worth import worth
from rwopt.tasks.pictures import to_pictures
from rwopt.tasks.teacher import teacher_latents

RECIPE = "few-steps"
PLAIN_CALLS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16)
CONTROLS = ("plain", "best guidance", "analytic", "constant", "clock", "clock and told", "weights", "weights and clock")
MORE_FEATURES = ["objective.terms.teacher.features.scorer=5", "gradient.updates=40"]
"""In standard deviations of the plain model's scores, features count five times as much as PSNR; two terms need more
updates than one."""
QUICK_FEATURES = MORE_FEATURES[:1]
MANY, SLOW = 8, 0.03
"""From so many calls on, at 45 dB and more, steps of the usual rate go past the optimum: half the rate there."""
STEADY = ("gradient.draws=8", "gradient.average=0.8", "gradient.updates=32", "probe.start=dials")
"""Where 240 weights learn 96 pictures by heart: more start noises, more updates and the mean of the last ones; dials
first, and from what they have reached everything, in finer steps."""


@dataclass(frozen=True)
class Part:
    """One number of calls of one sampler: seeds of the learned arm, of the dials without weights, and of what is
    learned by PSNR and the scorer's features together; which controls are run; more settings."""

    learned: int
    dials: int
    features: int = 0
    controls: tuple[str, ...] = CONTROLS[:1]
    more: tuple[str, ...] = ()

    @property
    def seeds(self) -> dict[str, int]:
        return {"learned": self.learned, "sampler dials": self.dials, FEATURES: self.features}


PLAN = {
    "dpmpp_2m": {3: Part(5, 3, 0, CONTROLS), 2: Part(5, 3, 5, CONTROLS), 4: Part(5, 2), 6: Part(5, 2), 8: Part(5, 2),
                 10: Part(5, 5, more=STEADY)},
    # in 2 calls DDIM and DPM++ 2M are one solver: first and last step are of first order
    "ddim": {4: Part(5, 2), 3: Part(5, 2), 6: Part(5, 2), 8: Part(5, 2), 10: Part(5, 2)},
}
OTHERS = {"dpmpp_2m": {calls: Part(5, 2, 0, CONTROLS[:3]) for calls in (3, 2, 4, 6)}}
"""For models that are not the default one: what carries over."""
QUICK = {"dpmpp_2m": {2: Part(2, 1, 1, CONTROLS)}, "ddim": {2: Part(1, 1)}}
FULL = ["task.train=96", "task.validation=24", "task.test=256", "tuner.trials=4", "gradient.updates=16",
        "gradient.batch=24", "gradient.rate=0.06",
        "arms=[plain,best solver,best guidance,analytic,constant,clock,sampler dials,weights,learned]"]  # fmt: skip
SMALL = ["task.train=8", "task.validation=8", "task.test=8", "tuner.trials=2", "gradient.updates=2", "gradient.batch=4",
         "tuner.control_trials=1", "analytic.rounds=1", "analytic.cases=2", "task.teacher.steps=8",
         "steps.grids=[trailing,karras]", "steps.samplers=[ddim,dpmpp_2m]"]  # fmt: skip


class Bench:
    """All runs of the benchmark in one folder."""

    def __init__(self, folder: Path, quick: bool, seeds: int, model: str = DEFAULT) -> None:
        self.folder, self.quick, self.seeds, self.model = folder, quick, seeds, model
        self.plan: dict[str, dict[int, Part]] = QUICK if quick else PLAN if model == DEFAULT else OTHERS
        self.counts = (1, 2, 3, 4) if quick else PLAIN_CALLS

    def search(self, sampler: str, calls: int, features: bool = False) -> Search:
        words = [*choice(self.model), *(SMALL if self.quick else FULL), f"task.steps={calls}",
                 f"task.sampler={sampler}", "track.wandb=off"]  # fmt: skip
        name = f"{sampler}-{calls}"
        if calls >= MANY and not self.quick:
            words.append(f"gradient.rate={SLOW}")
        part = self.plan[sampler].get(calls)
        words += part.more if part else ()
        if features:
            words, name = [*words, *(QUICK_FEATURES if self.quick else MORE_FEATURES)], f"{name}-features"
        return Search(config.load(RECIPE, words), self.folder / name, Silent(), self.folder / "teacher")

    def jobs(self) -> Iterator[tuple[str, int]]:
        yield from ((sampler, calls) for sampler, plan in self.plan.items() for calls in plan)

    def work(self) -> None:
        """What is not done yet, and not in another process's hands."""
        repeated = [(sampler, calls) for sampler, calls in self.jobs() if self.plan[sampler][calls].learned > 1]
        for sampler, calls in repeated:
            unless_taken(self.folder, f"{sampler}-{calls}", lambda s=sampler, c=calls: self.arms(s, c))
        for calls in self.counts:
            unless_taken(self.folder, f"plain-{calls}", lambda calls=calls: self.plain(calls))
        for sampler, calls in self.jobs():  # those of one seed, and what another process has left
            unless_taken(self.folder, f"{sampler}-{calls}", lambda s=sampler, c=calls: self.arms(s, c))

    def plain(self, calls: int) -> tuple[str, Scores]:
        """The best plain sampler and grid of that many calls by validation cases, and its scores on test cases."""
        search = self.search("dpmpp_2m", calls)
        name = f"best of {calls}"
        arm = search.tuner.best_of(name, search.solvers())
        return str(arm.choice["best"]), search.tuner.test(arm, list(search.settings.objective.report))

    def arms(self, sampler: str, calls: int) -> tuple[Search, dict[str, list[Arm]], dict[str, list[Scores]]]:
        """Every arm of one number of calls, with its scores on test cases."""
        search = self.search(sampler, calls)
        part, dials = self.plan[sampler][calls], search.dials()
        arms: dict[str, list[Arm]] = {}

        def add(name: str, arm: Arm) -> None:
            arms.setdefault(name, []).append(arm)
            search.tuner.test(arm, metrics)

        metrics = list(search.settings.objective.report)
        add("best solver", search.make(ARMS["best solver"], dials))
        for seed in range(min(part.learned, self.seeds)):
            add("learned", search.learn(dials, seed, name=f"learned {seed}"))
        for seed in range(min(part.dials, self.seeds)):
            add("sampler dials", search.learn(dials, seed, ARMS["sampler dials"], f"sampler dials {seed}"))
        for seed in range(min(part.features, self.seeds)):
            other = self.search(sampler, calls, features=True)
            add(FEATURES, other.learn(other.dials(), seed, name=f"{FEATURES} {seed}"))
        for name in part.controls:
            add(name, search.make(ARMS[name], dials))
        scores = {name: [search.tuner.test(arm, metrics) for arm in group] for name, group in arms.items()}
        return search, arms, scores


def finished(bench: Bench, sampler: str, calls: int) -> bool:
    """Whether a number of calls has its learned and its dial arms."""
    folder = bench.folder / f"{sampler}-{calls}" / "arms"
    seeds = bench.plan[sampler][calls].seeds
    wanted = [f"{name} {s}" for name, many in seeds.items() for s in range(min(many, bench.seeds))]
    wanted += ["plain", "best solver"]
    return all((folder / f"{name}.test.json").exists() for name in wanted)


def run(bench: Bench) -> dict[str, Any]:
    """The content of the result file."""
    bench.work()
    plains = {calls: bench.plain(calls) for calls in bench.counts}
    objective = {calls: scores.values[OBJECTIVE] for calls, (_, scores) in plains.items()}
    rows, paired, worths, settings = [], [], [], None
    for sampler, calls in bench.jobs():
        if not finished(bench, sampler, calls):
            print(f"{sampler}, {calls} calls: not finished, left out")
            continue
        search, arms, scores = bench.arms(sampler, calls)
        settings = search.settings
        metrics = report_metrics(settings)
        for name, group in scores.items():
            for metric in metrics:
                table = np.stack([s.values[metric.name] for s in group], 1)
                low, high = interval(table)
                rows.append({
                    "calls": calls, "sampler": sampler, "method": name, "metric": metric.name,
                    "mean": float(table.mean()), "low": low, "high": high, "seeds": len(group),
                    "numbers": _numbers(arms[name][0]), "price": arms[name][0].calls,
                })  # fmt: skip
            table = np.stack([s.values[OBJECTIVE] for s in group], 1)
            worths.append({"calls": calls, "sampler": sampler, "method": name, **_worth(table, objective)})
        for other in scores:
            if other != "learned":
                for m in metrics:
                    row = compare(
                        scores["learned"], scores[other], m.name, ("learned", other), m.optimised, "test",
                        m.higher_is_better,
                    )  # fmt: skip
                    paired.append({"calls": calls, "sampler": sampler, **asdict(row)})
    assert settings is not None
    return {
        "name": "few_steps",
        "command": "python benchmarks/few_steps.py" + (" --quick" if bench.quick else f" --seeds {bench.seeds}")
        + flag(bench.model),
        "quick": bench.quick,
        "settings": asdict(settings),
        "versions": versions(),
        "plain": [
            {"calls": calls, "solver": name, "means": scores.means()} for calls, (name, scores) in plains.items()
        ],
        "teacher": teacher_row(bench),
        "rows": rows,
        "paired": paired,
        "worth": worths,
        "carry": carried(bench),
    }


def _numbers(arm: Arm) -> int:
    """How many numbers were learned."""
    dials = {"guidance", "strength"}
    return len([name for name in arm.values if name not in dials])


def _worth(table: np.ndarray, plain: dict[int, np.ndarray]) -> dict[str, Any]:
    found = worth(table, plain)
    return {"plain_calls": found.calls, "low": found.low, "high": found.high, "capped": found.capped}


def teacher_row(bench: Bench) -> dict[str, Any]:
    """How far 50 calls of DPM++ 2M and of DDIM are from 200 of DPM++ 2M, in dB; what the judge says of the teacher."""
    path = bench.folder / "teacher.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    from rwopt.objectives.pixel import psnr

    search = bench.search("dpmpp_2m", 3 if not bench.quick else 2)
    splits, model = search.experiment.splits, search.experiment.model
    task, base = splits.task("test"), search.experiment.base
    assert task.teacher is not None
    batch = task.describe(task.teacher)
    objectives = search.experiment.objectives
    out = {name: float(objectives[name](batch).mean()) for name in ("judge.accuracy", "judge.realism")}
    few = splits.prepare(splits.cases("test")[:32])
    far = model.decode(teacher_latents(few, base, course_by_rule(model, 200 if not bench.quick else 20, "dpmpp_2m")))
    for sampler in ("dpmpp_2m", "ddim"):
        near = model.decode(teacher_latents(few, base, course_by_rule(model, 50 if not bench.quick else 8, sampler)))
        out[f"psnr of 50 {sampler} to 200"] = float(psnr(near, far).mean())
    write_text(path, json.dumps(out))
    return out


def carried(bench: Bench) -> list[dict[str, Any]]:
    """One file, other uses: other numbers of calls, another sampler, another guidance; mean dB to the teacher there."""
    path = bench.folder / "carry.json"
    if path.exists():
        return list(json.loads(path.read_text()))
    sampler, calls = "dpmpp_2m", 2 if bench.quick else 3
    source = bench.search(sampler, calls)
    table = source.experiment.model.table
    out: list[dict[str, Any]] = []

    def psnr(search: Search, schedule: Schedule | None) -> float:
        return search.experiment.value("test", search.experiment.base, schedule)

    base = source.experiment.base.guidance

    def small(sampler: str, calls: int, guidance: float = base) -> Search:
        words = [*choice(bench.model), *(SMALL if bench.quick else FULL), f"task.steps={calls}",
                 f"task.sampler={sampler}", "track.wandb=off",
                 f"dials.guidance={guidance}", "task.test=8" if bench.quick else "task.test=48"]  # fmt: skip
        name = f"carry-{sampler}-{calls}-{guidance:g}"
        return Search(config.load(RECIPE, words), bench.folder / name, Silent(), bench.folder / "teacher")

    def add(use: str, search: Search, schedule: Schedule) -> None:
        ones = Schedule.constant(schedule.sites, schedule.sigmas, steps=schedule.steps)
        best = search.tuner.best_of("best solver", search.solvers()).schedule
        forms = {"plain": None, "best plain sampler": best, "weights alone": replace(schedule, steps=None),
                 "dials alone": ones, "whole file": schedule}  # fmt: skip
        out.append({"use": use, **{name: psnr(search, form) for name, form in forms.items()}})

    learned = Arm.load(source.folder / "arms" / "learned 0.json").schedule
    assert learned is not None
    assert learned.steps is not None
    for other in sorted({calls, 2, 3, 4, 5, 6}):
        steps = learned.steps.resampled(other, table)
        add(f"{other} calls", small(sampler, other), replace(learned, steps=steps))
    for other in ("ddim", "uni_pc"):
        steps = replace(learned.steps, sampler=other)
        add(f"sampler {other}", small(other, calls), replace(learned, steps=steps))
    ddim = bench.folder / f"ddim-{calls}" / "arms" / "learned 0.json"
    if ddim.exists():
        schedule = Arm.load(ddim).schedule
        assert schedule is not None
        assert schedule.steps is not None
        for other in ("dpmpp_2m", "uni_pc"):
            steps = replace(schedule.steps, sampler=other)
            add(f"learned with ddim, used with {other}", small(other, calls), replace(schedule, steps=steps))
    for guidance in (2.0, 7.0):
        scales = tuple(max(1.01, g * guidance / base) for g in learned.steps.guidance)
        steps = replace(learned.steps, guidance=scales)
        add(f"guidance {guidance:g}", small(sampler, calls, guidance), replace(learned, steps=steps))
    write_text(path, json.dumps(out))
    return out


def grid(bench: Bench, path: Path, rows: int = 5) -> None:
    """Pictures side by side: plain and learned at 2 and 3 calls, plain at 8, the teacher."""
    from rwopt.report import image_grid

    columns: dict[str, list[np.ndarray]] = {}

    def add(title: str, images: torch.Tensor) -> None:
        columns[title] = to_pictures(images)

    for calls in (2, 3):
        search = bench.search("dpmpp_2m", calls)
        cases = search.experiment.splits.cases("test")
        task, base = search.experiment.splits.prepare(cases[7 :: len(cases) // rows][:rows]), search.experiment.base
        for name, title in (("best solver", f"{calls} calls, best plain"), ("learned 0", f"{calls} calls, learned")):
            arm = Arm.load(search.folder / "arms" / f"{name}.json")
            add(title, task.images(arm.dials, arm.schedule))
    eight = bench.search("dpmpp_2m", 8)
    add("8 calls, best plain", task.images(base, eight.tuner.best_of("best of 8", eight.solvers()).schedule))
    assert task.teacher is not None
    add("50 calls, plain", task.teacher)
    image_grid(columns, path, [case.caption for case in task.cases])


def main() -> None:
    quick = "some minutes: few cases and updates, own file"
    args = command_line("few_steps", __doc__, quick, 5, "at most so many of each arm", models=True)
    bench = Bench(args.folder, args.quick, args.seeds, args.model)
    result = result_of(args, bench, run)
    if result is None:
        return
    print(markdown(result), carry_markdown(result), short(result), sep="\n\n")
    if not args.quick:
        docs, end = ROOT.parent / "docs", suffix(args.model)
        into(page(args.model, "few-steps.md"), f"few_steps{end}", markdown(result))
        into(page(args.model, "few-steps.md"), f"carry{end}", carry_markdown(result))
        into(ROOT.parent / "README.md", f"few-steps{end}", short(result))
        curve(result, docs / f"few-steps-curve{end}.png")
        if not args.table:
            grid(bench, docs / f"few-steps{end}.png")


if __name__ == "__main__":
    main()
