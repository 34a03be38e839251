"""Distances of sets: against torchmetrics and slow loops, and whether their p-values mean what they say."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from rwopt.errors import UserError
from rwopt.objectives.objective import SetObjective
from rwopt.objectives.sets import exchanged, jackknife, make, mmd, specs

NAMES = list(specs())


class Mixed(nn.Module):
    """24 numbers of 3 x 8 x 8 pictures."""

    num_features = 24

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.randn(192, 24, generator=torch.Generator().manual_seed(0)) / 4)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weights  # type: ignore[operator]


def pictures(n: int, seed: int, redder: float = 0.0) -> Tensor:
    noise = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (0.8 * noise + redder * torch.tensor([1.0, 0, 0]).reshape(3, 1, 1)).clamp(0, 1)


def filled(name: str, real: Tensor, made: Tensor, **options: object) -> SetObjective:
    objective = make(name, features=Mixed(), **options)
    objective.update(real, real=True)
    objective.update(made, real=False)
    return objective


def table(n: int) -> np.ndarray:
    """Kernel values of n points with a diagonal of 0."""
    points = np.random.default_rng(0).normal(size=(n, 3))
    values = np.exp(-((points[:, None] - points[None]) ** 2).sum(2))
    np.fill_diagonal(values, 0)
    return values


def test_kid_is_that_of_torchmetrics_with_one_subset_of_all() -> None:
    real, made = pictures(80, 1), pictures(80, 2, 0.1)
    peer = KernelInceptionDistance(feature=Mixed(), subsets=1, subset_size=80)
    peer.update(real, real=True)
    peer.update(made, real=False)
    expected, _ = peer.compute()
    assert filled("set.kid", real, made).compute().value == pytest.approx(expected.item(), rel=1e-3)


def test_cmmd_is_its_formula() -> None:
    real, made = pictures(64, 1), pictures(70, 2, 0.1)
    x, y = (nn.functional.normalize(Mixed()(images).double(), dim=1).numpy() for images in (real, made))

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-((a - b) ** 2).sum() / 200))

    def inside(points: np.ndarray) -> float:
        return float(np.mean([kernel(a, b) for a, b in itertools.permutations(points, 2)]))

    across = np.mean([kernel(a, b) for a in x for b in y])
    expected = 1000 * (inside(x) + inside(y) - 2 * across)
    score = filled("set.cmmd", real, made).compute()
    assert score.value == pytest.approx(expected, rel=1e-6)
    assert score.n == 64


def test_the_jackknife_leaves_out_each_picture_once() -> None:
    values, real = table(13), 6
    first = np.arange(13) < real

    def without(i: int) -> float:
        keep = np.arange(13) != i
        return mmd(values[np.ix_(keep, keep)], first[keep])

    parts = [np.array([without(i) for i in group]) for group in (range(real), range(real, 13))]
    expected = np.sqrt(sum((len(part) - 1) * part.var() for part in parts))
    assert jackknife(values, real) == pytest.approx(expected, rel=1e-9)


def test_the_p_value_is_the_share_of_all_divisions() -> None:
    values, real = table(9), 4
    values[:4, :4] += 0.15 * (1 - np.eye(4))  # the first four are nearer to each other
    value = mmd(values, np.arange(9) < real)
    every = [mmd(values, np.isin(np.arange(9), c)) for c in itertools.combinations(range(9), real)]
    share = np.mean(np.array(every) >= value - 1e-12)
    assert exchanged(values, real, value, 0) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("name", NAMES)
def test_sets_of_one_kind_are_told_from_sets_of_two(name: str) -> None:
    same = [filled(name, pictures(64, 2 * i), pictures(64, 2 * i + 1)).compute() for i in range(12)]
    values = np.array([score.value for score in same])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))  # unbiased
    assert 0.4 < np.mean([score.sd for score in same]) / values.std() < 2.5
    assert 0.2 < np.mean([score.p for score in same]) < 0.8
    other = filled(name, pictures(64, 1), pictures(64, 2, 0.15)).compute()
    assert other.value > 5 * values.std()
    assert other.p == pytest.approx(1 / 1001)


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_joined_forgotten_and_reproducible(name: str) -> None:
    real, made = pictures(66, 1), pictures(64, 2)
    whole = filled(name, real, made)
    first = whole.compute()
    parts = make(name, features=Mixed())
    for start in range(0, 66, 11):
        parts.update(real[start : start + 11], real=True)
        parts.update(made[start : start + 11], real=False)
    state = torch.random.get_rng_state()
    assert parts.compute().to_dict() == pytest.approx(first.to_dict())
    assert torch.equal(torch.random.get_rng_state(), state)
    whole.reset()
    whole.update(made, real=True)
    whole.update(real, real=False)
    assert whole.compute().value == pytest.approx(first.value)
    assert filled(name, real, made, seed=1).compute().p == pytest.approx(first.p, abs=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_too_few_pictures_are_refused(name: str) -> None:
    line = rf"^objective {name}: 63 real and 64 generated pictures: below 64 it is noise, from 256 usable; give more$"
    with pytest.raises(UserError, match=line):
        filled(name, pictures(63, 1), pictures(64, 2)).compute()


def test_the_judges_features_are_there_and_others_are_refused() -> None:
    objective = make("set.kid", features="judge")
    for real, seed in ((True, 0), (False, 1)):
        noise = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        objective.update(noise, real=real)
    assert objective.compute().p > 0.01
    with pytest.raises(UserError, match="features=judges: did you mean judge"):
        make("set.kid", features="judges")
