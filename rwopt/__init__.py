"""rwopt: learn when and how much each block of a diffusion U-Net should count.

    import rwopt
    with rwopt.apply(pipe, "schedule.json"):
        image = pipe("a cat").images[0]

Names are loaded when first used, so that `import rwopt` imports no torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwopt.apply import Attachment, Handle, apply
    from rwopt.errors import UserError
    from rwopt.models import Model, load_model
    from rwopt.schedule import Schedule
    from rwopt.sites import Site, list_sites
    from rwopt.weights import WeightFunction

_HOME = {
    "Attachment": "apply",
    "Handle": "apply",
    "apply": "apply",
    "UserError": "errors",
    "Model": "models",
    "load_model": "models",
    "Schedule": "schedule",
    "Site": "sites",
    "list_sites": "sites",
    "WeightFunction": "weights",
}
__all__ = ["Attachment", "Handle", "Model", "Schedule", "Site", "UserError", "WeightFunction", "apply", "list_sites",
           "load_model"]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'rwopt' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"rwopt.{_HOME[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """This package. `rwopt.apply` is the function, also after something has imported the submodule of that name.

    The import system binds a submodule to its package once it is loaded; for public names that binding is left out.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
