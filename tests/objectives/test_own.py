"""A reward of one's own in a file, and families of other packages: what is taken, and what is said of mistakes."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rwopt.errors import UserError
from rwopt.objectives import Batch, Objective, Objectives, ObjectiveSpec, make_objective, objective_spec, registry
from rwopt.objectives.composite import Composite

REWARDS = '''
import torch

def red(images, batch):
    """How red it is.

    More words.
    """
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))

def dark(images, batch, power=1.0):
    return images.mean((1, 2, 3)) ** power
dark.spec = {"higher_is_better": False, "range": [0, 1], "differentiable": True, "licence": "MIT"}

def near(images, batch):
    return (images - batch.reference).abs().mean((1, 2, 3))
near.spec = {"needs": ["reference"], "higher_is_better": False}

def sometimes(images, batch):
    return torch.tensor([1.0, float("nan")])
sometimes.spec = {"nan": True}

def nothing(images, batch):
    return torch.tensor([1.0, float("nan")])

def flat(images, batch):
    return images.mean()

def words(images, batch):
    return "good"

def broken(images, batch):
    raise ValueError("no\\nluck")

def stuck(images, batch):
    return images.detach().mean((1, 2, 3))
stuck.spec = {"differentiable": True}

def misspelt(images, batch):
    return images.mean((1, 2, 3))
misspelt.spec = {"higher_is_beter": False}

def upside(images, batch):
    return images.mean((1, 2, 3))
upside.spec = {"range": [1, 0]}
'''


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "rewards.py").write_text(REWARDS)
    return str(tmp_path / "rewards.py")


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)))


def test_a_function_is_an_objective(file: str, batch: Batch) -> None:
    objective = make_objective(f"{file}:red")
    spec = objective.spec
    assert (spec.higher_is_better, spec.differentiable, spec.range) == (True, False, (-math.inf, math.inf))
    assert spec.about == "How red it is."
    images = batch.images
    torch.testing.assert_close(objective(batch), images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3)))


def test_what_it_says_of_itself_counts(file: str, batch: Batch) -> None:
    name = f"{file}:dark"
    spec = objective_spec(name)
    assert (spec.higher_is_better, spec.differentiable, spec.range, spec.licence) == (False, True, (0.0, 1.0), "MIT")
    images = batch.images.requires_grad_()
    made = Objectives({name: {"power": 2.0}})[name](batch)
    torch.testing.assert_close(made.detach(), images.detach().mean((1, 2, 3)) ** 2)
    assert torch.autograd.grad(made.sum(), images)[0].abs().sum() > 0
    torch.testing.assert_close(Composite({name: 1.0})(batch).detach(), -images.detach().mean((1, 2, 3)))
    with pytest.raises(UserError, match=r"near needs reference, which this task does not give"):
        make_objective(f"{file}:near")(batch)


def test_a_picture_may_have_no_score_if_that_is_said(file: str, batch: Batch) -> None:
    assert make_objective(f"{file}:sometimes")(batch).isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.py:red", r"there is no file .*nowhere\.py: give the path"),
        ("{file}:rad", r"rewards\.py has no function rad: it has broken, dark, flat, .*red"),
        ("{file}:nothing", r"gave NaN: return a number for each picture, or allow it"),
        ("{file}:flat", r"gave shape \[\] for 2 pictures: return a tensor of 2 numbers"),
        ("{file}:words", r"gave str for 2 pictures"),
        ("{file}:broken", r"failed: ValueError: no luck \(line \d+ of rewards\.py\): mend the function"),
        ("{file}:stuck", r"has no gradient, as its spec says"),
        ("{file}:misspelt", r"spec=higher_is_beter: did you mean higher_is_better\?"),
        ("{file}:upside", r"range \[1, 0\]: give two ascending numbers"),
    ],
)
def test_mistakes_are_told_in_one_line(file: str, name: str, said: str, batch: Batch) -> None:
    batch.images.requires_grad_()
    with pytest.raises(UserError, match=said) as caught:
        make_objective(name.format(file=file))(batch)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_run_says_where(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("x = 1\nimport no_such_package_at_all\n")
    with pytest.raises(UserError, match=r"cannot be run: ModuleNotFoundError: [^\n]* \(line 2 of bad\.py\): mend"):
        objective_spec(f"{tmp_path}/bad.py:f")


def test_a_changed_file_is_another_version(file: str, batch: Batch) -> None:
    before, version = make_objective(f"{file}:red")(batch), objective_spec(f"{file}:red").version
    Path(file).write_text(REWARDS.replace("images[:, 0].mean((1, 2)) -", "2 -"))
    assert objective_spec(f"{file}:red").version != version
    assert not torch.equal(make_objective(f"{file}:red")(batch), before)


def test_unknown_options_are_refused(file: str) -> None:
    with pytest.raises(UserError, match=r"dark has no option pover: it takes power"):
        make_objective(f"{file}:dark", pover=2)
    with pytest.raises(UserError, match=r"truth\.psnr has no option x: it takes none"):
        make_objective("truth.psnr", x=2)


# --- other packages


def family() -> Any:
    spec = ObjectiveSpec("elsewhere.zero", True, False, (0.0, 1.0), about="nothing")
    zero = Objective(spec, lambda batch: torch.zeros(len(batch.images)))
    return SimpleNamespace(specs=lambda: {spec.name: spec}, make=lambda name: zero)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Other packages whose entry points load, or raise."""

    def install(**families: Any) -> None:
        class Point(EntryPoint):
            def load(self) -> Any:
                if isinstance(families[self.name], Exception):
                    raise families[self.name]
                return families[self.name]

        points = [Point(name, f"package.{name}", registry.ENTRY_POINTS) for name in families]
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.ENTRY_POINTS else [])
        registry.plugins.cache_clear()

    yield install
    monkeypatch.undo()
    registry.plugins.cache_clear()


def test_another_package_gives_objectives(installed: Any, batch: Batch) -> None:
    installed(elsewhere=family())
    assert make_objective("elsewhere.zero")(batch).tolist() == [0, 0]
    assert "elsewhere.zero" in registry.objective_names()
    with pytest.raises(UserError, match=r"did you mean elsewhere\.zero\?"):
        make_objective("elsewhere.zer")


def test_one_that_does_not_load_stops_nobody_else(installed: Any) -> None:
    installed(good=family(), bad=ImportError("no\nway"))
    assert objective_spec("truth.psnr").name == "truth.psnr"
    assert objective_spec("elsewhere.zero").about == "nothing"
    with pytest.raises(UserError, match=r"entry point bad does not load: package\.bad: ImportError: no way\)$"):
        objective_spec("elsewhere.one")
