"""What carries over from one embedded model to the other: findings side by side, and files learned on one, used on the
other.

`python benchmarks/across.py [--quick] [--seeds 5]`. What `few_steps.py` learned (`results/learned/`; where that lacks a
file it is taken from the run folder, or learned) is mapped onto the other model's U-Net by depth, and its guidance is
scaled by the ratio of both models' own.
Held, as there, against what the target draws itself in 50 calls, on its 256 test cases. Two processes may share the
work (`--work`, then once more without it). Results: `benchmarks/results/across.json`; tables between the markers
`across` and `findings` of `docs/emoji.md`. Findings come from the result files of `few_steps.py`, `editing.py`,
`probes.py` and `speed.py`, with and without `--model emoji`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from typing import Any

import numpy as np
from comparison import into
from few_steps import Bench
from sharing import ROOT, command_line, page, result_of, suffix, unless_taken

from rwopt.embedded import DEFAULT, FOLDERS
from rwopt.files import write_text
from rwopt.schedule import Schedule
from rwopt.search.arms import ARMS, Arm
from rwopt.search.evaluation import OBJECTIVE, Scores, compare, interval
from rwopt.search.identity import versions
from rwopt.search.search import Search
from rwopt.unet.mapping import map_schedule

SAMPLER = "dpmpp_2m"
CALLS = (2, 3, 4, 6)
"""Of the findings."""
MAPPED = CALLS[:3]
"""Of the files that are used on the other model; in 6 calls weights add nothing on the emoji."""
EVOLUTION = "AutoDiffusion"  # has no rule, and was run on the default model alone
PLAIN, OWN, DIALS, FILE = "best solver", "learned here", "dials alone", "whole file"


@dataclass(frozen=True)
class Transfer:
    """A number of calls of one model's files, used on another model."""

    source: str
    target: str
    calls: int


class Across:
    """Both models' few-step benchmarks, and what one's files do on the other."""

    def __init__(self, quick: bool, seeds: int) -> None:
        self.quick, self.seeds = quick, min(seeds, 2) if quick else seeds
        end, logs = "-quick" * quick, ROOT.parent / "lightning_logs"
        self.benches = {
            name: Bench(logs / f"bench-few_steps{suffix(name)}{end}", quick, seeds, name) for name in FOLDERS
        }
        self.calls = MAPPED[:1] if quick else MAPPED
        self._searches: dict[tuple[str, int], Search] = {}

    def transfers(self) -> Iterator[Transfer]:
        yield from (Transfer(a, b, calls) for calls in self.calls for a, b in permutations(FOLDERS, 2))

    def search(self, model: str, calls: int) -> Search:
        if (model, calls) not in self._searches:
            self._searches[model, calls] = self.benches[model].search(SAMPLER, calls)
        return self._searches[model, calls]

    def learned(self, model: str, calls: int) -> list[Schedule]:
        """What a model has learned for a number of calls, of each seed: from `results/learned/`, where it is kept."""
        folder = self.benches[model].folder / "files" if self.quick else ROOT / "results" / "learned"
        path = folder / f"{model}-{calls}.json"
        found = [Schedule.from_dict(document) for document in json.loads(path.read_text())] if path.exists() else []
        if len(found) < self.seeds:
            search = self.search(model, calls)
            dials = search.dials()
            arms = (search.learn(dials, seed, name=f"learned {seed}") for seed in range(self.seeds))
            found = [arm.schedule for arm in arms if arm.schedule is not None]
            write_text(path, "[" + ",\n".join(json.dumps(schedule.to_dict()) for schedule in found) + "]\n")
        return found[: self.seeds]

    def work(self) -> None:
        """What is not done yet, and not in another process's hands."""
        for model in FOLDERS:
            for calls in self.calls:
                folder = self.benches[model].folder
                unless_taken(folder, f"{SAMPLER}-{calls}", lambda m=model, c=calls: self.learned(m, c))
        for transfer in self.transfers():
            folder = self.benches[transfer.target].folder
            unless_taken(folder, f"from-{transfer.source}-{transfer.calls}", lambda t=transfer: self.scores(t))

    def scores(self, transfer: Transfer) -> dict[str, list[Scores]]:
        """On the target's test cases: its best plain sampler, its own files, the other's dials and whole files."""
        search = self.search(transfer.target, transfer.calls)
        metrics = list(search.settings.objective.report)
        groups: dict[str, list[Arm]] = {
            PLAIN: [search.make(ARMS[PLAIN], search.dials())],
            OWN: [],
            DIALS: [],
            FILE: [],
        }
        for seed, schedule in enumerate(self.learned(transfer.target, transfer.calls)):
            groups[OWN].append(search.tuner.kept(f"learned {seed}") or search.tuner.fixed(f"file {seed}", schedule))
        for seed, learned in enumerate(self.learned(transfer.source, transfer.calls)):
            for form, schedule in self.carried(transfer, learned).items():
                groups[form].append(search.tuner.fixed(f"{form} of {transfer.source} {seed}", schedule))
        return {name: [search.tuner.test(arm, metrics) for arm in group] for name, group in groups.items()}

    def carried(self, transfer: Transfer, schedule: Schedule) -> dict[str, Schedule]:
        """One file of the source, for the target's U-Net: its sampler's dials alone, and with the weights."""
        source, target = (self.search(name, transfer.calls).experiment for name in (transfer.source, transfer.target))
        assert schedule.steps is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a guess is why this is measured
            mapped = map_schedule(schedule, target.model.unet, "depth")
        ratio = target.base.guidance / source.base.guidance
        steps = replace(schedule.steps, guidance=tuple(max(1.01, g * ratio) for g in schedule.steps.guidance))
        return {
            DIALS: Schedule.constant(mapped.sites, mapped.sigmas, steps=steps), FILE: replace(mapped, steps=steps),
        }  # fmt: skip


