"""Shapley values by permutation sampling, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers.probes import N, Quadratic, coupled, inputs, spearman

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import make_probe
from rwopt.probes.gram import columns, products
from rwopt.probes.shapley import draw_orders, every_subset, exact_shapley, permutation_shapley, skip_loss, summarise
from rwopt.probes.teacher import Teacher
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites


def test_shapley_sampling_is_exact_enumeration_in_expectation(model: Model) -> None:
    x, cond, course = inputs(model, steps=1)
    ids = [s.id for s in list_sites(model.unet)][:3]  # few enough to try all 3! orders
    with Attachment(model.unet, ids) as attachment, torch.no_grad():
        teacher = Teacher(model, attachment, x, cond, course)
        for i, plain in enumerate(teacher.run()):
            loss = skip_loss(teacher.predict, i, plain, N)
            exact = exact_shapley(every_subset(loss, 3))
            shares = permutation_shapley(loss, np.array(list(itertools.permutations(range(3)))))
            assert teacher.calls == 1 + 7  # every subset was asked for once
    np.testing.assert_allclose(shares.mean(0), exact, rtol=1e-9)


@pytest.mark.parametrize("m", [1, 2])
def test_each_picture_has_its_own_orders_for_the_price_of_one(model: Model, m: int) -> None:
    """Against the exact values of each picture, over all orders that two pictures can draw together."""
    x, cond, course = inputs(model, steps=1)
    ids = [s.id for s in list_sites(model.unet)][:3]
    with Attachment(model.unet, ids) as attachment, torch.no_grad():
        teacher = Teacher(model, attachment, x, cond, course)
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
        made = [make_probe("shapley", permutations=m, seed=s)(model, attachment, x, cond, course) for s in range(60)]
    assert {p.calls for p in made} == {2 + m * 2}
    np.testing.assert_allclose(np.mean([p.scores[0] for p in made], 0), exact.mean(1), atol=0.02 * exact.max())


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
    game = every_subset(lambda a: np.einsum("ijk,i,j,k", cubic, *[a.astype(float)] * 3), 6)
    loss = lambda a: game[np.atleast_2d(a) @ 2 ** np.arange(6)]  # noqa: E731 (a value for each row)
    exact = exact_shapley(game)
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
        many = lambda a, z=sizes: z * loss(a)  # noqa: E731
        mean, half = summarise(permutation_shapley(many, draw_orders(30, 6, rng)[None]))
        assert half is not None
        hits.append(np.abs(mean - exact) < half)
    assert 0.85 < np.mean(hits) < 1
    assert summarise(permutation_shapley(loss, draw_orders(2, 6, rng)))[1] is None
    with pytest.raises(UserError, match="all subsets"):
        exact_shapley(np.zeros(6))
