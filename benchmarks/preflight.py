"""What preflight says of time and memory against what the run then took: true architectures, random weights, this CPU.

`python benchmarks/preflight.py [--quick] [--size 512] [rows ...]`, on a machine that does nothing else and has
bfloat16: a row is a search in a process of its own, square pictures in two calls without guidance, in bfloat16. Rows:
`generation` (weights by SPSA, no gradient), `gradient` (an update by gradient), `xl` (SDXL by SPSA).
Writes `benchmarks/results/preflight.json` (rows: size, calls, seconds and bytes as planned and as counted, the load of
the machine) and prints their ratios. `--quick`: networks of few channels, to see the benchmark itself; writes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from architectures import POOLED, SD15, VAE, XL

from rwopt import config
from rwopt.embedded import FOLDERS
from rwopt.files import write_text
from rwopt.models.memory import most_memory
from rwopt.progress import Silent
from rwopt.search.identity import versions
from rwopt.search.search import Search

RESULT = Path(__file__).resolve().parent / "results" / "preflight.json"
COMMON = ["task.name=generation", "task.cases=prompts", "task.steps=2", "task.batch=1", "task.train=1", "task.test=1",
          "task.validation=1", "task.teacher.steps=2", "dials.guidance=1", "arms=[plain,learned]", "steps.learn=[]",
          "weights.kinds=[transformer]", "weights.group_by=kind", "probe.cases=1", "tuner.top_k=1", "track.wandb=off",
          "model.dtype=bfloat16", "model.vae_dtype=bfloat16", "model.device=cpu"]  # fmt: skip
ROWS = {
    "generation": ("sd", ["tuner.name=spsa", "tuner.trials=1", "probe.start=none"]),
    "gradient": ("sd", ["tuner.name=gradient", "tuner.trials=2", "probe.start=none", "gradient.updates=1",
                        "gradient.batch=1", "model.checkpointing=off"]),
    "xl": ("xl", ["tuner.name=spsa", "tuner.trials=1", "probe.start=none"]),
}  # fmt: skip


def save_model(kind: str, folder: Path, quick: bool) -> None:
    """A pipeline of true sizes with random weights, its U-Net in bfloat16."""
    import diffusers
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["avatars"] / "tokenizer")
    unet, vae = dict(SD15 if kind == "sd" else XL), dict(VAE)
    if quick:
        unet["block_out_channels"], vae["block_out_channels"] = (32, 64, 64, 64)[: 4 if kind == "sd" else 3], (32,) * 4

    def text(width: int, layers: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64,
            num_hidden_layers=2 if quick else layers, projection_dim=1280, bos_token_id=tokenizer.bos_token_id,
            max_position_embeddings=tokenizer.model_max_length, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip

    if kind == "xl":
        unet |= POOLED
    torch.set_default_dtype(torch.bfloat16)  # made so from the start: in float32 it would be in memory twice
    network = diffusers.UNet2DConditionModel(**unet, sample_size=64)
    torch.set_default_dtype(torch.float32)
    parts = {
        "vae": diffusers.AutoencoderKL(**vae, sample_size=512), "text_encoder": CLIPTextModel(text(768, 12)),
        "tokenizer": tokenizer, "unet": network, "scheduler": diffusers.DDIMScheduler(beta_schedule="scaled_linear"),
    }  # fmt: skip
    if kind == "xl":
        second = CLIPTextModelWithProjection(text(1280, 32))
        pipe: Any = diffusers.StableDiffusionXLPipeline(
            **parts, text_encoder_2=second, tokenizer_2=tokenizer, add_watermarker=False
        )
    else:
        pipe = diffusers.StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipe.save_pretrained(folder)


def measure(name: str, model: Path, folder: Path, size: int) -> dict[str, Any]:
    """A row: what was planned, and what the run took, in this process."""
    changes = [*COMMON, *ROWS[name][1], f"model.name={model}", f"task.size=[{size},{size}]"]
    settings = config.load("few-steps", ["model=sd15", *changes])
    search = Search(settings, folder, Silent())
    plan = search.preflight()
    load, start, counted = os.getloadavg()[0], time.perf_counter(), search.experiment.model.calls
    search.run("benchmarks/preflight.py")
    seconds, calls = time.perf_counter() - start, search.experiment.model.calls - counted
    took = {"calls": calls, "seconds": round(seconds, 1), "bytes": most_memory(torch.device("cpu"))}
    return {
        "row": name, "size": size,
        "planned": {"calls": plan.total, "seconds": round(plan.time, 1), "bytes": round(plan.memory)},
        "took": took, "a call": round(plan.seconds, 2), "a decoded batch": round(plan.decode, 2),
        "load": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
    }  # fmt: skip


def ratios(row: dict[str, Any]) -> str:
    planned, took = row["planned"], row["took"]
    told = (f"{key} {planned[key] / took[key]:.2f}" for key in ("seconds", "bytes"))
    size = f"{took['bytes'] / 2**30:.1f} GiB, {took['seconds']:.0f} s"
    return f"{row['row']}, {row['size']}: planned / taken: {', '.join(told)} (taken: {size}; load {row['load']})"


def child(*words: str) -> None:
    subprocess.run([sys.executable, __file__, *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=["generation", "gradient"], help=f"of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--size", type=int, default=512, help="height and width of the pictures")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # what a process of its own does
    args = parser.parse_args()
    if args.part:
        what, kind, place = args.part
        if what == "save":
            save_model(kind, Path(place) / kind, args.quick)
        else:
            row = measure(what, Path(place) / kind, Path(place) / what, args.size)
            write_text(Path(place) / f"{what}.json", json.dumps(row))
        return
    rows = []
    with tempfile.TemporaryDirectory() as place:
        quick = ["--quick"] if args.quick else []
        for kind in dict.fromkeys(ROWS[name][0] for name in args.rows):
            child("--part", "save", kind, place, *quick)
        for name in args.rows:
            child("--part", name, ROWS[name][0], place, "--size", str(args.size))
            rows.append(json.loads((Path(place) / f"{name}.json").read_text()))
            print(ratios(rows[-1]), flush=True)
    if not args.quick:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        known = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
        kept = [row for row in known if row["row"] not in args.rows or row["size"] != args.size]
        about = {"command": "python benchmarks/preflight.py", **machine, "versions": versions()}
        result = {**about, "rows": [*kept, *rows]}
        write_text(RESULT, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
