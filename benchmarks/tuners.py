"""Every tuner on the embedded model, editing and generation: validated score against U-Net calls.

`python benchmarks/tuners.py [--quick] [--seeds 5] [--trials 60] [--tasks editing generation] [key=value ...]`. All
search the same box, the recipe's weights at the recipe's dials, on the same train cases; "warm" ones score the plain
model and the probe's start first, "cold" ones know nothing. A run ends when it has spent as many U-Net calls as
`trials` scorings cost; a gradient's updates count forward, re-run and backward passes. At each new best on train
cases the candidate is scored on validation cases: that is `validated`, which no tuner sees. Finished runs are kept in
the run folder, so a killed benchmark goes on.

Writes `benchmarks/results/tuners.json`: rows (tuner, task, seed, calls, validated), one for each new best; summary
(tuner, task, calls_to_90): calls, median over seeds, until 90 % of the best improvement that any tuner reached on
average; null if it did not get there; `default`, the tuner that gets there first (sum over tasks). And the plot
`docs/tuners.png`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rwopt import baselines, config
from rwopt.backprop import Path as Way
from rwopt.cli import _quiet
from rwopt.evaluation import OBJECTIVE
from rwopt.files import write_text
from rwopt.progress import Silent
from rwopt.search import Search, versions
from rwopt.tuners import Parameter, Tuner
from rwopt.tuners.gradient import GradientOptions, GradientTuner, Problem
from rwopt.tuners.optuna import OptunaTuner
from rwopt.tuners.spsa import SpsaTuner
from rwopt.weights import WeightFunction

ROOT = Path(__file__).resolve().parent
QUICK = ["task.train=4", "task.validation=4", "task.steps=2", "probe.cases=2", "weights.knots=2"]
TUNERS = ("random", "tpe cold", "tpe", "gp", "cmaes", "spsa",
          "gradient full", "gradient truncated", "gradient detached")  # fmt: skip
Starts = dict[str, dict[str, float]]


@dataclass
class Race:
    """One task's search problem, the same for all tuners."""

    search: Search
    function: WeightFunction
    space: list[Parameter]
    starts: Starts
    trials: int

    @classmethod
    def prepare(cls, recipe: str, overrides: Sequence[str], folder: Path, trials: int) -> Race:
        settings = config.load(recipe, [*overrides, "track.wandb=off"])
        search = Search(settings, folder, Silent())
        function = search.functions()[0]
        start = function.fit(
            baselines.ranked_schedule(search.importance(), settings.probe.low, settings.probe.high)
        )
        radius = settings.weights.radius
        points = {"plain": np.zeros(function.dimension), "probe": start}
        return cls(
            search, function, [Parameter(n, -radius, radius) for n in function.names],
            {k: dict(zip(function.names, v.tolist(), strict=True)) for k, v in points.items()}, trials,
        )  # fmt: skip

    def score(self, split: str, values: dict[str, float]) -> float:
        theta = np.array([values[n] for n in self.function.names])
        return self.search.shop.value(split, self.search.shop.base, self.function.schedule(theta))

    def make(self, name: str, seed: int, folder: Path) -> Tuner:
        shop, study = self.search.shop, f"{name} {seed}"
        if name.startswith("gradient"):
            mode = name.split()[1]
            problem = Problem(self.function, shop.task("train"), shop.composites[OBJECTIVE], shop.base)
            options = GradientOptions(Way(mode, last=max(1, problem.steps // 3)), updates=2, batch=8, accumulate=2)
            return GradientTuner(study, self.space, problem, folder, seed, self.starts, "bench", options)
        if name == "spsa":
            return SpsaTuner(study, self.space, folder, self.trials, seed, self.starts, "bench")
        cold = name in ("random", "tpe cold")
        return OptunaTuner(
            study, self.space, f"sqlite:///{(folder / 'study.db').absolute()}", self.trials, seed,
            name.split()[0], {} if cold else self.starts, "bench",
        )  # fmt: skip

    def run(self, name: str, seed: int, folder: Path) -> list[tuple[int, float]]:
        """(calls spent, validated score) at each new best on train cases, and at the end."""
        path = folder / f"{name} {seed}.result.json"
        if path.exists():
            return [(int(c), float(v)) for c, v in json.loads(path.read_text())]
        folder.mkdir(parents=True, exist_ok=True)
        shop, tuner = self.search.shop, self.make(name, seed, folder)
        price = shop.task("train").calls * -(-len(shop.task("train")) // shop.task("train").batch)
        spent = sum(t.calls for t in tuner.trials())
        for _ in range(10 * self.trials):  # candidates without a finite score do not count as spent
            if spent >= self.trials * price:
                break
            candidate = tuner.propose()
            tuner.observe(candidate, self.score("train", dict(candidate.values)), price)
            spent = sum(t.calls for t in tuner.trials())
        curve: list[tuple[int, float]] = []
        calls, best = 0, -np.inf
        for trial in tuner.trials():
            calls += trial.calls
            if trial.score > best:
                best = trial.score
                curve.append((calls, self.score("validation", dict(trial.candidate.values))))
        curve.append((calls, curve[-1][1]))
        write_text(path, json.dumps(curve))
        return curve


def summarise(rows: list[dict[str, Any]], plain: dict[str, float]) -> list[dict[str, Any]]:
    """calls_to_90 of each tuner and task."""
    out = []
    for task in plain:
        runs: dict[str, dict[int, list[tuple[int, float]]]] = {}
        for r in rows:
            if r["task"] == task:
                runs.setdefault(r["tuner"], {}).setdefault(r["seed"], []).append((r["calls"], r["validated"]))
        top = max(np.mean([curve[-1][1] for curve in seeds.values()]) for seeds in runs.values())
        goal = plain[task] + 0.9 * (top - plain[task])
        for tuner, seeds in runs.items():
            calls = [next((c for c, v in curve if v >= goal), np.inf) for curve in seeds.values()]
            median = float(np.median(calls))
            out.append({
                "tuner": tuner, "task": task, "calls_to_90": median if np.isfinite(median) else None,
                "reached": sum(np.isfinite(calls).tolist()), "seeds": len(calls), "plain": plain[task], "goal": goal,
                "final": float(np.mean([curve[-1][1] for curve in seeds.values()])),
            })  # fmt: skip
    return out


def choose(summary: list[dict[str, Any]]) -> str:
    """Who reaches 90 % first, summed over tasks; if nobody does in all of them, who ends highest."""
    names = list(dict.fromkeys(s["tuner"] for s in summary))
    mine: Callable[[str], list[dict[str, Any]]] = lambda n: [s for s in summary if s["tuner"] == n]  # noqa: E731
    there = [n for n in names if all(s["calls_to_90"] is not None for s in mine(n))]
    if there:
        return min(there, key=lambda n: sum(s["calls_to_90"] for s in mine(n)))
    return max(names, key=lambda n: sum(s["final"] - s["plain"] for s in mine(n)))


def plot(rows: list[dict[str, Any]], plain: dict[str, float], path: Path) -> None:
    """Mean over seeds of the validated score of the best so far, against calls; one panel a task."""
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure((5.5 * len(plain), 4), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(plain), squeeze=False)[0], plain, strict=True):
        for name in dict.fromkeys(r["tuner"] for r in rows):
            curves: dict[int, list[tuple[int, float]]] = {}
            for r in rows:
                if (r["tuner"], r["task"]) == (name, task):
                    curves.setdefault(r["seed"], []).append((r["calls"], r["validated"]))
            at = sorted({c for curve in curves.values() for c, _ in curve})
            best = [[next((v for c, v in reversed(k) if c <= x), plain[task]) for k in curves.values()] for x in at]
            mean = [float(np.mean(b)) for b in best]
            axes.step(at, mean, where="post", label=name)
        axes.axhline(plain[task], color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=task, xlabel="U-Net calls", ylabel="validated objective", xscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: one task and seed, 4 scorings")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--tasks", nargs="+", default=["editing", "generation"])
    parser.add_argument("--tuners", nargs="+", default=list(TUNERS), choices=TUNERS)
    parser.add_argument("--folder", type=Path, help="run folder (default lightning_logs/bench-tuners)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    name = "tuners-quick" if args.quick else "tuners"
    folder = args.folder or ROOT.parent / "lightning_logs" / f"bench-{name}"
    if args.quick:
        args.seeds, args.trials, args.tasks, args.overrides = 1, 4, ["editing"], [*QUICK, *args.overrides]
        args.tuners = [t for t in args.tuners if t not in ("gp", "cmaes")]  # their first moves are random anyway
    _quiet()
    rows: list[dict[str, Any]] = []
    plain: dict[str, float] = {}
    for task in args.tasks:
        race = Race.prepare(task, args.overrides, folder / task, args.trials)
        plain[task] = race.score("validation", race.starts["plain"])
        for tuner in args.tuners:
            for seed in range(args.seeds):
                curve = race.run(tuner, seed, folder / task / "runs")
                rows += [{"tuner": tuner, "task": task, "seed": seed, "calls": c, "validated": v} for c, v in curve]
                print(f"{task:10} {tuner:20} seed {seed}: {curve[-1][1]:.4f} after {curve[-1][0]} calls", flush=True)
    summary = summarise(rows, plain)
    result = {
        "name": "tuners",
        "command": "python benchmarks/tuners.py" + (" --quick" if args.quick else f" --seeds {args.seeds}"),
        "quick": args.quick, "trials": args.trials, "versions": versions(), "rows": rows, "summary": summary,
        "default": choose(summary),
    }  # fmt: skip
    write_text(ROOT / "results" / f"{name}.json", json.dumps(result, indent=1) + "\n")
    if not args.quick:
        plot(rows, plain, ROOT.parent / "docs" / "tuners.png")
    for s in sorted(summary, key=lambda s: (s["task"], s["calls_to_90"] or np.inf)):
        print(f"{s['task']:10} {s['tuner']:20} calls to 90 %: {s['calls_to_90']}  final {s['final']:.4f}")
    print("default:", result["default"])


if __name__ == "__main__":
    main()
