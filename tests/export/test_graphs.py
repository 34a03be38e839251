"""U-Net graphs with weights in them, run by ONNX Runtime and OpenVINO, against torch at all timesteps."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small import hooks_of
from helpers.twins import Twin, make

from rwopt.errors import UserError
from rwopt.export import export, reader
from rwopt.export.graph import Table
from rwopt.schedule import Schedule, noise_table
from rwopt.schedule.noise import sigma_at
from rwopt.schedule.steps import Steps
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import SITE_KINDS, list_sites

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
LEVELS = noise_table(SD)
STRIDE = int(os.environ.get("RWOPT_STRIDE", "90"))  # of the timesteps at which graphs are run; 1 takes all
Run = Callable[[dict[str, np.ndarray]], np.ndarray]
Made = Callable[[str], tuple[Twin, Schedule, Path]]


def run_onnx(folder: Path) -> tuple[Run, list[str]]:
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    session = runtime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(["out_sample"], inputs)[0], [i.name for i in session.get_inputs()]


def run_openvino(folder: Path) -> tuple[Run, list[str]]:
    openvino = pytest.importorskip("openvino", reason="the extra openvino is not installed")
    model = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: model(inputs)["out_sample"], [i.get_any_name() for i in model.inputs]


RUNTIMES = {"onnx": run_onnx, "openvino": run_openvino}


def needs(host: str) -> None:
    for package in {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",)}[host]:
        pytest.importorskip(package, reason=f"the extra {host} is not installed")


def schedule_for(unet: Any, kinds: Any = SITE_KINDS, **fields: Any) -> Schedule:
    names = tuple(site.id for site in list_sites(unet, kinds))
    weights = np.random.default_rng(0).uniform(0.2, 1.8, (4, len(names)))
    weights[1, :3], weights[2, 3:5] = 1, 0
    return Schedule(names, np.array([12.0, 2.5, 0.9, 0.1]), weights, **{"noise": SD, **fields})


def arrays(twin: Twin, rows: int = 2) -> dict[str, np.ndarray]:
    x, rest = twin.x[:rows], twin.args(slice(rows))
    found = {"sample": x, "encoder_hidden_states": rest["encoder_hidden_states"], **rest.get("added_cond_kwargs", {})}
    return {name: value.numpy() for name, value in found.items()}


# --- the table


KNOTS = [[12.0, 2.5, 0.9, 0.1], [1.0], [500.0, 14.6, 14.599, 0.001], LEVELS[[999, 500, 0]].tolist()]


@pytest.mark.parametrize("interp", ["linear", "nearest", "previous"])
@pytest.mark.parametrize("knots", KNOTS)
def test_lookups_are_those_of_the_schedule_at_every_timestep(interp: str, knots: list[float]) -> None:
    weights = np.random.default_rng(1).uniform(0, 2, (len(knots), 5))
    schedule = Schedule(tuple(f"up_blocks.{i}.attentions.0" for i in range(5)), np.array(knots), weights,
                        interp=interp, noise=SD)  # fmt: skip
    table = Table(schedule)
    whole = np.arange(0, 1000.0)
    between = np.random.default_rng(2).uniform(-1, 1001, 200)
    for times in (whole, between):
        expected = schedule.at(sigma_at(times, LEVELS))
        got = np.stack([table(torch.tensor([t], dtype=torch.float32)).numpy() for t in times])
        np.testing.assert_allclose(got, expected, atol=2e-4 if times is between else 1e-6)


def test_the_edge_of_a_window_is_as_steep_as_it_was() -> None:
    from rwopt.export.arithmetic import window

    schedule = window(Schedule.constant(["mid_block.attentions.0"], [1.0], 0.5, noise=SD), LEVELS[700], LEVELS[200])
    table = Table(schedule)
    got = [table(torch.tensor([float(t)])).item() for t in range(1000)]
    np.testing.assert_allclose(got, schedule.at(LEVELS)[:, 0], atol=1e-6)
    assert got[699:702] == [0.5, 0.5, 1.0]


# --- the graphs


@pytest.mark.parametrize("host", RUNTIMES)
@torch.no_grad()
def test_a_graph_with_its_table_gives_what_torch_gives_at_all_timesteps(tmp_path: Path, host: str) -> None:
    """Of SDXL, which has two inputs more; SD's graphs are in the next test."""
    needs(host)
    twin = make("sdxl")
    schedule = schedule_for(twin.unet)
    written = export(schedule, host, tmp_path / "unet", unet=twin.unet)
    assert not hooks_of(twin.unet)
    assert Schedule.load(tmp_path / "unet" / "rwopt-schedule.json").digest() == schedule.digest()
    assert {path.name for path in written} == {path.name for path in (tmp_path / "unet").iterdir()} - {".rwopt-export"}
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    run, names = RUNTIMES[host](tmp_path / "unet")
    assert names == ["sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids"]
    inputs, text = arrays(twin), twin.args()
    worst = 0.0
    with Attachment(twin.unet, schedule.sites) as attachment:
        for t in [*range(0, 1000, STRIDE), 999, 998, 321.25, 0.5]:
            w = torch.tensor(schedule.at(sigma_at(t, LEVELS)), dtype=torch.float32)
            expected = attachment(twin.x, torch.tensor([float(t)]), weights=w, **text).numpy()
            got = run({**inputs, "timestep": np.array([t], np.float32)})
            worst = max(worst, float(np.abs(got - expected).max()))
    assert worst < 1e-4
    assert np.abs(expected - twin(torch.tensor([0.5])).numpy()).max() > 0.05  # the last call's
    print(f"{host}: off by {worst:.2g} at most")
    tall = np.concatenate([inputs["sample"][:1]] * 2, 2)
    one = {key: value[:1] for key, value in inputs.items()}
    got = run({**one, "sample": tall, "timestep": np.array([500], np.float32)})
    assert got.shape == tall.shape


