"""Gradients through the sampler: equal to finite differences, zero where they must be, and resumed to the bit."""

from __future__ import annotations

import csv
import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from helpers.small import make_tiny_unet, weight_function
from torch import Tensor, nn

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.objectives import Batch
from rwopt.sampling import backprop
from rwopt.sampling.backprop import GradientPath, Reward, unroll
from rwopt.sampling.course import Course, course_at, learned_course
from rwopt.sampling.denoise import Condition, Sided
from rwopt.sampling.sample import sample
from rwopt.schedule.steps import StepFunction
from rwopt.tuners import Parameter
from rwopt.tuners.gradient import GradientTuner
from rwopt.tuners.options import GradientOptions
from rwopt.tuners.problem import Problem
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import list_sites

TS = [900, 600, 300]
K, S = 3, 7
PATHS = [GradientPath("full"), GradientPath("truncated", last=1), GradientPath("detached", stride=2)]


def tiny_model(dtype: torch.dtype = torch.float32) -> Model:
    unet = make_tiny_unet()
    for site in list_sites(unet):  # branches of some size, so that weights move the picture
        unet.get_submodule(site.path).proj_out.weight.mul_(4)
    scheduler = DDIMScheduler(prediction_type="v_prediction")  # type: ignore[no-untyped-call]
    return Model("tiny", unet.to(dtype), None, None, None, scheduler, torch.device("cpu"))


class Toy(Problem):
    """Latents to be brought near a target of each picture: no decoder, no judge."""

    def __init__(self, model: Model, pictures: int = 4, group_by: str = "stage") -> None:
        sites = list_sites(model.unet)
        self.function = weight_function(sites, [model.sigma(t) for t in TS[::2]], group_by)
        self.model, self.pictures, self.steps = model, pictures, len(TS)

    def batch(
        self, attachment: Attachment, rows: slice, theta: Tensor
    ) -> tuple[Tensor, Condition, Course, Reward]:
        parts = []
        for i in range(rows.start, rows.stop):
            g = torch.Generator().manual_seed(i)
            parts.append([torch.randn(shape, generator=g) for shape in ((4, 8, 8), (5, 12), (4, 8, 8))])
        x, text, target = (torch.stack(p) for p in zip(*parts, strict=True))
        return x, Condition(text), course_at(self.model, TS), lambda z: -(z - target).square().flatten(1).sum(1)

    def values(self) -> dict[str, float]:
        return {"guidance": 1.0}


def gradient(model: Model, path: GradientPath, table: Tensor, offset: int = 0) -> Tensor:
    """Of the summed reward with respect to a table [K, S]."""
    table = table.clone().requires_grad_(True)
    problem = Toy(model)
    with Attachment(model.unet, problem.function.sites) as attachment:
        x, cond, course, reward = problem.batch(attachment, slice(0, 2), table)
        row = {sigma: k for k, sigma in enumerate(course.sigmas)}
        end = unroll(model, attachment, x, cond, course, lambda sigma: table[row[sigma]], path, offset)
        return torch.autograd.grad(reward(end).sum(), table)[0]


def value(model: Model, table: Tensor) -> float:
    problem = Toy(model)
    with Attachment(model.unet, problem.function.sites) as attachment:
        x, cond, course, reward = problem.batch(attachment, slice(0, 2), table)
        row = {sigma: k for k, sigma in enumerate(course.sigmas)}
        return float(reward(sample(model, attachment, x, cond, course, lambda sigma: table[row[sigma]]).double()).sum())


