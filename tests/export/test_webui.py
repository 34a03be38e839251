"""The extension for A1111 and Forge, on stand-ins of the interfaces that these document (`helpers.ldm`).

Neither web UI is at hand as a package, so nothing here shows that their own code calls an extension as documented.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ldm
from helpers.ldm import BY_HOOKS, FINE, MINI, WORDS, X, random_schedule, weighed_by_hooks

from rwopt.errors import UserError
from rwopt.export import export
from rwopt.schedule import Schedule
from rwopt.schedule.steps import Steps

ABAR = 1 / (1 + ldm.SIGMAS.double() ** 2)
CALLBACKS: list[Any] = []


class Control:
    """A gradio component: nothing but its arguments."""

    def __init__(self, *_: Any, **options: Any) -> None:
        self.options = options

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of a web UI, with a U-Net that is `shared.sd_model`'s."""
    model = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=ldm.UNet()), alphas_cumprod=ABAR)
    scripts = types.SimpleNamespace(Script=object, AlwaysVisible=object())
    shared = types.SimpleNamespace(sd_model=model)
    CALLBACKS.clear()
    callbacks = types.SimpleNamespace(on_cfg_denoiser=CALLBACKS.append)
    modules = types.SimpleNamespace(scripts=scripts, shared=shared, script_callbacks=callbacks)
    gradio = types.SimpleNamespace(Accordion=Control, Checkbox=Control, Textbox=Control, Slider=Control)
    monkeypatch.setitem(sys.modules, "modules", modules)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    return shared


def load(folder: Path, schedule: Schedule, **options: Any) -> Any:
    export(schedule, "webui", folder, **options)
    spec = importlib.util.spec_from_file_location("rwopt_schedule", folder / "scripts" / "rwopt_schedule.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def run(model: Any, sigma: float, denoiser: str = "CFGDenoiserKDiffusion") -> Any:
    """A call as A1111's denoiser makes it: callbacks, then the U-Net."""
    given = torch.full((2,), sigma)
    for callback in CALLBACKS:
        callback(types.SimpleNamespace(x=X, sigma=given, denoiser=type(denoiser, (), {})()))
    level = float(ldm.SIGMAS[int(sigma)]) if "Timesteps" in denoiser else sigma
    with torch.no_grad():
        return model.model.diffusion_model(X, torch.full((2,), level * 50), WORDS)


def test_a1111_arithmetic_window_and_clean_up(web: Any, tmp_path: Path) -> None:
    fine = [site for site in FINE if not site.endswith("skip")]
    for sites, mode, kind in ((MINI, "residual", "residual"), (MINI, "output", "output"), (fine, "residual", "fine")):
        schedule = random_schedule(sites, mode)
        script = load(tmp_path / kind, schedule, host="a1111").RwoptSchedule()
        assert len(script.ui(False)) == 5
        p = types.SimpleNamespace(sd_model=web.sd_model, extra_generation_params={})
        unet = web.sd_model.model.diffusion_model
        plain = {sigma: run(web.sd_model, sigma) for sigma in (20.0, 2.0, 0.9, 0.05)}
        script.process(p, True, "schedule.json", 1.0, 0.0, 1.0)
        assert "rwopt schedule" in p.extra_generation_params
        for sigma, before in plain.items():
            weighed = run(web.sd_model, sigma)
            places = {site: BY_HOOKS[kind][site] for site in sites}
            script.postprocess(p, None)
            expected = weighed_by_hooks(unet, places, schedule, sigma, lambda sigma=sigma: run(web.sd_model, sigma))
            script.process(p, True, "schedule.json", 1.0, 0.0, 1.0)
            assert torch.allclose(weighed, expected, atol=1e-5)
            assert not torch.allclose(weighed, before, atol=1e-2)
        t = 400  # DDIM and the like tell a timestep
        at = run(web.sd_model, float(ldm.SIGMAS[t]))
        assert torch.allclose(run(web.sd_model, float(t), "CFGDenoiserTimesteps"), at, atol=1e-5)
        script.process(p, True, "schedule.json", 1.0, 0.3, 0.7)
        inside, outside = float(ldm.SIGMAS[500]), float(ldm.SIGMAS[100])
        away = run(web.sd_model, outside)
        assert not torch.allclose(run(web.sd_model, inside), at, atol=1e-3)
        script.process(p, False, "schedule.json", 1.0, 0.0, 1.0)
        assert torch.equal(run(web.sd_model, outside), away)
        assert all(torch.equal(run(web.sd_model, sigma), before) for sigma, before in plain.items())
        assert not any(module._forward_hooks for module in unet.modules())
        CALLBACKS.clear()


def test_a1111_another_model_in_between(web: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load(tmp_path / "x", random_schedule(MINI), host="a1111").RwoptSchedule()
    first, other = web.sd_model, ldm.UNet()
    p = types.SimpleNamespace(sd_model=first, extra_generation_params={})
    script.process(p, True, "schedule.json", 1.0, 0.0, 1.0)
    weighed = run(first, 2.0)
    web.sd_model = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=other), alphas_cumprod=ABAR)
    assert torch.equal(run(web.sd_model, 2.0), weighed)  # hires. fix with another checkpoint of the same kind
    assert not any(module._forward_hooks for module in first.model.diffusion_model.modules())
    small = ldm.UNet()
    small.input_blocks = small.input_blocks[:2]  # one level less: no such sites
    web.sd_model = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=small), alphas_cumprod=ABAR)
    for callback in CALLBACKS * 3:
        callback(types.SimpleNamespace(x=X, sigma=torch.ones(2), denoiser=None))
    assert capsys.readouterr().out.count("runs without one") == 1
    p = types.SimpleNamespace(sd_model=web.sd_model, extra_generation_params={})
    with pytest.raises(ValueError, match="no site"):
        script.process(p, True, "schedule.json", 1.0, 0.0, 1.0)
    assert not p.extra_generation_params
    script.postprocess(p, None)


