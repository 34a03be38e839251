"""Diffusion models: loading one (`load_model`), what a search needs of it (`Model`), its memory and number formats.

`load_model("avatars")` gives an embedded model (those of `rwopt.embedded`; how they were made: `training/`).
"""

from rwopt.models.loading import load_model
from rwopt.models.model import Model

__all__ = ["Model", "load_model"]
