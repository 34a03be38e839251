"""What measuring an embedded model shares: samples of stock diffusers, the table and its file, the sheet of samples."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import Tensor

STEPS = 20


def stock_pipeline(model: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: StableDiffusionPipeline, captions: list[str], guidance: float, seed: int = 0) -> np.ndarray:
    """Float pictures [N, 64, 64, 3] in [0, 1], 16 a batch."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for i in range(0, len(captions), 16):
        parts.append(
            pipe(captions[i : i + 16], num_inference_steps=STEPS, guidance_scale=guidance, generator=generator,
                 output_type="np").images
        )  # fmt: skip
    return np.concatenate(parts)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: Tensor) -> float:
    """Mean over pictures [N, 3, 64, 64] in [0, 1] of the PSNR, in dB, of decode(encode(x)) with the posterior mean."""
    values = []
    for x in pictures.split(64):
        y = (vae.decode(vae.encode(x * 2 - 1).latent_dist.mode()).sample / 2 + 0.5).clamp(0, 1)
        values.append(-10 * torch.log10(((x - y) ** 2).mean((1, 2, 3))))
    return float(torch.cat(values).mean())


def as_labels(cases: Iterable[Any], attributes: dict[str, list[str]]) -> Tensor:
    """[N, attributes]: the wanted value of each case; -1 where one does not apply."""
    return torch.tensor([
        [-1 if n in c.hidden else values.index(c.target[n]) for n, values in attributes.items()] for c in cases
    ])  # fmt: skip


def size_and_time(pipe: StableDiffusionPipeline, captions: list[str], guidance: float, model: Path) -> dict[str, float]:
    """Seconds for 16 pictures, and megabytes of all files."""
    start = time.perf_counter()
    sample(pipe, captions[:16], guidance)
    seconds = time.perf_counter() - start
    size = sum(f.stat().st_size for f in model.rglob("*") if f.is_file())
    return {"seconds_16_pictures": seconds, "megabytes": size / 1e6}


def publish_table(file: Path, command: str, guidance: float, rows: dict[str, float], targets: dict[str, float],
                  ceilings: dict[str, float]) -> None:  # fmt: skip
    """Print every value beside its goal, and write all of it."""
    for name, value in rows.items():
        goal = f">= {targets[name]:g}" if name in targets else f"<= {ceilings[name]:g}" if name in ceilings else ""
        print(f"{name:<36} {value:8.3f}  {goal}")
    result = {"command": command, "steps": STEPS, "guidance": guidance, "measured": rows, "targets": targets,
              "ceilings": ceilings}  # fmt: skip
    file.write_text(json.dumps(result, indent=1) + "\n")


def sheet(pictures: np.ndarray, path: Path) -> None:
    """The first 32 of float pictures [N, 64, 64, 3], eight a row."""
    from rwopt.report.grid import image_grid

    shown = (pictures[:32] * 255).round().astype(np.uint8)
    columns = {f"{i + 1}": [shown[i + 8 * row] for row in range(4)] for i in range(8)}
    image_grid(columns, path, [""] * 4, scale=2)
