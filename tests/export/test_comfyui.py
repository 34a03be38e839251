"""The export to ComfyUI: in ComfyUI's own code where that is at hand (`make test-comfyui`), else on a stand-in of the
interface that it documents (`helpers.ldm`), which shows our arithmetic and nothing about ComfyUI."""

from __future__ import annotations

import asyncio
import functools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ldm
from helpers.ldm import BY_HOOKS, FINE, MINI, NOISE, TABLE, WORDS, X, random_schedule, weighed_by_hooks

from rwopt import apply, list_sites
from rwopt.errors import UserError
from rwopt.export import comfyui, export, reader
from rwopt.schedule import Schedule
from rwopt.schedule.noise import timestep_of
from rwopt.schedule.steps import Steps
from rwopt.unet.attachment import Attachment


def nodes_of(folder: Path, schedule: Schedule, **options: Any) -> Any:
    export(schedule, "comfyui", folder, **options)
    return ldm.load_package(folder, f"rwopt_node_{abs(hash(folder))}")


def test_the_folder_has_the_schedule_and_modules_that_compile(tmp_path: Path) -> None:
    schedule = random_schedule(MINI, steps=Steps("dpmpp_2m", (14.6, 2.0, 0.5), guidance=(5.0, 4.0, 3.0)))
    files = export(schedule, "comfyui", tmp_path / "node")
    assert {"__init__.py", "nodes.py", "pyproject.toml", "README.md", "example_workflow.json", "schedule.json",
            "rwopt_reader.py", "rwopt_weigh.py"} == {path.name for path in files}  # fmt: skip
    assert Schedule.load(tmp_path / "node" / "schedule.json") == schedule
    assert (tmp_path / "node" / "rwopt_reader.py").read_text() == reader.source()
    for path in files:
        text = path.read_text()
        assert "rwopt" in text
        assert not (path.suffix == ".md" and "$" in text)
        if path.suffix == ".py":
            compile(text, str(path), "exec")
            assert "import rwopt\n" not in text
            assert "from rwopt" not in text
    workflow = json.loads((tmp_path / "node" / "example_workflow.json").read_text())
    assert workflow["6"]["class_type"] == "SamplerCustom"
    assert not any("_meta" in node for node in workflow.values())  # a title there hides the node's name in the window


def test_refused_with_the_site_or_entry_and_a_remedy(tmp_path: Path) -> None:
    one = [14.0, 0.1]
    for schedule, text in [
        (Schedule.constant(["up_blocks.0.resnets.0.low"], one), "site up_blocks.0.resnets.0.low is FreeU's"),
        (Schedule.constant(["down_blocks.0.attentions.0.ff"], one, mode="output"), "has no mode 'output' in ComfyUI"),
        (Schedule.constant(MINI, one, model={"unet_class": "UNetMotionModel"}), "model.unet_class is UNetMotionModel"),
        (Schedule.constant(MINI, one, noise={"timestep": "flow"}), "noise.timestep is 'flow'"),
        (Schedule.constant(MINI, one, steps=Steps("tcd", (14.0, 1.0))), "steps.sampler is tcd"),
    ]:
        with pytest.raises(UserError, match=text):
            export(schedule, "comfyui", tmp_path / "node")
        assert not (tmp_path / "node").exists()
    export(schedule, "comfyui", tmp_path / "node", steps=False)
    assert Schedule.load(tmp_path / "node" / "schedule.json").steps is None


@pytest.mark.parametrize("kind", ["residual", "output", "fine"])
def test_stand_in_arithmetic_equals_torch_hooks(tmp_path: Path, kind: str) -> None:
    schedule = random_schedule(FINE if kind == "fine" else MINI, "output" if kind == "output" else "residual")
    node = nodes_of(tmp_path / "node", schedule).NODE_CLASS_MAPPINGS["RwoptApplySchedule"]
    unet = ldm.UNet()
    plain = ldm.Patcher(unet)
    (patched,) = node().apply(plain, "schedule.json")
    with torch.no_grad():
        for sigma in (20.0, 14.6, 2.0, 0.9, 0.05):
            expected = weighed_by_hooks(unet, BY_HOOKS[kind], schedule, sigma,
                                        lambda sigma=sigma: plain.call(X, sigma, WORDS, [1, 0]))  # fmt: skip
            assert torch.allclose(patched.call(X, sigma, WORDS, [1, 0]), expected, atol=1e-5)
            assert not torch.allclose(plain.call(X, sigma, WORDS, [1, 0]), expected, atol=1e-2)
            assert torch.equal(patched.clone().call(X, sigma, WORDS, [1, 0]), patched.call(X, sigma, WORDS, [1, 0]))