def run(bench: Across) -> dict[str, Any]:
    """The content of the result file."""
    bench.work()
    rows, paired = [], []
    for transfer in bench.transfers():
        scores = bench.scores(transfer)
        for form, group in scores.items():
            table = np.stack([s.values[OBJECTIVE] for s in group], 1)
            low, high = interval(table)
            accuracy = float(np.mean([s.mean("judge.accuracy") for s in group]))
            rows.append({**asdict(transfer), "form": form, "mean": float(table.mean()), "low": low, "high": high,
                         "seeds": len(group), "judge.accuracy": accuracy})  # fmt: skip
        for a, b in ((FILE, PLAIN), (FILE, DIALS), (FILE, OWN)):
            row = compare(scores[a], scores[b], OBJECTIVE, (a, b), True, "test")
            paired.append({**asdict(transfer), **asdict(row)})
    settings = [bench.search(name, bench.calls[0]).settings for name in FOLDERS]
    return {
        "name": "across",
        "command": "python benchmarks/across.py" + (" --quick" if bench.quick else f" --seeds {bench.seeds}"),
        "quick": bench.quick,
        "settings": [asdict(s) for s in settings],
        "versions": versions(),
        "rows": rows,
        "paired": paired,
    }


def _difference(pair: dict[str, Any], form: str = "+.1f") -> str:
    """A mean with its interval; bold where that leaves out zero."""
    text = f"{pair['mean']:{form}} [{pair['low']:{form}}, {pair['high']:{form}}]"
    return f"**{text}**" if pair["low"] > 0 or pair["high"] < 0 else text


def markdown(result: dict[str, Any]) -> str:
    """Files learned on one model, used on the other."""
    rows = {(r["target"], r["calls"], r["form"]): r["mean"] for r in result["rows"]}
    pairs = {(p["target"], p["calls"], p["b"]): p for p in result["paired"]}
    head = ["learned on, used on", "calls", "best plain sampler", "learned here", "other's dials", "other's whole file",
            "file − plain", "file − its dials", "file − learned here"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for source, target, calls in dict.fromkeys((r["source"], r["target"], r["calls"]) for r in
                                               sorted(result["rows"], key=lambda r: r["source"])):  # fmt: skip
        means = [f"{rows[target, calls, form]:.1f}" for form in (PLAIN, OWN, DIALS, FILE)]
        gains = [_difference(pairs[target, calls, other]) for other in (PLAIN, DIALS, OWN)]
        lines.append(f"| {source}, {target} | {calls} | {' | '.join([*means, *gains])} |")
    cases, seeds = result["settings"][0]["task"]["test"], max(r["seeds"] for r in result["rows"])
    about = (
        f"PSNR in dB to the picture that the model itself draws in 50 calls, {cases} test cases, {seeds} search seeds"
    )
    return "\n".join([*lines, "", f"{about}; bold: the interval leaves out zero. `{result['command']}`"])


# both models' findings


def _result(name: str, model: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / f"{name}{suffix(model)}.json").read_text())
    return found


def _few(calls: int, other: str) -> Callable[[str], str]:
    def text(model: str) -> str:
        wanted = (calls, SAMPLER, other, OBJECTIVE)
        found = [p for p in _result("few_steps", model)["paired"]
                 if (p["calls"], p["sampler"], p["b"], p["metric"]) == wanted]  # fmt: skip
        return _difference(found[0]) if found else ""

    return text


def _worth(calls: int) -> Callable[[str], str]:
    def text(model: str) -> str:
        found = next(w for w in _result("few_steps", model)["worth"]
                     if (w["calls"], w["sampler"], w["method"]) == (calls, SAMPLER, "learned"))  # fmt: skip
        return f"{'over ' * found['capped']}{found['plain_calls']:.1f} [{found['low']:.1f}, {found['high']:.1f}]"

    return text


