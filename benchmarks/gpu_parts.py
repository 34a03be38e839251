"""What `gpu.py` measures: a part a function, which yields rows and runs in a process of its own.

What only CUDA can tell (kernels, their time, synchronisations, memory) is None elsewhere. A row that cannot be measured
has an `error` instead.
"""

from __future__ import annotations

import copy
import functools
import shlex
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from architectures import VAE
from comparison import ROOT
from diffusers import AutoencoderKL, DDIMScheduler
from gpu_bench import AGAIN, METHODS, NOISE, PLAIN, Bench, Place, added, network, reason, spread
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from rwopt.models import Model
from rwopt.models.formats import auto_vae_format, has_bf16
from rwopt.sampling.backprop import GradientPath
from rwopt.sampling.course import Course, course_at, course_by_rule
from rwopt.sampling.denoise import Condition
from rwopt.sampling.memory import update_memory
from rwopt.schedule.weights import WeightFunction
from rwopt.tuners.ascent import Ascent
from rwopt.tuners.options import GradientOptions
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import BRANCHES, list_sites

Row = dict[str, Any]
GIB = 2**30

# --- sites: operations, synchronisations, wall clock


class Count(TorchDispatchMode):
    """Tensor operations as they are dispatched, views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def sites(place: Place, name: str) -> Iterator[Row]:
    """Of a picture: wall clock over that of plain ones. At the first batch size, as others change nothing there, also
    operations of a U-Net call, and how often the host waits in a picture."""
    bench, counts = Bench(place, name), {}
    for batch, end in place.cells(bench.batches):
        row = {"model": name, "batch": batch}
        try:
            bench.take(batch)
            bench.picture()  # warm
            if batch == bench.batches[0]:
                counts = {method: _counted(bench, method) for method in METHODS}
            walls = _walls(bench, end)
        except Exception as error:
            yield row | {"error": reason(error)}
            continue
        for method, wall in walls.items():
            yield row | {"method": method} | counts.get(method, {}) | wall
        counts = {}


def _counted(bench: Bench, method: str) -> Row:
    modules, joins = bench.places(method)
    with bench.on(method):
        waits = _waits(bench.place, bench.picture)
        bench.start()
        bench.call(0)
        with Count() as count:
            bench.call(1)
    return {"modules": modules, "joins": joins, "operations": count.number, "synchronisations": waits}


def _waits(place: Place, function: Callable[[], Any]) -> int | None:
    """How often the host waits for the device."""
    if not place.cuda:
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in said)


def _walls(bench: Bench, end: float) -> dict[str, Row]:
    """In each round every method makes a picture, in random order, and is held against that round's two plain ones."""
    rounds: list[dict[str, float]] = []
    rng, most = np.random.default_rng(0), 1 if bench.place.small else 30
    while len(rounds) < most:
        begun = time.monotonic()
        took = {}
        for method in rng.permutation(list(METHODS)).tolist():
            with bench.on(method):
                bench.call(0)
                took[method] = bench.place.seconds(bench.picture)
        rounds.append(took)
        if 2 * time.monotonic() - begun > end:  # another one would end too late
            break
    plain = [took[PLAIN] for took in rounds]
    rows = {PLAIN: {"call_ms": round(1000 * float(np.median(plain)) / bench.place.steps, 3)}}
    for method in (method for method in METHODS if method != PLAIN):
        others = (PLAIN,) if method == AGAIN else (PLAIN, AGAIN)
        rows[method] = spread([took[method] / float(np.mean([took[other] for other in others])) for took in rounds])
    return rows


# --- kernels: in a process of its own, as launches that follow a profiler may be slower


@torch.no_grad()
def kernels(place: Place, name: str) -> Iterator[Row]:
    """Of a U-Net call: what the GPU runs (kernels, copies, fills), and the sum of its milliseconds."""
    bench, calls = Bench(place, name), 1 if place.small else 2
    for batch in bench.batches:
        bench.take(batch)
        for method in METHODS:
            row = {"model": name, "batch": batch, "method": method}
            try:
                with bench.on(method):
                    bench.call(0)
                    found = _profiled(place, lambda: [bench.call(1) for _ in range(calls)])
            except Exception as error:
                yield row | {"error": reason(error)}
                break
            number, milliseconds = found or (None, None)
            yield row | {
                "kernels": number and number / calls,
                "gpu_ms": milliseconds and round(milliseconds / calls, 3),
            }


