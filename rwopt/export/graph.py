"""A U-Net with a schedule in it as one module for graph exporters: `onnx` and `openvino`.

Two kinds. `weights=table`: the graph looks its weights up itself, by the timestep that it is given anyway, so that
pipelines need no change. `weights=input`: it has one more input, `site_weights` [S], and whoever runs it looks up.

The table of a schedule over training timesteps t is exact, not sampled. ln sigma is linear in t between whole
timesteps (`rwopt.schedule.noise`), and weights are linear in ln sigma between knots, so they are linear in t between
the whole timesteps and the knots' own. These places [P] and their rows [P, S] are constants of the graph; a lookup
counts the places that t has passed, takes two rows and blends them: no operation that a runtime lacks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rwopt.errors import UserError, one_of
from rwopt.export import reader
from rwopt.export.fold import network
from rwopt.export.ldm import kind_of
from rwopt.schedule import Schedule, noise_table
from rwopt.schedule.noise import Array, sigma_at, timestep_of
from rwopt.unet.attachment import Attachment
from rwopt.unet.call import Columns
from rwopt.unet.example import check_plain, example_inputs
from rwopt.unet.sites import FREEU_KINDS

WEIGHTS = ("table", "input")
"""Where a graph has its weights from."""

OUTPUT = "out_sample"
_SLACK = 1e-3  # in ln sigma: `previous` takes a knot so much early, as `Schedule.at` does


def check(schedule: Schedule, host: str, package: str, extra: str, weights: str, steps: bool) -> None:
    """UserError for a package that is not installed, and for what a graph cannot hold; before a network is loaded."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"the export to {host} needs the package {package}: pip install 'rwopt[{extra}]'")
    one_of(WEIGHTS, "weights", weights)
    if steps and schedule.steps is not None:
        raise UserError("the schedule has steps, and a U-Net's graph is no sampler: give steps=false")
    if schedule.cfg_branch != "both":
        raise UserError(f"op.cfg_branch is {schedule.cfg_branch!r}: a graph weighs all rows alike, use 'both'")
    for site in schedule.sites:
        if kind_of(site) in FREEU_KINDS:
            raise UserError(f"site {site} is FreeU's: a graph has no such operation, export the schedule without it")
    timestep = schedule.noise.get("timestep", "index")
    if weights == "table" and (timestep != "index" or not schedule.noise):
        about = f"noise.timestep is {timestep!r}" if schedule.noise else "the schedule has no noise entry"
        raise UserError(f"{about}, and the table in a graph counts in training timesteps: give weights=input")


