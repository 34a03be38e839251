"""Measure the emoji model against its targets. Run: `python -m training.emoji.measure` (about 3 minutes, 2 cores).

Uses stock diffusers for sampling and no rwopt code but the judge network. Guidance is the best of a few on validation
captions by the scorer; all that is printed is of test combinations, which nothing was trained on. Prints a table,
writes `benchmarks/results/model-emoji.json` and the sample sheet `docs/samples-emoji.png`.
"""

from __future__ import annotations

import numpy as np
import torch

from rwopt.models.judge import Judge
from rwopt.tasks.cases import load_cases
from training.common import ROOT
from training.emoji.drawings import MODEL, Drawings
from training.emoji.train_vae import unseen
from training.judging import accuracy
from training.measuring import as_labels, psnr, publish_table, sample, sheet, size_and_time, stock_pipeline

SCALES = (2.0, 3.0, 4.0, 6.0, 8.0)
TARGETS = {"vae_psnr": 28.0, "judge_accuracy": 0.95, "judge_subject_of_5": 0.85, "sample_accuracy": 0.80,
           "sample_subject_of_5": 0.60}  # fmt: skip
CEILINGS = {"seconds_16_pictures": 10.0, "megabytes": 30.0}


def attributes_alone(found: dict[str, float]) -> float:
    """Mean accuracy of all that is not the subject, of which there are too many."""
    return float(np.mean([v for name, v in found.items() if name != "subject"]))


def main() -> None:
    pipe, drawings = stock_pipeline(MODEL), Drawings.load()
    judges = {name: Judge.load(name, "emoji") for name in ("scorer", "judge")}
    rows: dict[str, float] = {"vae_psnr": psnr(pipe.vae, unseen(drawings))}
    chosen = drawings.draw(drawings.rows("test"), 1024, torch.Generator().manual_seed(1))
    images, labels = drawings.compose(*chosen), drawings.told(*chosen[:2])
    for name, judge in judges.items():
        scores = accuracy(judge, images, labels)
        rows[f"{name}_accuracy"] = attributes_alone(scores)
        rows[f"{name}_subject_of_5"] = accuracy(judge, images, labels, 5)["subject"]
        rows |= {f"{name}_accuracy/{k}": v for k, v in scores.items()}

    cases = load_cases("emoji", "validation", "generation")[:64]
    said, right = [c.caption for c in cases], as_labels(cases, drawings.attributes)

    def scored(guidance: float) -> float:
        verdict = judges["scorer"](torch.from_numpy(sample(pipe, said, guidance)).permute(0, 3, 1, 2))
        found = [verdict.probability(n, right[:, i].clamp(min=0))[right[:, i] >= 0]
                 for i, n in enumerate(verdict.logits)]  # fmt: skip
        return float(torch.cat(found).detach().mean())

    guidance = max(SCALES, key=scored)
    cases = load_cases("emoji", "test", "generation")
    captions, right = [c.caption for c in cases], as_labels(cases, drawings.attributes)
    pictures = sample(pipe, captions, guidance)
    drawn = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    found = accuracy(judges["judge"], drawn, right)
    rows["sample_accuracy"] = attributes_alone(found)
    rows["sample_subject_of_5"] = accuracy(judges["judge"], drawn, right, 5)["subject"]
    rows |= {f"sample_accuracy/{k}": v for k, v in found.items()}
    rows |= size_and_time(pipe, captions, guidance, MODEL)
    publish_table(ROOT.parent / "benchmarks/results/model-emoji.json", "python -m training.emoji.measure", guidance,
                  rows, TARGETS, CEILINGS)  # fmt: skip
    sheet(pictures, ROOT.parent / "docs/samples-emoji.png")


if __name__ == "__main__":
    main()
