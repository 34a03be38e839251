"""One contract for every objective, and what single ones promise: exact zeros, hidden attributes, a fresh memory."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from rwopt.errors import UserError
from rwopt.models.judge import Judge
from rwopt.objectives import Batch, Objective, ObjectiveSpec, judges, make_objective, pixel, teacher
from rwopt.objectives.composite import Composite
from rwopt.objectives.judges import Panel, panel

N = 4
CHANGES = [["hair_color"], ["glasses"], ["mouth"], ["background"]]
HIDDEN: list[list[str]] = [[], ["eyes"], ["hair_color", "hair"], []]
NAMES = [name for family in (judges, pixel, teacher) for name in family.specs()]
"""`test_reward_contract.py` has all others."""
CUT = (".success", ".identity", ".saturation", ".ms_ssim")  # at 0, where random pictures may lie
PARTIAL = ("face.",)  # these pictures show no face
TERMS = {"scorer.success": 1.0, "scorer.kept": 1.0, "scorer.identity": 1.0, "scorer.realism": 0.5}


def pictures(seed: int, n: int = N) -> Tensor:
    """Smooth random pictures, so that a judge sees something of the size of a feature."""
    coarse = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear").contiguous()


def latents(seed: int, n: int = N) -> Tensor:
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def looked_at(name: str, batch: Batch) -> Tensor:
    """What an objective is a function of: pictures, or the latents that they were decoded from."""
    seen = batch.images if make_objective(name).spec.pictures else batch.latents
    assert seen is not None
    return seen


def perfect(batch: Batch, images: Tensor | None = None, own: Tensor | None = None) -> Batch:
    """Pictures (and latents) that are all that one could wish them to be."""
    images, own = pictures(1) if images is None else images, latents(5) if own is None else own
    return replace(
        batch, images=images, reference=pictures(1), truth=pictures(1), teacher=pictures(1), latents=own,
        teacher_latents=latents(5),
    )  # fmt: skip


@pytest.fixture
def batch() -> Batch:
    rng = np.random.default_rng(0)
    values = Judge.load("scorer").attributes
    target = [{name: str(rng.choice(known)) for name, known in values.items()} for _ in range(N)]
    return Batch(
        pictures(1), pictures(2), pictures(3), pictures(4), latents(5), latents(6), ["a"] * N, target, CHANGES, HIDDEN
    )


def take(batch: Batch, order: list[int]) -> Batch:
    def pick(value: Any) -> Any:
        return value[order] if isinstance(value, Tensor) else [value[i] for i in order]

    known = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: pick(value) for name, value in known.items() if value is not None})


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


# --- the contract


@pytest.mark.parametrize("name", NAMES)
class TestContract:
    def test_one_score_a_picture_whatever_the_company(self, name: str, batch: Batch) -> None:
        objective = make_objective(name)
        scores = objective(batch)
        assert scores.shape == (N,)
        assert (scores.isfinite() | (scores.isnan() & name.startswith(PARTIAL))).all()
        close(scores, torch.cat([objective(take(batch, [i])) for i in range(N)]))
        order = [2, 0, 3, 1]
        close(scores[order], objective(take(batch, order)))

    def test_gradient(self, name: str, batch: Batch) -> None:
        objective = make_objective(name)
        seen = looked_at(name, batch).requires_grad_()
        scores = objective(batch)
        assert scores.requires_grad == objective.spec.differentiable
        if objective.spec.differentiable:
            gradient = torch.autograd.grad(scores.sum(), seen)[0]
            assert gradient.isfinite().all()
            if not name.endswith(CUT):
                assert (gradient.abs().flatten(1).sum(1) > 0).all()
            rows = [torch.autograd.grad(objective(batch)[i], seen)[0] for i in (0,)]
            close(rows[0][0], gradient[0])
            assert rows[0][1:].abs().sum() == 0
        with torch.no_grad():
            close(objective(batch), scores.detach())
            assert not objective(batch).requires_grad

    def test_gradient_of_perfect_pictures_is_finite(self, name: str, batch: Batch) -> None:
        objective = make_objective(name)
        if objective.spec.differentiable:
            same = perfect(batch, pictures(1).requires_grad_(), latents(5).requires_grad_())
            seen = looked_at(name, same)
            assert torch.autograd.grad(objective(same).sum(), seen)[0].isfinite().all()

    def test_range(self, name: str, batch: Batch) -> None:
        spec = make_objective(name).spec
        extremes = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64), pictures(3)[2], pictures(2)[3]])
        for images in (batch.images, extremes, pictures(3)):
            own = 10 * images[:, :1, :8, :8].repeat(1, 4, 1, 1)  # far from any latents
            scores = make_objective(name)(replace(batch, images=images, latents=own))
            assert float(scores.min()) >= spec.range[0] - 1e-5
            assert float(scores.max()) <= spec.range[1] + 1e-5

    def test_declaration(self, name: str, batch: Batch) -> None:
        spec = make_objective(name).spec
        assert spec.name == name
        assert spec.range[0] < spec.range[1]
        assert spec.needs <= {f.name for f in fields(Batch)} - {"images"}
        assert spec.about
        assert spec.licence

    def test_needs_are_all_and_only_what_is_declared(self, name: str, batch: Batch) -> None:
        objective = make_objective(name)
        bare = Batch(batch.images, **{need: getattr(batch, need) for need in objective.spec.needs})
        assert objective(bare).shape == (N,)
        for need in objective.spec.needs:
            with pytest.raises(UserError, match=rf"^objective {name} needs {need}, which this task does not give$"):
                objective(replace(batch, **{need: None}))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("judge.kepd", "judge.kept"), ("truth.pnsr", "truth.psnr"), ("scorer.sucess", "scorer.success"),
     ("teacher.psrn", "teacher.psnr")],
)
def test_an_unknown_name_gets_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=rf"^objective {wrong} is unknown: did you mean {right}\? [^\n]*$"):
        make_objective(wrong)


def test_a_function_of_the_wrong_shape_is_a_programming_error(batch: Batch) -> None:
    spec = ObjectiveSpec("flat", True, True, (0.0, 1.0))
    with pytest.raises(RuntimeError, match=r"flat gave \(\) for 4 pictures"):
        Objective(spec, lambda b: b.images.mean())(batch)


# --- nearness to something known

NEARNESS = [n for n in NAMES if n.startswith(("teacher.", "truth.")) or n.endswith((".ssim", ".distance"))]


@pytest.mark.parametrize("name", NEARNESS)
class TestNearness:
    def test_perfect_is_the_end_of_the_range(self, name: str, batch: Batch) -> None:
        spec, scores = make_objective(name).spec, make_objective(name)(perfect(batch))
        close(scores, torch.full((N,), spec.range[1] if spec.higher_is_better else spec.range[0]))

    def test_nearer_is_better(self, name: str, batch: Batch) -> None:
        """All the way from something else to what is wished."""
        objective, steps = make_objective(name), []
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            images = torch.lerp(pictures(2), pictures(1), share)
            steps.append(objective(perfect(batch, images, torch.lerp(latents(6), latents(5), share))))
        up = torch.stack(steps).diff(dim=0) * (1 if objective.spec.higher_is_better else -1)
        assert (up > 0).all()

    def test_gradient_is_that_of_finite_differences(self, name: str, batch: Batch) -> None:
        objective = make_objective(name)
        seen = looked_at(name, batch).requires_grad_()
        gradient = torch.autograd.grad(objective(batch).sum(), seen)[0]
        way, h = gradient.sign(), 2e-4  # all numbers at once: single precision sees no smaller move
        moved = "images" if objective.spec.pictures else "latents"
        with torch.no_grad():
            ends = [objective(replace(batch, **{moved: seen + c * h * way})).double() for c in (1, -1)]
        slopes = (ends[0] - ends[1]) / (2 * h)
        expected = (gradient * way).flatten(1).sum(1).double()
        torch.testing.assert_close(slopes, expected, rtol=0.02, atol=1e-3)


def test_the_teachers_objectives_are_what_they_say(batch: Batch) -> None:
    assert batch.teacher is not None
    assert batch.latents is not None
    assert batch.teacher_latents is not None
    expected = peak_signal_noise_ratio(batch.images, batch.teacher, data_range=1.0, dim=(1, 2, 3), reduction="none")
    close(make_objective("teacher.psnr")(batch), expected)
    a, b = batch.latents.double().numpy(), batch.teacher_latents.double().numpy()
    ratio = ((a - b) ** 2).sum((1, 2, 3)) / (b**2).sum((1, 2, 3))
    np.testing.assert_allclose(make_objective("teacher.latent")(batch).numpy(), ratio, rtol=1e-5)
    scaled = replace(batch, latents=3 * batch.latents, teacher_latents=3 * batch.teacher_latents)
    close(make_objective("teacher.latent")(scaled), make_objective("teacher.latent")(batch))  # whatever the VAE's scale
    as_truth = replace(batch, truth=batch.teacher)
    for network in ("scorer", "judge"):
        close(make_objective(f"teacher.features.{network}")(batch), make_objective(f"{network}.distance")(as_truth))
    close(make_objective("teacher.ssim")(batch), make_objective("truth.ssim")(as_truth).clamp(min=0))


def test_only_the_distance_of_latents_does_not_look_at_pictures() -> None:
    assert [name for name in NAMES if not make_objective(name).spec.pictures] == ["teacher.latent"]


# --- single ones


@pytest.mark.parametrize("network", ["scorer", "judge"])
@pytest.mark.parametrize("kind", ["success", "success_accuracy"])
def test_an_untouched_source_has_no_success_at_all(network: str, kind: str, batch: Batch) -> None:
    assert batch.reference is not None
    objective = make_objective(f"{network}.{kind}")
    for images in (batch.reference, batch.reference.clone(), batch.reference.clone().requires_grad_()):
        assert (objective(replace(batch, images=images)) == 0).all()


def test_success_is_the_share_of_the_way_to_certainty(batch: Batch) -> None:
    judge = panel("scorer")
    assert batch.reference is not None
    assert batch.target is not None
    before, after = judge.verdict(batch.reference), judge.verdict(batch.images)
    scores = make_objective("scorer.success")(batch)
    for i, (name,) in enumerate(CHANGES):
        if name in HIDDEN[i]:
            continue
        value = judge.judge.indices(name, [batch.target[i][name]])
        p, q = (v.logits[name][i].softmax(-1)[value].item() for v in (before, after))
        assert scores[i].item() == pytest.approx(min(max((q - p) / max(1 - p, 1e-3), 0), 1), abs=1e-5)


@pytest.mark.parametrize("network", ["scorer", "judge"])
def test_a_picture_is_itself(network: str, batch: Batch) -> None:
    same = replace(batch, reference=batch.images, truth=batch.images)
    torch.testing.assert_close(make_objective(f"{network}.identity")(same), torch.ones(N))
    assert (make_objective(f"{network}.distance")(same) == 0).all()
    assert (make_objective("truth.psnr")(same) == 100).all()
    torch.testing.assert_close(make_objective("truth.ssim")(same), torch.ones(N))


@pytest.mark.parametrize("kind", ["kept", "kept_accuracy", "alignment", "accuracy"])
def test_the_mean_is_over_what_can_be_seen(kind: str, batch: Batch) -> None:
    judge = panel("judge")
    assert batch.target is not None
    scores, verdict = make_objective(f"judge.{kind}")(batch), panel("judge").verdict(batch.images)
    for i in range(N):
        hits = []
        for name in judge.attributes:
            if name in HIDDEN[i] or ("kept" in kind and name in CHANGES[i]):
                continue
            value = judge.judge.indices(name, [batch.target[i][name]])[0]
            share = verdict.logits[name][i].softmax(-1)
            hits.append(float(share.argmax() == value) if "accuracy" in kind else float(share[value]))
        assert scores[i].item() == pytest.approx(np.mean(hits), abs=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if "target" in make_objective(n).spec.needs])
def test_hidden_attributes_do_not_count(name: str, batch: Batch) -> None:
    assert batch.target is not None
    before = make_objective(name)(batch)
    other = [dict(t) for t in batch.target]
    for i, names in enumerate(HIDDEN):
        for attribute in names:
            known = Judge.load("scorer").attributes[attribute]
            other[i][attribute] = known[(known.index(other[i][attribute]) + 1) % len(known)]
    close(make_objective(name)(replace(batch, target=other)), before)


def test_nothing_to_judge_is_nan_and_costs_no_gradient(batch: Batch) -> None:
    hidden = [["hair_color"], [], [], []]  # the edit of the first picture cannot be seen
    images = pictures(1).requires_grad_()
    case = replace(batch, images=images, hidden=hidden)
    scores = make_objective("scorer.success")(case)
    assert scores.isnan().tolist() == [True, False, False, False]
    gradient = torch.autograd.grad(scores.nan_to_num(1.0).sum(), images)[0]
    assert gradient.isfinite().all()


def test_incomplete_targets_are_named(batch: Batch) -> None:
    assert batch.target is not None
    lacking = [dict(t) for t in batch.target]
    del lacking[2]["mouth"]
    with pytest.raises(UserError, match=r"^target of picture 2 lacks mouth[^\n]*$"):
        make_objective("judge.alignment")(replace(batch, target=lacking))
    with pytest.raises(UserError, match=r"^attribute mouth=grin is unknown[^\n]*$"):
        make_objective("judge.alignment")(replace(batch, target=[{**t, "mouth": "grin"} for t in batch.target]))


def test_psnr_is_that_of_torchmetrics(batch: Batch) -> None:
    assert batch.truth is not None
    expected = peak_signal_noise_ratio(batch.images, batch.truth, data_range=1.0, dim=(1, 2, 3), reduction="none")
    close(make_objective("truth.psnr")(batch), expected)


# --- the memory of a panel


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> tuple[Panel, list[int]]:
    judges, seen = Panel("scorer"), []
    forward = judges.judge.forward
    monkeypatch.setattr(judges.judge, "forward", lambda images: (seen.append(len(images)), forward(images))[1])
    return judges, seen


def test_the_same_pictures_cost_one_pass(counted: tuple[Panel, list[int]]) -> None:
    judges, seen = counted
    a, b = pictures(1), pictures(2)
    first = judges.verdict(a)
    for _ in range(3):
        judges.verdict(b)
        assert judges.verdict(a) is first
        assert judges.verdict(a.clone()) is first
    assert seen == [N, N]
    for other in range(5):  # a reference that is asked for again and again is not forgotten for newer pictures
        judges.verdict(pictures(10 + other))
        assert judges.verdict(a) is first
    assert seen == [N] * 7
    assert len(judges._seen) == 3


def test_a_verdict_is_never_stale(counted: tuple[Panel, list[int]]) -> None:
    judges, _ = counted
    array = pictures(1).numpy()
    images = torch.from_numpy(array)
    fresh = Judge.load("scorer")
    judges.verdict(images)
    images.mul_(0.5)  # in place
    close(judges.verdict(images).realism, fresh(images).realism)
    array[:] = pictures(5).numpy()  # behind torch's back
    close(judges.verdict(images).realism, fresh(images).realism)
    for seed in range(6):  # freed at once: the next one may well lie at the same address
        close(judges.verdict(pictures(seed)).realism, fresh(pictures(seed)).realism)


def test_gradients_are_never_remembered(counted: tuple[Panel, list[int]]) -> None:
    judges, seen = counted
    images = pictures(1)
    judges.verdict(images)
    assert judges.verdict(images.requires_grad_()).realism.requires_grad
    with torch.no_grad():
        assert not judges.verdict(images).realism.requires_grad
    assert seen == [N, N]


def test_judges_run_in_float32(batch: Batch) -> None:
    objective = make_objective("scorer.realism")
    exact = objective(batch)
    assert objective(replace(batch, images=batch.images.double())).dtype == torch.float32
    close(objective(replace(batch, images=batch.images.double().requires_grad_())).detach(), exact)


# --- the composite


def test_composite_is_the_weighted_geometric_mean(batch: Batch) -> None:
    close_source = replace(batch, reference=0.9 * batch.images)
    score = Composite(TERMS)(close_source)
    total = sum(TERMS.values())
    expected = torch.ones(N)
    for name, weight in TERMS.items():
        expected *= make_objective(name)(close_source).nan_to_num(1.0) ** (weight / total)
    close(score, expected)
    close(Composite({name: 7 * weight for name, weight in TERMS.items()})(close_source), score)
    single = make_objective("judge.kept")(batch)
    close(Composite({"judge.kept": 3.0})(batch), single)


def test_an_untouched_source_scores_nothing(batch: Batch) -> None:
    assert batch.reference is not None
    kept = replace(batch, images=batch.reference, hidden=[[]] * N)
    score = Composite(TERMS)(kept)
    assert (score == 0).all()
    assert (score >= 0).all()


def test_composite_takes_nothing_to_judge_as_one(batch: Batch) -> None:
    nothing = replace(batch, changed=[[]] * N)
    assert make_objective("scorer.success")(nothing).isnan().all()
    without = {name: weight for name, weight in TERMS.items() if name != "scorer.success"}
    total = sum(TERMS.values())
    close(Composite(TERMS)(nothing), Composite(without)(nothing) ** ((total - 1) / total))
    images = pictures(1).requires_grad_()
    gradient = torch.autograd.grad(Composite(TERMS)(replace(nothing, images=images)).sum(), images)[0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [n for n in NAMES if make_objective(n).spec.range != (0.0, 1.0)])
def test_one_term_without_a_mean_is_its_own_score_the_better_the_higher(name: str, batch: Batch) -> None:
    composite, objective = Composite({name: 2.0}), make_objective(name)
    sign = 1 if objective.spec.higher_is_better else -1
    assert torch.equal(composite(batch), sign * objective(batch))
    low, high = composite.range
    assert low < high
    best, some = composite(perfect(batch)), composite(batch)
    assert (best > some).all()
    assert (some >= low).all()
    assert (best <= high).all()
    assert composite.pictures == objective.spec.pictures


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "at least one objective"),
        ({"judge.kept": 0.0}, "weight above 0"),
        ({"judge.kept": -1.0}, "weight above 0"),
        ({"judge.kept": math.nan}, "weight above 0"),
        ({"truth.psnr": 1.0, "judge.kept": 1.0}, "truth.psnr has range"),
        ({"judge.kept": 1.0, "judge.distance": 1.0}, "judge.distance has range"),
        ({"teacher.latent": 1.0, "teacher.ssim": 1.0}, "teacher.latent has range"),
        ({"judge.keep": 1.0}, "did you mean judge.kept"),
    ],
)
def test_impossible_composites_are_refused(terms: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Composite(terms)
    assert "\n" not in str(caught.value)
