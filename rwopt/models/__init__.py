"""Diffusion models: loading one (`load_model`), what a search needs of it (`Model`), its memory and number formats.

`load_model("avatars")` gives the embedded model (64 x 64 avatars, see `training/`).
"""

from rwopt.models.loading import EMBEDDED, load_model
from rwopt.models.model import Model

__all__ = ["EMBEDDED", "Model", "load_model"]
