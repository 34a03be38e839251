"""Several terms as one number: calibrated sums, and what becomes of pictures without a score."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwopt.errors import UserError
from rwopt.objectives import Batch, Objective, Objectives, ObjectiveSpec, calibration
from rwopt.objectives.calibration import Scale
from rwopt.objectives.composite import Composite

NAN, INF = math.nan, math.inf


class Given(Objectives):
    """Objectives that say what they were told to, one number a picture."""

    def __init__(self, invalid: str = "drop", **scores: list[float]) -> None:
        super().__init__(invalid=invalid)
        self.specs = {
            "cosine": ObjectiveSpec("cosine", True, True, (-1.0, 1.0)),
            "distance": ObjectiveSpec("distance", False, True, (0.0, INF)),
            "share": ObjectiveSpec("share", True, True, (0.0, 1.0)),
            "other": ObjectiveSpec("other", True, False, (0.0, 1.0)),
        }
        for name, values in scores.items():
            table = torch.tensor(values)
            self._made[name] = Objective(self.specs[name], lambda batch, t=table: t + 0 * batch.images.mean((1, 2, 3)))

    def spec(self, name: str) -> ObjectiveSpec:
        return self.specs[name]


def batch(n: int) -> Batch:
    return Batch(torch.full((n, 3, 2, 2), 0.5))


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True)


def test_a_calibrated_sum_is_in_standard_deviations_of_the_plain_model() -> None:
    given = Given(cosine=[0.2, 0.6, NAN, NAN], distance=[3.0, 1.0, 2.0, NAN])
    composite = Composite({"cosine": 2.0, "distance": 0.5}, given, "auto")
    assert composite.calibrated
    assert composite.differentiable
    with pytest.raises(RuntimeError, match="no calibration"):
        composite(batch(4))
    composite.scales = {"cosine": Scale(0.4, 0.1, 9), "distance": Scale(2.0, 2.0, 9)}
    # less is better of the distance; what has no score counts as the plain model's mean, and nothing at all as NaN
    close(composite(batch(4)), [2 * -2 - 0.5 * 0.5, 2 * 2 + 0.5 * 0.5, 0.0, NAN])
    assert composite.range == (-INF, INF)


def test_the_plain_model_itself_scores_nothing_on_average() -> None:
    cosine, distance = torch.randn(50).tolist(), (5 + 3 * torch.randn(50)).tolist()
    given = Given(cosine=cosine, distance=distance)
    composite = Composite({"cosine": 1.0, "distance": 1.0}, given, "calibrated")
    composite.scales = {name: calibration.measure(name, given[name](batch(50))) for name in composite.weights}
    assert float(composite(batch(50)).mean()) == pytest.approx(0.0, abs=1e-5)
    only = Composite({"distance": 1.0}, given, "calibrated")
    only.scales = composite.scales
    assert float(only(batch(50)).std()) == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(only(batch(50)) > 0, torch.tensor(distance) < composite.scales["distance"].mean)


def test_gradients_pass_a_calibrated_sum_around_what_has_no_score() -> None:
    composite = Composite({"cosine": 1.0, "distance": 1.0}, Given(cosine=[0.1, NAN], distance=[1.0, 2.0]), "auto")
    composite.scales = {"cosine": Scale(0.0, 1.0, 2), "distance": Scale(0.0, 1.0, 2)}
    images = torch.rand(2, 3, 2, 2, requires_grad=True)
    assert torch.autograd.grad(composite(Batch(images)).sum(), images)[0].isfinite().all()


@pytest.mark.parametrize(
    ("terms", "combine", "calibrated"),
    [
        ({"share": 1.0, "other": 1.0}, "auto", False),
        ({"share": 1.0, "other": 1.0}, "calibrated", True),
        ({"share": 1.0, "cosine": 1.0}, "auto", True),
        ({"distance": 1.0}, "auto", False),
        ({"distance": 1.0}, "calibrated", True),
    ],
)
def test_how_terms_are_combined(terms: dict[str, float], combine: str, calibrated: bool) -> None:
    assert Composite(terms, Given(), combine).calibrated == calibrated


def test_what_cannot_be_combined_is_told() -> None:
    with pytest.raises(UserError, match=r"cosine has range [^\n]*set objective\.combine=calibrated"):
        Composite({"share": 1.0, "cosine": 1.0}, Given(), "geometric")
    with pytest.raises(UserError, match="did you mean calibrated"):
        Composite({"share": 1.0}, Given(), "calibrate")


# --- pictures without a score


def test_no_score_is_neither_the_best_nor_a_zero() -> None:
    terms = {"share": 1.0, "other": 1.0}
    composite = Composite(terms, Given(share=[0.25, NAN, NAN], other=[1.0, 0.25, NAN]))
    close(composite(batch(3)), [0.5, 0.5, NAN])
    close(Composite({"share": 1.0}, Given(share=[0.25, NAN]))(batch(2)), [0.25, NAN])


def test_failing_counts_as_the_worst() -> None:
    terms = {"share": 1.0, "other": 1.0}
    composite = Composite(terms, Given("fail", share=[0.25, NAN], other=[1.0, 0.25]))
    close(composite(batch(2)), [0.5, 0.0])
    signed = Composite({"cosine": 1.0, "share": 1.0}, Given("fail", cosine=[NAN], share=[0.5]), "auto")
    signed.scales = {"cosine": Scale(0.5, 0.5, 3), "share": Scale(0.5, 1.0, 3)}
    close(signed(batch(1)), [-3.0])
    with pytest.raises(UserError, match=r"objective\.invalid=fail: distance has no worst score"):
        Composite({"distance": 1.0}, Given("fail"))


# --- calibration


def test_scales_leave_out_what_has_no_score_and_survive_their_file(tmp_path: Path) -> None:
    scale = calibration.measure("a", torch.tensor([1.0, NAN, 3.0]))
    assert scale == Scale(2.0, pytest.approx(math.sqrt(2)), 2)
    calibration.save({"a": scale}, tmp_path / "calibration.json")
    assert calibration.load(tmp_path / "calibration.json") == {"a": scale}
    (tmp_path / "calibration.json").write_text('{"a": {"mean": 1}}')
    with pytest.raises(UserError, match=r"calibration\.json is no calibration: remove it"):
        calibration.load(tmp_path / "calibration.json")


def test_a_likeness_to_itself_is_scaled_by_strangers() -> None:
    scale = calibration.measure("a", torch.ones(3), lambda: torch.tensor([0.7, NAN, 0.4]))
    assert scale == Scale(1.0, pytest.approx(math.sqrt((0.3**2 + 0.6**2) / 2)), 3)
    assert calibration.measure("a", torch.tensor([1.0, 3.0]), lambda: torch.tensor([9.0])).sd == pytest.approx(2**0.5)


@pytest.mark.parametrize(("scores", "said"), [([1.0, NAN], "for 1 of 2 pictures"), ([0.3, 0.3, 0.3], "0.3 for every")])
def test_what_has_no_scale_is_told(scores: list[float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        calibration.measure("a", torch.tensor(scores))