def _profiled(place: Place, function: Callable[[], Any]) -> tuple[int, float] | None:
    if not place.cuda:
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    place.wait()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        function()
        place.wait()
    events = [e for e in seen.events() if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", 0)]
    if not events:
        raise RuntimeError("the profiler saw no kernel: CUPTI is missing or may not be used by this user")
    return len(events), sum(event.time_range.elapsed_us() for event in events) / 1000


# --- compile


@torch.no_grad()
def compile(place: Place, name: str, mode: str, method: str) -> Iterator[Row]:
    """A weighed U-Net against a plain one, both compiled: graphs, wall clock, and agreement with what is not compiled.

    mode: of `torch.compile`; without a GPU, where no kernels are made, "eager" is its backend. `off`: largest
    difference over the output's range, at three steps. other: after `handle.schedule = other`, a schedule whose outputs
    are `apart` from the first one's.
    """
    bench, steps = Bench(place, name, less=True), 50
    weighed = bench.unet
    plain = copy.deepcopy(weighed, {id(p): p for p in weighed.parameters()})  # of the same parameters
    # TorchDynamo asks for no hooks when it looks for a graph that fits: it would give the weighed one the plain one's.
    plain.__class__ = type("PlainUNet", (type(plain),), {})
    first = bench.schedule(method)
    other = replace(first, weights=first.weights / 2)
    bench.start(steps)

    def outputs(net: Any) -> list[Tensor]:
        return [bench.call(i, net).float().clone() for i in (0, steps // 2, steps - 1)]

    wanted = {PLAIN: outputs(plain)}
    for key, schedule in (("first", first), ("other", other)):
        with apply(bench.pipe, schedule):
            wanted[key] = outputs(weighed)
    how = {"mode": mode} if place.cuda else {"backend": mode}
    nets = [torch.compile(net, fullgraph=True, **how) for net in (plain, weighed)]
    calls = [functools.partial(_marked, net) for net in nets]

    def graphs() -> int:
        return counters["stats"]["unique_graphs"]

    row: Row = {"model": name, "mode": mode, "sites": method, "batch": len(bench.noise)}
    handle = apply(bench.pipe, first)
    row["plain_compile_s"] = round(place.seconds(lambda: outputs(calls[0])), 1)
    before = graphs()
    row["compile_s"] = round(place.seconds(lambda: outputs(calls[1])), 1)
    row["graphs"] = graphs() - before
    row |= {"plain_off": _off(outputs(calls[0]), wanted[PLAIN]), "off": _off(outputs(calls[1]), wanted["first"])}
    before = graphs()
    bench.picture(calls[1], steps)
    row |= {"steps": steps, "recompiles": graphs() - before}
    before = graphs()
    handle.schedule = other
    bench.start(steps)
    off, apart = _off(outputs(calls[1]), wanted["other"]), _off(wanted["first"], wanted["other"])
    row["other"] = {"off": off, "apart": apart, "graphs": graphs() - before}
    handle.schedule = first
    row["cuda_graphs_skipped"] = counters["inductor"]["cudagraph_skips"] if place.cuda else None
    pictures = [functools.partial(bench.picture, call, 2 if place.small else 20) for call in calls]
    row["plain_synchronisations"], row["synchronisations"] = (_waits(place, picture) for picture in pictures)
    took, ratios = [place.seconds(pictures[0])], []
    end = time.monotonic() + min(place.left / 2, 20)
    while len(ratios) < (2 if place.small else 30) and (not ratios or time.monotonic() < end):
        one = place.seconds(pictures[1])
        took.append(place.seconds(pictures[0]))
        ratios.append(2 * one / (took[-2] + took[-1]))
    yield row | {"call_ms": round(1000 * float(np.median(took)) / (2 if place.small else 20), 3)} | spread(ratios)


def _marked(net: Any, *args: Any, **kwargs: Any) -> Any:
    """A call of a compiled network, whose last output nobody needs any more."""
    torch.compiler.cudagraph_mark_step_begin()
    return net(*args, **kwargs)


def _off(found: list[Tensor], wanted: list[Tensor]) -> float | None:
    """None where the outputs are not finite."""
    ratios = [float((a - b).abs().max() / (b.max() - b.min())) for a, b in zip(found, wanted, strict=True)]
    return float(f"{max(ratios):.2g}") if np.isfinite(ratios).all() else None


# --- gradient

VAES = {"SD1.5": VAE, "SDXL": VAE | {"force_upcast": True, "scaling_factor": 0.13025}}
PICTURES = {"SD1.5": (1, 4), "SDXL": (1,)}
LITTLE_PICTURES = {"SD1.5": (2,), "SDXL": (1,)}


def gradient(place: Place, name: str) -> Iterator[Row]:
    """One update of a gradient search as the library makes it, 10 steps with guidance: seconds and peak memory.

    checkpointing: `model.checkpointing`, where auto is what a search does on this card. The reward is the pictures'
    mean square. estimate: what `rwopt.sampling.memory` says without a GPU.
    """
    unet = Bench(place, name, less=True).unet
    config = VAES[name] | ({"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4} if place.small else {})
    known = network(Place(torch.device("meta"), True, 0), lambda: AutoencoderKL(**config), torch.float32).config
    half = auto_vae_format(known, unet.config.sample_size, place.dtype, has_bf16(str(place.device)))
    vae = network(place, lambda: AutoencoderKL(**config), half if place.cuda else torch.float32)
    for part in (unet, vae):
        part.to(memory_format=torch.channels_last)
    unet.register_forward_pre_hook(_told, with_kwargs=True)
    model = Model(name, unet, vae, None, None, DDIMScheduler(**NOISE), place.device)
    sizes = (LITTLE_PICTURES if place.small else PICTURES)[name]
    for pictures in sizes:
        for switch, path in product(("auto", "on"), ("full", "detached")):
            row = {"model": name, "pictures": pictures, "path": path, "checkpointing": switch}
            model.checkpointing = switch
            try:
                yield row | _update(place, model, pictures, path)
            except Exception as error:
                yield row | {"error": reason(error)}
    ids = [site.id for site in list_sites(unet, tuple(BRANCHES))]
    for pictures in sizes:
        estimate = round(update_memory(model, ids, pictures, GradientPath("full")).peak / GIB, 2)
        yield {"model": name, "pictures": pictures, "path": "full", "checkpointing": "on", "estimate_gib": estimate}


def _told(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """SDXL's U-Net is told sizes and pooled text besides, which searches do not know of."""
    return args, {**kwargs, **added(unet.config, args[0])}


def _update(place: Place, model: Any, pictures: int, path: str) -> Row:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(pictures, *model.latent_shape, generator=draw).to(place.device)
    positive, negative = torch.randn(2, pictures, 77, model.unet.config.cross_attention_dim, generator=draw)
    cond = Condition(positive.to(place.device), negative.to(place.device), 7.5)
    ids = [site.id for site in list_sites(model.unet, tuple(BRANCHES))]
    course = course_by_rule(model, 2 if place.small else 10)
    function = WeightFunction(ids, np.array(course.sigmas), {one: [i] for i, one in enumerate(ids)})

    def reward(latents: Tensor) -> Tensor:
        return model.decode(latents).square().mean((1, 2, 3))

    def update(attachment: Attachment, course: Course) -> Tensor:
        problem = SimpleNamespace(function=function, model=model, steps=len(course), pictures=pictures,
                                  batch=lambda attachment, rows, theta: (x, cond, course, reward))  # fmt: skip
        theta = np.zeros(function.dimension)
        options = GradientOptions(mode=path, batch=pictures)
        ascent = Ascent(problem, attachment, theta, (theta - 1, theta + 1), options).to(place.device)  # type: ignore[arg-type]
        return ascent.reward_gradient(slice(0, pictures), 0)[1]

    with Attachment(model.unet, ids) as attachment:
        update(attachment, course_at(model, [float(course.told[-1])]))  # warm
        if place.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        found: list[Tensor] = []
        seconds = place.seconds(lambda: found.append(update(attachment, course)))
    peak = round(torch.cuda.max_memory_allocated() / GIB, 2) if place.cuda else None
    finite = bool(found[0].isfinite().all())
    return {"steps": len(course), "seconds": round(seconds, 2), "gib": peak, "finite": finite}


# --- search and card

LIMITS = ["task.train=4", "task.validation=4", "task.test=6", "task.steps=2", "tuner.trials=3", "tuner.dial_trials=1",
          "tuner.control_trials=1", "tuner.sampler=random", "gradient.updates=1", "gradient.batch=4", "probe.cases=2",
          "analytic.rounds=1", "analytic.epochs=1", "analytic.cases=2", "weights.group_by=kind",
          "weights.knots=2", "track.wandb=off"]  # fmt: skip


def search(place: Place) -> Iterator[Row]:
    """The main job with small limits, as a person starts it."""
    words = ["search", "recipe=editing", f"model.device={place.device.type}", *LIMITS]
    words += ["arms=[plain,learned]"] if place.small else []
    row: Row = {"command": shlex.join(["rwopt", *words[:3]]), "limits": words[3:]}
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "run", time.monotonic()
        command, limit = [sys.executable, "-m", "rwopt.cli", *words, "--out", str(out)], max(place.left + 8, 1)
        try:
            done = subprocess.run(command, cwd=ROOT.parent, capture_output=True, text=True, check=False, timeout=limit)
        except subprocess.TimeoutExpired:
            yield row | {"error": f"not done after {limit:.0f} s, its share of the time"}
            return
        row |= {"seconds": round(time.monotonic() - start, 1), "exit_code": done.returncode}
        row["schedule"] = (out / "schedule.json").exists()
        said = done.stderr.strip().splitlines()
        yield row | ({"error": said[-1][:200]} if done.returncode and said else {})


def card(place: Place) -> Iterator[Row]:
    """The GPU's name, or None where there is none."""
    if not torch.cuda.is_available():
        yield {"name": None}
        return
    found = torch.cuda.get_device_properties(0)
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    yield {"name": found.name, "gib": round(found.total_memory / GIB), "driver": driver, "cuda": torch.version.cuda}