TABLE = 1 + 0.2 * torch.randn(K, S, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


@pytest.mark.parametrize(("inner", "switch"), [(False, "auto"), (False, "off"), (True, "off")])
def test_full_gradient_equals_finite_differences(inner: bool, switch: str) -> None:
    """Under checkpointing too: hooks that read shared state would see the last step's weights when steps are re-run."""
    model = tiny_model(torch.float64)
    model.checkpointing = switch  # auto: activations are kept, a tiny model's fit anywhere; off: steps are re-run
    if inner:
        model.unet.enable_gradient_checkpointing()
    exact, h = gradient(model, GradientPath("full"), TABLE), 2e-2
    for k, s in ((0, 1), (0, 5), (1, 3), (2, 6)):
        shift = torch.zeros_like(TABLE)
        shift[k, s] = h
        near, far = (value(model, TABLE + c * shift) - value(model, TABLE - c * shift) for c in (1, 2))
        slack = 2e-3 * float(exact.abs().max())
        assert float(exact[k, s]) == pytest.approx((8 * near - far) / (12 * h), rel=2e-3, abs=slack)


def test_each_mode_trains_the_rows_that_it_says() -> None:
    model = tiny_model()
    table = TABLE.float()
    full = gradient(model, GradientPath("full"), table)
    truncated = gradient(model, GradientPath("truncated", last=2), table)
    assert (truncated[0] == 0).all()
    torch.testing.assert_close(truncated[1:], full[1:])
    detached = gradient(model, GradientPath("detached"), table)
    assert (detached.abs().amax(1) > 0).all()
    torch.testing.assert_close(detached[-1], full[-1])  # no U-Net comes after the last step
    assert not torch.allclose(detached[0], full[0], rtol=1e-3)
    for offset, live in ((0, [0, 2]), (1, [1])):
        subset = gradient(model, GradientPath("detached", stride=2), table, offset)
        torch.testing.assert_close(subset[live], detached[live])
        assert (subset[[k for k in range(K) if k not in live]] == 0).all()


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "uni_pc"])
def test_the_samplers_dials_have_the_gradient_of_finite_differences(sampler: str) -> None:
    """Noise levels, what the U-Net is told, and guidance; `detached` leaves out what goes through the U-Net's input."""
    model, g = tiny_model(torch.float64), torch.Generator().manual_seed(0)
    shapes = ((2, 4, 8, 8), (2, 5, 12), (2, 5, 12), (2, 4, 8, 8))
    x, text, negative, target = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    function = StepFunction(sampler, [model.sigma(t) for t in TS], model.table.tolist(), 3.0)
    theta = 0.3 * torch.randn(len(function.names), generator=g, dtype=torch.float64)

    def reward(theta: Tensor, path: GradientPath = PATHS[0]) -> Tensor:
        course = learned_course(model, function, theta)
        with Attachment(model.unet, ()) as attachment:
            end = unroll(model, attachment, x, Condition(text, negative), course, lambda sigma: None, path)
        return -(end - target).square().sum()

    dials = theta.clone().requires_grad_(True)
    exact = torch.autograd.grad(reward(dials), dials)[0]
    h = 3e-4  # of a hundred timesteps: the U-Net sees sines of them, and in single precision
    for i, name in enumerate(function.names):
        step = torch.eye(len(theta), dtype=torch.float64)[i] * h
        with torch.no_grad():
            slope = float(reward(theta + step) - reward(theta - step)) / (2 * h)
        assert float(exact[i]) == pytest.approx(slope, rel=5e-3, abs=2e-3 * float(exact.abs().max())), name
    detached = torch.autograd.grad(reward(dials, GradientPath("detached")), dials)[0]
    assert (detached != 0).any()
    assert not torch.allclose(detached, exact)
    last = torch.autograd.grad(reward(dials, GradientPath("truncated", last=1)), dials)[0]
    names = dict(zip(function.names, last.tolist(), strict=True))
    assert names["told2"] == pytest.approx(float(exact[function.names.index("told2")]))
    assert names["told0"] == names["told1"] == 0  # what is told enters by the U-Net alone


