"""rwopt: learn when and how much each block of a diffusion U-Net should count.

    import rwopt
    with rwopt.apply(pipe, "schedule.json"):
        image = pipe("a cat").images[0]

Names are loaded when first used, so that `import rwopt` imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwopt.errors import UserError
    from rwopt.models import Model, load_model
    from rwopt.schedule import Schedule
    from rwopt.schedule.weights import WeightFunction
    from rwopt.unet.apply import Handle, apply
    from rwopt.unet.attachment import Attachment
    from rwopt.unet.mapping import map_schedule
    from rwopt.unet.neighbours import freeu, skip_tuning
    from rwopt.unet.sites import Site, list_sites

_HOME = {
    "Attachment": "unet.attachment",
    "Handle": "unet.apply",
    "Model": "models",
    "Schedule": "schedule",
    "Site": "unet.sites",
    "UserError": "errors",
    "WeightFunction": "schedule.weights",
    "apply": "unet.apply",
    "freeu": "unet.neighbours",
    "list_sites": "unet.sites",
    "load_model": "models",
    "map_schedule": "unet.mapping",
    "skip_tuning": "unet.neighbours",
}
__all__ = ["Attachment", "Handle", "Model", "Schedule", "Site", "UserError", "WeightFunction", "apply", "freeu",
           "list_sites", "load_model", "map_schedule", "skip_tuning"]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rwopt' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"rwopt.{_HOME[name]}"), name)
    globals()[name] = value
    return value
