"""`lpips.alex`, `lpips.vgg`, `lpips.squeeze`: learned perceptual distance to the reference (Zhang et al. 2018,
arXiv:1801.03924, equation 1), lower is better.

The linear heads (BSD-2-Clause) come with torchmetrics. The networks that they stand on are written out here, since
torchvision is not to be had everywhere: AlexNet (Krizhevsky 2014, arXiv:1404.5997), VGG-16 (Simonyan and Zisserman
2014, arXiv:1409.1556) and SqueezeNet 1.1 (Iandola et al. 2016, arXiv:1602.07360), convolutions only. Their ImageNet
weights are torchvision's published files, whose names tell their checksums; they were on no machine that this was
written and tested on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rwopt.objectives.frozen import still
from rwopt.objectives.objective import Batch, Objective, ObjectiveSpec
from rwopt.objectives.preprocess import normalise
from rwopt.objectives.weights import ANY, Source, filled, options, read_state, scratch

_TORCH = "https://download.pytorch.org/models"
_FILES = {
    "alex": Source("backbone", _TORCH, "alexnet-owt-7be5be79.pth", "BSD-3-Clause", 244_400_000, "7be5be79"),
    "vgg": Source("backbone", _TORCH, "vgg16-397923af.pth", "BSD-3-Clause", 553_400_000, "397923af"),
    "squeeze": Source("backbone", _TORCH, "squeezenet1_1-b8a52dc0.pth", "BSD-3-Clause", 4_970_000, "b8a52dc0"),
}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pictures in [-1, 1]
_AT_ONCE = 4  # pictures: a VGG's features of one at 512 pixels take 0.2 GB


class Fire(nn.Module):
    """SqueezeNet's module: few 1 x 1 filters, then many of 1 x 1 and 3 x 3 side by side."""

    def __init__(self, channels: int, few: int, many: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, few, 1)
        self.expand1x1 = nn.Conv2d(few, many, 1)
        self.expand3x3 = nn.Conv2d(few, many, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu()


def _alex() -> Iterator[nn.Module]:
    pool = nn.MaxPool2d(3, 2)
    yield from (nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool, nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool)
    for channels, out in ((192, 384), (384, 256), (256, 256)):
        yield from (nn.Conv2d(channels, out, 3, padding=1), nn.ReLU())


def _vgg() -> Iterator[nn.Module]:
    channels = 3
    for out, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if channels > 3:
            yield nn.MaxPool2d(2)
        for _ in range(repeats):
            yield from (nn.Conv2d(channels, out, 3, padding=1), nn.ReLU())
            channels = out


def _squeeze() -> Iterator[nn.Module]:
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    yield from (nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool, Fire(64, 16, 64), Fire(128, 16, 64), pool)
    yield from (Fire(128, 32, 128), Fire(256, 32, 128), pool, Fire(256, 48, 192), Fire(384, 48, 192))
    yield from (Fire(384, 64, 256), Fire(512, 64, 256))


# network -> its layers, and the numbers of those whose output counts
_NETWORKS: dict[str, tuple[Callable[[], Iterator[nn.Module]], tuple[int, ...]]] = {
    "alex": (_alex, (1, 4, 7, 9, 11)),
    "vgg": (_vgg, (3, 8, 15, 22, 29)),
    "squeeze": (_squeeze, (1, 4, 7, 9, 10, 11, 12)),
}


class Perceptual(nn.Module):
    """Distance [N] of two sets of pictures [N, 3, H, W] in [0, 1]: at each of some layers features of unit length over
    channels, their squared difference weighted by channel, mean over places; summed over layers."""

    def __init__(self, network: str) -> None:
        super().__init__()
        layers, self.taps = _NETWORKS[network]
        self.features = nn.Sequential(*layers())
        self.heads = nn.ParameterList(_heads(network))

    def forward(self, images: Tensor, other: Tensor) -> Tensor:
        x = normalise(torch.cat([images, other]) * 2 - 1, _SHIFT, _SCALE)
        total, taps = x.new_zeros(len(images)), iter(self.heads)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                unit = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()  # a root of 0 would have no gradient
                a, b = unit.chunk(2)
                total = total + ((a - b).square() * next(taps)).sum(1).mean((1, 2))
        return total


def _heads(network: str) -> list[nn.Parameter]:
    """Weights [C, 1, 1] of the channels at each layer that counts, as torchmetrics ships them."""
    spec = find_spec("torchmetrics")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{network}.pth"
    state = read_state(str(path))
    return [nn.Parameter(state[key].reshape(-1, 1, 1)) for key in sorted(state)]


def specs() -> Mapping[str, ObjectiveSpec]:
    out = {}
    for network, source in _FILES.items():
        name = f"lpips.{network}"
        out[name] = ObjectiveSpec(
            name, False, True, (0.0, float("inf")), frozenset({"reference"}), source.licence,
            "learned perceptual distance to the reference", weights=source.file, sha256=source.sha256,
            size=source.size,
        )  # fmt: skip
    return out


def missing(name: str, **given: Any) -> str:
    """What is not there, in one line; "" if all is."""
    return _FILES[name.split(".")[1]].missing(name, given.get("backbone", ""))


def make(name: str, **given: Any) -> Objective:
    """The objective. Options, both text: backbone: the published file, or one with the same names; sha256: what it must
    have, "" for the published one's, "any" for whatever it is.

    Raises `UserError` where weights are missing, are of another network or have another checksum.
    """
    network = name.split(".")[1]
    chosen = options(name, given, {"backbone": "", "sha256": ""})
    path, digest = _FILES[network].checked(name, chosen["backbone"], chosen["sha256"])
    distance = perceptual(network, path, digest)

    def score(batch: Batch) -> Tensor:
        assert batch.reference is not None
        distance.to(batch.images.device)
        pairs = zip(*(torch.split(x.float(), _AT_ONCE) for x in (batch.images, batch.reference)), strict=True)
        return torch.cat([distance(images, other) for images, other in pairs])

    return Objective(replace(specs()[name], sha256=digest), score)


@lru_cache(maxsize=3)
def perceptual(network: str, path: str, digest: str) -> Perceptual:
    """The frozen distance on a file of that content; what classifies in it is left out."""
    state = {key: value for key, value in read_state(path).items() if not key.startswith("classifier.")}
    distance = Perceptual(network)
    own = {f"heads.{key}": value for key, value in distance.heads.state_dict().items()}
    return still(filled(distance, path, {**state, **own}))


def tiny(name: str) -> dict[str, Any]:
    """Options of the true network, which is small, with random weights."""
    network = name.split(".")[1]
    return {"backbone": str(scratch(network, _WRITERS[network]) / "backbone.pt"), "sha256": ANY}


def _write_tiny(network: str, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(*_NETWORKS[network][0]())
    torch.save({f"features.{key}": value for key, value in layers.state_dict().items()}, folder / "backbone.pt")


_WRITERS = {network: partial(_write_tiny, network) for network in _NETWORKS}
