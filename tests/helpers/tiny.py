"""A whole search in seconds: a random Stable Diffusion of the embedded model's kind, a few kilobytes, and few cases."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rwopt.embedded import FOLDERS
from rwopt.search.arms import Arm

TRIALS, DIAL_TRIALS, CONTROL_TRIALS = 3, 2, 1
SETTINGS = ["task.train=3", "task.validation=3", "task.test=5", f"tuner.trials={TRIALS}", "tuner.sampler=random",
            f"tuner.dial_trials={DIAL_TRIALS}", f"tuner.control_trials={CONTROL_TRIALS}", "task.steps=2",
            "weights.knots=2", "gradient.updates=1", "gradient.batch=2", "gradient.draws=2", "analytic.rounds=1",
            "analytic.epochs=1", "analytic.cases=2", "probe.cases=2", "track.wandb=off",
            "model.dtype=float32"]  # fmt: skip
CONTROLS = ("gradient norm", "uniform mean", "reversed", "permuted sites", "permuted steps")
STUDIES = {"guidance": TRIALS + 3 * DIAL_TRIALS, "analytic": TRIALS + 2 * DIAL_TRIALS,
           **dict.fromkeys(CONTROLS, CONTROL_TRIALS), "constant weights": TRIALS, "constant": 2 * DIAL_TRIALS,
           "learned weights": TRIALS, "learned": 2 * DIAL_TRIALS}  # fmt: skip
"""Scored trials that a finished search leaves in each study."""


def save_tiny_pipeline(folder: Path, side: int = 64, channels: int = 4) -> Path:
    """A seeded random pipeline in the diffusers layout for pictures of `side` x `side` pixels and latents of so many
    channels; tokenizer and scheduler are embedded ones."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDERS["avatars"] / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=side // 8, in_channels=channels, out_channels=channels, layers_per_block=1,
        block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=side, mid_block_add_attention=False,
        latent_channels=channels,
    )  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
    ))  # fmt: skip
    scheduler = DDIMScheduler.from_pretrained(FOLDERS["avatars"] / "scheduler")
    StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


def rwopt(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    environment = {**os.environ, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.Popen(
        [sys.executable, "-m", "rwopt.cli", *map(str, arguments)], text=True, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,  # type: ignore[call-overload]
    )  # fmt: skip


def scored_trials(folder: Path) -> dict[str, int]:
    """Scored trials of each study in a run folder, read without Optuna and the tuners' own tables."""
    query = """select study_name, count(*) from studies join trials using (study_id)
               where state = 'COMPLETE' group by study_name"""
    with sqlite3.connect(f"file:{folder / 'study.db'}?mode=ro", uri=True) as database:
        if database.execute("select 1 from sqlite_master where name = 'trials'").fetchone() is None:
            return {}  # killed before its tables were made
        counts = dict(database.execute(query).fetchall())
    for table in folder.glob("studies/*/trials.json"):
        counts[table.parent.name] = sum(row["state"] == "done" for row in json.loads(table.read_text())["rows"])
    return counts


def check_files(folder: Path) -> int:
    """Raise unless every file that a (killed) run left is whole; the number of files that were read."""
    count = 0
    for path in folder.rglob("*"):
        if path.is_dir() or path.name.startswith("."):  # a killed write leaves a hidden temporary file at most
            continue
        count += 1
        if path.suffix == ".json":
            json.loads(path.read_text())
            if path.parent.name == "arms" and path.suffixes == [".json"]:
                Arm.load(path)
        elif path.suffix == ".jsonl":
            *whole, last = path.read_text().split("\n")
            for line in whole:
                json.loads(line)
            if last:  # one torn line at the end is mended when the file is opened again
                path.read_text().index("\n")
        elif path.suffix == ".png":
            assert path.read_bytes().endswith(b"IEND\xaeB`\x82"), path
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), path
        elif path.suffix in (".yaml", ".txt"):
            assert path.read_text().endswith("\n"), path
    return count


def killed_search(
    folder: Path, settings: Sequence[str], kills: int, seed: int, within: float
) -> dict[str, object]:
    """Start a search, kill it `kills` times at random moments (up to `within` seconds of work), then let it finish.

    Times count from the first line that a run adds to its record: before, it only loads the model. All files are
    checked after each kill. Returns what was seen; raises AssertionError if a run fails or a file is not whole.
    """
    record = folder / "metrics.jsonl"
    rng, seen = random.Random(seed), []
    while len(seen) < kills:
        before = record.stat().st_size if record.exists() else 0
        process = rwopt(*_arguments(folder, settings))
        while process.poll() is None and not (record.exists() and record.stat().st_size > before):
            time.sleep(0.02)
        moment = rng.uniform(0, within)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        trials = scored_trials(folder) if (folder / "study.db").exists() else {}
        seen.append({
            "seconds": round(moment, 2), "killed": process.returncode != 0, "files": check_files(folder),
            "scored_trials": sum(trials.values()),
        })  # fmt: skip
    process = rwopt(*_arguments(folder, settings))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return {"kills": seen, "files": check_files(folder), "trials": scored_trials(folder), "output": output}


def _arguments(folder: Path, settings: Sequence[str]) -> list[str]:
    if (folder / "recipe.yaml").exists():
        return ["search", f"resume={folder}"]
    return ["search", *settings, "--out", str(folder)]
