"""The judges of a model: one small network with attribute heads, an identity embedding and a realism score.

Each embedded model has two in its folder, beside `unet/`: `scorer` (what a search optimises) and `judge` (held out:
other seed, width and training pictures). Weights are safetensors beside a `config.json` that names the attributes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwopt.embedded import DEFAULT, FOLDERS, place_of
from rwopt.errors import UserError, check

NETWORKS = ("scorer", "judge")


@dataclass
class Verdict:
    """What a judge says of N pictures.

    logits: {attribute: [N, number of values]}, calibrated (temperature-scaled); embedding: unit vectors [N, E];
    realism: logit [N], 0 is undecided; features: [N, F], the layer before the heads.
    """

    logits: dict[str, Tensor]
    embedding: Tensor
    realism: Tensor
    features: Tensor

    def probability(self, attribute: str, value: Tensor) -> Tensor:
        """Probability [N] that `attribute` has the value of index `value` [N]."""
        return self.logits[attribute].softmax(-1).gather(1, value[:, None])[:, 0]

    def among(self, attribute: str, value: Tensor, k: int = 1) -> Tensor:
        """Whether that value is one of the `k` likeliest, bool [N]: fewer than `k` others are likelier."""
        logits = self.logits[attribute]
        return (logits > logits.gather(1, value[:, None])).sum(1) < k


class Judge(nn.Module):
    """Strided residual CNN for square pictures in [0, 1]; `attributes` maps a name to its values.

    width: of its first layer, a multiple of 8; embedding: of the identity; size: side of the pictures that it sees, in
    pixels, a multiple of 16; hidden: width of the features that all heads share. Raises `UserError` for another size.
    """

    def __init__(
        self, attributes: dict[str, list[str]], width: int = 24, embedding: int = 64, size: int = 64, hidden: int = 256
    ) -> None:
        super().__init__()
        check(size > 0 and size % 16 == 0, "judge: size", size, "give a multiple of 16")
        self.attributes, self.width, self.size = {k: list(v) for k, v in attributes.items()}, width, size
        channels = (width, 2 * width, 3 * width, 4 * width)
        self.stem = nn.Conv2d(3, width, 5, stride=2, padding=2)
        self.down = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, a), nn.SiLU(), nn.Conv2d(a, b, 3, stride=2, padding=1))
            for a, b in pairwise(channels)
        )
        self.same = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1)) for b in channels[1:]
        )
        places = (size // 16) ** 2  # the stem and three `down` halve it four times
        self.neck = nn.Sequential(
            nn.GroupNorm(8, channels[-1]), nn.SiLU(), nn.Flatten(), nn.Linear(places * channels[-1], hidden), nn.SiLU()
        )
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, len(values)) for name, values in self.attributes.items()})
        self.identity, self.real = nn.Linear(hidden, embedding), nn.Linear(hidden, 1)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(len(self.attributes)))

    def forward(self, images: Tensor) -> Verdict:
        """`images` [N, 3, H, W] in [0, 1]; those of another size are resized to the judge's own."""
        own = (self.size, self.size)
        if images.shape[-2:] != own:
            images = F.interpolate(images, own, mode="bilinear", antialias=True, align_corners=False)
        h = self.stem(images * 2 - 1)
        for down, same in zip(self.down, self.same, strict=True):
            h = down(h)
            h = h + same(h)
        features = self.neck(h)
        logits = {
            name: head(features) / self.temperature[i] for i, (name, head) in enumerate(self.heads.items())
        }
        return Verdict(logits, F.normalize(self.identity(features), dim=-1), self.real(features)[:, 0], features)

    def indices(self, attribute: str, values: list[str]) -> Tensor:
        """Value names of one attribute as indices [N]. Raises `UserError` for a value that the judge does not know."""
        known = self.attributes[attribute]
        for value in values:
            if value not in known:
                raise UserError(f"attribute {attribute}={value} is unknown to the judges: use {', '.join(known)}")
        return torch.tensor([known.index(v) for v in values])

    def save(self, folder: Path) -> None:
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        config = {
            "attributes": self.attributes, "width": self.width, "embedding": self.identity.out_features,
            "size": self.size, "hidden": self.real.in_features,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, network: str | Path = "scorer", model: str = DEFAULT) -> Judge:
        """Frozen, float32: `scorer` or `judge` of a model (the name of an embedded one, or a folder that has them), or,
        whatever the model, of a folder that `save` wrote. Raises `UserError` where there is none."""
        from safetensors.torch import load_file

        folder = judge_folder(str(network), model)
        judge = cls(**json.loads((folder / "config.json").read_text()))
        judge.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        return judge.requires_grad_(False).eval()


def judge_folder(network: str, model: str) -> Path:
    """Where the weights of a network lie. Arguments and errors as those of `Judge.load`."""
    folder = Path(place_of(model)) / network if network in NETWORKS else Path(network)
    if not (folder / "config.json").exists():
        if network in NETWORKS:
            own = ", ".join(FOLDERS)
            raise UserError(f"model {model} has no {network}: use {own}, or a folder with scorer/ and judge/")
        raise UserError(f"judge {network} is not a folder with config.json: use scorer, judge, or such a folder")
    return folder