@pytest.mark.parametrize("switch", ["auto", "off"])
@pytest.mark.parametrize("path", PATHS)
def test_the_forward_run_and_its_price(path: GradientPath, switch: str) -> None:
    model, kept = tiny_model(), switch == "auto"
    model.checkpointing = switch
    problem = Toy(model)
    with Attachment(model.unet, problem.function.sites) as attachment:
        x, cond, course, reward = problem.batch(attachment, slice(0, 1), TABLE)
        row = TABLE.float()[0].clone().requires_grad_(True)
        end = unroll(model, attachment, x, cond, course, lambda sigma: row, path)
        assert torch.equal(end.detach(), sample(model, attachment, x, cond, course, lambda sigma: row.detach()))
        model.calls = len(course)
        reward(end).sum().backward()  # type: ignore[no-untyped-call]
    trained = sum(path.trains(i, len(course)) for i in range(len(course)))
    # what was counted, and the backward pass as two
    assert path.price(len(course), kept=kept) == model.calls + 2 * trained
    assert model.calls == len(course) + (0 if kept else trained)


# --- switches that save memory


def switched(
    number: torch.dtype, pictures: int, path: GradientPath, large: bool, switch: str, size: float = 1
) -> Tensor:
    """Gradient [K, S] of pictures' mean square times `size`, over `size`; guided, through a decoder."""
    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    model = tiny_model(number)
    model.vae, model.checkpointing = nn.Module.to(vae.requires_grad_(False), number), switch
    g = torch.Generator().manual_seed(0)
    shapes = ((pictures, 4, 8, 8), (2, pictures, 5, 12))
    x, text = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    if number != torch.float64:
        x, text = x.float(), text.float()
    table = TABLE.clone().requires_grad_(True)
    with Attachment(model.unet, [site.id for site in list_sites(model.unet)]) as attachment:
        course = course_at(model, TS)
        row = {sigma: k for k, sigma in enumerate(course.sigmas)}
        cond = Condition(*text, guidance=3.0)
        end = unroll(model, attachment, x, cond, course, lambda sigma: table[row[sigma]], path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("rwopt.models.model.LARGE", 0 if large else math.inf)
            images = model.decode(end)
        reward = (images - 0.3).square().flatten(1).mean(1).sum() * size
        gradient = torch.autograd.grad(reward, table)[0] / size
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.unet.modules())
    return gradient


@functools.cache
def unswitched(number: torch.dtype, pictures: int, path: GradientPath) -> Tensor:
    return switched(number, pictures, path, False, "auto")


SWITCHES = [  # each pair of two of the three; the eight left out cost as much again
    (path, bool((i + j) % 2), switch)
    for i, path in enumerate([*PATHS, GradientPath("detached")])
    for j, switch in enumerate(["off", "on"])
]


@pytest.mark.parametrize(("path", "large", "switch"), SWITCHES)
def test_the_gradient_is_the_same_with_every_switch(path: GradientPath, large: bool, switch: str) -> None:
    """Six pictures, more than one crowd. In float32 only batch sizes differ, which round differently."""
    assert backprop.CROWD < 6
    for number, pictures, most in ((torch.float64, 6, 1e-12), (torch.float32, 6, 3e-6), (torch.float32, 1, 0)):
        plain = unswitched(number, pictures, path)
        found = switched(number, pictures, path, large, switch)
        assert float((found - plain).norm()) <= most * float(plain.norm())


