"""Measure the avatars' model against its targets. Run: `python training/measure.py` (about 2 minutes, 2 cores).

Uses stock diffusers for sampling and no rwopt code but the judge network. Prints a table, writes
`benchmarks/results/model.json` and the sample sheet `docs/samples.png`.
"""

from __future__ import annotations

import numpy as np
import torch

from rwopt.models.judge import Judge
from rwopt.tasks.cases import load_cases

from common import MODEL, ROOT, load_pool, to_float, visible
from judging import accuracy
from measuring import as_labels, psnr, publish_table, sample, sheet, size_and_time, stock_pipeline
from world import NAMES

COLOURS = ("skin", "background", "clothing_color")
GUIDANCE = 4.0
TARGETS = {"vae_psnr": 30.0, "judge_accuracy": 0.97, "sample_accuracy": 0.75, "sample_colours": 0.90}
CEILINGS = {"seconds_16_pictures": 10.0, "megabytes": 40.0}


def main() -> None:
    pipe = stock_pipeline(MODEL)
    unseen, values = load_pool("unseen")
    rows: dict[str, float] = {"vae_psnr": psnr(pipe.vae, to_float(unseen[:, 0]))}
    for name in ("scorer", "judge"):
        scores = accuracy(Judge.load(name), to_float(unseen[:, 0]), torch.from_numpy(visible(values)[:, 0]))
        rows[f"{name}_accuracy"] = float(np.mean(list(scores.values())))
        rows |= {f"{name}_accuracy/{k}": v for k, v in scores.items()}
    cases = load_cases("avatars", "test", "generation")
    captions = [c.caption for c in cases]
    pictures = sample(pipe, captions, GUIDANCE)
    labels = as_labels(cases, {name: list(values) for name, values in NAMES.items()})
    found = accuracy(Judge.load("judge"), torch.from_numpy(pictures).permute(0, 3, 1, 2), labels)
    rows["sample_accuracy"] = float(np.mean(list(found.values())))
    rows["sample_colours"] = float(np.mean([found[n] for n in COLOURS]))
    rows |= {f"sample_accuracy/{k}": v for k, v in found.items()}
    rows |= size_and_time(pipe, captions, GUIDANCE, MODEL)
    publish_table(ROOT.parent / "benchmarks/results/model.json", "python training/measure.py", GUIDANCE, rows, TARGETS,
                  CEILINGS)  # fmt: skip
    sheet(pictures, ROOT.parent / "docs/samples.png")


if __name__ == "__main__":
    main()
