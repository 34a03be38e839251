"""The exports that run: hooks without rwopt, and folded networks, against `rwopt.apply` on real pipelines."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from helpers.pipelines import build, run, words
from helpers.small import hooks_of, inputs, make_tiny_unet
from helpers.twins import make
from peft import LoraConfig

from rwopt.errors import UserError
from rwopt.export import export, reader
from rwopt.export.diffusers_folder import code
from rwopt.export.fold import network
from rwopt.schedule import Schedule, noise_block
from rwopt.schedule.noise import sigma_of
from rwopt.schedule.steps import Steps
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.sites import SITE_KINDS, list_sites

FOLDABLE = ("transformer", "self", "cross", "ff", "resnet")


def random_schedule(unet: Any, kinds: Any, rows: int = 3, mode: str = "residual", **fields: Any) -> Schedule:
    names = tuple(site.id for site in list_sites(unet, kinds))
    draw = np.random.default_rng(len(names))
    weights = draw.uniform(0.2, 1.8, (rows, len(names)))
    weights[:, 0] = 1
    weights[:, 1] = 0
    sigmas = np.geomspace(10, 0.1, rows) if rows > 1 else np.array([1.0])
    return Schedule(names, sigmas, weights, mode, **fields)


def loaded(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported", folder / "rwopt_apply.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["exported"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kinds", "mode", "interp"),
    [
        (SITE_KINDS, "residual", "linear"),
        (("transformer", "resnet", "skip"), "output", "linear"),
        (("transformer",), "residual", "nearest"),
        (("cross", "skip"), "residual", "previous"),
    ],
)
def test_hooks_without_rwopt_make_the_same_pictures(tmp_path: Path, kinds: Any, mode: str, interp: str) -> None:
    pipe = build(StableDiffusionPipeline, make("sd").unet)
    schedule = random_schedule(pipe.unet, kinds, mode=mode, interp=interp)
    export(schedule, "diffusers", tmp_path / "out")
    module, file = loaded(tmp_path / "out"), str(tmp_path / "out" / "schedule.json")
    plain = run(pipe, words())
    for scheduler in (DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
        with apply(pipe, file):
            expected = run(pipe, words())
        hooks = module.apply(pipe, file)
        got = run(pipe, words())
        hooks.strength = 0.0
        unchanged = run(pipe, words())
        hooks.remove()
        assert torch.equal(unchanged, run(pipe, words()))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(got, unchanged, atol=1e-3)
    assert not hooks_of(pipe.unet)
    assert plain.shape == got.shape


def test_the_exported_file_needs_no_rwopt_and_is_short(tmp_path: Path) -> None:
    text = code({})
    assert len(text.splitlines()) <= 260
    assert text.startswith(reader.source())
    names = {n.module or "" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
    names |= {a.name for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names}
    assert {name for name in names if name not in sys.stdlib_module_names} == {"torch"}
    export(random_schedule(make_tiny_unet(), ("transformer",)), "diffusers", tmp_path / "out")
    assert len((tmp_path / "out" / "README.md").read_text().splitlines()) == 10
    probe = "import sys, rwopt_apply; assert 'rwopt' not in sys.modules"
    subprocess.run([sys.executable, "-c", probe], cwd=tmp_path / "out", check=True)


STEPS = {"ddim": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler", "lcm": "LCMScheduler",
         "dpmpp_2m": "DPMSolverMultistepScheduler", "tcd": "TCDScheduler"}  # fmt: skip


@pytest.mark.parametrize("sampler", STEPS)
def test_steps_without_rwopt_are_those_of_apply(tmp_path: Path, sampler: str) -> None:
    """Grid, told levels and guidance of each call, by the README's own lines."""
    pipe = build(StableDiffusionPipeline, make("sd").unet)
    levels = sigma_of(pipe.scheduler.alphas_cumprod.numpy())
    guidance = (6.0, 3.0, 2.0, 1.5) if sampler != "tcd" else ()
    told = tuple(levels[[999, 720, 420, 90]]) if sampler != "lcm" else ()
    steps = Steps(sampler, tuple(levels[[999, 700, 400, 100]]), told, guidance)
    schedule = random_schedule(pipe.unet, ("transformer",), noise=noise_block(pipe.scheduler), steps=steps)
    export(schedule, "diffusers", tmp_path / "out")
    module = loaded(tmp_path / "out")
    with pytest.raises(ValueError, match=rf"need another sampler: pipe.scheduler = {STEPS[sampler]}.from_config"):
        module.apply(pipe, str(tmp_path / "out" / "schedule.json"))
    readme = (tmp_path / "out" / "README.md").read_text()
    lines = [line.strip() for line in readme.splitlines() if "Sampler" in line]
    assert len(lines) == 2
    exec("\n".join(lines), {"pipe": pipe})
    assert type(pipe.scheduler).__name__ == STEPS[sampler]
    call = {key: value for key, value in words().items() if key != "num_inference_steps"}
    with apply(pipe, tmp_path / "out" / "schedule.json") as handle:  # its numbers are rounded
        expected = run(pipe, {**call, **handle.arguments})
    plain = run(pipe, words(steps=4))
    hooks = module.apply(pipe, str(tmp_path / "out" / "schedule.json"))
    got = run(pipe, {**call, **hooks.arguments})
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(got, plain, atol=1e-3)
    with pytest.warns(UserWarning, match=r"other steps than the file: call it with \*\*hooks"):
        run(pipe, words(steps=3))
    hooks.remove()
    assert not hooks_of(pipe.unet)