def test_float16_keeps_small_gradients_through_the_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small as those of a mean over 512 x 512 pictures are."""
    exact = switched(torch.float32, 2, GradientPath("full"), True, "on")

    def error() -> float:
        half = switched(torch.float16, 2, GradientPath("full"), True, "on", size=1e-3)
        return float((half - exact).norm() / exact.norm())

    assert error() < 0.02
    monkeypatch.setattr(backprop, "in_range", lambda network, number, *inputs: network(*inputs))
    assert error() > 0.1


def test_sides_of_guidance_and_rows_are_cut_with_their_pictures() -> None:
    model = tiny_model(torch.float64)
    g = torch.Generator().manual_seed(0)
    x, *text = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((6, 4, 8, 8), *[(6, 5, 12)] * 2))
    cond, course = Condition(*text, guidance=torch.linspace(1, 6, 6)), course_at(model, TS)
    for row in (TABLE[0], TABLE[:1].repeat(6, 1) * torch.linspace(0.9, 1.1, 6)[:, None], Sided(TABLE[1], TABLE[2])):
        ends = []
        for model.checkpointing in ("off", "on"):
            with Attachment(model.unet, [site.id for site in list_sites(model.unet)]) as attachment:
                for path in (GradientPath("full"), GradientPath("truncated", last=1)):
                    ends.append(unroll(model, attachment, x, cond, course, lambda sigma, row=row: row, path))
        for end in ends[1:]:
            torch.testing.assert_close(end, ends[0], rtol=1e-10, atol=1e-10)


# --- the tuner


Log = Callable[[dict[str, float]], None]


def make(folder: File, log: Log | None = None, pictures: int = 4, **options: Any) -> GradientTuner:
    problem = Toy(tiny_model(), pictures)
    space = [Parameter("guidance", 1, 12)] + [Parameter(n, -0.7, 0.7) for n in problem.function.names]
    common = {"batch": 2, "updates": 2, "rate": 0.05, "clip": 1e9, "mode": "detached", "accumulate": 2}
    kept = GradientOptions(**{**common, **options})
    return GradientTuner("g", space, problem, folder, seed=3, fingerprint="toy", options=kept, log=log)


def score(t: GradientTuner, values: Any) -> float:
    problem = t.problem
    table = problem.function.schedule(np.array([values[n] for n in t.names]))
    with Attachment(problem.model.unet, problem.function.sites) as attachment:
        x, cond, course, reward = problem.batch(attachment, slice(0, problem.pictures), torch.zeros(0))
        weights = lambda sigma: torch.from_numpy(table.at(sigma)).float()  # noqa: E731
        return float(reward(sample(problem.model, attachment, x, cond, course, weights)).mean())


def run(t: GradientTuner, trials: int) -> list[Any]:
    while len(t.trials()) < trials:
        candidate = t.propose()
        t.observe(candidate, score(t, candidate.values), 3)
    return t.trials()


@pytest.mark.parametrize("mode", ["full", "detached"])
def test_overfitting_one_case_raises_its_reward(mode: str, tmp_path: File) -> None:
    records: list[dict[str, float]] = []
    t = make(tmp_path, records.append, pictures=1, mode=mode, batch=1, accumulate=1, updates=4)
    trials = run(t, 3)
    scores = [x.score for x in trials]
    assert scores == sorted(scores)
    assert scores[-1] > scores[0] + 2
    assert [x.candidate.origin for x in trials] == ["plain", "gradient", "gradient"]
    assert trials[0].candidate.values["guidance"] == 1
    assert [x.calls for x in trials] == [3, 3 + 4 * 9, 3 + 4 * 9]  # 4 updates, each 3 steps of 3 calls
    assert [r["update"] for r in records] == list(range(1, 9))
    rows = [row for f in sorted((tmp_path / "g" / "csv").glob("*/metrics.csv")) for row in csv.DictReader(f.open())]
    assert [float(row["update"]) for row in rows] == list(range(1, 9))
    # the first record is the reward of the start, in the tuner's own words
    assert records[0]["reward"] == pytest.approx(scores[0], rel=1e-5)


def test_accumulation_bounds_and_pull(tmp_path: File) -> None:
    thetas = {}
    for name, options in {"two": {"accumulate": 2}, "one": {"accumulate": 1, "batch": 4}}.items():
        (_, after) = run(make(tmp_path / name, **options), 2)
        thetas[name] = after.candidate.values
    assert thetas["two"] == pytest.approx(thetas["one"], rel=1e-3)  # two halves of the cases, or all at once
    (_, after) = run(make(tmp_path / "far", rate=5.0), 2)
    assert max(abs(v) for n, v in after.candidate.values.items() if n != "guidance") == pytest.approx(0.7)
    (_, held) = run(make(tmp_path / "held", pull=1e6, updates=4), 2)
    (_, free) = run(make(tmp_path / "free", updates=4), 2)
    size = [sum(abs(v) for n, v in x.candidate.values.items() if n != "guidance") for x in (held, free)]
    assert size[0] < size[1]


def test_the_average_is_that_of_the_updates(tmp_path: File) -> None:
    """Weights 0.8^k of theta k updates ago, over their sum; the start and what Adam does have no share in it."""
    single = make(tmp_path / "single", updates=1)
    names, trials = single.names, run(single, 6)[1:]  # theta itself after each of five updates
    table = np.array([[trial.candidate.values[name] for name in names] for trial in trials])
    wanted = np.average(table, axis=0, weights=0.8 ** np.arange(5)[::-1])
    whole = run(make(tmp_path / "mean", updates=5, average=0.8), 2)[-1].candidate.values
    np.testing.assert_allclose([whole[name] for name in names], wanted, rtol=1e-6)
    assert not np.allclose(wanted, table[-1], rtol=1e-3)


def test_stopped_and_resumed_is_the_same_to_the_bit(tmp_path: File) -> None:
    whole = run(make(tmp_path / "whole", average=0.8), 4)
    for trials in (2, 3, 4):
        parts = run(make(tmp_path / "parts", average=0.8), trials)
    assert parts == whole
    with pytest.raises(UserError, match="another recipe"):
        make(tmp_path / "parts", rate=0.1)


CHILD = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
from test_gradient import make, run
run(make(Path({folder!r}), lambda record: time.sleep(0.05), updates=200), 2)
"""


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path: File) -> None:
    from rwopt.tuners import ascent

    here = File(__file__).parent
    folder = tmp_path / "killed"
    code = CHILD.format(tests=str(here.parent), here=str(here), folder=str(folder))
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.time() + 300
    while not (folder / "g" / "last.ckpt").exists():
        assert child.poll() is None, child.stderr.read().decode()  # type: ignore[union-attr]
        assert time.time() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = ascent.read(folder / "g" / "last.ckpt")["count"]
    assert done >= 1
    ends = []
    for place in (folder, tmp_path / "whole"):
        t = make(place, updates=200)
        if place != folder:
            run(t, 1)
        ends.append(t._advance(done + 3)[0])
    assert (ends[0] == ends[1]).all()


