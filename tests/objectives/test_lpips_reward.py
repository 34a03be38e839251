"""LPIPS against torchmetrics on the same backbones, and the backbones against their papers' numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as metric

from rwopt.errors import UserError
from rwopt.objectives import lpips
from rwopt.objectives.lpips import Perceptual, make, tiny
from rwopt.objectives.objective import Batch

NAMES = list(lpips.specs())


def pictures(seed: int, n: int = 2) -> Tensor:
    return torch.rand(n, 3, 64, 72, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_distances_and_gradients_are_those_of_torchmetrics(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own distance on the same layers, which it would take from torchvision."""
    network = name.split(".")[1]
    objective, path = make(name, **tiny(name)), tiny(name)["backbone"]
    layers = lpips.perceptual(network, path, objective.spec.sha256 or "").features
    monkeypatch.setattr(metric, "_get_tv_model_features", lambda *_: layers)
    theirs = metric._LPIPS(net=network)
    images, other = pictures(1).requires_grad_(), pictures(2)
    scores, expected = objective(Batch(images, reference=other)), theirs(images, other, normalize=True).reshape(-1)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    slopes, wanted = (torch.autograd.grad(s.sum(), images)[0] for s in (scores, expected))
    torch.testing.assert_close(slopes, wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    ("network", "numbers", "shapes"),
    [
        ("alex", 2_469_696, {"0.weight": (64, 3, 11, 11), "3.weight": (192, 64, 5, 5), "10.weight": (256, 256, 3, 3)}),
        ("vgg", 14_714_688, {"0.weight": (64, 3, 3, 3), "14.weight": (256, 256, 3, 3), "28.weight": (512, 512, 3, 3)}),
        ("squeeze", 722_496, {"0.weight": (64, 3, 3, 3), "3.squeeze.weight": (16, 64, 1, 1),
                              "12.expand3x3.weight": (256, 64, 3, 3)}),
    ],
)  # fmt: skip
def test_backbones_have_the_published_names_and_numbers(
    network: str, numbers: int, shapes: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        features = Perceptual(network).features
    state = features.state_dict()
    assert sum(value.numel() for value in state.values()) == numbers
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("network", ["alex", "vgg", "squeeze"])
def test_it_taps_after_each_activation_with_a_head(network: str) -> None:
    distance = Perceptual(network)
    x, taps = pictures(1), []
    for i, layer in enumerate(distance.features):
        x = layer(x)
        if i in distance.taps:
            taps.append(x.shape[1])
            assert (x >= 0).all()
    assert taps == [head.numel() for head in distance.heads]
    assert all((head >= 0).all() for head in distance.heads)


def test_a_picture_is_no_distance_from_itself_and_noise_leads_away() -> None:
    objective, images = make("lpips.alex", **tiny("lpips.alex")), pictures(1, 5)
    assert (objective(Batch(images, reference=images)) == 0).all()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    steps = torch.stack([objective(Batch(images + s * noise, reference=images)) for s in (0.01, 0.03, 0.1, 0.3)])
    assert (steps.diff(dim=0) > 0).all()
    same = images.clone().requires_grad_()
    slopes = torch.autograd.grad(objective(Batch(same, reference=images)).sum(), same)[0]
    assert (slopes == 0).all()


def test_portions_change_nothing() -> None:
    objective, images, other = make("lpips.squeeze", **tiny("lpips.squeeze")), pictures(1, 6), pictures(2, 6)
    all_at_once = objective(Batch(images, reference=other))
    singly = [objective(Batch(images[i : i + 1], reference=other[i : i + 1])) for i in range(6)]
    torch.testing.assert_close(all_at_once, torch.cat(singly))


def test_files_are_those_of_torchvision_or_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = torch.load(tiny("lpips.alex")["backbone"], weights_only=True)
    path = tmp_path / "alexnet-owt-7be5be79.pth"
    torch.save({**state, "classifier.6.bias": torch.ones(1000)}, path)
    make("lpips.alex", backbone=str(path), sha256="any")
    with pytest.raises(UserError, match=r"has sha256 \w+, not 7be5be79: download alexnet-owt-7be5be79\.pth"):
        make("lpips.alex", backbone=str(path))
    torch.save({**state, "features.0.weight": nn.Conv2d(3, 64, 3).weight}, path)
    with pytest.raises(UserError, match=r"has other shapes of features\.0\.weight"):
        make("lpips.alex", backbone=str(path), sha256="any")
    with pytest.raises(UserError, match=r"lacks features\.12\.bias"):
        make("lpips.vgg", backbone=tiny("lpips.alex")["backbone"], sha256="any")


def test_missing_backbones_are_named() -> None:
    line = lpips.missing("lpips.squeeze")
    assert "squeezenet1_1-b8a52dc0.pth of https://download.pytorch.org/models (BSD-3-Clause, 4.97 MB)" in line
    assert line.endswith("set the objective's option backbone to that file")
