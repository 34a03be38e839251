"""What every probe must do, and what each one finds on losses whose sensitivities are known."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from rwopt.apply import Attachment
from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import PROBES, SIGNED, Importance, make_probe, mean_interval
from rwopt.probes.ablation import ablate
from rwopt.probes.gradient_norm import output_gradient
from rwopt.probes.gram import columns, products
from rwopt.probes.shapley import draw_orders, every_subset, exact_shapley, permutation_shapley, skip_loss, summarise
from rwopt.probes.snr import Moments, watch
from rwopt.probes.teacher import Teacher
from rwopt.probes.voting import Voting, _skip, follow, points
from rwopt.sampling import Condition, predict, sample
from rwopt.sites import find_sites, group_sites, list_sites

N, K, S = 2, 2, 7  # pictures, steps, sites (of the tiny U-Net, in 5 blocks)
TS = [700, 300]
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
    "reward_gradient": 4 * K,
    "shapley": K * (2 + 2 * (S - 1)),
    "snr": K + 3 * K,
    "voting": 2 * K * 2 * 3,
}
TAILS = K * (K + 1) // 2  # steps from each step to the end, summed
STUDENT = {
    "ablation": K + TAILS * S,
    "gram": K + TAILS * S,
    "reward_gradient": 4 * K,
    "shapley": K + TAILS * (1 + 2 * (S - 1)),
    "voting": 2 * 3 * (K + TAILS),
}
CASES = [(name, "teacher" if name in STUDENT else None, guided) for name in PROBES for guided in (True, False)]
CASES += [(name, "student", True) for name in STUDENT]
BACKWARD = {"gradient_norm": 2 * K, "reward_gradient": 2 * K}  # calls that a model does not count itself


@pytest.fixture
def model(tiny_unet: Any) -> Model:
    scheduler = DDIMScheduler(prediction_type="v_prediction")  # type: ignore[no-untyped-call]
    return Model("tiny", tiny_unet, None, None, None, scheduler, torch.device("cpu"))


def inputs(guided: bool = True) -> tuple[torch.Tensor, Condition, list[int]]:
    g = torch.Generator().manual_seed(0)
    text = torch.randn(2, N, 5, 12, generator=g)
    cond = Condition(text[0], text[1] if guided else None, 3.0 if guided else 1.0)
    return torch.randn(N, 4, 8, 8, generator=g), cond, TS


def attach(model: Model, mode: str) -> Attachment:
    return Attachment(model.unet, [s.id for s in list_sites(model.unet)], mode)


def legacy_state() -> np.ndarray:
    state: Any = np.random.get_state()
    return np.array(state[1])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    def ranks(v: np.ndarray) -> np.ndarray:
        return np.asarray((v[:, None] > v).sum(1) + (v[:, None] == v).sum(1) / 2)

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


# --- the contract


@pytest.mark.parametrize(("name", "trajectory", "guided"), CASES)
def test_contract(name: str, trajectory: str | None, guided: bool, model: Model, tmp_path: Path) -> None:
    x, cond, ts = inputs(guided)
    kept, rng = x.clone(), (legacy_state(), torch.get_rng_state())
    probe = make_probe(name, **SMALL[name], **({} if trajectory is None else {"trajectory": trajectory}))
    with attach(model, probe.mode) as attachment:
        hooks = [len(m._forward_hooks) for m in model.unet.modules()]
        found = probe(model, attachment, x, cond, ts)
        used = model.calls
        again = probe(model, attachment, x, cond, ts)
        assert [len(m._forward_hooks) for m in model.unet.modules()] == hooks

    assert found.sites == attachment.sites
    assert found.method == name
    assert found.sigmas == pytest.approx([model.sigma(t) for t in ts])
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


def test_probes_follow_the_plain_trajectory(model: Model) -> None:
    x, cond, ts = inputs()
    states: list[torch.Tensor] = []
    with attach(model, "residual") as attachment:
        teacher = Teacher(model, attachment, x, cond, ts)
        with torch.no_grad():
            list(teacher.run())
        sample(model, attachment, x, cond, ts, callback=lambda i, t, x: states.append(x))
    assert all(torch.equal(a, b) for a, b in zip(teacher.states, states, strict=True))


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
    assert (
        mean == [2]
    )
    assert (
        high - mean == pytest.approx(1.96 / 3**0.5)
    )
    assert (
        mean - low == pytest.approx(high - mean)
    )
    assert mean_interval(np.ones((2, 1)))[1:] == (None, None)
    values = np.array([[-3.0, 1.0]])
    assert (mean_interval(values)[1] == 0).all()
    assert (mean_interval(values, signed=True)[1] == pytest.approx(-1 - 1.96 * 2))


# --- each probe on a real U-Net


def test_ablation_is_the_relative_error_of_a_skip(model: Model) -> None:
    x, cond, ts = inputs()
    weights = torch.ones(S)
    weights[3] = 0
    with attach(model, "residual") as attachment, torch.no_grad():
        found = make_probe("ablation")(model, attachment, x, cond, ts)
        plain, cut = (predict(model, attachment, x, ts[0], cond, w) for w in (None, weights))
        by_block = make_probe("ablation", by="block")(model, attachment, x, cond, ts)
    ratios = [
        float((cut[[n, N + n]] - plain[[n, N + n]]).square().sum() / plain[[n, N + n]].square().sum())
        for n in (0, 1)
    ]
    assert found.scores[0, 3] == pytest.approx(np.mean(ratios), rel=1e-4)
    assert by_block.calls == K * (1 + 5)
    assert by_block.scores[0, 3] == by_block.scores[0, 4]


def test_student_trajectory_ends_where_sampling_ends(model: Model) -> None:
    x, cond, ts = inputs()
    weights = torch.ones(K, S)
    weights[0, 2] = 0
    rows = {model.sigma(t): w for t, w in zip(ts, weights, strict=True)}
    with attach(model, "residual") as attachment, torch.no_grad():
        teacher = Teacher(model, attachment, x, cond, ts)
        predict_end, ends = teacher.view("student")
        plain = sample(model, attachment, x, cond, ts)
        assert all(torch.equal(end, plain) for end in ends)
        moved = predict_end(0, weights[0].numpy())
        torch.testing.assert_close(moved, sample(model, attachment, x, cond, ts, lambda sigma: rows[sigma]))
        found = make_probe("ablation", trajectory="student")(model, attachment, x, cond, ts)
    ratio = (moved - plain).square().sum((1, 2, 3)) / plain.square().sum((1, 2, 3))
    assert found.scores[0, 2] == pytest.approx(float(ratio.mean()), rel=1e-4)


@pytest.mark.parametrize("trajectory", ["teacher", "student"])
def test_gram_holds_the_ablation_and_all_pairs(trajectory: str, model: Model) -> None:
    x, cond, ts = inputs()
    with attach(model, "residual") as attachment:
        ablation = make_probe("ablation", trajectory=trajectory)(model, attachment, x, cond, ts)
        gram = make_probe("gram", trajectory=trajectory)(model, attachment, x, cond, ts)
        sums = make_probe("gram", trajectory=trajectory, score="shapley")(model, attachment, x, cond, ts)
    np.testing.assert_allclose(gram.scores, ablation.scores, rtol=1e-6)
    matrices = np.array(gram.details["gram"])
    np.testing.assert_allclose(matrices, matrices.transpose(0, 2, 1), rtol=1e-9)
    np.testing.assert_allclose(matrices.diagonal(axis1=1, axis2=2), gram.scores, rtol=1e-9)
    np.testing.assert_allclose(matrices.sum(2), sums.scores, atol=1e-12)
    if trajectory == "student":  # steps share the final latents, so they interact too
        table = np.array(gram.details["table"]).reshape(K, S, K, S)
        np.testing.assert_allclose([table[k, :, k] for k in range(K)], matrices, rtol=1e-9)


def test_gram_predicts_a_small_joint_move(model: Model) -> None:
    x, cond, ts = inputs()
    move = np.array([0.02, -0.01, 0.0, 0.02, 0.01, -0.02, 0.01])
    with attach(model, "residual") as attachment, torch.no_grad():
        found = make_probe("gram", value=0.98)(model, attachment, x, cond, ts)
        teacher = Teacher(model, attachment, x, cond, ts)
        for i, plain in enumerate(teacher.run()):
            error = skip_loss(lambda i, w: teacher.predict(i, 1 + move), i, plain, N)(np.ones(S, dtype=bool)).mean()
            assert move @ np.array(found.details["gram"][i]) @ move == pytest.approx(error, rel=0.15)


def test_shapley_sampling_is_exact_enumeration_in_expectation(model: Model) -> None:
    x, cond, ts = inputs()
    ids = [s.id for s in list_sites(model.unet)][:3]  # few enough to try all 3! orders
    with Attachment(model.unet, ids) as attachment, torch.no_grad():
        teacher = Teacher(model, attachment, x, cond, ts[:1])
        for i, plain in enumerate(teacher.run()):
            loss = skip_loss(teacher.predict, i, plain, N)
            exact = exact_shapley(every_subset(loss, 3))
            shares = permutation_shapley(loss, np.array(list(itertools.permutations(range(3)))))
            assert teacher.calls == 1 + 7  # every subset was asked for once
    np.testing.assert_allclose(shares.mean(0), exact, rtol=1e-9)


@pytest.mark.parametrize("m", [1, 2])
def test_each_picture_has_its_own_orders_for_the_price_of_one(model: Model, m: int) -> None:
    """Against the exact values of each picture, over all orders that two pictures can draw together."""
    x, cond, ts = inputs()
    ids = [s.id for s in list_sites(model.unet)][:3]
    with Attachment(model.unet, ids) as attachment, torch.no_grad():
        teacher = Teacher(model, attachment, x, cond, ts[:1])
        (plain,) = teacher.run()
        loss = skip_loss(teacher.predict, 0, plain, N)
        exact = exact_shapley(every_subset(loss, 3))
        sums = []
        for order in itertools.permutations(range(3)):
            pair = np.array([order, order[::-1]])  # m = 1: the second picture has the reverse; m = 2: each has both
            orders = pair[None] if m == 1 else np.stack([pair, pair], 1)
            before = teacher.calls
            sums.append(permutation_shapley(loss, orders))
            assert teacher.calls - before <= m * 3
            assert all(share.sum(0) == pytest.approx(exact.sum(0)) for share in sums[-1])  # to the end, in any order
        np.testing.assert_allclose(np.mean(sums, (0, 1)), exact, rtol=1e-5)
    with Attachment(model.unet, ids) as attachment:
        made = [make_probe("shapley", permutations=m, seed=s)(model, attachment, x, cond, ts[:1]) for s in range(60)]
    assert {p.calls for p in made} == {2 + m * 2}
    np.testing.assert_allclose(np.mean([p.scores[0] for p in made], 0), exact.mean(1), atol=0.02 * exact.max())


def test_reward_gradient_agrees_with_finite_differences(model: Model) -> None:
    x, cond, ts = inputs()
    target = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def reward(z: torch.Tensor) -> torch.Tensor:
        return -(z - target).square().flatten(1).sum(1)

    with attach(model, "residual") as attachment:
        full = make_probe("reward_gradient", reward=reward)(model, attachment, x, cond, ts)
        local = make_probe("reward_gradient", reward=reward, trajectory="teacher")(model, attachment, x, cond, ts)
        for k, s in ((0, 2), (1, 5)):
            ends = []
            for h in (1e-2, -1e-2):
                table = torch.ones(K, S)
                table[k, s] += h
                rows = {model.sigma(t): row for t, row in zip(ts, table, strict=True)}
                ends.append(reward(sample(model, attachment, x, cond, ts, lambda sigma, r=rows: r[sigma])).mean())
            assert full.scores[k, s] == pytest.approx(float(ends[0] - ends[1]) / 2e-2, rel=0.03, abs=1e-4)
        with pytest.raises(UserError, match="task_reward"):
            make_probe("reward_gradient")(model, attachment, x, cond, ts)
    np.testing.assert_allclose(local.scores[-1], full.scores[-1], rtol=1e-5)  # after the last step no input is left
    assert (local.scores[0] != full.scores[0]).all()


@pytest.mark.parametrize("kinds", [("transformer",), ("self", "cross", "ff")])
def test_snr_slope_agrees_with_scaling_the_branch(kinds: tuple[str, ...], model: Model) -> None:
    """The derivative of the log-SNR that one reads after really scaling the branch by 1 +- h."""
    x, cond, _ = inputs(guided=False)
    sites = list_sites(model.unet, kinds)
    site = next(i for i, s in enumerate(sites) if s.path.startswith("up_blocks.1"))  # one transformer block each
    draws = torch.randn(4, *x.shape, generator=torch.Generator().manual_seed(3)) * 0.5

    def moments(weight: float) -> Moments:
        out, weights = Moments(), torch.ones(len(sites))
        weights[site] = weight
        with Attachment(model.unet, [s.id for s in sites]) as attachment, torch.no_grad():
            for noise in draws:
                with watch(model.unet, sites) as seen:
                    predict(model, attachment, x + noise, 300, cond, weights)
                out.add(*seen[site, 0])
        return out

    slope = (moments(1.01).log_snr() - moments(0.99).log_snr()) / 0.02
    np.testing.assert_allclose(moments(1.0).slope(), slope, rtol=2e-2, atol=2e-3)


def test_snr_needs_a_branch(model: Model) -> None:
    with attach(model, "output") as attachment, pytest.raises(UserError, match="keeps its SNR"):
        make_probe("snr")(model, attachment, *inputs())


def test_ablation_in_output_mode_would_cut_the_stream(model: Model) -> None:
    with attach(model, "output") as attachment:
        for name in ("gram", "shapley"):
            with pytest.raises(UserError, match="mode=residual"):
                make_probe(name)(model, attachment, *inputs())
        with pytest.raises(UserError, match="mode=residual"):
            make_probe("ablation")(model, attachment, *inputs())
        found = make_probe("ablation", value=0.97)(model, attachment, *inputs())
    assert (found.scores > 0).all()


@pytest.mark.parametrize("mode", ["residual", "output"])
def test_gradient_norm_agrees_with_finite_differences(mode: str, model: Model) -> None:
    x, cond, ts = inputs()
    with attach(model, mode) as attachment:
        found = make_probe("gradient_norm")(model, attachment, x, cond, ts)
        for s in (0, 2, 6):
            with torch.no_grad():
                up, down = (
                    predict(model, attachment, x, ts[0], cond, torch.ones(S) + h * torch.eye(S)[s])
                    .square()
                    .flatten(1)
                    .mean(1)
                    for h in (1e-2, -1e-2)
                )
            assert found.scores[0, s] == pytest.approx(
                float((up - down).abs().mean() / 2e-2), rel=0.02, abs=1e-5
            )


def test_voting_scores_blocks(model: Model) -> None:
    x, cond, ts = inputs()
    with attach(model, "output") as attachment:
        a = make_probe("voting", **SMALL["voting"])(model, attachment, x, cond, ts)
        b = make_probe("voting", teacher="cached", **SMALL["voting"])(model, attachment, x, cond, ts)
    assert a.details["blocks"] == [
        "down_blocks.0",
        "down_blocks.1",
        "mid_block",
        "up_blocks.1",
        "up_blocks.2",
    ]
    assert (a.scores[:, 3] == a.scores[:, 4]).all()
    assert (a.scores[:, 5] == a.scores[:, 6]).all()
    assert a.scores.min() >= 2
    assert a.scores.max() <= 2 * 5
    assert (a.scores == b.scores).all()
    assert b.calls == K + K * 2 * 3


def test_voting_along_the_student_judges_the_final_latents(model: Model) -> None:
    """The walk sees the end of a run in which one step is weighed, skips and all, and the others are plain."""
    x, cond, ts = inputs()
    weights, off = np.array([0.9, 1.0, 0.8, 0.7, 0.95]), np.array([False, True, False, False, False])
    seen: list[torch.Tensor] = []

    class Once(Voting):
        def vote(self, run: Any, student: Any, steps: int, blocks: int) -> tuple[np.ndarray, dict[str, Any]]:
            seen.extend([*run(), *(student(i, weights, off) for i in range(steps))])
            return np.ones((steps, blocks)), {}

    blocks = group_sites(list_sites(model.unet), "block")
    table = np.ones(S)
    for weight, skip, members in zip(weights, off, blocks.values(), strict=True):
        table[members] = 0.0 if skip else weight
    with attach(model, "residual") as attachment:
        Once(trajectory="student")(model, attachment, x, cond, ts)
        plain, at = sample(model, attachment, x, cond, ts), [model.sigma(t) for t in ts]
        rows = [{s: torch.as_tensor(table if s == at[i] else np.ones(S)).float() for s in at} for i in range(K)]
        ends = [sample(model, attachment, x, cond, ts, row.get) for row in rows]
    for found, expected in zip(seen, [plain] * K + ends, strict=True):
        torch.testing.assert_close(found, expected)
    assert not torch.allclose(ends[0], plain)


def test_a_skip_in_output_mode_is_the_residual_skip(model: Model) -> None:
    x, cond, ts = inputs()
    off = list_sites(model.unet)[2]
    weights = torch.ones(S)
    with torch.no_grad():
        with attach(model, "output") as attachment, _skip(model.unet, [off]):
            weights[2] = 0.9  # must not matter: the published skip is not scaled
            skipped = predict(model, attachment, x, ts[0], cond, weights)
        with attach(model, "residual") as attachment:
            weights[2] = 0.0
            assert torch.equal(skipped, predict(model, attachment, x, ts[0], cond, weights))
    assert find_sites(model.unet, [off.id])[0].kind == "transformer"


# --- known sensitivities: L(w) = (1 - w)' H (1 - w)


class Quadratic:
    """A linear network whose mean squared error at step k is (1 - w)' H[k] (1 - w); counts its calls."""

    def __init__(self, hessians: np.ndarray, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        steps, s, _ = hessians.shape
        basis = np.linalg.qr(rng.standard_normal((64, s)))[0] * 8  # 64 = 4 x 4 x 4 elements a row
        self.maps = [torch.tensor(basis @ np.linalg.cholesky(h).T) for h in hessians]
        self.plain = torch.tensor(rng.standard_normal((steps, 1, 4, 4, 4)))
        self.calls = 0

    def run(self) -> Any:
        for plain in self.plain:
            self.calls += 1
            yield plain

    def predict(self, i: int, weights: np.ndarray, skipped: np.ndarray | None = None) -> torch.Tensor:
        self.calls += 1
        weights = weights if skipped is None else np.where(skipped, 0, weights)
        return self.plain[i] + (self.maps[i] @ torch.tensor(1 - weights)).reshape(1, 4, 4, 4)


def coupled(rng: np.random.Generator, s: int, scale: float, coupling: float) -> np.ndarray:
    """A random SPD matrix whose diagonal spans two decades; `coupling` bounds the correlations."""
    d = scale * 10 ** rng.uniform(-2, 0, s)
    a = rng.standard_normal((s, 4 * s))
    c = (1 - coupling) * np.eye(s) + coupling * np.corrcoef(a)
    return c * np.sqrt(np.outer(d, d))


def test_ablation_ranks_known_sensitivities() -> None:
    rng = np.random.default_rng(1)
    hessians = np.array([coupled(rng, 7, 1.0, 0.5) for _ in range(200)])
    net = Quadratic(hessians)
    errors = ablate(net.predict, net.run(), [[s] for s in range(7)], 7, 1)[..., 0]
    assert net.calls == 200 * (1 + 7)
    truth = hessians.diagonal(axis1=1, axis2=2)
    scale = net.plain.square().mean((1, 2, 3, 4)).numpy()[:, None]
    np.testing.assert_allclose(errors * scale, truth, rtol=1e-9)
    shapley = hessians.sum(2)  # of the game v(A) = 1_A' H 1_A
    assert np.mean([spearman(e, t) for e, t in zip(errors, shapley, strict=True)]) >= 0.9


@pytest.mark.parametrize("update", ["probability", "hard", "soft"])
def test_the_published_score_runs_against_sensitivity(update: str) -> None:
    """A fact of the published rule, not a wish.

    Where the error limit binds, blocks that cannot shrink keep high thresholds, and those get few points.
    """
    diagonal = np.logspace(-1.5, 0.5, 7)[np.random.default_rng(3).permutation(7)]
    hessians = np.array([np.diag(diagonal)] * 3) * 0.02
    corr = {}
    for turned in (False, True):
        net, probe = Quadratic(hessians), Voting(update=update, seed=5, reversed=turned)
        scores, details = probe.vote(net.run, net.predict, 3, 7)
        assert net.calls == 2 * 3 * 15 * 20
        assert scores.min() >= 15
        assert scores.max() <= 15 * 7
        assert (scores.sum(1) == 15 * 28).all()
        corr[turned] = np.mean([spearman(s, diagonal) for s in scores])
    assert all(0.05 < a < 0.5 for a in details["acceptance"])
    assert corr[False] < -0.5
    assert corr[True] > 0.5
    if update == "probability":
        assert details["skipped"] == 0  # thresholds stay below the weights that they follow


def test_walk_depends_on_its_seed_and_guard_only() -> None:
    hessians = np.array([np.diag(np.logspace(-3, -2, 5))] * 2)

    def vote(**options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        net = Quadratic(hessians)
        return Voting(rounds=3, epochs=10, **options).vote(net.run, net.predict, 2, 5)

    assert (vote(seed=1)[0] == vote(seed=1)[0]).all()
    assert (vote(seed=1)[0] != vote(seed=2)[0]).any()
    # with no limit only the energy decides: the published guard lets proposals raise it
    free = (1e9, 1e9)
    assert vote(energy_guard="fixed", limit=free)[1]["acceptance"] == [1, 1]
    assert max(vote(limit=free)[1]["acceptance"]) < 0.9


def test_published_update_rules_and_points() -> None:
    assert follow("probability", True, 1.0) == pytest.approx((0.87, 0.10))
    assert follow("probability", False, 1.0) == pytest.approx((0.81, 0.04))
    assert follow("hard", False, 0.3) == (0.5, 0.0)
    assert follow("soft", True, 0.25) == (0.25, 0.75)
    threshold = np.array([[0.9, 0.1, 0.5]])
    assert points(threshold, np.random.default_rng(0)).tolist() == [[1, 3, 2]]
    assert points(threshold, np.random.default_rng(0), most_to_highest=True).tolist() == [[3, 1, 2]]


def test_output_gradient_keeps_rows_apart() -> None:
    weights = torch.ones(3, 2, requires_grad=True)
    out = (
        (weights * torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]]))
        .sum(1)[:, None, None, None]
        .expand(3, 1, 2, 2)
    )
    assert output_gradient(out, weights).tolist() == [[6, 12], [42, 56], [0, 2]]


