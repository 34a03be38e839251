"""The embedded models as parameters of tests, and one more of their layout, small and random, which none of them is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import save_tiny_pipeline

from rwopt.embedded import FOLDERS
from rwopt.files import package_folder
from rwopt.models.judge import NETWORKS, Judge

ATTRIBUTES = {
    "style": ["3d emoji", "flat emoji"], "subject": [f"subject {i}" for i in range(200)], "skin": ["none", "light"],
    "hair": ["none", "red", "bald"], "background": ["white", "violet", "mint"],
}  # fmt: skip
SIDE, CHANNELS = 96, 16


def models(*leave_out: str) -> list[object]:
    """Names of the embedded models as parameters; one whose folder is not there yet is skipped."""
    return [_param(name, folder / "model_index.json") for name, folder in FOLDERS.items() if name not in leave_out]


def case_sets() -> list[object]:
    """The same of their cases."""
    return [_param(name, package_folder("data") / name / "test.jsonl") for name in FOLDERS]


def _param(name: str, file: Path) -> object:
    return pytest.param(name, marks=pytest.mark.skipif(not file.is_file(), reason=f"{file} is not there"))


def stock_pipeline(model: Any) -> Any:
    """diffusers' own pipeline of a model's networks, with DDIM on the grid of `rwopt`'s own loop."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    stock = StableDiffusionPipeline(
        model.vae, model.text_encoder, model.tokenizer, model.unet,
        DDIMScheduler.from_config(model.scheduler.config, timestep_spacing="trailing"), None, None,
        requires_safety_checker=False,
    )  # type: ignore[no-untyped-call] # fmt: skip
    stock.set_progress_bar_config(disable=True)
    return stock


def save_other_model(folder: Path) -> Path:
    """A random pipeline with judges of its own, for pictures and attributes unlike those of avatars."""
    import torch

    save_tiny_pipeline(folder, SIDE, CHANNELS)
    save_judges(folder)
    torch.manual_seed(1)
    return folder


def save_judges(folder: Path) -> Path:
    """The judges of `save_other_model` alone."""
    import torch

    for seed, network in enumerate(NETWORKS):
        torch.manual_seed(seed)
        Judge(ATTRIBUTES, width=8 * (1 + seed), embedding=8, size=SIDE).save(folder / network)
    return folder
