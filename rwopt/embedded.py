"""The models that ship with the package: weights and judges in `rwopt/models/<name>`, cases in `data/<name>`."""

from __future__ import annotations

from pathlib import Path

FOLDERS = {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("models/*/model_index.json"))}
"""Name of each -> its folder, a diffusers model with `scorer` and `judge` beside `unet`."""

DEFAULT = "avatars"
"""The one that is meant where none is named."""


def place_of(name: str) -> str:
    """Where a model lies: the folder of an embedded one, else the name itself, a path or a hub id."""
    return str(FOLDERS.get(name, name))
