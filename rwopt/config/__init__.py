"""The typed border: what a recipe may say (`settings.py`), its parts (`groups.py`), how one is read (`recipe.py`)."""

from rwopt.config.recipe import find_recipe, load, parse, recipes, to_yaml
from rwopt.config.settings import (
    DialSettings,
    Settings,
    TaskSettings,
    TunerSettings,
)

__all__ = ["DialSettings", "Settings", "TaskSettings", "TunerSettings", "find_recipe", "load", "parse", "recipes",
           "to_yaml"]  # fmt: skip
