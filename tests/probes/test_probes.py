"""What every probe must do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.probes import TS, K, S, attach, inputs
from helpers.small import hooks_of

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import PROBES, SIGNED, Importance, make_probe, mean_interval

SMALL: dict[str, dict[str, Any]] = {
    "ablation": {},
    "gradient_norm": {},
    "gram": {},
    "reward_gradient": {"reward": lambda z: z.square().flatten(1).mean(1)},
    "shapley": {"permutations": 2},
    "snr": {"draws": 3},
    "voting": {"rounds": 2, "epochs": 3},
}


PRICE = {
    "ablation": K * (1 + S),
    "gradient_norm": 3 * K,
    "gram": K * (1 + S),
    "reward_gradient": 3 * K,
    "shapley": K * (2 + 2 * (S - 1)),
    "snr": K + 3 * K,
    "voting": 2 * K * 2 * 3,
}


TAILS = K * (K + 1) // 2  # steps from each step to the end, summed


STUDENT = {
    "ablation": K + TAILS * S,
    "gram": K + TAILS * S,
    "reward_gradient": 3 * K,
    "shapley": K + TAILS * (1 + 2 * (S - 1)),
    "voting": 2 * 3 * (K + TAILS),
}


CASES = [(name, "teacher" if name in STUDENT else None, guided) for name in PROBES for guided in (True, False)]
CASES += [(name, "student", True) for name in STUDENT]


BACKWARD = {"gradient_norm": 2 * K, "reward_gradient": 2 * K}  # calls that a model does not count itself


def legacy_state() -> np.ndarray:
    state: Any = np.random.get_state()
    return np.array(state[1])


@pytest.mark.parametrize(("name", "trajectory", "guided"), CASES)
def test_contract(name: str, trajectory: str | None, guided: bool, model: Model, tmp_path: Path) -> None:
    x, cond, course = inputs(model, guided)
    kept, rng = x.clone(), (legacy_state(), torch.get_rng_state())
    probe = make_probe(name, **SMALL[name], **({} if trajectory is None else {"trajectory": trajectory}))
    with attach(model, probe.mode) as attachment:
        found = probe(model, attachment, x, cond, course)
        hooks = [len(m._forward_hooks) for m in model.unet.modules()]  # what stores text keys comes with the first call
        used = model.calls
        again = probe(model, attachment, x, cond, course)
        assert [len(m._forward_hooks) for m in model.unet.modules()] == hooks
    assert not hooks_of(model.unet)

    assert found.sites == attachment.sites
    assert found.method == name
    assert found.sigmas == pytest.approx([model.sigma(t) for t in TS])
    assert found.scores.shape == (K, S)
    assert np.isfinite(found.scores).all()
    assert name in SIGNED or (found.scores >= 0).all()
    if found.low is not None and found.high is not None:
        assert (found.low <= found.scores).all()
        assert (found.scores <= found.high).all()
    assert found.calls == (STUDENT if trajectory == "student" else PRICE)[name]
    assert used == found.calls - BACKWARD.get(name, 0)
    assert (again.scores == found.scores).all()
    assert torch.equal(x, kept)
    assert torch.is_grad_enabled()
    assert (legacy_state() == rng[0]).all()
    assert torch.equal(torch.get_rng_state(), rng[1])

    loaded = Importance.load(found.save(tmp_path / "importance.json"))
    assert loaded.sites == found.sites
    assert loaded.details == found.details
    assert (loaded.calls, loaded.method) == (found.calls, found.method)
    for field in ("sigmas", "scores", "low", "high"):
        a, b = getattr(loaded, field), getattr(found, field)
        assert (a is None and b is None) or (a == b).all()


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean ablation"):
        make_probe("ablatoin")
    with pytest.raises(UserError, match="did you mean rounds"):
        make_probe("voting", round=3)
    with pytest.raises(UserError, match="did you mean cached"):
        make_probe("voting", teacher="cache")
    with pytest.raises(UserError, match="at least 1"):
        make_probe("voting", epochs=0)
    with pytest.raises(UserError, match="did you mean student"):
        make_probe("gram", trajectory="studnet")
    with pytest.raises(UserError, match="at least 1"):
        make_probe("shapley", permutations=0)
    with pytest.raises(UserError, match="at least 2"):
        make_probe("snr", draws=1)
    with pytest.raises(UserError, match="value=1"):
        make_probe("gram", value=1.0)


def test_bad_importances_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shape"):
        Importance(("a",), np.array([2.0, 1.0]), np.ones((2, 2)))
    with pytest.raises(UserError, match="not finite"):
        Importance(("a",), np.array([1.0]), np.full((1, 1), np.nan))
    with pytest.raises(UserError, match="descending"):
        Importance(("a",), np.array([1.0, 2.0]), np.ones((2, 1)))
    (tmp_path / "other.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="is no rwopt"):
        Importance.load(tmp_path / "other.json")
    with pytest.raises(UserError, match="cannot be read"):
        Importance.load(tmp_path / "absent.json")


def test_interval_of_the_mean() -> None:
    mean, low, high = mean_interval(np.array([[1.0, 2.0, 3.0]]))
    assert low is not None
    assert high is not None
    assert mean == [2]
    assert high - mean == pytest.approx(1.96 / 3**0.5)
    assert mean - low == pytest.approx(high - mean)
    assert mean_interval(np.ones((2, 1)))[1:] == (None, None)
    values = np.array([[-3.0, 1.0]])
    assert (mean_interval(values)[1] == 0).all()
    assert mean_interval(values, signed=True)[1] == pytest.approx(-1 - 1.96 * 2)