def test_stand_in_ones_strength_window_and_branch(tmp_path: Path) -> None:
    schedule = random_schedule(MINI, cfg_branch="cond")
    node = nodes_of(tmp_path / "node", schedule).NODE_CLASS_MAPPINGS["RwoptApplySchedule"]()
    plain = ldm.Patcher(ldm.UNet())

    def out(patcher: Any, sigma: float, sides: list[int]) -> Any:
        with torch.no_grad():
            return patcher.call(X, sigma, WORDS, sides)

    ones = json.dumps(Schedule.constant([*MINI, *FINE], [14.0, 0.1]).to_dict())
    assert torch.equal(out(node.apply(plain, ones)[0], 2.0, [0, 1]), out(plain, 2.0, [0, 1]))
    assert torch.equal(out(node.apply(plain, "schedule.json", strength=0.0)[0], 2.0, [0, 1]), out(plain, 2.0, [0, 1]))
    (patched,) = node.apply(plain, "schedule.json", 1.0, 0.3, 0.7)
    high, low = (ldm.Predictor().percent_to_sigma(p) for p in (0.3, 0.7))
    for sigma in (high * 1.1, low * 0.9):
        assert torch.equal(out(patched, sigma, [0, 1]), out(plain, sigma, [0, 1]))
    sigma = (high * low) ** 0.5
    weighed, before = out(patched, sigma, [0, 1]), out(plain, sigma, [0, 1])
    assert torch.equal(weighed[1], before[1])  # the row without a condition
    assert not torch.allclose(weighed[0], before[0], atol=1e-3)
    assert torch.allclose(out(patched, sigma, [0])[0], weighed[0], atol=1e-6)  # a call of conditional rows only


