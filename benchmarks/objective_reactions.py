"""How each objective with real weights reacts to what can happen to a picture, and whether the guard sees mottling.

`python benchmarks/objective_reactions.py [--quick] [--table] [--learn]`. Two parts, on avatars of the test cases:

- reactions: true edits as references, each changed in a known way (blur, noise, shift, ...); the mean score of every
  objective that has weights here, or is a plain formula, against the untouched reference.
- mottling: pictures of the plain model, and from the same noise of a schedule that was learned on the train cases with
  weights on branches, resnets and skips and no term against noise (a row of `docs/tuners.md`): the mean difference
  with a paired interval. The schedule is `benchmarks/results/mottling-schedule.json`; `--learn` makes it again, in a
  quarter of an hour.

Objectives whose packages or weights are missing are left out and named. Writes
`benchmarks/results/objective_reactions.json`, the tables in `docs/objectives-reactions.md`, and for the eye
`docs/objectives-mottling.png` (above the plain model's pictures, below the learned ones).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import ROOT, into
from torch import Tensor

from rwopt import config
from rwopt.cli.screen import quiet
from rwopt.errors import UserError
from rwopt.files import write_bytes, write_text
from rwopt.objectives import Batch, Objective, make_objective
from rwopt.objectives.quality import blur
from rwopt.progress import Bar
from rwopt.schedule import Schedule
from rwopt.search.arms import ARMS, LEARNED
from rwopt.search.evaluation import interval
from rwopt.search.identity import versions
from rwopt.search.search import Search
from rwopt.tasks import Dials, make_task
from rwopt.tasks.cases import load_cases
from rwopt.tasks.pictures import to_pictures, to_tensor

OBJECTIVES = [
    "scorer.identity", "judge.identity", "scorer.realism", "judge.realism", "judge.distance", "effnet.identity",
    "effnet.features", "structure.effnet", "structure.gmsd", "structure.ms_ssim", "truth.ssim", "face.dlib",
    "mask.psnr", "quality.flat_noise", "quality.flat_noise_excess", "quality.colourfulness", "quality.contrast",
    "quality.sharpness", "quality.saturation",
]  # fmt: skip
GUARDED = [name for name in OBJECTIVES if not name.startswith(("truth.", "mask.", "judge.distance", "face."))]
SETTINGS = ["task.validation=96", "tuner.trials=3", "gradient.updates=15",
            "weights.kinds=[self,cross,ff,resnet,skip]", "track.wandb=off"]  # fmt: skip
SCHEDULE = ROOT / "results" / "mottling-schedule.json"


def random(images: Tensor) -> Tensor:
    """Normal numbers of the shape of the pictures, always the same."""
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


def mottled(images: Tensor, levels: float) -> Tensor:
    """Soft blotches about six pixels wide, of that standard deviation."""
    soft = blur(random(images), 1.5)
    return (images + levels / 255 * soft / soft.std()).clamp(0, 1)


def enlarged(images: Tensor) -> Tensor:
    """Twice the size: dlib finds few faces in pictures of 64 pixels."""
    return torch.nn.functional.interpolate(images, scale_factor=2, mode="bicubic").clamp(0, 1)


def fringed(images: Tensor) -> Tensor:
    """Red moved two pixels to the right and blue two to the left."""
    red, green, blue = images.unbind(1)
    return torch.stack([red.roll(2, -1), green, blue.roll(-2, -1)], 1)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "untouched": lambda x: x,
    "blur 1 px": lambda x: blur(x, 1),
    "blur 2 px": lambda x: blur(x, 2),
    "sharpened": lambda x: (2 * x - blur(x, 1)).clamp(0, 1),
    "noise 5": lambda x: (x + 5 / 255 * random(x)).clamp(0, 1),
    "noise 20": lambda x: (x + 20 / 255 * random(x)).clamp(0, 1),
    "mottling 3": lambda x: mottled(x, 3),
    "mottling 8": lambda x: mottled(x, 8),
    "fringes": fringed,
    "shift 2 px": lambda x: x.roll(2, -1),
    "mirrored": lambda x: x.flip(3),
    "brightness 0.8": lambda x: 0.8 * x,
    "another": lambda x: x.roll(1, 0),
}


def found(names: Sequence[str]) -> tuple[dict[str, Objective], dict[str, str]]:
    """Objectives that can be made here, and why the others cannot."""
    made, lacking = dict[str, Objective](), dict[str, str]()
    for name in names:
        try:
            made[name] = make_objective(name)
        except UserError as error:
            lacking[name] = str(error)
    return made, lacking


def reactions(objectives: Mapping[str, Objective], count: int) -> list[dict[str, Any]]:
    """Mean scores of every change: rows of objective, change, mean, sd over pictures, share of them with a score."""
    truths = to_tensor([case.truth for case in load_cases("avatars", "test", "editing", count)])
    assert truths is not None
    mask = torch.zeros(count, 1, *truths.shape[2:])
    mask[..., 24:40, 16:48] = 1  # where eyes are
    rows = []
    for change, function in CHANGES.items():
        images = function(truths)
        for name, objective in objectives.items():
            first, second = (enlarged(x[:16]) if name == "face.dlib" else x for x in (images, truths))
            with torch.no_grad():
                scores = objective(Batch(first, reference=second, truth=second, mask=mask)).double().numpy()
            seen = scores[~np.isnan(scores)]
            rows.append({
                "objective": name, "change": change, "mean": float(seen.mean()) if len(seen) else None,
                "sd": float(seen.std()) if len(seen) else None, "valid": len(seen) / len(scores),
            })  # fmt: skip
    return rows


def learn(folder: Path) -> Schedule:
    """The schedule that mottles, learned anew (or gone on with, in the same folder)."""
    settings = config.load("generation", SETTINGS)
    with Bar() as bar:
        search = Search(settings, folder, bar)
        function = search.function(ARMS[LEARNED], search.experiment.base)
        arm = search.tuner.tune_weights(
            "all weights", function, search.experiment.base, {"plain": np.zeros(function.dimension)}, seed=0
        )
    assert arm.schedule is not None
    return arm.schedule


def mottling(
    objectives: Mapping[str, Objective], schedule: Schedule, count: int, picture: Path | None
) -> list[dict[str, Any]]:
    """Learned minus plain on the same cases and noise: rows of objective, plain, mean, low, high, share that rose."""
    from rwopt.models import load_model

    task = make_task("generation", load_model("avatars"), load_cases("avatars", "test", "generation", count), 6)
    plain, spoilt = task.references, task.images(Dials(), schedule)
    assert plain is not None
    if picture is not None:
        write_bytes(picture, sheet(torch.cat([plain[:8], spoilt[:8]])))
    rows = []
    for name, objective in objectives.items():
        with torch.no_grad():
            first, second = (objective(Batch(x, reference=plain)).double().numpy() for x in (plain, spoilt))
        difference = (second - first)[~np.isnan(second - first)]
        low, high = interval(difference)
        rows.append({
            "objective": name, "plain": float(np.nanmean(first)), "mean": float(difference.mean()), "low": low,
            "high": high, "rose": float((difference > 0).mean()), "cases": len(difference),
        })  # fmt: skip
    return rows


def sheet(images: Tensor, columns: int = 8, scale: int = 3) -> bytes:
    """A PNG of pictures, eight a row, three times their size."""
    import io

    from PIL import Image

    rows = [np.concatenate(to_pictures(images[i : i + columns]), 1) for i in range(0, len(images), columns)]
    whole = np.concatenate(rows).repeat(scale, 0).repeat(scale, 1)
    Image.fromarray(whole).save(stream := io.BytesIO(), "PNG", optimize=True)
    return stream.getvalue()


def number(value: float | None, size: float) -> str:
    """Three digits of a column whose numbers are about as large as `size`."""
    return "none" if value is None else f"{value:.{1 if size > 10 else 2 if size > 2 else 3}f}"


def tables(result: Mapping[str, Any]) -> str:
    """Two tables, a line for each objective."""
    changes = list(CHANGES)
    lines = ["| objective | " + " | ".join(changes) + " |", "|---" * (1 + len(changes)) + "|"]
    for name in dict.fromkeys(row["objective"] for row in result["reactions"]):
        cells = {r["change"]: r for r in result["reactions"] if r["objective"] == name}
        size = max(abs(r["mean"]) for r in cells.values() if r["mean"] is not None)
        texts = [
            number(cells[c]["mean"], size) + ("" if cells[c]["valid"] in (0, 1) else f" ({cells[c]['valid']:.0%})")
            for c in changes
        ]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    lines += ["", "| objective | plain | learned without a guard, minus plain | rose in |", "|---|---|---|---|"]
    for r in result["mottling"]:
        size = max(abs(r["plain"]), abs(r["mean"]))
        mean, low, high = (f"{'+' if v >= 0 else ''}{number(v, size)}" for v in (r["mean"], r["low"], r["high"]))
        text = f"{mean} [{low}, {high}]"
        text = f"**{text}**" if r["low"] > 0 or r["high"] < 0 else text
        lines.append(f"| {r['objective']} | {number(r['plain'], size)} | {text} | {r['rose']:.0%} |")
    absent = "".join(f" Left out: {why}." for why in result["lacking"].values())
    lines += ["", f"{result['count']} test cases (16 for face.dlib); in brackets: share of pictures in which a face is "
              f"found. `{result['command']}`.{absent}"]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: few cases, own file")
    parser.add_argument("--learn", action="store_true", help="learn the schedule again")
    parser.add_argument("--table", action="store_true", help="only make the tables again from the result file")
    parser.add_argument("--folder", type=Path, help="run folder (default lightning_logs/bench-objective_reactions)")
    args = parser.parse_args()
    quiet()
    name = "objective_reactions-quick" if args.quick else "objective_reactions"
    file, docs = ROOT / "results" / f"{name}.json", ROOT.parent / "docs"
    if args.table:
        result = json.loads(file.read_text())
    else:
        count = 4 if args.quick else 64
        if args.learn:
            learn(args.folder or ROOT.parent / "lightning_logs" / "bench-objective_reactions").save(SCHEDULE)
        objectives, lacking = found(OBJECTIVES)
        guarded = {n: o for n, o in objectives.items() if n in GUARDED}
        picture = None if args.quick else docs / "objectives-mottling.png"
        result = {
            "name": "objective_reactions",
            "command": "python benchmarks/objective_reactions.py" + (" --quick" if args.quick else ""),
            "quick": args.quick, "versions": versions(), "count": count, "lacking": lacking,
            "reactions": reactions(objectives, count),
            "mottling": mottling(guarded, Schedule.load(SCHEDULE), count, picture),
        }  # fmt: skip
        write_text(file, json.dumps(result, indent=1) + "\n")
    text = tables(result)
    print(text)
    if not args.quick:
        into(docs / "objectives-reactions.md", "objective_reactions", text)


if __name__ == "__main__":
    main()
