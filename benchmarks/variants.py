"""Which weights are worth learning: groups of sites, knots, mode and bounds, each by the same gradient steps.

`python benchmarks/variants.py [--quick] [--recipes editing generation] [--variants 0 2 6]`. All variants are learned on
the train cases at the recipe's own dials, from the plain model, and scored on the validation cases against the plain
model at the same dials: a choice among them must not see the test cases. Finished variants are kept in the run folder.

Writes `benchmarks/results/variants.json` (rows: task, variant, numbers, calls, metric, mean, low, high, win_rate, p;
differences to the plain model) and the tables in `docs/tuners.md`. One recipe alone replaces its rows.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison import ROOT, publish

from rwopt import config
from rwopt.cli.screen import quiet
from rwopt.progress import Bar
from rwopt.search.arms import ARMS, LEARNED
from rwopt.search.evaluation import HELD_OUT, OBJECTIVE, compare
from rwopt.search.identity import versions
from rwopt.search.search import Search

VARIANTS: dict[str, list[str]] = {
    "7 transformers, mode output": ["weights.kinds=[transformer]", "weights.mode=output"],
    "7 transformers": ["weights.kinds=[transformer]"],
    "3 kinds of branch": ["weights.group_by=kind"],
    "3 stages x 3 kinds": ["weights.group_by=stage_kind"],
    "21 branches, constant": ["weights.knots=1"],
    "21 branches, 2 knots": ["weights.knots=2"],
    "21 branches (the recipe)": [],
    "21 branches, rank 1": ["weights.rank=1"],
    "21 branches, rank 2": ["weights.rank=2"],
    "21 branches, half the radius": ["weights.radius=0.4"],
    "21 branches, twice the radius": ["weights.radius=1.6"],
    "branches, resnets and skips": ["weights.kinds=[self,cross,ff,resnet,skip]"],
    "21 branches, three times the steps": ["gradient.updates=30"],
    "21 branches, detached gradient": ["gradient.mode=detached"],
}
METRICS = {
    "editing": [OBJECTIVE, HELD_OUT, "judge.success_accuracy", "judge.realism", "truth.psnr"],
    "generation": [OBJECTIVE, HELD_OUT, "judge.accuracy", "judge.realism", "judge.identity"],
}
QUICK = ["task.train=4", "task.validation=6", "task.steps=2", "gradient.batch=4", "gradient.updates=1",
         "tuner.trials=3"]  # fmt: skip


def rows_of(
    recipe: str, overrides: Sequence[str], folder: Path, bar: Bar, names: Sequence[str]
) -> list[dict[str, Any]]:
    """All variants on one recipe."""
    metrics, rows = METRICS[recipe], []
    for name in names:
        settings = config.load(recipe, [*overrides, *VARIANTS[name], "track.wandb=off"])
        search = Search(settings, folder / name.replace(" ", "-"), bar)
        tuner, base = search.tuner, search.experiment.base
        function = search.function(ARMS[LEARNED], base)
        plain = tuner.fixed("plain")
        learned = tuner.tune_weights(name, function, base, {"plain": np.zeros(function.dimension)}, seed=0)
        reported = [m for m in metrics if m not in (OBJECTIVE, HELD_OUT)]
        scores = [[tuner.test(arm, reported, "validation")] for arm in (learned, plain)]
        for metric in metrics:
            p = compare(*scores, metric, (name, "plain"), metric == OBJECTIVE, "validation")
            rows.append({
                "task": recipe, "variant": name, "numbers": function.dimension, "calls": learned.calls,
                "metric": metric, "mean": p.mean, "low": p.low, "high": p.high, "win_rate": p.win_rate, "p": p.p,
                "cases": p.cases,
            })  # fmt: skip
    return rows


def markdown(result: dict[str, Any]) -> str:
    """A table for each task."""
    rows = result["rows"]
    tables = [f"{task.capitalize()}:\n\n{_table(rows, task)}" for task in dict.fromkeys(r["task"] for r in rows)]
    below = f"Minus the plain model at the same dials, {rows[0]['cases']} validation cases. `{result['command']}`"
    return "\n\n".join([*tables, below])


def _table(rows: Sequence[dict[str, Any]], task: str) -> str:
    """One line a variant."""
    metrics = METRICS[task]
    lines = ["| weights | numbers | U-Net calls | " + " | ".join(metrics) + " |", "|---" * (3 + len(metrics)) + "|"]
    mine = [r for r in rows if r["task"] == task]
    for name in dict.fromkeys(r["variant"] for r in mine):
        table = {r["metric"]: r for r in mine if r["variant"] == name}
        cells = []
        for m in metrics:
            r, digits = table[m], 2 if m == "truth.psnr" else 3
            text = f"{r['mean']:+.{digits}f} [{r['low']:+.{digits}f}, {r['high']:+.{digits}f}]"
            cells.append(f"**{text}**" if r["low"] > 0 or r["high"] < 0 else text)
        first = table[metrics[0]]
        lines.append(f"| {name} | {first['numbers']} | {first['calls']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: one task, three variants, few cases")
    parser.add_argument("--recipes", nargs="+", default=["editing", "generation"], choices=list(METRICS))
    numbers = ", ".join(f"{i}: {name}" for i, name in enumerate(VARIANTS))
    parser.add_argument("--variants", nargs="+", type=int, choices=range(len(VARIANTS)), help=f"some only; {numbers}")
    parser.add_argument("--folder", type=Path, help="run folder (default lightning_logs/bench-variants)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    names, recipes, given = list(VARIANTS), args.recipes, ["task.validation=128", *args.overrides]
    if args.variants is not None:
        names = [names[i] for i in args.variants]
    elif args.quick:
        names = names[4:7]
    if args.quick:
        recipes, given = recipes[:1], [*QUICK, *args.overrides]
    quiet()
    name = "variants-quick" if args.quick else "variants"
    folder = args.folder or ROOT.parent / "lightning_logs" / f"bench-{name}"
    rows: list[dict[str, Any]] = []
    with Bar() as bar:
        bar.start(len(recipes) * len(names) * config.load(recipes[0], given).tuner.trials)
        for recipe in recipes:
            rows += rows_of(recipe, given, folder / recipe, bar, names)
    file = ROOT / "results" / f"{name}.json"
    if file.exists() and not args.quick:
        rows = [row for row in json.loads(file.read_text())["rows"] if row["task"] not in recipes] + rows
        rows.sort(key=lambda row: str(row["task"]))
    words = ["python", "benchmarks/variants.py", *sys.argv[1:]]
    command = shlex.join(words)
    if args.recipes != list(METRICS):  # what made the rows of the other recipe, too
        command = command.replace(shlex.join(["--recipes", *args.recipes]), f"--recipes {' '.join(METRICS)}")
    result = {"name": "variants", "command": command, "quick": args.quick, "versions": versions(), "rows": rows}
    publish(result, markdown(result), file, "tuners.md")


if __name__ == "__main__":
    main()
