"""A frozen network with a memory: several objectives that look at the same pictures cost one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Seen = TypeVar("Seen")
Network = TypeVar("Network", bound=nn.Module)


def still(network: Network) -> Network:
    """The network in float32, without dropout and gradients to its weights."""
    return network.eval().requires_grad_(False).float()


class Frozen(Generic[Seen]):
    """`look` at pictures [N, 3, H, W] through a network that learns nothing, in float32, on the pictures' device.

    What was seen of the last three sets of pictures is remembered (of none while gradients are taken).
    """

    def __init__(self, network: nn.Module, look: Callable[[Tensor], Seen]) -> None:
        self.network, self.look = still(network), look
        self._seen: list[tuple[Tensor, Seen]] = []

    def __call__(self, images: Tensor) -> Seen:
        """What `look` gives for the pictures, computed once for the same ones."""
        self.network.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            if images.requires_grad and torch.is_grad_enabled():
                return self.look(images.float())
            # Own copies, compared by content (a hundredth of a forward pass): a tensor may be changed in place, and
            # neither its identity nor its version counter tells when that happened through NumPy.
            for i, (copy, seen) in enumerate(self._seen):
                if copy.device == images.device and copy.dtype == images.dtype and torch.equal(copy, images):
                    self._seen.append(self._seen.pop(i))
                    return seen
            with torch.no_grad():
                seen = self.look(images.float())
        self._seen = [*self._seen[-2:], (images.detach().clone(), seen)]
        return seen
