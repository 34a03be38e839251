"""Every tuner on the embedded model, editing and generation: validated score against U-Net calls.

`python benchmarks/tuners.py [--quick] [--seeds 5] [--tasks editing generation] [key=value ...]`. All raise the recipe's
objective at the recipe's dials, on the same few train cases; a call is one U-Net call on all of them. Boxes: the
recipe's table, a number for each branch at each step, or 9 numbers (kind of branch x 3 noise levels). "Cold" ones know
nothing; all others score the plain model and the ablation probe's start first, and that probe's price counts. Budgets
differ, as what is asked is how soon a tuner gets there: `trials` scorings, twice as many for gradients, three times
for the cold TPE; a gradient's updates count forward, re-run and backward passes. At each new best on train cases the
candidate is scored on validation cases: that is `validated`, which no tuner sees.

Then the starts: what TPE and the gradient reach from each, alone.

Finished runs are kept in the run folder, so a killed benchmark goes on, and two processes may take a task each.
Writes `benchmarks/results/tuners.json`: rows (tuner, task, seed, calls, validated), one for each new best; summary
(tuner, task, calls_to_90): calls, median over seeds, until a run has 90 % of the best improvement that any tuner
reached on average, and keeps it to its end; null if it did not get there within its `budget`; `default`, who gets there
first (sum over tasks; if nobody does, who gains most), and in each box `without_gradient`; starts. And the plot
`docs/tuners.png`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from comparison import ROOT, into

from rwopt import config
from rwopt.cli.screen import quiet
from rwopt.files import write_text
from rwopt.progress import Silent
from rwopt.search.arms import ARMS, LEARNED
from rwopt.search.evaluation import interval
from rwopt.search.identity import versions
from rwopt.search.search import Search
from rwopt.tuners import Parameter, Tuner
from rwopt.tuners.gradient import GradientTuner
from rwopt.tuners.options import GradientOptions
from rwopt.tuners.optuna import OptunaTuner
from rwopt.tuners.problem import Problem
from rwopt.tuners.spsa import SpsaTuner

STEPS = ["task.steps=4", "weights.knots=4"]
FULL = [*STEPS, "task.train=16", "task.batch=16", "task.validation=48", "probe.cases=16"]
QUICK = ["task.train=4", "task.validation=4", "task.steps=2", "probe.cases=2", "weights.knots=2"]
NINE = ["weights.group_by=kind", "weights.knots=3"]
STARTS = ("plain", "scores", "gradient", "gauss_newton")
WARM = ("plain", "scores")


@dataclass(frozen=True)
class Entry:
    """Who takes part. kind: an Optuna sampler, spsa, or a mode of the gradient; budget: in multiples of `trials`."""

    kind: str
    starts: tuple[str, ...] = WARM
    nine: bool = False
    budget: float = 1.0

    @property
    def gradient(self) -> bool:
        return self.kind in ("full", "truncated", "detached")


TUNERS = {
    "random, cold": Entry("random", ()),
    "tpe, cold": Entry("tpe", (), budget=3),
    **{kind: Entry(kind) for kind in ("tpe", "gp", "cmaes", "nsga2", "nsga3", "spsa")},
    **{f"{kind}, 9 numbers": Entry(kind, nine=True) for kind in ("tpe", "gp", "cmaes", "spsa")},
    **{f"gradient {mode}": Entry(mode, budget=2) for mode in ("full", "truncated", "detached")},
}
FROM = {
    **{f"gradient full from {start}": Entry("full", (start,)) for start in STARTS},
    **{f"tpe from {start}": Entry("tpe", (start,), budget=0.5) for start in STARTS},
}


@dataclass
class Race:
    """One task's search problem in one box, the same for all tuners."""

    search: Search
    trials: int
    _starts: dict[str, tuple[dict[str, float], int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.experiment = self.search.experiment
        self.function = self.search.function(ARMS[LEARNED], self.experiment.base)
        radius = self.search.settings.weights.radius
        self.space = [Parameter(n, -radius, radius) for n in self.function.names]
        task = self.experiment.splits.task("train")
        self.price = task.calls * -(-len(task) // task.batch)

    def start(self, name: str) -> tuple[dict[str, float], int]:
        """A start by name, as values of the box, and what its probes cost."""
        if name not in self._starts:
            theta, calls = np.zeros(self.function.dimension), 0
            if name != "plain":
                theta, calls = self.search.probing.start(self.function, name)
            self._starts[name] = dict(zip(self.function.names, theta.tolist(), strict=True)), calls
        return self._starts[name]

    def score(self, split: str, values: dict[str, float]) -> float:
        theta = np.array([values[n] for n in self.function.names])
        return self.experiment.value(split, self.experiment.base, self.function.schedule(theta))

    def make(self, name: str, entry: Entry, seed: int, folder: Path) -> Tuner:
        study, trials = f"{name} {seed}", round(self.trials * entry.budget)
        starts = {s: self.start(s)[0] for s in entry.starts}
        if entry.gradient:
            splits, draws = self.experiment.splits, self.search.settings.gradient.draws
            task = splits.prepare(splits.cases("train"), draws)
            problem = Problem(self.function, task, self.experiment.objective, self.experiment.base)
            options = GradientOptions(entry.kind, max(1, problem.steps // 2), updates=2, batch=task.batch)
            return GradientTuner(study, self.space, problem, folder, seed, starts, "bench", options)
        if entry.kind == "spsa":
            return SpsaTuner(study, self.space, folder, trials, seed, starts, "bench")
        storage = f"sqlite:///{(folder / f'{study}.db').absolute()}"
        return OptunaTuner(study, self.space, storage, trials, seed, entry.kind, starts, "bench")

    def run(self, name: str, entry: Entry, seed: int, folder: Path) -> list[tuple[int, float]]:
        """(calls spent, validated score) at each new best on train cases, and at the end."""
        path = folder / f"{name} {seed}.result.json"
        if path.exists():
            return [(int(c), float(v)) for c, v in json.loads(path.read_text())]
        folder.mkdir(parents=True, exist_ok=True)
        tuner, budget = self.make(name, entry, seed, folder), self.trials * entry.budget * self.price
        opening = sum(self.start(s)[1] for s in entry.starts)
        spent = sum(t.calls for t in tuner.trials())
        for _ in range(10 * self.trials):  # candidates without a finite score do not count as spent
            if spent >= budget:
                break
            candidate = tuner.propose()
            tuner.observe(candidate, self.score("train", dict(candidate.values)), self.price)
            spent = sum(t.calls for t in tuner.trials())
        curve: list[tuple[int, float]] = []
        calls, best = opening, -np.inf
        for trial in tuner.trials():
            calls += trial.calls
            if trial.score > best:
                best = trial.score
                curve.append((calls, self.score("validation", dict(trial.candidate.values))))
        curve.append((calls, curve[-1][1]))
        write_text(path, json.dumps(curve))
        return curve


Rows = list[dict[str, Any]]


def curves_of(rows: Rows, task: str) -> dict[str, list[list[tuple[int, float]]]]:
    """{tuner: one curve a seed}."""
    out: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for r in rows:
        if r["task"] == task:
            out.setdefault(r["tuner"], {}).setdefault(r["seed"], []).append((r["calls"], r["validated"]))
    return {name: list(seeds.values()) for name, seeds in out.items()}


def _stays(curve: list[tuple[int, float]], goal: float) -> float:
    """Calls from which on a run's validated score is `goal` or more: a lucky moment does not count."""
    below = [i for i, (_, value) in enumerate(curve) if value < goal]
    first = below[-1] + 1 if below else 0
    return curve[first][0] if first < len(curve) else np.inf


def summarise(rows: Rows, plain: dict[str, float]) -> Rows:
    """calls_to_90 of each tuner and task; what it ends with, minus the plain model, with an interval over seeds."""
    out = []
    for task in plain:
        runs = curves_of(rows, task)
        top = max(np.mean([curve[-1][1] for curve in seeds]) for seeds in runs.values())
        goal = plain[task] + 0.9 * (top - plain[task])
        for tuner, seeds in runs.items():
            calls = [_stays(curve, goal) for curve in seeds]
            gains = np.array([curve[-1][1] - plain[task] for curve in seeds])
            low, high = interval(gains) if len(gains) > 1 else (None, None)
            median = float(np.median(calls))
            out.append({
                "tuner": tuner, "task": task, "calls_to_90": median if np.isfinite(median) else None,
                "reached": int(np.isfinite(calls).sum()), "seeds": len(calls), "plain": plain[task], "goal": goal,
                "gain": float(gains.mean()), "low": low, "high": high,
                "budget": float(np.median([curve[-1][0] for curve in seeds])),
            })  # fmt: skip
    return out


def choose(summary: Rows) -> str:
    """Who reaches 90 % first, summed over tasks; if nobody does in all of them, who ends highest."""
    names = list(dict.fromkeys(s["tuner"] for s in summary))

    def mine(name: str) -> Rows:
        return [s for s in summary if s["tuner"] == name]

    there = [n for n in names if all(s["calls_to_90"] is not None for s in mine(n))]
    if there:
        return min(there, key=lambda n: sum(s["calls_to_90"] for s in mine(n)))
    return max(names, key=lambda n: sum(s["gain"] for s in mine(n)))


def plot(rows: Rows, plain: dict[str, float], path: Path) -> None:
    """Mean over seeds of the validated gain of the best so far, against calls; one panel a task."""
    from matplotlib.figure import Figure

    figure = Figure((6 * len(plain), 4.6), layout="constrained")
    names = list(dict.fromkeys(r["tuner"] for r in rows))
    families = sorted({n.partition(",")[0] for n in names} - {"random"})
    colours = {f: f"C{i + (i > 6)}" for i, f in enumerate(families)} | {"random": "grey"}  # C7 is grey
    panels = figure.subplots(1, len(plain), squeeze=False)[0]
    for axes, task in zip(panels, plain, strict=True):
        for name, curves in curves_of(rows, task).items():
            # until the first run ends; a run counts as plain before its first score
            at = [c for c in sorted({c for curve in curves for c, _ in curve}) if c <= min(k[-1][0] for k in curves)]
            mean = [np.mean([next((v for c, v in reversed(k) if c <= x), plain[task]) for k in curves]) for x in at]
            family, _, kind = name.partition(", ")
            axes.step(
                at, np.array(mean) - plain[task], where="post", label=name, color=colours[family],
                linestyle={"": "-", "9 numbers": "--", "cold": ":"}[kind],
                linewidth=2.4 if "gradient" in name else 1.4,
            )  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set(title=task, xlabel="U-Net calls", ylabel="validated gain over the plain model")
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.015))
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=8, frameon=False)
    write = path.with_name(f".{path.name}")
    figure.savefig(write, dpi=150, format="png")
    write.replace(path)


def markdown(result: dict[str, Any]) -> str:
    """Two tables for the docs: tuners, then starts."""
    tasks = list(dict.fromkeys(s["task"] for s in result["summary"]))

    def table(rows: Rows, first: str, reached: bool) -> list[str]:
        head = [first] + [f"{t}: {what}" for t in tasks for what in (["calls to 90 %"] * reached + ["gain", "calls"])]
        lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        names = list(dict.fromkeys(s["tuner"] for s in rows))
        for name in names:
            cells = [name]
            for task in tasks:
                s = next(s for s in rows if (s["tuner"], s["task"]) == (name, task))
                if reached:
                    to = "not within" if s["calls_to_90"] is None else f"{s['calls_to_90']:.0f}"
                    cells.append(f"{to} ({s['reached']}/{s['seeds']})")
                band = "" if s["low"] is None else f" [{s['low']:+.4f}, {s['high']:+.4f}]"
                cells += [f"{s['gain']:+.4f}{band}", f"{s['budget']:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
        return lines

    first = result["summary"]
    return "\n".join([*table(first, "tuner", True), "", *table(result["starts"], "start", False), "",
                      f"Gain: validated objective minus the plain model's, mean and 95 % interval over "
                      f"{first[0]['seeds']} seeds ({result['starts'][0]['seeds']} for starts). "
                      f"`{result['command']}`"])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: one task and seed, 4 scorings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--tasks", nargs="+", default=["editing", "generation"])
    parser.add_argument("--tuners", nargs="+", default=list(TUNERS), choices=TUNERS)
    parser.add_argument("--only-starts", action="store_true", help="their rows in the result file are replaced")
    parser.add_argument("--table", action="store_true", help="only make the docs' tables and plot from the result file")
    parser.add_argument("--folder", type=Path, help="run folder (default lightning_logs/bench-tuners)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    name = "tuners-quick" if args.quick else "tuners"
    file = ROOT / "results" / f"{name}.json"
    if args.table:
        publish(json.loads(file.read_text()))
        return
    folder = args.folder or ROOT.parent / "lightning_logs" / f"bench-{name}"
    given = [*(QUICK if args.quick else FULL), *args.overrides, "track.wandb=off"]
    entries, starts = {n: TUNERS[n] for n in args.tuners}, dict(FROM)
    if args.only_starts:
        entries = {}
    if args.quick:
        args.seeds, args.trials, args.tasks = 1, 4, ["editing"]
        entries = {n: e for n, e in entries.items() if e.kind not in ("gp", "cmaes")}  # their first moves are random
        starts = {n: e for n, e in starts.items() if e.gradient}
    quiet()
    rows: Rows = []
    begun: Rows = []
    plain: dict[str, float] = {}
    for task in args.tasks:
        races = {
            nine: Race(Search(config.load(task, [*given, *NINE * nine]), folder / task / box, Silent()), args.trials)
            for nine, box in ((False, "table"), (True, "nine"))
        }
        plain[task] = races[False].score("validation", races[False].start("plain")[0])
        for group, into_rows in ((entries, rows), (starts, begun)):
            for tuner, entry in group.items():
                for seed in range(args.seeds):
                    curve = races[entry.nine].run(tuner, entry, seed, folder / task / "runs")
                    about = {"tuner": tuner, "task": task, "seed": seed}
                    into_rows += [{**about, "calls": c, "validated": v} for c, v in curve]
                    print(f"{task:10} {tuner:28} seed {seed}: {curve[-1][1] - plain[task]:+.4f} "
                          f"after {curve[-1][0]} calls", flush=True)  # fmt: skip
    started = {"start_rows": begun, "starts": summarise(begun, plain)}
    if args.only_starts:
        result = json.loads(file.read_text()) | started
    else:
        summary = summarise(rows, plain)
        result = {
            "name": "tuners", "command": shlex.join(["python", "benchmarks/tuners.py", *sys.argv[1:]]),
            "quick": args.quick, "trials": args.trials, "settings": given, "versions": versions(), "rows": rows,
            "summary": summary, "default": choose(summary),
            "without_gradient": {
                "table": choose([s for s in summary if "gradient" not in s["tuner"] and "9 numbers" not in s["tuner"]]),
                "9 numbers": choose([s for s in summary if "9 numbers" in s["tuner"]]),
            },
            **started,
        }  # fmt: skip
    write_text(file, json.dumps(result, indent=1) + "\n")
    if args.quick:
        print(markdown(result))
    else:
        publish(result)
    print("default:", result["default"], "; without a gradient:", result["without_gradient"])


def publish(result: dict[str, Any]) -> None:
    """The docs' tables and plot."""
    docs = ROOT.parent / "docs"
    print(markdown(result))
    into(docs / "tuners.md", "tuners", markdown(result))
    plain = {s["task"]: s["plain"] for s in result["summary"]}
    plot(result["rows"], plain, docs / "tuners.png")


if __name__ == "__main__":
    main()