class Table(nn.Module):
    """Weights [S] at a training timestep [1], which may be fractional and is clamped to those of training."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        levels = noise_table(schedule.noise)
        self.linear, self.last = schedule.interp == "linear", len(levels) - 1
        if self.linear:
            every = np.append(np.arange(len(levels)), timestep_of(schedule.sigmas, levels))
            places: Array = np.unique(every.astype(np.float32)).astype(np.float64)  # as the graph will have them
            rows = schedule.at(sigma_at(places, levels))
        else:
            places, rows = _changes(schedule, levels), schedule.weights
        self.register_buffer("places", torch.tensor(places, dtype=torch.float32)[None])  # [1, P]
        self.register_buffer("rows", torch.tensor(rows, dtype=torch.float32))

    def forward(self, timestep: Tensor) -> Tensor:
        t = timestep.float().reshape(1, 1).clamp(0, self.last)
        places, rows = self.get_buffer("places"), self.get_buffer("rows")
        if not self.linear:  # the places are ends, passed on the way down
            return rows.index_select(0, (t <= places).sum(-1)).squeeze(0)
        i = ((t >= places).sum(-1) - 1).clamp(0, places.shape[1] - 2)
        low, high = (places.squeeze(0).index_select(0, j) for j in (i, i + 1))
        share = ((t.squeeze(0) - low) / (high - low)).clamp(0, 1)
        a, b = (rows.index_select(0, j).squeeze(0) for j in (i, i + 1))
        return torch.lerp(a, b, share)


def _changes(schedule: Schedule, levels: Array) -> Array:
    """Timesteps [K - 1], descending, from which on downwards the next row counts; -1 where that is never."""
    sigmas = schedule.sigmas
    if schedule.interp == "previous":
        edges = sigmas[1:] * np.exp(_SLACK)
    else:
        edges = np.sqrt(sigmas[:-1] * sigmas[1:]) * (1 - 1e-12)  # right in the middle the upper knot is the nearest
    return np.where(edges < levels[0], -1.0, timestep_of(edges, levels))


class Graph(nn.Module):
    """The U-Net with its weights: of a table, or of an input behind all others."""

    def __init__(self, unet: Any, attachment: Attachment, table: Table | None) -> None:
        super().__init__()
        self.unet, self.attachment, self.table = unet, attachment, table

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *rest: Tensor) -> Tensor:
        weights = rest[-1] if self.table is None else self.table(timestep)
        given: dict[str, Any] = {self.attachment.key: Columns(weights)}
        further = list(rest)
        if self.unet.config.addition_embed_type:
            given["added_cond_kwargs"] = {"text_embeds": further.pop(0), "time_ids": further.pop(0)}
        if self.unet.config.time_cond_proj_dim:
            given["timestep_cond"] = further.pop(0)
        output: Tensor = self.unet(sample, timestep, encoder_hidden_states, return_dict=False, **given)[0]
        return output


@dataclass(frozen=True)
class Traceable:
    """module: what to trace; inputs: name -> an example; axes: name -> those dimensions of an input that are free."""

    module: Graph
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]


@contextlib.contextmanager
def traceable(schedule: Schedule, unet: Any, weights: str) -> Iterator[Traceable]:
    """A U-Net (live, in a pipeline, or a folder) in single precision with the schedule on it, to be exported inside.

    UserError for networks other than those of Stable Diffusion 1.x, 2.x and XL.
    """
    net = network(unet)
    check_plain(net, "a graph is made of")
    kinds = {parameter.dtype for parameter in net.parameters()}
    if kinds != {torch.float32}:
        raise UserError(f"the U-Net is in {', '.join(map(str, kinds))}: give it in float32, and shrink the graph")
    table = Table(schedule) if weights == "table" else None
    inputs, axes = _inputs(net.config, len(schedule.sites) if table is None else 0)
    attachment = Attachment(net, schedule.sites, schedule.mode)
    try:
        with warnings.catch_warnings(), torch.enable_grad():  # with gradients nothing is written in place
            warnings.simplefilter("ignore")  # of branches on shapes, which the free axes do not reach
            yield Traceable(Graph(net, attachment, table).eval().requires_grad_(False), inputs, axes)
    finally:
        attachment.remove()


def _inputs(config: Any, weights: int) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Inputs as ONNX pipelines name them; `weights`: how many, for an input of their own."""
    size = 2 ** len(config.block_out_channels)
    inputs = example_inputs(config, (size, size))
    axes = {"sample": {0: "batch", 2: "height", 3: "width"}, "encoder_hidden_states": {0: "batch", 1: "tokens"}}
    axes |= {name: {0: "batch"} for name in inputs if name not in (*axes, "timestep")}
    if weights:
        inputs["site_weights"] = torch.full((weights,), 0.75)
    return inputs, axes


def accompany(folder: Path, schedule: Schedule, found: Traceable, weights: str) -> None:
    """Write beside a graph the U-Net's configuration, the schedule, and for weights=input what looks weights up."""
    found.module.unet.save_config(folder)
    schedule.save(folder / "rwopt-schedule.json")
    if weights == "input":
        (folder / "rwopt_reader.py").write_text(reader.source(), encoding="utf-8")


def notes(schedule: Schedule) -> dict[str, str]:
    """What a graph says of its weights: sites in the order of `site_weights`, and the schedule's digest."""
    return {"rwopt.sites": ",".join(schedule.sites), "rwopt.digest": schedule.digest(), "rwopt.mode": schedule.mode}