def test_what_the_hooks_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    unet = make_tiny_unet()
    site = ["mid_block.attentions.0"]
    for schedule, says in (
        (random_schedule(unet, ("low",)), "site up_blocks.0.resnets.0.low is FreeU's"),
        (Schedule.constant([f"{site[0]}.cross"], [1.0], mode="output"), "mid_block.attentions.0.cross has no mode"),
        (Schedule.constant(site, [1.0], cfg_branch="cond"), "op.cfg_branch is 'cond'"),
        (Schedule.constant(site, [1.0], noise={"timestep": "edm"}), "noise.timestep is 'edm'"),
        (Schedule.constant(site, [1.0], steps=Steps("uni_pc", (1,))), "takes no grid from a.* give steps=false"),
    ):
        with pytest.raises(UserError, match=says):
            export(schedule, "diffusers", tmp_path / "out")
    assert not [*tmp_path.iterdir()]
    export(Schedule.constant(site, [1.0], steps=Steps("ddim", (1,))), "diffusers", tmp_path / "out", steps=False)
    module = loaded(tmp_path / "out")
    pipe = build(StableDiffusionPipeline, make("sd").unet)
    absent = Schedule.constant(["up_blocks.9.attentions.0"], [1.0]).save(tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"the U-Net has no up_blocks\.9\.attentions\.0"):
        module.apply(pipe, str(absent))


# ---------------------------------------------------------------------------------------------------- folding

CHANGES: dict[str, dict[str, Any]] = {
    "conv": {},
    "linear": {"use_linear_projection": True},
    "scaled": {"resnet_time_scale_shift": "scale_shift", "mid_block_scale_factor": 1.7},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_folded_network_gives_what_hooks_give(tmp_path: Path, name: str) -> None:
    unet = make_tiny_unet(**CHANGES[name]).double()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    schedule = random_schedule(unet, FOLDABLE, rows=1)
    x, t, text = inputs(dtype=torch.float64)
    with Attachment(unet, schedule.sites) as attachment:
        expected = attachment(x, t, text, torch.tensor(schedule.weights[0]))
    written = export(schedule, "fold", tmp_path / "unet", unet=unet)
    assert {path.name for path in written} == {
        "config.json", "diffusion_pytorch_model.safetensors", "rwopt-schedule.json"
    }  # fmt: skip
    folded = UNet2DConditionModel.from_pretrained(tmp_path / "unet", torch_dtype=torch.float64)
    got = folded(x, t, text).sample
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-9)
    assert not torch.allclose(got, unet(x, t, text).sample, atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    assert not hooks_of(unet)
    assert not [path for path in (tmp_path / "unet").iterdir() if path.is_dir()]


def test_a_plain_schedule_folds_into_the_same_network(tmp_path: Path, tiny_unet: UNet2DConditionModel) -> None:
    tiny_unet.save_pretrained(tmp_path / "model" / "unet")
    schedule = Schedule.constant([site.id for site in list_sites(tiny_unet, FOLDABLE)], [1.0])
    for source in (tmp_path / "model", str(tmp_path / "model" / "unet")):
        export(schedule, "fold", tmp_path / "out", unet=source)
        folded = network(tmp_path / "out")
        for key, value in tiny_unet.state_dict().items():
            assert torch.equal(folded.state_dict()[key], value)


def test_one_level_is_taken_on_request(tmp_path: Path, tiny_unet: UNet2DConditionModel) -> None:
    site = "mid_block.attentions.0"
    schedule = Schedule((site,), np.array([2.0, 1.0]), np.array([[2.0], [0.5]]))
    with pytest.raises(UserError, match=f"site {site} has weights from 0.5 to 2.*at=SIGMA"):
        export(schedule, "fold", tmp_path / "a", unet=tiny_unet)
    export(schedule, "fold", tmp_path / "a", unet=tiny_unet, at=1.0)
    layer = network(tmp_path / "a").get_submodule(site).proj_out
    assert torch.equal(layer.weight, tiny_unet.get_submodule(site).proj_out.weight / 2)
    assert torch.equal(layer.bias, tiny_unet.get_submodule(site).proj_out.bias / 2)


def test_what_cannot_be_folded_is_refused_by_name(tmp_path: Path, tiny_unet: UNet2DConditionModel) -> None:
    def refused(says: str, schedule: Schedule, unet: Any = tiny_unet) -> None:
        with pytest.raises(UserError, match=says):
            export(schedule, "fold", tmp_path / "out", unet=unet)
        assert not (tmp_path / "out").exists()

    site = "mid_block.attentions.0"
    refused(f"op.mode is 'output' at site {site}", Schedule.constant([site], [1.0], 0.5, mode="output"))
    for name in ("up_blocks.0.resnets.0.skip", "up_blocks.0.resnets.0.low"):
        refused(f"site {name} .* cannot be folded", Schedule.constant([name], [1.0], 0.5))
    refused("1 of 1 sites are absent", Schedule.constant(["mid_block.attentions.7"], [1.0], 0.5))
    refused("has steps", Schedule.constant([site], [1.0], 0.5, steps=Steps("ddim", (1,))))
    refused("has no config.json", Schedule.constant([site], [1.0], 0.5), unet=str(tmp_path))
    refused("cannot be folded", Schedule.constant([site], [1.0], 0.5), unet=make("ddpm").unet)
    tiny_unet.add_adapter(LoraConfig(r=2, target_modules=["to_out.0"]))
    refused(f"site {site}.cross ends in .*lora.*: fuse or unload", Schedule.constant([f"{site}.cross"], [1.0], 0.5))
