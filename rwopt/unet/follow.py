"""A hook on a layer that may be replaced while it is on: LoRA wraps layers at any time, and unwraps them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn


class Followed:
    """A forward hook on what is `owner.name` at the start of each U-Net call.

    Resnets need it: their branch is what the layer `conv2` gives. From outside of the resnet the branch is the output
    without the shortcut, and to compute the 1 x 1 shortcut again costs 3 % of a U-Net call.
    """

    _lock = threading.Lock()

    def __init__(self, owner: nn.Module, name: str, hook: Callable[..., Any]) -> None:
        self.owner, self.name, self.hook = owner, name, hook
        self.layer: nn.Module = getattr(owner, name)
        self._handle = self.layer.register_forward_hook(hook)

    def follow(self) -> None:
        """Move to the layer that is there now."""
        layer = self.owner._modules[self.name]  # an attribute of a module, without the search for it
        if layer is self.layer or layer is None:
            return
        with self._lock:  # another thread may be as far
            if layer is not self.layer:
                self._handle.remove()
                self.layer, self._handle = layer, layer.register_forward_hook(self.hook)

    def remove(self) -> None:
        self._handle.remove()