def quadratic_losses(hessian: np.ndarray) -> np.ndarray:
    """Errors [2^S, 1] of all subsets of the game v(A) = 1_A' H 1_A."""
    return every_subset(lambda skipped: np.array([skipped @ hessian @ skipped], dtype=float), len(hessian))


def test_gram_and_shapley_recover_a_coupled_quadratic() -> None:
    rng = np.random.default_rng(2)
    hessians = np.array([coupled(rng, 7, 1.0, 0.9) for _ in range(30)])
    net = Quadratic(hessians)
    scale = net.plain.square().mean((1, 2, 3, 4)).numpy()
    ranks = []
    for i, moves in enumerate(columns(net.predict, net.run(), 7, 1)):
        (gram,) = products(moves, moves) * scale[i]
        np.testing.assert_allclose(gram, hessians[i], rtol=1e-9, atol=1e-12)
        exact = exact_shapley(quadratic_losses(hessians[i]))[:, 0]
        np.testing.assert_allclose(gram.sum(1), exact, rtol=1e-9)  # row sums: exact for a quadratic
        loss = skip_loss(net.predict, i, net.plain[i], 1)
        shares = permutation_shapley(loss, draw_orders(2, 7, rng)) * scale[i]
        np.testing.assert_allclose(shares.mean(0)[:, 0], exact, rtol=1e-9)  # so is one order with its reverse
        ranks.append(spearman(gram.diagonal(), exact))
    assert net.calls == 30 * (1 + 7 + 1 + 2 * 6)
    assert np.mean(ranks) > 0.8


