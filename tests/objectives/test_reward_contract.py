"""The contract for every objective that there is, networks in a small size with random weights among them.

`test_objectives.TestContract` holds what was always asked; here it is asked of the families with networks, and some
more of all.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import test_objectives as single
import torch
from helpers.rewards import small
from test_objectives import N, close, perfect, pictures, take
from test_objectives import batch as batch  # the fixture
from torch import Tensor

from rwopt.errors import UserError
from rwopt.objectives import Batch, Objective, make_objective, make_set, objective_names, objective_spec
from rwopt.objectives.objective import SetObjective
from rwopt.objectives.registry import every_spec

EVERY = objective_names()
OTHERS = [name for name in EVERY if name not in single.NAMES]
SETS = [name for name, spec in every_spec().items() if spec.level == "set"]
METHODS = [name for name in vars(single.TestContract) if name.startswith("test_")]
COMPARED = {"reference", "truth", "teacher"}


def here(name: str) -> dict[str, Any]:
    """Options with which an objective can be made here: networks in a small size where it has large ones."""
    options, absent = small(name)
    if absent:
        pytest.skip(absent)
    return options


@cache
def instance(name: str) -> Objective:
    """The objective, its networks in a small size where it has large ones."""
    return make_objective(name, **here(name))


@pytest.fixture
def whole(batch: Batch) -> Batch:
    """Everything that a batch may hold; the masks leave something on both sides."""
    mask = torch.zeros(N, 1, 64, 64)
    for i in range(N):
        mask[i, :, 8 * i : 8 * i + 24, 16:48] = 1
    prompts = ["a red house", "two dogs", "an old man in the rain", "grass"]
    return replace(batch, mask=mask, prompts=prompts, source_prompts=["a house"] * N)


@pytest.fixture
def of_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single, "make_objective", instance)


@pytest.mark.usefixtures("of_networks")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OTHERS)
def test_the_contract_of_single_objectives(name: str, method: str, whole: Batch) -> None:
    getattr(single.TestContract(), method)(name, whole)


@pytest.mark.parametrize("name", EVERY)
class TestEvery:
    def test_the_declaration_before_loading_is_that_of_the_objective(self, name: str, whole: Batch) -> None:
        told, made = objective_spec(name), instance(name).spec
        for field in ("name", "higher_is_better", "differentiable", "needs", "level", "licence", "pictures"):
            assert getattr(told, field) == getattr(made, field)
        assert told.level == "image"
        assert bool(told.size) == bool(told.weights)
        assert told.sha256 is None or re.fullmatch(r"[0-9a-f]{6,64}", told.sha256)

    def test_half_precision_is_taken_as_the_same_pictures(self, name: str, whole: Batch) -> None:
        objective = instance(name)
        for kind in (torch.float16, torch.bfloat16):
            halves = {n: getattr(whole, n).to(kind) for n in ("images", "reference", "truth", "teacher", "latents")}
            wanted = objective(replace(whole, **{n: x.float() for n, x in halves.items()}))
            close(objective(replace(whole, **halves)).float(), wanted)

    def test_the_same_pictures_have_the_same_score_again(self, name: str, whole: Batch) -> None:
        objective = instance(name)
        first = objective(whole)
        objective(take(whole, [3, 1]))
        again = objective(whole)
        assert torch.equal(first.nan_to_num(7.0), again.nan_to_num(7.0))

    def test_nothing_is_nearer_than_the_same_picture(self, name: str, whole: Batch) -> None:
        objective = instance(name)
        needs = objective.spec.needs
        if not needs & COMPARED or not needs <= COMPARED | {"mask"}:
            return  # it does not compare, or not with pictures alone
        sign = 1 if objective.spec.higher_is_better else -1
        best = sign * objective(perfect(whole))
        if best.isnan().all():
            return  # no face
        noise = 0.1 * torch.randn(N, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        for other in (pictures(2), (pictures(1) + noise).clamp(0, 1), pictures(1).flip(3)):
            assert (best >= sign * objective(perfect(whole, other)) - 1e-5).all()
        assert (best > sign * objective(perfect(whole, pictures(2)))).any()


def test_networks_change_nothing_of_the_random_state_or_of_gradients(whole: Batch) -> None:
    for name in OTHERS:
        try:
            objective = instance(name)
        except pytest.skip.Exception:
            continue
        state = torch.random.get_rng_state()
        images = whole.images.clone()
        objective(whole)
        assert torch.equal(torch.random.get_rng_state(), state), name
        assert torch.equal(whole.images, images), name
        assert torch.is_grad_enabled(), name


@pytest.mark.parametrize("name", EVERY)
def test_an_unknown_option_is_refused_in_one_line(name: str) -> None:
    here(name)
    with pytest.raises(UserError, match=rf"{re.escape(name)} has no option no_such") as caught:
        make_objective(name, no_such=1)
    assert "\n" not in str(caught.value)


def test_declarations_load_nothing_heavy() -> None:
    code = (
        "import sys, rwopt\nfrom rwopt.objectives.registry import every_spec, missing\n"
        "print(len(every_spec()), *sorted(set(sys.modules) & {'torchvision', 'transformers', 'timm', 'clip', 'dlib', "
        "'torchmetrics', 'open_clip', 'ImageReward', 'efficientnet_lite_pytorch', 'face_recognition_models'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(every_spec()))]


# --- sets


def halves(kind: str, n: int) -> tuple[Tensor, Tensor]:
    """Two sets of n pictures: of the same kind, or the second one darker and smoother."""
    real, other = pictures(11, n), pictures(12, n)
    return real, other if kind == "same" else (other * 0.4).flip(1)


@pytest.mark.parametrize("name", SETS)
class TestSets:
    def make(self, name: str) -> SetObjective:
        return make_set(name, **here(name))

    def test_sets_that_are_too_small_are_refused(self, name: str) -> None:
        objective = self.make(name)
        assert objective.spec.level == "set"
        assert objective.least > 1
        objective.update(pictures(1), real=True)
        objective.update(pictures(2), real=False)
        with pytest.raises(UserError, match=str(objective.least)):
            objective.compute()

    def test_another_kind_of_pictures_is_farther(self, name: str) -> None:
        objective, found = self.make(name), {}
        for kind in ("same", "other"):
            real, made = halves(kind, objective.least)
            objective.reset()
            for part in range(0, len(real), 64):  # parts add up
                objective.update(real[part : part + 64], real=True)
                objective.update(made[part : part + 64], real=False)
            found[kind] = objective.compute()
            assert found[kind].n == objective.least
            assert math.isfinite(found[kind].value)
            assert found[kind].sd >= 0
        sign = -1 if objective.spec.higher_is_better else 1
        assert sign * found["other"].value > sign * found["same"].value

    def test_it_is_no_objective_of_a_search(self, name: str) -> None:
        with pytest.raises(UserError, match=r"objective\.sets"):
            make_objective(name)


def test_single_objectives_are_no_sets() -> None:
    with pytest.raises(UserError, match="single pictures"):
        make_set("truth.psnr")