def forge_pass(script: Any, p: Any, *settings: Any) -> Any:
    """Before each sampling Forge starts from the model's own patcher, and asks scripts."""
    p.sd_model.forge_objects.unet = p.sd_model.plain
    script.process_before_every_sampling(p, *settings, x=X, noise=X, c=None, uc=None)
    return p.sd_model.forge_objects.unet


@pytest.mark.parametrize("kind", ["residual", "output", "fine"])
def test_forge_arithmetic_and_passes(web: Any, tmp_path: Path, kind: str) -> None:
    sites = MINI if kind != "fine" else [s for s in FINE if s.endswith(("self", "cross", "skip"))]
    schedule = random_schedule(sites, "output" if kind == "output" else "residual")
    script = load(tmp_path / "x", schedule, host="forge").RwoptSchedule()
    plain = ldm.Patcher(web.sd_model.model.diffusion_model)
    model = types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=plain), plain=plain)
    p = types.SimpleNamespace(sd_model=model, extra_generation_params={})
    script.process(p, True, "schedule.json", 1.0, 0.0, 1.0)
    places = {site: BY_HOOKS[kind][site] for site in sites}
    with torch.no_grad():
        for sigma in (20.0, 2.0, 0.05):
            expected = weighed_by_hooks(plain.model.diffusion_model, places, schedule, sigma,
                                        lambda sigma=sigma: plain.call(X, sigma, WORDS, [1, 0]))  # fmt: skip
            for _ in ("first pass", "hires. fix"):
                unet = forge_pass(script, p, True, "schedule.json", 1.0, 0.0, 1.0)
                assert torch.allclose(unet.call(X, sigma, WORDS, [1, 0]), expected, atol=1e-5)
            assert torch.equal(unet.clone().call(X, sigma, WORDS, [1, 0]), unet.call(X, sigma, WORDS, [1, 0]))
            off = forge_pass(script, p, True, "schedule.json", 0.0, 0.0, 1.0)
            assert torch.equal(off.call(X, sigma, WORDS, [1, 0]), plain.call(X, sigma, WORDS, [1, 0]))
    assert forge_pass(script, p, False, "schedule.json", 1.0, 0.0, 1.0) is plain


def test_forge_weighs_the_rows_of_a_branch(web: Any, tmp_path: Path) -> None:
    script = load(tmp_path / "x", random_schedule(MINI, cfg_branch="uncond"), host="forge").RwoptSchedule()
    plain = ldm.Patcher(web.sd_model.model.diffusion_model)
    model = types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=plain), plain=plain)
    unet = forge_pass(script, types.SimpleNamespace(sd_model=model), True, "schedule.json", 1.0, 0.0, 1.0)
    with torch.no_grad():
        weighed, before = unet.call(X, 2.0, WORDS, [1, 0]), plain.call(X, 2.0, WORDS, [1, 0])
    assert torch.equal(weighed[1], before[1])
    assert not torch.allclose(weighed[0], before[0], atol=1e-3)


def test_refused(tmp_path: Path) -> None:
    one = [14.0, 0.1]
    for schedule, options, text in [
        (Schedule.constant(["up_blocks.0.resnets.0.skip"], one), {}, "cannot be weighed in A1111"),
        (Schedule.constant(["mid_block.attentions.0.ff"], one), {}, "cannot be weighed in Forge"),
        (Schedule.constant(MINI, one, cfg_branch="cond"), {}, "A1111 weighs all rows alike"),
        (Schedule.constant(MINI, one, steps=Steps("euler", (14.0, 1.0))), {}, "give steps=false"),
        (Schedule.constant(MINI, one), {"host": "vlad"}, "host=vlad"),
    ]:
        with pytest.raises(UserError, match=text):
            export(schedule, "webui", tmp_path / "x", **options)
    export(Schedule.constant(["up_blocks.0.resnets.0.skip"], one), "webui", tmp_path / "forge", host="forge")
    export(Schedule.constant(["mid_block.attentions.0.ff"], one), "webui", tmp_path / "a1111", host="a1111")
    files = export(Schedule.constant(MINI, one), "webui", tmp_path / "both")
    assert {path.name for path in files} == {"rwopt_schedule.py", "rwopt_reader.py", "rwopt_weigh.py", "README.md",
                                             "schedule.json"}  # fmt: skip
    for path in files:
        assert "rwopt" in path.read_text()
        if path.suffix == ".py":
            compile(path.read_text(), str(path), "exec")
