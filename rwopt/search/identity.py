"""What makes two searches the same (the recipe without what only says where it runs, and the model's own weights), and
what a run was made with.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from dataclasses import replace
from pathlib import Path

import torch

from rwopt.config import Settings, to_yaml
from rwopt.models import Model
from rwopt.objectives import objective_spec

NAME = "name.txt"
"""In a run folder: what it was called when it was made."""


def weights_digest(model: Model, each: int = 64) -> str:
    """SHA-256 over the first numbers of every tensor of U-Net and VAE, in bfloat16: the same from any number format."""
    digest = hashlib.sha256()
    for net in (model.unet, model.vae):
        for name, tensor in sorted(net.state_dict().items()):
            head = tensor.reshape(-1)[:each].to("cpu", torch.bfloat16).view(torch.int16)
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + head.numpy().tobytes())
    return digest.hexdigest()


def fingerprint(settings: Settings, model: Model) -> str:
    """Of recipe, model, and versions of objectives.

    A model's place may differ from machine to machine, and so may the storage's address.
    """
    measured = settings.objective
    names = (*measured.terms, *measured.report, *settings.tuner.limits, *settings.tuner.guard)
    versions = {name: objective_spec(name).version for name in sorted(set(names)) if name != "objective"}
    newer = {name: version for name, version in versions.items() if version != "1"}  # of one's own: its file's digest
    bare = replace(
        settings,
        track=type(settings.track)(),
        model=replace(settings.model, name="", device="auto", checkpointing="auto", config="", revision="", variant=""),
        tuner=replace(settings.tuner, storage="", heartbeat=1, grace=2),
    )
    return hashlib.sha256((to_yaml(bare) + weights_digest(model) + (str(newer) if newer else "")).encode()).hexdigest()


def run_name(folder: Path) -> str:
    """What the studies of a run are filed under in a shared storage: its folder's first name, whatever it is now."""
    kept = folder / NAME
    return kept.read_text(encoding="utf-8").strip() if kept.exists() else folder.absolute().name


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """What the run was made with."""
    packages = ("rwopt", "torch", "diffusers", "transformers", "optuna", "numpy", "wandb")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}