def test_stand_in_errors_name_what_is_missing(tmp_path: Path) -> None:
    nodes = nodes_of(tmp_path / "node", random_schedule(MINI)).NODE_CLASS_MAPPINGS
    node, plain = nodes["RwoptApplySchedule"](), ldm.Patcher(ldm.UNet())
    absent = json.dumps(Schedule.constant(["down_blocks.2.attentions.0"], [1.0]).to_dict())
    for text, error in [
        (absent, "no site 'down_blocks.2.attentions.0'"), ("other.json", "cannot be read"),
        ("{", "the pasted schedule"), ('{"format": "other"}', "no rwopt schedule"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=error):
            node.apply(plain, text)
    with pytest.raises(ValueError, match="no U-Net of Stable Diffusion's kind"):
        node.apply(ldm.Patcher(torch.nn.Linear(2, 2)), "schedule.json")
    assert nodes["RwoptApplySchedule"].IS_CHANGED("schedule.json") != nodes["RwoptApplySchedule"].IS_CHANGED(absent)


# ComfyUI's own code from here on


@pytest.fixture(scope="module")
def comfy() -> Any:
    if "RWOPT_COMFY" not in os.environ:
        pytest.skip("RWOPT_COMFY is not set to the folder of ComfyUI's code: make test-comfyui")
    from helpers import comfy

    comfy.start()
    return comfy


@pytest.fixture(scope="module")
def small(comfy: Any) -> Any:
    return functools.cache(comfy.Small)


def sites_of(unet: Any, kinds: str, mode: str = "residual") -> list[str]:
    wanted = ("transformer",) if kinds == "transformer" else comfyui.KINDS[mode]
    return [site.id for site in list_sites(unet, wanted)]


def apply_node(comfy: Any, folder: Path, schedule: Schedule, patcher: Any, **options: Any) -> Any:
    export(schedule, "comfyui", folder)
    node = comfy.load_node(folder)["RwoptApplySchedule"]()
    return node.apply(patcher, str(folder / "schedule.json"), **options)[0]


def by_diffusers(small: Any, schedule: Schedule, sampler: str, sigmas: Any, cfg: float) -> Any:
    """The same picture by diffusers' scheduler and U-Net, and rwopt.apply."""
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    kind = EulerDiscreteScheduler if sampler == "euler" else DPMSolverMultistepScheduler
    scheduler = kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(timesteps=[round(float(t)) for t in timestep_of(sigmas[:-1].numpy(), TABLE)])
    x = small.noise() * (float((sigmas[0] ** 2 + 1) ** 0.5) if sampler == "euler" else 1.0)
    added = None
    if small.unet.config.addition_embed_type:
        added = {"text_embeds": torch.cat([side[0][1]["pooled_output"] for side in (small.negative, small.positive)]),
                 "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2)}  # fmt: skip
    text = torch.cat([small.negative[0][0], small.positive[0][0]])
    with torch.no_grad(), apply(small.unet, schedule):
        for t in scheduler.timesteps:
            given = scheduler.scale_model_input(torch.cat([x, x]), t)
            away, towards = small.unet(given, t, text, added_cond_kwargs=added).sample.chunk(2)
            x = scheduler.step(away + cfg * (towards - away), t, x).prev_sample
    return small.model.process_latent_out(x)


@pytest.mark.parametrize("topology", ["sd15", "sdxl"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("what", ["transformer residual", "all residual", "all output"])
def test_node_equals_diffusers_with_the_same_schedule(
    comfy: Any, small: Any, tmp_path: Path, topology: str, sampler: str, what: str
) -> None:
    small, (kinds, mode) = small(topology), what.split()
    schedule = random_schedule(sites_of(small.unet, kinds, mode), mode)
    patched, sigmas = apply_node(comfy, tmp_path / "node", schedule, small.patcher), small.sigmas(5)
    with small.calls() as calls:
        picture = small.sample(patched, sampler, sigmas)
    assert [float(c["sigma"][0]) for c in calls] == sigmas[:-1].tolist()
    with apply(small.unet, schedule):
        errors = [float((small.twin(c) - c["out"]).abs().max()) for c in calls]
    away = min(float((small.twin(c) - c["out"]).abs().max()) for c in calls)
    print(topology, sampler, kinds, mode, f"worst {max(errors):.1e}, plain model away by {away:.1e}")
    assert max(errors) < 1e-5
    assert away > 1e-2
    expected = by_diffusers(small, schedule, sampler, sigmas, 4.0)
    error = float((picture - expected).abs().max() / expected.abs().max())
    print(f"picture: relative {error:.1e}")
    assert error < 1e-4


@pytest.mark.parametrize("topology", ["sd15", "sdxl"])
def test_all_ones_changes_no_bit_and_nothing_stays(comfy: Any, small: Any, tmp_path: Path, topology: str) -> None:
    small = small(topology)
    plain = small.sample(small.patcher, "dpmpp_2m", small.sigmas(3))
    keys, options = list(small.core.state_dict()), repr(small.patcher.model_options)
    ones = Schedule.constant(sites_of(small.unet, "all"), [14.6, 0.03], noise=NOISE)
    patched = apply_node(comfy, tmp_path / "ones", ones, small.patcher)
    assert torch.equal(small.sample(patched, "dpmpp_2m", small.sigmas(3)), plain)
    weighed = apply_node(comfy, tmp_path / "node", random_schedule(list(ones.sites)), small.patcher)
    first = small.sample(weighed, "dpmpp_2m", small.sigmas(3))
    assert not torch.equal(first, plain)
    assert torch.equal(small.sample(weighed.clone(), "dpmpp_2m", small.sigmas(3)), first)
    assert torch.equal(small.sample(small.patcher, "dpmpp_2m", small.sigmas(3)), plain)
    assert not small.patcher.object_patches
    assert repr(small.patcher.model_options) == options
    assert list(small.core.state_dict()) == keys
    small.patcher.unpatch_model()
    for name, module in small.core.named_modules():
        assert getattr(module.forward, "__self__", module) is module, name


@pytest.mark.parametrize("topology", ["sd15", "sdxl"])
def test_freeu_in_both_orders(comfy: Any, small: Any, tmp_path: Path, topology: str) -> None:
    from comfy_extras.nodes_freelunch import FreeU

    small = small(topology)
    sigmas = small.sigmas(3)
    for kinds in ("transformer", "all"):
        schedule = random_schedule(sites_of(small.unet, kinds))
        folder = tmp_path / kinds
        freeu = lambda model: FreeU().patch(model, 1.3, 1.4, 0.9, 0.2)[0]  # noqa: E731
        first = small.sample(freeu(apply_node(comfy, folder, schedule, small.patcher)), "euler", sigmas)
        second = small.sample(apply_node(comfy, folder, schedule, freeu(small.patcher)), "euler", sigmas)
        alone = [small.sample(freeu(small.patcher), "euler", sigmas),
                 small.sample(apply_node(comfy, folder, schedule, small.patcher), "euler", sigmas)]  # fmt: skip
        assert torch.allclose(first, second, rtol=1e-4, atol=1e-4 * float(first.abs().max()))
        if kinds == "transformer":
            assert torch.equal(first, second)
        assert not any(torch.allclose(first, one, rtol=1e-2) for one in alone)


def test_two_schedules_multiply(comfy: Any, small: Any, tmp_path: Path) -> None:
    small = small("sd15")
    sites = sites_of(small.unet, "all")
    one, two = random_schedule(sites, seed=1), random_schedule(sites, seed=2)
    both = Schedule(one.sites, one.sigmas, one.weights * two.weights, noise=NOISE, interp="nearest")
    one, two = replace(one, interp="nearest"), replace(two, interp="nearest")
    stacked = apply_node(comfy, tmp_path / "two", two, apply_node(comfy, tmp_path / "one", one, small.patcher))
    single = apply_node(comfy, tmp_path / "both", both, small.patcher)
    a, b = (small.sample(model, "euler", small.sigmas(3)) for model in (stacked, single))
    assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("branch", ["both", "cond", "uncond"])
def test_rows_of_guidance_in_one_batch_or_apart(
    comfy: Any, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, branch: str, split: bool
) -> None:
    small = small("sd15")
    if split:  # as where memory is short
        monkeypatch.setattr(small.model, "memory_required", lambda *_, **__: 1e18)
    schedule = random_schedule(sites_of(small.unet, "all"), cfg_branch=branch)
    patched = apply_node(comfy, tmp_path / "node", schedule, small.patcher)
    with small.calls() as calls:
        small.sample(patched, "dpmpp_2m", small.sigmas(2), rows=2)
    assert {len(c["sides"]) for c in calls} == {1 if split else 2}
    attachment = Attachment(small.unet, schedule.sites)
    for c in calls:
        weights = torch.ones(len(c["x"]), len(schedule.sites))
        for i, side in enumerate(c["sides"]):
            if branch in ("both", ("cond", "uncond")[side]):
                weights[2 * i : 2 * i + 2] = torch.tensor(schedule.at(float(c["sigma"][0]))).float()
        with torch.no_grad():
            expected = attachment(c["x"], c["t"][0], c["text"], weights=weights)
        assert float((expected - c["out"]).abs().max()) < 1e-5
    attachment.remove()


def test_strength_and_window(comfy: Any, small: Any, tmp_path: Path) -> None:
    small = small("sd15")
    schedule = random_schedule(sites_of(small.unet, "all"))
    options = {"strength": 0.5, "start_percent": 0.3, "end_percent": 0.7}
    patched = apply_node(comfy, tmp_path / "node", schedule, small.patcher, **options)
    with small.calls() as calls:
        small.sample(patched, "euler", small.sigmas(10))
    half = replace(schedule, weights=1 + 0.5 * (schedule.weights - 1))
    inside = []
    for c in calls:
        share = 1 - float(c["t"][0]) / 999
        plain = small.twin(c)
        with apply(small.unet, half):
            weighed = small.twin(c)
        assert float(((weighed if 0.3 < share < 0.7 else plain) - c["out"]).abs().max()) < 1e-5
        inside.append(0.3 < share < 0.7)
    assert {True, False} == set(inside)


def test_attention_that_is_replaced_is_weighed_too(comfy: Any, small: Any, tmp_path: Path) -> None:
    """As IP-Adapter does: what stands between `to_q` and `to_out` is another's."""
    small = small("sd15")
    patcher = small.patcher.clone()

    def double(q: Any, k: Any, v: Any, options: Any) -> Any:
        from comfy.ldm.modules.attention import optimized_attention

        return 2 * optimized_attention(q, k, v, options["n_heads"])

    for number in (1, 2):
        patcher.set_model_attn2_replace(double, "input", number)
    sites = ["down_blocks.0.attentions.0.cross", "down_blocks.0.attentions.1.cross"]
    folder, one = tmp_path / "node", [14.6, 0.03]

    def picture(w: float, patcher: Any) -> Any:
        patched = apply_node(comfy, folder, Schedule.constant(sites, one, w), patcher)
        return small.sample(patched, "euler", small.sigmas(2))

    out, plain = {w: picture(w, patcher) for w in (0.0, 1.0)}, picture(0.0, small.patcher)
    assert torch.equal(out[0.0], plain)  # nothing of either attention is left
    assert not torch.allclose(out[1.0], plain, rtol=1e-2)


def test_compiled_model_follows_the_schedule_in_one_graph(comfy: Any, small: Any, tmp_path: Path) -> None:
    """By ComfyUI's own TorchCompileModel wrapper; the backend counts graphs and runs them as they are."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from torch._dynamo.testing import CompileCounter

    small = small("sd15")
    grid = [float(TABLE[t]) for t in (999, 800, 600, 400, 200, 50)]
    steps = Steps("euler", tuple(grid), tuple(1.1 * sigma for sigma in grid), (6.0, 5.0, 4.0, 3.0, 2.0, 2.0))
    schedule = random_schedule(sites_of(small.unet, "all"), steps=steps)
    patched = apply_node(comfy, tmp_path / "node", schedule, small.patcher)
    node = comfy.load_node(tmp_path / "node")["RwoptSamplerSteps"]()
    model, sampler, sigmas = node.steps(patched, str(tmp_path / "node" / "schedule.json"))
    expected = small.sample(model, sampler, sigmas)
    torch._dynamo.reset()
    counter = CompileCounter()
    set_torch_compile_wrapper(model, backend=counter)
    out = small.sample(model, sampler, sigmas)
    error = float((out - expected).abs().max() / expected.abs().max())
    print(f"compiled: graphs {counter.frame_count}, relative {error:.1e}")
    torch._dynamo.reset()
    assert error < 1e-4
    assert counter.frame_count == 1


def test_sampler_steps_node(comfy: Any, small: Any, tmp_path: Path) -> None:
    small = small("sd15")
    sites = sites_of(small.unet, "transformer")
    grid = [float(TABLE[t]) for t in (999, 700, 420, 150)]
    told = [float(TABLE[t]) for t in (999, 650, 470, 180)]
    steps = Steps("dpmpp_2m", tuple(grid), tuple(told), (6.0, 5.0, 3.0, 2.0))
    schedule = Schedule.load(random_schedule(sites, steps=steps).save(tmp_path / "schedule.json"))
    patched = apply_node(comfy, tmp_path / "node", schedule, small.patcher)
    node = comfy.load_node(tmp_path / "node")["RwoptSamplerSteps"]()
    model, sampler, sigmas = node.steps(patched, str(tmp_path / "node" / "schedule.json"))
    assert sigmas.tolist() == pytest.approx([*grid, 0.0], rel=1e-5)
    scales = []
    model.set_model_sampler_post_cfg_function(lambda args: scales.append(args["cond_scale"]) or args["denoised"])
    with small.calls() as calls:
        picture = small.sample(model, sampler, sigmas, cfg=9.0)
    assert scales == [6.0, 5.0, 3.0, 2.0]
    assert [float(c["told"][0]) for c in calls] == pytest.approx([999, 650, 470, 180], abs=0.02)
    with apply(small.unet, schedule):  # weights by the solver's level, and then the U-Net is told its own
        for c, t in zip(calls, (999, 700, 420, 150), strict=True):
            assert float((small.twin(c, t) - c["out"]).abs().max()) < 1e-4
    off = torch.tensor([12.0, 3.0, 0.5, 0.0])  # on another grid: weights alone
    assert torch.equal(small.sample(model, "dpmpp_2m", off, cfg=3.0), small.sample(patched, "dpmpp_2m", off, cfg=3.0))
    assert torch.isfinite(picture).all()
    with pytest.raises(ValueError, match="has no steps"):
        node.steps(patched, json.dumps(random_schedule(sites).to_dict()))


def test_example_workflow_is_valid(comfy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import execution
    import folder_paths

    comfy.load_node(Path(comfy.FOLDER) / "comfy_extras" / "nodes_custom_sampler.py")
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda kind: ["model.safetensors"])
    for number, steps in enumerate((None, Steps("euler", (14.0, 1.0)))):
        folder = tmp_path / str(number)
        export(random_schedule(MINI, steps=steps), "comfyui", folder)
        comfy.load_node(folder)
        prompt = json.loads((folder / "example_workflow.json").read_text())
        ok, error, *_ = asyncio.run(execution.validate_prompt("1", prompt, None))
        assert ok, error
