"""Learned schedules against every baseline and control on test cases, over several search seeds.

`python benchmarks/editing.py [--quick] [--seeds 5]`, likewise `generation.py` and `few_steps_editing.py`. Seeds repeat
the learned search (and a learned control, up to three times); dials, probes and fixed schedules are shared, as nothing
in them is random but the dials' sampler. Finished parts are kept in the run folder, so a killed benchmark goes on.
Every number goes to `benchmarks/results/<name>.json`, and the tables between the markers of `docs/results.md` (few
calls: `docs/few-steps.md`) and README.md are made from that file. `docs/<name>.png` shows the first seed. `--model`:
another embedded model, whose name is added to all these and to the markers, which stand in its own page; there the
recipe's own number of cases is searched with, and fewer baselines are asked.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from sharing import ROOT, add_model, choice, flag, page, suffix

from rwopt import config
from rwopt.cli.screen import quiet
from rwopt.embedded import DEFAULT
from rwopt.files import write_text
from rwopt.progress import Bar
from rwopt.results import Paired
from rwopt.search.arms import ARMS, LEARNED
from rwopt.search.evaluation import Scores, compare
from rwopt.search.identity import versions
from rwopt.search.publish import picture_grid
from rwopt.search.search import Search
from rwopt.search.verdict import report_metrics, verdict

QUICK = [
    "task.train=6", "task.validation=8", "task.test=14", "task.steps=2", "tuner.trials=3", "tuner.dial_trials=1",
    "tuner.control_trials=1", "tuner.sampler=random", "gradient.updates=1", "gradient.batch=4", "analytic.rounds=1",
    "analytic.epochs=2", "analytic.cases=2", "probe.cases=4",
]  # fmt: skip
SMALLER = {"few-steps-editing": ["tuner.dial_trials=0", "task.teacher.steps=4", "steps.grids=[trailing,karras]"]}
FULL = ["task.train=128", "task.validation=128", "task.test=256"]  # on top of the recipe
ELSEWHERE, FEWER = FULL[-1:], ("plain", "best guidance", "analytic")  # of another model: the same, and its arms
BLACK_BOX = ["tuner.name=optuna", "weights.group_by=kind", "weights.knots=3"]  # as many numbers as Optuna can handle
CONTROLS = {
    "editing": {"constant": 3, "black box": 1}, "generation": {"constant": 3, "black box": 1},
    "few-steps-editing": {"sampler dials": 3},
}  # fmt: skip
"""Learned arms beside the learned one, and how many search seeds of each at most."""
NOTES = {name: spec.note for name, spec in ARMS.items()} | {
    "black box": "9 weights (kind of branch x 3 noise levels) by Optuna instead of the gradient",
}


def run(
    recipe: str, seeds: int, overrides: Sequence[str], folder: Path, quick: bool, only: Sequence[str] = (),
    model: str = DEFAULT,
) -> dict[str, Any]:  # fmt: skip
    """All arms (or `only` some, and the learned one), scored on the test cases: the content of the result file."""
    overrides = [*choice(model), *overrides]
    if only:
        overrides = [*overrides, f"arms=[{','.join([*(name for name in only if name in ARMS), LEARNED])}]"]
    settings = config.load(recipe, [*overrides, "track.wandb=off"])
    with Bar() as bar:
        search = Search(settings, folder, bar)
        dial_trials = settings.tuner.dial_trials
        trials = settings.tuner.trials if quick else 20
        black_box = [*overrides, "track.wandb=off", *BLACK_BOX, f"tuner.trials={trials}"]
        repeats = {name: min(seeds, most) for name, most in CONTROLS[recipe].items()} | {LEARNED: seeds}
        if only:
            repeats = {name: many for name, many in repeats.items() if name in (*only, LEARNED)}
        other = Search(config.load(recipe, black_box), folder / "black box", bar) if "black box" in repeats else search
        controls = {*repeats} & {spec.name for spec in search.arms}
        learned = sum(repeats[name] - 1 for name in controls)  # beside those of a search
        bar.start(search.evaluations + learned * (settings.tuner.trials + 2 * dial_trials)
                  + repeats.get("black box", 0) * (trials + 2 * dial_trials) + dial_trials)  # fmt: skip
        dials = search.dials()
        arms = {spec.name: [search.make(spec, dials)] for spec in search.arms if not spec.learned}
        for name in repeats:
            who = other if name == "black box" else search
            start = who.dials()
            arms[name] = [
                who.learn(start, seed, ARMS.get(name, ARMS[LEARNED]), f"{name} {seed}")
                for seed in range(repeats[name])
            ]
        metrics = list(settings.objective.report)
        scores = {name: [search.tuner.test(arm, metrics) for arm in group] for name, group in arms.items()}
        if not quick:
            first = {name: group[0] for name, group in arms.items()}
            picture_grid(search.experiment, first, ROOT.parent / "docs" / f"{recipe}{suffix(model)}.png")
    pairs = [("learned", other) for other in arms if other != "learned"]
    more = [("constant", "best guidance"), ("constant", "analytic"), ("best guidance", "plain")]
    pairs += [(a, b) for a, b in more if a in arms and b in arms]
    paired = [
        compare(scores[a], scores[b], m.name, (a, b), m.optimised, "test", m.higher_is_better)
        for a, b in pairs
        for m in report_metrics(settings)
    ]
    return {
        "name": recipe,
        "command": f"python benchmarks/{recipe.replace('-', '_')}.py" + (" --quick" if quick else f" --seeds {seeds}")
        + flag(model) + "".join(f" --arm '{name}'" for name in only if tuple(only) != FEWER),
        "quick": quick,
        "settings": asdict(settings),
        "versions": versions(),
        "arms": [
            {
                "name": name,
                "note": NOTES.get(name, ""),
                "means": mean(scores[name]),
                "by_seed": [s.means() for s in scores[name]],
                "dials": [a.dials.to_dict() for a in group],
                "evaluations": [a.evaluations for a in group],
                "calls": [a.calls for a in group],
                "validation": [a.validation for a in group],
            }
            for name, group in arms.items()
        ],
        "paired": [asdict(p) for p in paired],
        "verdict": verdict(paired),
    }


def mean(scores: Sequence[Scores]) -> dict[str, float]:
    return {name: float(np.mean([s.mean(name) for s in scores])) for name in scores[0].values}


SHOWN = {
    "editing": ["objective", "judge.objective", "judge.success_accuracy", "judge.realism", "truth.psnr"],
    "generation": ["objective", "judge.objective", "judge.accuracy", "judge.realism", "judge.identity",
                   "quality.flat_noise"],
    "few-steps-editing": ["objective", "teacher.ssim", "judge.success", "judge.kept", "judge.realism", "truth.psnr"],
}  # the result file has all
PAGES = {"few-steps-editing": "few-steps.md"}


SHORT = ["plain", "best guidance", "analytic", "constant"]  # whom learned meets in README


def short(result: dict[str, Any]) -> str:
    """The differences that README shows, of editing."""
    shown = ["objective", "judge.objective", "judge.success_accuracy", "truth.psnr"]
    lines = markdown(result, shown).split("\n\n")
    head, rule, *rows = lines[1].split("\n")
    table = [head, rule, *(row for row in rows if row.startswith(tuple(f"| learned − {b} |" for b in SHORT)))]
    without_wins = [row.rstrip("| ").rpartition(" | ")[0] + " |" for row in table if row != rule]
    return "\n".join([without_wins[0], "|---" * (1 + len(shown)) + "|", *without_wins[1:], "", lines[2]])


def markdown(result: dict[str, Any], shown: Sequence[str] = ()) -> str:
    """Means by arm, then learned minus each arm with intervals, as `docs/results.md` shows them."""
    shown = list(shown or SHOWN[result["name"]])

    decibels = {"truth.psnr", *(["objective"] if "teacher.psnr" in result["settings"]["objective"]["terms"] else ())}

    def number(metric: str, value: float, sign: str = "") -> str:
        return f"{value:{sign}.{2 if metric in decibels else 3}f}"

    lines = ["| arm | " + " | ".join(shown) + " |", "|---|" + "---|" * len(shown)]
    for arm in result["arms"]:
        lines.append(f"| {arm['name']} | " + " | ".join(number(m, arm["means"][m]) for m in shown) + " |")
    lines += ["", "| difference, mean [95 % interval] | " + " | ".join(shown) + " | wins, p (objective) |",
              "|---|" + "---|" * (len(shown) + 1)]  # fmt: skip
    table = {(p["a"], p["b"], p["metric"]): Paired(**p) for p in result["paired"]}
    for a, b in dict.fromkeys((p["a"], p["b"]) for p in result["paired"]):
        cells = []
        for m in shown:
            p = table[a, b, m]
            text = f"{number(m, p.mean, '+')} [{number(m, p.low, '+')}, {number(m, p.high, '+')}]"
            cells.append(f"**{text}**" if p.low > 0 or p.high < 0 else text)
        first = table[a, b, shown[0]]
        lines.append(f"| {a} − {b} | " + " | ".join(cells) + f" | {first.win_rate:.0%}, {first.p:.2g} |")
    first = result["paired"][0]
    seeds = ", ".join(f"{len(a['by_seed'])} of {a['name']}" for a in result["arms"] if len(a["by_seed"]) > 1)
    lines += ["", f"{first['cases']} test cases; search seeds: {seeds}; bold: the interval leaves out zero. "
              f"`{result['command']}`"]  # fmt: skip
    return "\n".join(lines)


def into(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` in a page; without these it stays as it is."""
    old = path.read_text()
    between = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    new = re.sub(between, lambda m: m[1] + text + "\n" + m[2], old, flags=re.DOTALL)
    if new != old:
        write_text(path, new)