def test_shapley_errors_are_honest() -> None:
    """On a game of third order, where orders differ, intervals hold the truth about as often as they say."""
    rng = np.random.default_rng(4)
    cubic = rng.standard_normal((6, 6, 6))
    loss = lambda a: np.array([np.einsum("ijk,i,j,k", cubic, *[a.astype(float)] * 3)])  # noqa: E731
    exact = exact_shapley(every_subset(loss, 6))[:, 0]
    assert exact.sum() == pytest.approx(cubic.sum())
    hits = []
    for _ in range(40):
        mean, half = summarise(permutation_shapley(loss, draw_orders(40, 6, rng)))
        assert half is not None
        hits.append(np.abs(mean - exact) < half)
    assert 0.85 < np.mean(hits) < 1
    hits = []
    for _ in range(40):  # 30 pictures, each with a game of its own: the mean over all pictures there could be
        sizes = rng.uniform(0.5, 1.5, 30)
        many = lambda a, z=sizes: z * np.array([loss(row)[0] for row in np.broadcast_to(a, (30, 6))])  # noqa: E731
        mean, half = summarise(permutation_shapley(many, draw_orders(30, 6, rng)[None]))
        assert half is not None
        hits.append(np.abs(mean - exact) < half)
    assert 0.85 < np.mean(hits) < 1
    assert summarise(permutation_shapley(loss, draw_orders(2, 6, rng)))[1] is None
    with pytest.raises(UserError, match="all subsets"):
        exact_shapley(np.zeros(6))


def test_snr_estimator_finds_known_parts() -> None:
    rng = np.random.default_rng(5)
    s, sa = rng.standard_normal((2, 1, 4000))
    mix, own = 0.5, 0.3  # n_a = mix n + own noise
    moments = Moments()
    for _ in range(400):
        n = rng.standard_normal((1, 4000)) * 2
        moments.add(torch.tensor(s + n), torch.tensor(sa + mix * n + own * rng.standard_normal((1, 4000))))
    truth = 2 * (s @ sa.T)[0, 0] / (s @ s.T)[0, 0] - 2 * mix
    assert moments.slope()[0] == pytest.approx(truth, abs=0.02)
    assert moments.log_snr()[0] == pytest.approx(np.log((s @ s.T)[0, 0] / (4 * 4000)), abs=0.02)