def test_two_processes_do_the_work_of_one(tmp_path: File) -> None:
    """DDP over pictures: each process takes half of the micro-batches, gradients are summed."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    torch.set_num_threads(1)  # a forked process must not inherit a pool of threads
    one = run(make(tmp_path / "one", accumulate=2), 2)
    two = run(make(tmp_path / "two", accumulate=2, devices=2), 2)
    assert two[-1].candidate.values == pytest.approx(one[-1].candidate.values, rel=1e-5)
    assert two[-1].calls == one[-1].calls


def test_bad_options_are_refused() -> None:
    with pytest.raises(UserError, match="one of full"):
        GradientPath("half")
    with pytest.raises(UserError, match="at least 1"):
        GradientPath("truncated", last=0)
    with pytest.raises(UserError, match="at least 1"):
        GradientOptions(batch=0)
    with pytest.raises(UserError, match=r"gradient\.average=1\.0: .*below 1"):
        GradientOptions(average=1.0)
    with pytest.raises(UserError, match=r"at least gradient\.devices=2"):
        GradientOptions(accumulate=1, devices=2)


def test_a_batch_is_cut_by_pictures() -> None:
    batch = Batch(torch.zeros(3, 3, 1, 1), reference=torch.arange(3.0), hidden=[["a"], [], ["b"]])
    part = batch.rows(slice(1, 3))
    assert part.reference is not None
    assert part.reference.tolist() == [1, 2]
    assert part.hidden == [[], ["b"]]
    assert part.truth is None
