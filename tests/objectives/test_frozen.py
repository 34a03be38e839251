"""A frozen network learns nothing, computes in float32, and remembers the last three sets of pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rwopt.objectives.frozen import Frozen


@pytest.fixture
def counted() -> tuple[Frozen[Tensor], list[int]]:
    network, seen = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Dropout(0.5)).half(), []

    def look(images: Tensor) -> Tensor:
        seen.append(len(images))
        out: Tensor = network(images).mean((2, 3))
        return out

    return Frozen(network, look), seen


def pictures(seed: int) -> Tensor:
    return torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_it_is_still(counted: tuple[Frozen[Tensor], list[int]]) -> None:
    frozen, _ = counted
    assert not frozen.network.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in frozen.network.parameters())


def test_the_same_pictures_cost_one_pass(counted: tuple[Frozen[Tensor], list[int]]) -> None:
    frozen, seen = counted
    first = frozen(pictures(0))
    for other in range(1, 6):  # a reference that is asked for again and again is not forgotten for newer pictures
        frozen(pictures(other))
        assert frozen(pictures(0)) is first
    assert len(seen) == 6
    frozen(pictures(1))
    assert len(seen) == 7


def test_it_is_never_stale(counted: tuple[Frozen[Tensor], list[int]]) -> None:
    frozen, _ = counted
    images = pictures(0)
    before = frozen(images).clone()
    images.mul_(0.5)
    assert not torch.equal(frozen(images), before)
    torch.testing.assert_close(frozen(images), frozen.look(images))


def test_gradients_are_taken_anew_and_not_kept(counted: tuple[Frozen[Tensor], list[int]]) -> None:
    frozen, seen = counted
    images = pictures(0)
    frozen(images)
    images.requires_grad_()
    assert frozen(images).requires_grad
    assert len(seen) == 2
    with torch.no_grad():
        assert not frozen(images).requires_grad
    assert len(seen) == 2


def test_it_computes_in_float32(counted: tuple[Frozen[Tensor], list[int]]) -> None:
    frozen, _ = counted
    exact = frozen(pictures(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(pictures(0).double()), exact)
        assert frozen(pictures(0).bfloat16()).dtype == torch.float32
