"""What a schedule costs, told without a clock: tensor operations, and values that the host must wait for.

True architectures on the meta device: nothing there has a value, so whatever needs one fails.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from helpers.samplers import SD
from helpers.true import UNETS
from helpers.twins import ids_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rwopt.schedule import Schedule
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.lookup import Timesteps


class Count(TorchDispatchMode):
    """Tensor operations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations[str(func)] = self.operations.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))

    def more_than(self, plain: Count) -> dict[str, int]:
        names = self.operations.keys() | plain.operations.keys()
        more = {n: self.operations.get(n, 0) - plain.operations.get(n, 0) for n in names}
        return {name: count for name, count in more.items() if count}


@pytest.fixture(scope="module", params=list(UNETS))
def net(request: pytest.FixtureRequest) -> Any:
    """A U-Net of the true architecture without values, and the arguments of a call but for the time step."""
    config = UNETS[request.param] | {"addition_embed_type": None}  # sizes and pooled text: no site is there
    size = config["sample_size"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
        return unet, torch.empty(2, 4, size, size), torch.empty(2, 77, unet.config.cross_attention_dim)


def ramp(ids: list[str], **fields: Any) -> Schedule:
    weights = np.random.default_rng(0).uniform(0.9, 1.1, (4, len(ids)))
    return Schedule(tuple(ids), np.array([12.0, 3.0, 0.5, 0.05]), weights, **fields)


def counted(net: Any, t: Any, **weights: Tensor) -> Count:
    unet, x, text = net
    with Count() as count, torch.no_grad():
        unet(x, t, text, **weights)
    return count


@pytest.fixture(scope="module")
def plain(net: Any) -> Count:
    return counted(net, torch.tensor(500))


CALLS: list[tuple[tuple[str, ...], dict[str, int]]] = [
    (("transformer",), {"aten.lerp.Scalar": 1}),
    (("self", "cross", "ff"), {"aten.mul.Tensor": 1}),
    (("resnet",), {"aten.mul.Tensor": 1}),
    (("skip",), {"aten.slice.Tensor": 1, "aten.mul_.Tensor": 1}),
    (("backbone",), {"aten.slice.Tensor": 1, "aten.mul_.Tensor": 1}),
]
NETS = [("SD1.5", *call) for call in CALLS] + [("SDXL", *call) for call in CALLS[:2]]  # it differs in its transformers


@pytest.mark.parametrize(("net", "kinds", "operations"), NETS, indirect=["net"], scope="module")
def test_operations_of_a_call(net: Any, plain: Count, kinds: tuple[str, ...], operations: dict[str, int]) -> None:
    """One a site where rows share their weights, two at a join, none a call besides; nothing at weights of one."""
    unet = net[0]
    scheduler = DDIMScheduler(**SD)
    scheduler.set_timesteps(4)
    pipe, ids = SimpleNamespace(unet=unet, scheduler=scheduler), ids_of(unet, kinds)
    blocks = sum(len(m.transformer_blocks) for _, m in unet.named_modules() if hasattr(m, "transformer_blocks"))
    places = 3 * blocks if kinds == ("self", "cross", "ff") else len(ids)
    with apply(pipe, ramp(ids)):
        counted(net, scheduler.timesteps[0])  # the first call of a picture copies its time steps
        more = counted(net, scheduler.timesteps[1]).more_than(plain)
        assert more == {name: count * places for name, count in operations.items()}
        assert counted(net, scheduler.timesteps[1]).more_than(plain) == more
    with apply(pipe, Schedule.constant(ids, [9.0, 0.1])):
        counted(net, scheduler.timesteps[0])
        assert counted(net, scheduler.timesteps[1]).more_than(plain) == {}
    assert counted(net, torch.tensor(500)).more_than(plain) == {}


def test_operations_where_rows_differ(net: Any, plain: Count) -> None:
    """Two a site; the columns are made once a call."""
    unet, x, text = net
    for kinds in (("transformer",), ("resnet",)):
        ids = ids_of(unet, kinds)
        with Attachment(unet, ids) as attachment:
            weights = torch.empty(2, len(ids), device="meta")
            with Count() as count, torch.no_grad():
                attachment(x, torch.tensor(500), text, weights)
        more = count.more_than(plain)
        each = {n: c for n, c in more.items() if c >= len(ids)}
        assert sum(each.values()) == 2 * len(ids), more
        assert sum(more.values()) - sum(each.values()) <= 4, more


def test_the_host_waits_once_a_picture(monkeypatch: pytest.MonkeyPatch, tiny_unet: UNet2DConditionModel) -> None:
    """Activations and time steps without values, but for the one copy of the time steps at the start of a picture."""
    copies: list[int] = []
    known = {}

    def copied(self: Timesteps, timesteps: Tensor, sites: int, times: None = None) -> None:
        copies.append(len(timesteps))
        made(self, known[len(timesteps)], sites)
        self.timesteps, self.version = timesteps, timesteps._version

    made = Timesteps.__init__
    monkeypatch.setattr(Timesteps, "__init__", copied)
    unet = tiny_unet.to("meta")
    scheduler = DDIMScheduler(**SD)
    pipe = SimpleNamespace(unet=unet, scheduler=scheduler)
    x, text = torch.empty(2, 4, 8, 8, device="meta"), torch.empty(2, 5, 12, device="meta")
    ids = ids_of(unet, ("transformer", "cross", "resnet", "skip"))
    with apply(pipe, ramp(ids)):
        for steps in (5, 3, 5):
            scheduler.set_timesteps(steps)
            known[steps] = scheduler.timesteps
            scheduler.timesteps = scheduler.timesteps.to("meta")
            for t in scheduler.timesteps:
                unet(x, t, text)
            for t in scheduler.timesteps:
                unet(x, t.expand(2), text)
    assert copies == [5, 3, 5]


@pytest.mark.parametrize("form", ["view", "repeated", "sliced", "cloned", "other dtype", "number", "inference"])
def test_each_form_of_the_time_step_gives_the_same(tiny_unet: UNet2DConditionModel, form: str) -> None:
    """What is no view of the scheduler's own steps is copied; in-place changes of the steps are noticed."""
    scheduler = DDIMScheduler(**SD)
    pipe = SimpleNamespace(unet=tiny_unet, scheduler=scheduler)
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    schedule = ramp(ids_of(tiny_unet, ("transformer", "cross")))

    def run() -> list[Tensor]:
        outs = []
        with torch.inference_mode(form == "inference"), torch.no_grad():
            scheduler.set_timesteps(4)
            steps = scheduler.timesteps[1:] if form == "sliced" else scheduler.timesteps
            for t in steps:
                forms = {"repeated": t.expand(2), "cloned": t.clone(), "other dtype": t.double(), "number": int(t)}
                outs.append(tiny_unet(x, forms.get(form, t), text).sample.clone())
        return outs

    with apply(pipe, schedule):
        actual = run()
        scheduler.timesteps = scheduler.timesteps.clone()
        if form == "view":
            tiny_unet(x, scheduler.timesteps[0], text)
            scheduler.timesteps[0] = 17
            changed = tiny_unet(x, scheduler.timesteps[0], text).sample
    explicit = Attachment(tiny_unet, schedule.sites)
    table = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    scheduler.set_timesteps(4)

    def expected(t: int) -> Tensor:
        return explicit(x, t, text, torch.from_numpy(schedule.at(float(table[t]))).float())

    for out, t in zip(actual, scheduler.timesteps[1 if form == "sliced" else 0 :].tolist(), strict=True):
        torch.testing.assert_close(out, expected(t), rtol=1e-5, atol=1e-6)
    if form == "view":
        torch.testing.assert_close(changed, expected(17), rtol=1e-5, atol=1e-6)
