"""The weights of a call, as numbers and as tensors: the same answers, exact at 0 and 1."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from rwopt.unet.call import PLAIN, Columns, Numbers, Plain, Traced, call_of

W = [0.0, 1.0, 0.3, -0.5, 1.7]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def calls(rows: int) -> dict[str, Plain]:
    row = torch.tensor(W, dtype=torch.float64)
    return {
        "numbers": Numbers(W),
        "numbers with factors": Numbers(W, row.unbind()),
        "column": Columns(row),
        "column a row": Columns(row.expand(rows, -1)),
        "traced": Traced(row.float()),
        "traced a row": Traced(row.float().expand(rows, -1)),
    }


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(4, 3, 5, 2, generator=g), torch.randn(4, 3, 5, 2, generator=g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", list(calls(1)))
def test_all_forms_say_the_same(kind: str, dtype: torch.dtype, pair: tuple[Tensor, Tensor]) -> None:
    y, b = (part.to(dtype) for part in pair)
    call = calls(len(y))[kind]
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 1e-6}
    for column, w in enumerate(W):
        scaled, blended = call.scaled(y, column), call.blended(y, b, column)
        for got, wanted in ((scaled, w * y), (blended, b + w * (y - b))):
            torch.testing.assert_close(y if got is None else got, wanted, **close)
    for got in (call.scaled(y, 1), call.blended(y, b, 1)):
        assert got is None or torch.equal(got, y)
    zero = call.blended(y, b, 0)
    assert zero is not None
    assert torch.equal(zero, b)


def test_frames_take_the_row_of_their_video(pair: tuple[Tensor, Tensor]) -> None:
    y, b = pair  # two frames each of two videos
    rows = Columns(torch.tensor([[2.0], [3.0]]))
    assert torch.equal(rows.scaled(y, 0), torch.cat([2 * y[:2], 3 * y[2:]]))
    torch.testing.assert_close(rows.blended(y, b, 0), torch.cat([2 * y[:2] - b[:2], 3 * y[2:] - 2 * b[2:]]))


def test_weights_that_need_a_gradient_get_one(pair: tuple[Tensor, Tensor]) -> None:
    y, b = (part.double() for part in pair)
    weights = torch.tensor(W, dtype=torch.float64, requires_grad=True)
    call = call_of(weights)
    total = sum((call.scaled(y, c) * (c + 1)).sum() + call.blended(y, b, c).sum() for c in range(len(W)))  # type: ignore[union-attr, operator]
    (gradient,) = torch.autograd.grad(total, weights)
    expected = torch.stack([(c + 1) * y.sum() + (y - b).sum() for c in range(len(W))])
    torch.testing.assert_close(gradient, expected)


def test_what_becomes_numbers() -> None:
    assert isinstance(call_of(torch.tensor(W)), Numbers)
    assert isinstance(call_of(torch.tensor(W).bfloat16()), Numbers)
    assert isinstance(call_of(torch.tensor(W)[None]), Columns)
    assert isinstance(call_of(torch.tensor(W, device="meta")), Columns)  # its values stay where they are
    assert not isinstance(call_of(torch.tensor(W, requires_grad=True)), Numbers)


def test_the_plain_model(pair: tuple[Tensor, Tensor]) -> None:
    assert PLAIN.scaled(pair[0], 0) is None
    assert PLAIN.blended(*pair, 0) is None
    assert PLAIN.table() is None
    assert copy.deepcopy(Numbers(W)).weights == W