def _judged(calls: int) -> Callable[[str], str]:
    def text(model: str) -> str:
        rows = {r["method"]: r["mean"] for r in _result("few_steps", model)["rows"]
                if (r["calls"], r["sampler"], r["metric"]) == (calls, SAMPLER, "judge.accuracy")}  # fmt: skip
        return f"{rows['best solver']:.1%}, {rows['learned']:.1%}"

    return text


def _edited(other: str, metric: str) -> Callable[[str], str]:
    def text(model: str) -> str:
        pair = next(p for p in _result("editing", model)["paired"]
                    if (p["a"], p["b"], p["metric"]) == ("learned", other, metric))  # fmt: skip
        return _difference(pair, "+.2f" if metric == "truth.psnr" else "+.3f")

    return text


def _planned(other: str) -> Callable[[str], str]:
    def text(model: str) -> str:
        result = _result("speed", model)
        pairs = {p["b"]: p for p in result["paired"] if (p["budget"], p["a"]) == (0.5, "plan and weights")}
        if other in pairs:
            return _difference(pairs[other])
        own = {"plain", "best solver", "learned few steps", "plan", "plan and dials", "plan and weights", EVOLUTION}
        best = max((r for r in result["rows"] if r["budget"] == 0.5 and r["method"] not in own),
                   key=lambda r: r["psnr_converged"])  # fmt: skip
        return f"{_difference(pairs[best['method']])} ({best['method']})"

    return text


def _probed(probe: str) -> Callable[[str], str]:
    def text(model: str) -> str:
        result = _result("probes", model)
        row = next(r for r in result["rows"] if (r["probe"], r["model"], r["noise_level"]) == (probe, model, None))
        return f"{row['rho']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"

    return text


FEW: tuple[tuple[str, Callable[[int], Callable[[str], str]]], ...] = (
    ("learned − best plain sampler, dB", lambda calls: _few(calls, "best solver")),
    ("learned − tuned guidance, dB", lambda calls: _few(calls, "best guidance")),
    ("learned − the paper's schedule, dB", lambda calls: _few(calls, "analytic")),
    ("learned − the sampler's dials, no weights, dB", lambda calls: _few(calls, "sampler dials")),
    ("plain calls that are worth as much", _worth),
    ("judge accuracy: best plain, learned", _judged),
)
"""By number of calls."""
FINDINGS: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("edits: learned − plain, objective", _edited("plain", "objective")),
    ("edits: learned − plain, objective by the judge", _edited("plain", "judge.objective")),
    ("edits: learned − tuned guidance, objective by the judge", _edited("best guidance", "judge.objective")),
    ("edits: learned − the paper's schedule, objective by the judge", _edited("analytic", "judge.objective")),
    ("edits: learned − tuned guidance, PSNR to the true edit, dB", _edited("best guidance", "truth.psnr")),
    ("half the time: plan and weights − best plain sampler, dB", _planned("best solver")),
    ("half the time: plan and weights − best published rule, dB", _planned("")),
    ("probes, rank correlation with exact values: the paper's voting", _probed("voting (published)")),
    ("probes: leave one out", _probed("ablation")),
    ("probes: Shapley, one order", _probed("shapley, 1 order")),
)  # fmt: skip


def findings() -> str:
    """Both models' numbers side by side: few calls by their number, and all else."""
    lines = ["| few calls | model | " + " | ".join(map(str, CALLS)) + " |", "|---|---|" + "---|" * len(CALLS)]
    for what, of in FEW:
        lines += [
            f"| {what} | {model} | {' | '.join(of(calls)(model) for calls in CALLS)} |" for model in FOLDERS
        ]
    lines += ["", f"| | {' | '.join(FOLDERS)} |", "|---|" + "---|" * len(FOLDERS)]
    lines += [f"| {what} | {' | '.join(text(model) for model in FOLDERS)} |" for what, text in FINDINGS]
    about = "Differences are means over 256 test cases and the search seeds of the tables below; bold: the interval"
    return "\n".join([*lines, "", f"{about} leaves out zero."])


def main() -> None:
    quick = "some minutes: 2 calls, few cases and updates, own file"
    args = command_line("across", __doc__, quick, 5, "of learned files")
    bench = Across(args.quick, args.seeds)
    result = result_of(args, bench, run)
    if result is None:
        return
    print(markdown(result))
    if not args.quick:
        other = next(name for name in FOLDERS if name != DEFAULT)
        into(page(other, ""), "across", markdown(result))
        into(page(other, ""), "findings", findings())


if __name__ == "__main__":
    main()
