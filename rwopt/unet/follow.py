"""A hook on a layer that may be replaced while it is on: LoRA wraps layers at any time, and unwraps them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn

from rwopt.errors import UserError
from rwopt.unet.scope import eager


class Followed:
    """A forward hook on what is `owner.name` at the start of each U-Net call.

    Resnets need it: their branch is what the layer `conv2` gives. From outside of the resnet the branch is the output
    without the shortcut, and to compute the 1 x 1 shortcut again costs 3 % of a U-Net call.
    """

    def __init__(self, owner: nn.Module, name: str, hook: Callable[..., Any]) -> None:
        self.owner, self.name, self.hook = owner, name, hook
        self.layer: nn.Module = getattr(owner, name)
        self._handle = self.layer.register_forward_hook(hook)
        self._lock = threading.Lock()

    def check(self) -> None:
        """While a graph is traced, where hooks cannot be moved: UserError if the layer was replaced.

        It ends the graph and the call goes on without one, or `fullgraph=True` was asked for and shows the line.
        """
        if getattr(self.owner, self.name) is not self.layer:
            raise UserError("layers were replaced (LoRA?) after the schedule was applied: apply it again, then compile")

    @eager
    def follow(self) -> None:
        """Move to the layer that is there now."""
        layer: nn.Module = getattr(self.owner, self.name)
        if layer is self.layer:
            return
        with self._lock:  # another thread may be as far
            if layer is not self.layer:
                self._handle.remove()
                self.layer, self._handle = layer, layer.register_forward_hook(self.hook)

    def remove(self) -> None:
        self._handle.remove()
