"""Measure the embedded model against its targets. Run: `python training/measure.py` (about 2 minutes, 2 cores).

Uses stock diffusers for sampling and no rwopt code but the judge network. Prints a table, writes
`benchmarks/results/model.json` and the sample sheet `docs/samples.png`.
"""

from __future__ import annotations

import json
import time

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from rwopt.models.judge import Judge
from rwopt.tasks.cases import load_cases

from common import MODEL, ROOT, load_pool, to_float, visible
from judging import accuracy
from train_vae import psnr
from world import NAMES

COLOURS = ("skin", "background", "clothing_color")
GUIDANCE, STEPS = 4.0, 20


def sample(pipe: StableDiffusionPipeline, captions: list[str], seed: int = 0) -> np.ndarray:
    """Float pictures [N, 64, 64, 3] in [0, 1], 16 a batch."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for i in range(0, len(captions), 16):
        parts.append(
            pipe(captions[i : i + 16], num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator,
                 output_type="np").images
        )  # fmt: skip
    return np.concatenate(parts)


def main() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    unseen, values = load_pool("unseen")
    rows: dict[str, float] = {"vae_psnr": psnr(pipe.vae, unseen[:, 0])}
    for name in ("scorer", "judge"):
        scores = accuracy(Judge.load(name), to_float(unseen[:, 0]), torch.from_numpy(visible(values)[:, 0]))
        rows[f"{name}_accuracy"] = float(np.mean(list(scores.values())))
        rows |= {f"{name}_accuracy/{k}": v for k, v in scores.items()}
    cases = load_cases("avatars", "test", "generation")
    pictures = sample(pipe, [c.caption for c in cases])
    labels = np.array([
        [-1 if n in c.hidden else NAMES[n].index(c.target[n]) for n in NAMES] for c in cases
    ])  # fmt: skip
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    found = accuracy(Judge.load("judge"), images, torch.from_numpy(labels))
    rows["sample_accuracy"] = float(np.mean(list(found.values())))
    rows["sample_colours"] = float(np.mean([found[n] for n in COLOURS]))
    rows |= {f"sample_accuracy/{k}": v for k, v in found.items()}
    start = time.perf_counter()
    sample(pipe, [c.caption for c in cases[:16]])
    rows["seconds_16_pictures"] = time.perf_counter() - start
    rows["megabytes"] = sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) / 1e6
    targets = {"vae_psnr": 30.0, "judge_accuracy": 0.97, "sample_accuracy": 0.75, "sample_colours": 0.90}
    ceilings = {"seconds_16_pictures": 10.0, "megabytes": 40.0}
    for name, value in rows.items():
        goal = f">= {targets[name]:g}" if name in targets else f"<= {ceilings[name]:g}" if name in ceilings else ""
        print(f"{name:<36} {value:8.3f}  {goal}")
    result = {"command": "python training/measure.py", "steps": STEPS, "guidance": GUIDANCE, "measured": rows,
              "targets": targets, "ceilings": ceilings}  # fmt: skip
    (ROOT.parent / "benchmarks/results/model.json").write_text(json.dumps(result, indent=1) + "\n")
    from rwopt.report.grid import image_grid

    sheet = (pictures[:32] * 255).round().astype(np.uint8)
    columns = {f"{i + 1}": [sheet[i + 8 * row] for row in range(4)] for i in range(8)}
    image_grid(columns, ROOT.parent / "docs/samples.png", [""] * 4, scale=2)


if __name__ == "__main__":
    main()