@pytest.fixture(scope="module")
def open_graph(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Makes SD's graph with weights as an input, once for each host: (the U-Net, the schedule, the folder)."""

    @functools.cache
    def made(host: str) -> tuple[Twin, Schedule, Path]:
        needs(host)
        twin, folder = make("sd"), tmp_path_factory.mktemp(host) / "unet"
        schedule = schedule_for(twin.unet, ("transformer", "skip"), mode="output", interp="previous", noise={})
        export(schedule, host, folder, unet=twin.unet, weights="input")
        return twin, schedule, folder

    return made


@pytest.mark.parametrize("host", RUNTIMES)
@torch.no_grad()
def test_a_graph_with_weights_as_an_input(open_graph: Made, host: str) -> None:
    twin, schedule, folder = open_graph(host)
    run, names = RUNTIMES[host](folder)
    assert names[-1] == "site_weights"
    assert (folder / "rwopt_reader.py").read_text() == reader.source()
    table = reader.load(folder / "rwopt-schedule.json")
    with Attachment(twin.unet, schedule.sites, "output") as attachment:
        for t in (999, 500, 20):
            w = np.array(table.at(float(LEVELS[t])), np.float32)
            expected = attachment(twin.x, t, weights=torch.tensor(w), **twin.args()).numpy()
            got = run({**arrays(twin), "timestep": np.array([t], np.float32), "site_weights": w})
            np.testing.assert_allclose(got, expected, atol=1e-4)
            ones = run({**arrays(twin), "timestep": np.array([t], np.float32), "site_weights": np.ones_like(w)})
            np.testing.assert_allclose(ones, twin(t).numpy(), atol=1e-5)


def test_a_graph_says_what_its_weights_are(open_graph: Made) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    _, schedule, folder = open_graph("onnx")
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(str(folder / "model.onnx"))
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["rwopt.sites"].split(",") == [*schedule.sites]
    assert props["rwopt.digest"] == schedule.digest()


@pytest.mark.parametrize("host", RUNTIMES)
def test_without_the_extra_there_is_one_line(tmp_path: Path, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    schedule = Schedule.constant(["mid_block.attentions.0"], [1.0], noise=SD)
    with pytest.raises(UserError, match=rf"to {host} needs the package {host}: pip install 'rwopt\[{host}\]'$"):
        export(schedule, host, tmp_path / "unet", unet=str(tmp_path / "absent"))
    assert not [*tmp_path.iterdir()]


def test_what_a_graph_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # all of it comes before the package's work
    site = "mid_block.attentions.0"

    def refused(says: str, unet: Any = None, name: str = site, weights: str = "table", **fields: Any) -> None:
        schedule = Schedule.constant([name], [1.0], 0.5, **{"noise": SD, **fields})
        with pytest.raises(UserError, match=says):
            export(schedule, "onnx", tmp_path / "unet", unet=unet, weights=weights)
        assert not (tmp_path / "unet").exists()

    refused("weights=tables: did you mean table", weights="tables")
    refused("has steps.*steps=false", steps=Steps("ddim", (1,)))
    refused("op.cfg_branch is 'cond'", cfg_branch="cond")
    refused("site up_blocks.0.resnets.0.low is FreeU's", name="up_blocks.0.resnets.0.low")
    refused("has no noise entry.*weights=input", noise={})
    refused("noise.timestep is 'edm'.*weights=input", noise={"timestep": "edm"})
    refused("unet=UNet2DModel: a graph is made of a UNet2DConditionModel", make("ddpm").unet)
    refused("a graph is made of a UNet2DConditionModel", make("kandinsky").unet)
    refused("is in torch.float16: give it in float32", make("sd").unet.half())
    refused("1 of 1 sites are absent", make("sd").unet, name="up_blocks.7.attentions.0")
