"""Diffusion models: loading one (`load_model`), what a search needs of it (`Model`), its memory and number formats.

`load_model("avatars")` gives an embedded model (those of `rwopt.embedded`; how they were made: `training/`).
"""

from pathlib import Path

from rwopt.embedded import DEFAULT, place_of
from rwopt.models.loading import load_model
from rwopt.models.model import Model

EMBEDDED = Path(place_of(DEFAULT))
"""Folder of the embedded model that is meant where none is named; all of them: `rwopt.embedded`."""

__all__ = ["EMBEDDED", "Model", "load_model"]
