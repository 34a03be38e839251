"""Reward hacking on purpose: one weak reward raised for long, with a guard and without: `python benchmarks/hacking.py`.

The reward is the scorer's realism alone, and weights may act on every kind of site. What no search sees (the judge) and
noise in flat areas say what becomes of the pictures; the guard is on the noise. `--quick` under a minute, own file.
Results: `benchmarks/results/hacking.json`, the table between the markers of `docs/objectives.md`, and
`docs/objectives-hacking.png`. Arms are kept in the run folder, so a killed benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from comparison import into

from rwopt import config
from rwopt.cli.screen import quiet
from rwopt.files import write_text
from rwopt.progress import Silent
from rwopt.report import image_grid
from rwopt.search.arms import Arm
from rwopt.search.evaluation import compare
from rwopt.search.guard import sentence
from rwopt.search.identity import versions
from rwopt.search.search import Search
from rwopt.tasks.pictures import to_pictures

ROOT = Path(__file__).resolve().parent
RECIPE = """
task: {name: generation, steps: 4, train: 48, validation: 48, test: 128}
weights: {kinds: [self, cross, ff, resnet, skip], group_by: site, knots: 4}
probe: {start: none}
objective:
  terms: {scorer.realism: 1.0}
  report: {scorer.realism: true, judge.realism: false, judge.accuracy: false, judge.identity: false,
           quality.flat_noise: false}
tuner: {name: gradient, dial_trials: 0, top_k: 1}
gradient: {updates: 8, batch: 24}
arms: [plain, learned]
"""
ROUNDS = (1, 3, 8)
GUARD = "tuner.guard={quality.flat_noise: 0.1}"
SMALL = ["task.train=8", "task.validation=8", "task.test=8", "gradient.updates=1", "gradient.batch=4"]


def run(folder: Path, quick: bool) -> tuple[dict[str, Any], dict[str, list[Any]], list[str]]:
    """The content of the result file; pictures of some test cases by arm, and their captions."""
    small = SMALL if quick else []
    rounds = (1, 2) if quick else ROUNDS
    plans = {f"{n} rounds" if n > 1 else "1 round": [f"tuner.trials={n + 1}"] for n in rounds}
    plans[f"{rounds[-1]} rounds, guarded"] = [f"tuner.trials={rounds[-1] + 1}", GUARD]
    arms: dict[str, tuple[Search, Arm]] = {}
    for name, words in plans.items():
        settings = config.parse(RECIPE, "benchmarks/hacking.py", [*small, *words, "track.wandb=off"])
        search = Search(settings, folder / name, Silent())
        arms[name] = search, search.learn(search.dials(), 0)
    search, _ = next(iter(arms.values()))
    arms = {"plain": (search, search.tuner.fixed("plain")), **arms}
    metrics = list(search.settings.objective.report)
    specs = {m: search.experiment.objectives.spec(m).higher_is_better for m in metrics}
    scores = {name: where.tuner.test(arm, metrics) for name, (where, arm) in arms.items()}
    rows = []
    for name in arms:
        for metric in metrics:
            pair = compare([scores[name]], [scores["plain"]], metric, (name, "plain"), metric.startswith("scorer"),
                           "test", specs[metric])  # fmt: skip
            rows.append({"arm": name, "metric": metric, "mean": scores[name].mean(metric), "minus_plain": pair.mean,
                         "low": pair.low, "high": pair.high})  # fmt: skip
    guarded = list(arms)[-1]
    said = sentence(guarded, arms[guarded][1].choice["guard"])
    task = search.experiment.splits.prepare(search.experiment.splits.cases("test")[:8])
    shown = ("plain", f"{rounds[-1]} rounds", guarded)
    pictures = {name: to_pictures(task.images(arms[name][1].dials, arms[name][1].schedule)) for name in shown}
    result = {"name": "hacking", "command": "python benchmarks/hacking.py" + " --quick" * quick, "quick": quick,
              "cases": search.settings.task.test, "versions": versions(), "rows": rows, "guard": said}  # fmt: skip
    return result, pictures, [case.caption for case in task.cases]


def markdown(result: dict[str, Any]) -> str:
    """The table of `docs/objectives.md`."""
    metrics = list(dict.fromkeys(row["metric"] for row in result["rows"]))
    table = {(row["arm"], row["metric"]): row for row in result["rows"]}
    lines = ["| arm | " + " | ".join(metrics) + " |", "|---|" + "---|" * len(metrics)]
    for arm in dict.fromkeys(row["arm"] for row in result["rows"]):
        cells = []
        for metric in metrics:
            row = table[arm, metric]
            interval = "" if arm == "plain" else f" [{row['low']:+.3f}, {row['high']:+.3f}]"
            cells.append(f"{row['mean']:.3f}{interval}")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    about = f"{result['cases']} test cases, one seed; in brackets the interval of the difference to plain. "
    rounds = f"A round is 8 updates of 24 pictures. `{result['command']}`"
    return "\n".join([*lines, "", about + rounds, "", result["guard"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="run folder (default lightning_logs/bench-hacking)")
    args = parser.parse_args()
    quiet()
    name = "hacking-quick" if args.quick else "hacking"
    result, pictures, captions = run(args.folder or ROOT.parent / "lightning_logs" / f"bench-{name}", args.quick)
    write_text(ROOT / "results" / f"{name}.json", json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    if not args.quick:
        into(ROOT.parent / "docs" / "objectives.md", "hacking", markdown(result))
        image_grid(pictures, ROOT.parent / "docs" / "objectives-hacking.png", captions)


if __name__ == "__main__":
    main()