def publish(result: dict[str, Any], text: str, file: Path, page: str) -> None:
    """Keep a result and print its table; a full run's goes into `docs/<page>` as well, at the result's name."""
    write_text(file, json.dumps(result, indent=1) + "\n")
    print(text)
    if not result["quick"]:
        into(ROOT.parent / "docs" / page, result["name"], text)


def main(recipe: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: few cases and trials, own file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="only make the table again from the result file")
    parser.add_argument("--arm", action="append", default=[], help="only this arm beside the learned one; repeatable")
    parser.add_argument("--folder", type=Path, help="run folder (default lightning_logs/bench-<recipe>)")
    add_model(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    quiet()
    place = recipe + suffix(args.model)
    name = f"{place}-quick" if args.quick else place
    folder = args.folder or ROOT.parent / "lightning_logs" / f"bench-{name}"
    default = args.model == DEFAULT
    words = (*QUICK, *SMALLER.get(recipe, ())) if args.quick else FULL if default else ELSEWHERE
    overrides, arms = [*words, *args.overrides], args.arm or (() if default else FEWER)
    file = ROOT / "results" / f"{name}.json"
    if args.table:
        result = json.loads(file.read_text())
    else:
        result = run(recipe, 2 if args.quick else args.seeds, overrides, folder, args.quick, arms, args.model)
        write_text(file, json.dumps(result, indent=1) + "\n")
    print(markdown(result), *result["verdict"], sep="\n")
    if not args.quick:
        into(page(args.model, PAGES.get(recipe, "results.md")), place, markdown(result))
        if recipe == "editing":
            into(ROOT.parent / "README.md", f"short{suffix(args.model)}", short(result))
