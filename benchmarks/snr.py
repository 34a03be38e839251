"""Is reweighting a "free lunch" for the signal-to-noise ratio? What of that claim holds on the embedded model.

`python benchmarks/snr.py [--quick] [--pictures 16] [--cases 64]`. Three questions, at every branch and step:
1. does a small change of the branch's weight raise the SNR of the stream it joins (probe `snr`)?
2. do weights along those slopes raise the SNR of what the U-Net predicts, the clean picture?
3. do they make better pictures, by the recipe's objective and the held-out judge? And is the slope of the SNR the slope
   of the objective (probe `reward_gradient`)?

SNR by repetition: of one picture under many noises, what is common is signal and what is not is noise. The weights that
follow the slopes are `exp(+-reach * slope / largest slope)`. Pictures of probes are train cases, 3. is of validation
cases. Writes `benchmarks/results/snr.json` and the table in `docs/probes.md`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import ROOT, publish
from probes import spearman

from rwopt import config
from rwopt.cli.screen import quiet
from rwopt.models import Model
from rwopt.probes import Importance
from rwopt.probes.snr import Moments
from rwopt.progress import Silent
from rwopt.sampling.course import Course
from rwopt.sampling.denoise import Condition, predict
from rwopt.sampling.sample import sample
from rwopt.schedule import Schedule
from rwopt.search.evaluation import HELD_OUT, OBJECTIVE, compare, interval, score
from rwopt.search.identity import versions
from rwopt.search.search import Search
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

REACH = (0.1, 0.3)


def along(slopes: Importance, reach: float) -> Schedule:
    """Weights that follow (reach > 0) or go against (reach < 0) the slopes."""
    size = np.abs(slopes.scores).max()
    return Schedule(slopes.sites, slopes.sigmas, np.exp(reach * slopes.scores / size))


@torch.no_grad()
def prediction_snr(
    model: Model, attachment: Attachment, clean: torch.Tensor, text: Condition, course: Course, draws: int,
    schedule: Schedule,
) -> np.ndarray:  # fmt: skip
    """log SNR [K, N] of the clean picture that a v-predicting U-Net sees in `clean` under noise."""
    generator, out = torch.Generator().manual_seed(1), []
    for i, (sigma, t) in enumerate(zip(course.sigmas, course.told, strict=True)):
        moments, signal, noise = Moments(), course.levels.signal[i], course.levels.noise[i]
        weights = torch.from_numpy(schedule.at(sigma)).float()
        for _ in range(draws):
            noisy = course.noised(i, clean, torch.randn(clean.shape, generator=generator))
            v = predict(model, attachment, noisy, t, text, weights)
            seen = signal * noisy - noise * v
            moments.add(seen, seen)
        out.append(moments.log_snr())
    return np.array(out)


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    given = [f"task.train={args.pictures}", f"task.validation={args.cases}", "track.wandb=off", "model.dtype=float32"]
    search = Search(config.load("generation", [*given, *args.overrides]), folder, Silent())
    experiment, probing = search.experiment, search.probing
    model, task = experiment.model, experiment.splits.task("train")
    assert model.scheduler.config.prediction_type == "v_prediction"
    ids = [s.id for s in list_sites(model.unet, ("self", "cross", "ff"))]
    n = len(task)
    slopes = probing.probe("snr", "snr.json", ids, n, "residual", draws=args.draws)
    reward = probing.probe("reward_gradient", "reward.json", ids, n, "residual")
    assert slopes.low is not None
    assert slopes.high is not None
    rows, gains, schedules = [], [], {"plain": along(slopes, 0.0)}
    for reach in REACH:
        schedules |= {f"along {reach}": along(slopes, reach), f"against {reach}": along(slopes, -reach)}
    with Attachment(model.unet, ids) as attachment:
        x, cond, course = task.inputs(attachment, experiment.base, slice(0, n))
        clean, text = sample(model, attachment, x, cond, course), Condition(cond.positive)
        levels = {
            k: prediction_snr(model, attachment, clean, text, course, args.draws, s) for k, s in schedules.items()
        }
    judged = experiment.splits.task("validation")
    scores = {
        name: score(judged, judged.made(experiment.base, None if name == "plain" else s), experiment.composites)
        for name, s in schedules.items()
    }
    for k, (sigma, t) in enumerate(zip(slopes.sigmas.tolist(), course.told, strict=True)):
        kinds: dict[str, list[float]] = {"self": [], "cross": [], "ff": []}
        for site, slope in zip(ids, slopes.scores[k].tolist(), strict=True):
            kinds[site.rpartition(".")[2]].append(slope)
        rows.append({
            "noise_level": sigma, "timestep": t, "sites": len(ids),
            "raise": int((slopes.low[k] > 0).sum()), "lower": int((slopes.high[k] < 0).sum()),
            "by_kind": {kind: float(np.mean(of)) for kind, of in kinds.items()},
            "rho_reward": spearman(slopes.scores[k], reward.scores[k]),
        })  # fmt: skip
    for name in schedules:
        if name != "plain":
            moved = levels[name] - levels["plain"]  # [K, N]
            entry: dict[str, Any] = {"weights": name, "db": [float(v) for v in 10 / np.log(10) * moved.mean(1)]}
            entry["db_low"], entry["db_high"] = zip(*[interval(10 / np.log(10) * row) for row in moved], strict=True)
            for metric in (OBJECTIVE, HELD_OUT):
                p = compare([scores[name]], [scores["plain"]], metric, (name, "plain"), True, "validation")
                entry[metric] = [p.mean, p.low, p.high]
            gains.append(entry)
    return {
        "name": "snr", "command": shlex.join(["python", "benchmarks/snr.py", *sys.argv[1:]]), "quick": args.quick,
        "pictures": n, "draws": args.draws, "cases": args.cases, "versions": versions(), "rows": rows,
        "interventions": gains, "prices": {"snr": slopes.calls, "reward_gradient": reward.calls},
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """Slopes by noise level, then what following them does."""
    head = ["sigma", "branches that raise / lower the SNR of their stream when weighed up",
            "mean slope: self, cross, ff", "rank correlation with the objective's slope"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in result["rows"]:
        counts = f"{r['raise']} / {r['lower']} of {r['sites']}"
        kinds = ", ".join(f"{v:+.2f}" for v in r["by_kind"].values())
        lines.append(f"| {r['noise_level']:.2f} | {counts} | {kinds} | {r['rho_reward']:+.2f} |")
    levels = " / ".join(f"{r['noise_level']:.2f}" for r in result["rows"])
    lines += ["", f"| weights | SNR of the predicted picture, dB, at sigma {levels} | objective | judge.objective |",
              "|---" * 4 + "|"]  # fmt: skip
    for g in result["interventions"]:
        cells = []
        for v, low, high in zip(g["db"], g["db_low"], g["db_high"], strict=True):
            cells.append(f"**{v:+.2f}**" if low > 0 or high < 0 else f"{v:+.2f}")
        means = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*g[m]) for m in (OBJECTIVE, HELD_OUT)]
        lines.append(f"| {g['weights']} | {' / '.join(cells)} | {' | '.join(means)} |")
    below = (
        f"Counted, and bold, where the 95 % interval over {result['pictures']} pictures leaves out zero. Second "
        f"table: minus the plain model; objectives on {result['cases']} validation cases. `{result['command']}`"
    )
    return "\n".join([*lines, "", below])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: 3 pictures, 2 steps")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--draws", type=int, default=16, help="noises of each picture")
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--table", action="store_true", help="only make the docs' table from the result file")
    parser.add_argument("--folder", type=Path, help="run folder (default lightning_logs/bench-snr)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    if args.quick:
        args.pictures, args.draws, args.cases = 3, 3, 4
        args.overrides = ["task.steps=2", "weights.knots=2", *args.overrides]
    quiet()
    name = "snr-quick" if args.quick else "snr"
    file = ROOT / "results" / f"{name}.json"
    if args.table:
        result = json.loads(file.read_text())
    else:
        result = run(args, args.folder or ROOT.parent / "lightning_logs" / f"bench-{name}")
    publish(result, markdown(result), file, "probes.md")


if __name__ == "__main__":
    main()
